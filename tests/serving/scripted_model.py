"""A model that says what its config.json scripts: exact token sequences from the real engine, without weights.

The next token depends on the current one (after a forced `</think>` comes what the script says after `</think>`) and on
the band of positions that it stands in: band b holds positions BAND·b to BAND·(b+1), the last one has no end, and each
has a script of its own. The prompt's length so chooses the script. Registered by `register`, in test processes only.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

BAND = 64
NAMES = ("<|end|>", "<|user|>", "<|assistant|>", "<|pad|>", "<think>", "</think>", "<tool_call>", "</tool_call>")
END, USER, ASSISTANT, PAD, THINK, SHUT, CALL, CALL_END = range(256, 264)
# Parsers look for these in decoded text, so decoding must not skip them.
VISIBLE = NAMES[4:]
VOCAB_SIZE = 272
# How far the scripted token's logit lies above all others: at temperature 1 it comes in 92 of 100 draws.
STRENGTH = 8.0

# Each a list of texts whose tokens follow each other; "?" stands for a prompt after which the model opens the thought.
SCRIPTS: dict[str, tuple[str, ...]] = {
    "plain": ("?<think>abcdefg</think>XYZ<|end|>",),
    "two blocks": ("?<think>abcde</think>X<think>",),  # without end: a b c d e, X, a b c d e, X, ...
    "tool": ("?<think>abc<tool_call>defghi</tool_call>XYZ<|end|>", "</think>XYZ"),
    "loop": ("?<think>abcdefgf", "</think>XYZ<|end|>"),  # f g f g f g ...
    "lines": ("?<think>abcd\nefghij</think>XYZ<|end|>",),
    "multi": ("?([abcdefg])~XYZ<|end|>",),
    "endless": ("?<think>abcdefghijklmnopqrstuvwxyza", "</think>XYZ<|end|>"),
}
BANDS = {name: index for index, name in enumerate(SCRIPTS)}

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
<|assistant|><think></think>{{ message.content }}<|end|>
{%- else -%}<|user|>{{ message.content }}<|end|>{%- endif -%}
{%- endfor -%}
{%- set text = messages[-1].content -%}
{%- if add_generation_prompt -%}<|assistant|>
{%- if not text.endswith('?') -%}<think>
{%- if text.endswith('!') or (enable_thinking is defined and not enable_thinking) -%}</think>{%- endif -%}
{%- endif -%}{%- endif -%}
"""


def encode(text: str) -> list[int]:
    """Token ids: one for each of NAMES, one for each other byte."""
    ids: list[int] = []
    while text:
        name = next((name for name in NAMES if text.startswith(name)), None)
        ids.append(ord(text[0]) if name is None else 256 + NAMES.index(name))
        text = text[len(name or " ") :]
    return ids


def decode(ids: Sequence[int]) -> str:
    """The text of token ids, with the names spelled out and a dot for those that nothing is named after."""
    return "".join(chr(token) if token < 256 else NAMES[token - 256] if token < 264 else "·" for token in ids)


def follow_ups(script: tuple[str, ...]) -> dict[int, int]:
    """Token → the one after it; a token with two successors is a mistake."""
    table: dict[int, int] = {ASSISTANT: THINK}
    for ids in map(encode, script):
        for token, after in pairwise(ids):
            assert table.setdefault(token, after) == after, f"{script}: {decode([token])!r} has two successors"
    return table


def prompt(script: str, tail: str, hint: str = "") -> list[int]:
    """A prompt that ends with `tail` inside the script's band; `hint` is text before it, for n-gram drafts to copy."""
    return [ord(".")] * (BAND * BANDS[script]) + encode(hint + tail)


def write_model(folder: Path) -> Path:
    """Write config.json, tokenizer and chat template; the weights are vLLM's dummy ones (there are none)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from vllm_puzzle.bench.pocket_tokenizer import _byte_symbol

    tokenizer = Tokenizer(models.BPE(vocab={_byte_symbol(byte): byte for byte in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(name, special=name not in VISIBLE, normalized=False) for name in NAMES])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer.to_str())
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": NAMES[0], "pad_token": NAMES[3]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    config = {
        "architectures": ["ScriptedForCausalLM"], "model_type": "llama", "vocab_size": VOCAB_SIZE, "hidden_size": 32,
        "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 32, "num_hidden_layers": 1,
        "intermediate_size": 32, "max_position_embeddings": 8192, "torch_dtype": "float32", "eos_token_id": END,
        "bos_token_id": None, "follow_ups": [sorted(follow_ups(script).items()) for script in SCRIPTS.values()],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def register() -> None:
    """Tell vLLM the class itself: a name would be inspected in a process of its own."""
    import torch
    from vllm import ModelRegistry
    from vllm.model_executor.layers.attention import Attention

    class ScriptedForCausalLM(torch.nn.Module):
        def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
            super().__init__()
            config = vllm_config.model_config.hf_config
            self.vocab_size = config.vocab_size
            self.hidden_size = config.hidden_size
            tables = torch.full((len(config.follow_ups), self.vocab_size), config.eos_token_id)
            for band, pairs in enumerate(config.follow_ups):
                for token, after in pairs:
                    tables[band, token] = after
            self.tables = tables
            # Nothing attends; the layer gives requests a KV cache to be scheduled by.
            self.attention = Attention(
                1, 32, 1.0, num_kv_heads=1, cache_config=vllm_config.cache_config, prefix=f"{prefix}layers.0.attention"
            )

        def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.pad(input_ids[:, None].float(), (0, self.hidden_size - 1))

        def forward(
            self,
            input_ids: torch.Tensor,
            positions: torch.Tensor,
            intermediate_tensors: Any = None,
            inputs_embeds: torch.Tensor | None = None,
        ) -> torch.Tensor:
            hidden = self.embed_input_ids(input_ids)
            hidden[:, 1] = positions
            return hidden

        def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
            token, position = hidden_states[:, 0].long(), hidden_states[:, 1].long()
            after = self.tables[(position // BAND).clamp(max=len(self.tables) - 1), token]
            logits = torch.zeros(len(token), self.vocab_size)
            return logits.scatter_(1, after[:, None], STRENGTH)

        def load_weights(self, weights: Any) -> set[str]:
            return set()

    ModelRegistry.register_model("ScriptedForCausalLM", ScriptedForCausalLM)
