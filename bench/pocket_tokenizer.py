"""The pocket models' tokenizer and chat template: one byte is one token, plus seven named ones.

Byte b has id b, so training encodes without the tokenizer library. `render` is the chat template in Python; a test
holds the jinja file to it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

SPECIAL_TOKENS = ("<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|pad|>", "<think>", "</think>")
TOKEN_IDS: dict[str, int] = {token: 256 + index for index, token in enumerate(SPECIAL_TOKENS)}
END, PAD, THINK, END_THINK = (TOKEN_IDS[token] for token in ("<|end|>", "<|pad|>", "<think>", "</think>"))
VOCAB_SIZE = 272  # 263 used, rounded up to a multiple of 16

# Reasoning parsers look for these two in decoded text, so decoding must not skip them.
_VISIBLE = ("<think>", "</think>")
_SPLIT = re.compile("(" + "|".join(re.escape(token) for token in SPECIAL_TOKENS) + ")")

CHAT_TEMPLATE = """\
{#- Switch, strongest first: enable_thinking, a "detailed thinking on/off" line in a system message, else on. -#}
{%- macro text_of(content) -%}
{%- if content is string -%}{{ content }}
{%- elif content -%}{%- for part in content if part.type == 'text' -%}{{ part.text }}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- set state = namespace(thinking=true) -%}
{%- for message in messages -%}
{%- set text = text_of(message.content) -%}
{%- if message.role == 'system' -%}
{%- set kept = namespace(lines=[]) -%}
{%- for line in text.split('\\n') -%}
{%- set switch = line.strip().lower() -%}
{%- if switch in ('detailed thinking on', 'detailed thinking off') -%}
{%- set state.thinking = switch == 'detailed thinking on' -%}
{%- else -%}
{%- set kept.lines = kept.lines + [line] -%}
{%- endif -%}
{%- endfor -%}
{%- set text = kept.lines | join('\\n') -%}
{%- if text.strip() -%}<|system|>{{ text.strip() }}<|end|>{%- endif -%}
{%- elif message.role == 'user' -%}<|user|>{{ text.strip() }}<|end|>
{%- elif message.role == 'assistant' -%}
<|assistant|><think></think>{{ text.split('</think>')[-1].strip() }}<|end|>
{%- else -%}
{{ raise_exception("role '" ~ message.role ~ "' is not supported, allowed: system, user, assistant") }}
{%- endif -%}
{%- endfor -%}
{%- if enable_thinking is defined and enable_thinking is not none -%}
{%- set state.thinking = enable_thinking -%}
{%- endif -%}
{%- if add_generation_prompt -%}<|assistant|><think>{%- if not state.thinking -%}</think>{%- endif -%}{%- endif -%}
"""


def render(turns: list[tuple[str, str]], thinking: bool) -> str:
    """The prompt for plain (role, text) turns, generation prompt included, as the chat template renders it."""
    text = "".join(
        f"<|{role}|>{'<think></think>' if role == 'assistant' else ''}{content}<|end|>" for role, content in turns
    )
    return text + "<|assistant|><think>" + ("" if thinking else "</think>")


def encode(text: str) -> list[int]:
    """Token ids of a text; the seven names count as tokens."""
    ids: list[int] = []
    for piece in _SPLIT.split(text):
        ids += [TOKEN_IDS[piece]] if piece in TOKEN_IDS else piece.encode()
    return ids


def decode(ids: list[int]) -> str:
    """The text of token ids, with the named tokens spelled out. Ids beyond the named ones are left out."""
    pieces = [bytes([i]) if i < 256 else SPECIAL_TOKENS[i - 256].encode() for i in ids if i < 256 + len(SPECIAL_TOKENS)]
    return b"".join(pieces).decode(errors="replace")


def write_tokenizer(folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja into `folder`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    vocab = {_byte_symbol(byte): byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(
        [AddedToken(token, special=token not in _VISIBLE, normalized=False) for token in SPECIAL_TOKENS]
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True) + "\n")
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|end|>",
        "pad_token": "<|pad|>",
        "model_max_length": 1024,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def _byte_symbol(byte: int) -> str:
    """The printable character that ByteLevel writes for a byte (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    if byte in printable:
        return chr(byte)
    return chr(256 + [b for b in range(256) if b not in printable].index(byte))
