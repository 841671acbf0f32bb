"""A gpt-oss that says what its config.json scripts, in Harmony's own vocabulary: exact replies, without weights.

What a user asks names the script. It is a list of messages; the model goes on with the first one, from as many on as
it has ended, that begins with what it has begun: so it answers after a thought that was cut. LEVEL_SLOT in a script is
said as the level that the prompt asks for. Registered by `register`, in test processes only.

The vocabulary is that of `openai_harmony`, which vLLM renders prompts and reads replies with. The tokenizer beside it
has the same ids, and no merges: a word that is no token is spelled by its bytes, and nothing here has one.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

ARCHITECTURE = "ScriptedHarmonyForCausalLM"
NUM_WORDS, VOCAB_SIZE = 199998, 201088
SPECIAL = ("<|startoftext|>", "<|endoftext|>", "<|reserved_200000|>", "<|reserved_200001|>", "<|return|>",
           "<|constrain|>", "<|reserved_200004|>", "<|channel|>", "<|start|>", "<|end|>", "<|message|>",
           "<|reserved_200009|>", "<|reserved_200010|>", "<|reserved_200011|>", "<|call|>")  # fmt: skip
LEVEL_SLOT = SPECIAL[11]
STRENGTH = 30.0

BEGIN = "<|start|>assistant"
THINK, ANSWER = "<|channel|>analysis<|message|>", "<|channel|>final<|message|>"
WORDS = tuple(f" {letter}" for letter in "abcdefghijklmnopqrstuvwxyz")  # each is one token
THOUGHT = "".join(WORDS[:7])
REPLY = f"{BEGIN}{ANSWER}X Y Z{LEVEL_SLOT}<|return|>"
SCRIPTS: dict[str, tuple[str, ...]] = {
    "plain": (f"{THINK}{THOUGHT}<|end|>", REPLY),
    "endless": (f"{THINK}{''.join(WORDS) * 100}<|end|>", REPLY),
    "twice": (f"{THINK}{THOUGHT}<|end|>", f"{BEGIN}{THINK}{THOUGHT}<|end|>", REPLY),
    "at once": (REPLY.removeprefix(BEGIN),),
    "number": (
        f"{THINK}{''.join(WORDS) * 100}<|end|>",
        f"{BEGIN}<|channel|>final <|constrain|>json<|message|>42<|return|>",
    ),
    "call": (
        f"{THINK}{THOUGHT}<|end|>",
        f'{BEGIN}<|channel|>commentary to=functions.add <|constrain|>json<|message|>{{"a": 1}}<|call|>',
        f'{BEGIN}<|channel|>final to=functions.add json<|message|>{{"a": 1}}<|call|>',
    ),
    "preamble": (f"{THINK}{THOUGHT}<|end|>", f"{BEGIN}<|channel|>commentary<|message|>X Y<|end|>", REPLY),
}


def register() -> None:
    """Tell vLLM the class itself: a name would be inspected in a process of its own. It gets gpt-oss's defaults."""
    import torch
    from vllm import ModelRegistry
    from vllm.model_executor.layers.attention import Attention
    from vllm_puzzle.serving import vllm_compat

    class ScriptedHarmonyForCausalLM(torch.nn.Module):
        def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
            super().__init__()
            config = vllm_config.model_config.hf_config
            self.vocab_size, self.hidden_size = config.vocab_size, config.hidden_size
            self.scripts = {tuple(asked): messages for asked, messages in config.scripts}
            # One request at a time, without a prefix cache: what stands at each position of it.
            self.tokens = torch.zeros(vllm_config.model_config.max_model_len + 1, dtype=torch.long)
            # Nothing attends; the layer gives requests a KV cache to be scheduled by.
            self.attention = Attention(
                1, 32, 1.0, num_kv_heads=1, cache_config=vllm_config.cache_config, prefix=f"{prefix}layers.0.attention"
            )

        def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
            return torch.zeros(len(input_ids), self.hidden_size)

        def forward(
            self,
            input_ids: torch.Tensor,
            positions: torch.Tensor,
            intermediate_tensors: Any = None,
            inputs_embeds: torch.Tensor | None = None,
        ) -> torch.Tensor:
            self.tokens[positions] = input_ids.long()
            hidden = self.embed_input_ids(input_ids)
            hidden[:, 0] = positions
            return hidden

        def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
            logits = torch.zeros(len(hidden_states), self.vocab_size)
            for row, position in enumerate(hidden_states[:, 0].long().tolist()):
                logits[row, next_token(self.scripts, self.tokens[: position + 1].tolist())] = STRENGTH
            return logits

        def load_weights(self, weights: Any) -> set[str]:
            return set()

    ModelRegistry.register_model(ARCHITECTURE, ScriptedHarmonyForCausalLM)
    vllm_compat.use_gpt_oss_defaults(ARCHITECTURE)


def next_token(scripts: dict[tuple[int, ...], list[list[int]]], tokens: list[int]) -> int:
    """What the model says after a prompt and the part of the reply that it has said."""
    end, done = encode("<|end|>")[0], encode("<|return|>")[0]
    asked_at = _last(tokens, encode("<|start|>user<|message|>"))
    if asked_at < 0:
        return done  # a warm-up, of no prompt
    asked_until = tokens.index(end, asked_at)
    said = tokens[asked_until + 1 + len(encode(BEGIN)) :]
    ends = [at for at, token in enumerate(said) if token == end]
    begun = said[ends[-1] + 1 :] if ends else said
    level = tokens[_last(tokens, encode("Reasoning:"))]
    for message in scripts[tuple(tokens[asked_at:asked_until])][len(ends) :]:
        wanted = [level if token == encode(LEVEL_SLOT)[0] else token for token in message]
        if len(wanted) > len(begun) and wanted[: len(begun)] == begun:
            return wanted[len(begun)]
    return done


def _last(tokens: list[int], part: list[int]) -> int:
    """Where the last occurrence of `part` ends; -1 if there is none."""
    size = len(part)
    return next((at for at in range(len(tokens), size - 1, -1) if tokens[at - size : at] == part), -1)


@cache
def _encoding() -> Any:
    from openai_harmony import HarmonyEncodingName, load_harmony_encoding

    return load_harmony_encoding(HarmonyEncodingName.HARMONY_GPT_OSS)


@cache
def _encoded(text: str) -> tuple[int, ...]:
    return tuple(_encoding().encode(text, allowed_special="all"))


def encode(text: str) -> list[int]:
    """Token ids in Harmony's vocabulary."""
    return list(_encoded(text))


def words() -> list[bytes]:
    """Every token of the vocabulary but the special ones, by id."""
    decode = _encoding().decode
    return [decode([token], errors="surrogateescape").encode("utf-8", "surrogateescape") for token in range(NUM_WORDS)]


def write_model(folder: Path) -> Path:
    """Write config.json and tokenizer; the weights are vLLM's dummy ones (there are none)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from vllm_puzzle.bench.pocket_tokenizer import _byte_symbol

    symbols = {byte: _byte_symbol(byte) for byte in range(256)}
    vocabulary = {word.decode("latin-1").translate(symbols): token for token, word in enumerate(words())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|return|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    ends = [encode(name)[0] for name in ("<|return|>", "<|endoftext|>", "<|call|>")]  # as published
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    config = {
        "architectures": [ARCHITECTURE], "model_type": "gpt_oss", "vocab_size": VOCAB_SIZE, "hidden_size": 32,
        "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 32, "num_hidden_layers": 2,
        "intermediate_size": 32, "num_local_experts": 2, "num_experts_per_tok": 1, "max_position_embeddings": 8192,
        "torch_dtype": "float32", "eos_token_id": ends[0], "pad_token_id": ends[1],
        "scripts": [(encode(asked), list(map(encode, messages))) for asked, messages in SCRIPTS.items()],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder
