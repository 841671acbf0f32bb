"""The two pocket models' shapes, and their folders in the formats that the serving side reads.

The parent is published as a plain Llama, the puzzle in DeciLM's format (`nemotron-nas`, one `block_configs` entry per
layer). Weights are rounded to bfloat16. Files appear in one piece: written beside, then renamed.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from vllm_puzzle.bench.pocket_decode import PocketModel
from vllm_puzzle.bench.pocket_tokenizer import END, PAD, VOCAB_SIZE, write_tokenizer
from vllm_puzzle.model_configs.schema import Attention, GatedFFN, LayerRecord, LinearMap, ModelRecord, Rope

HIDDEN, HEADS, HEAD_DIM, FFN = 128, 4, 32, 384


def _attention(num_kv_heads: int, window: int | None = None) -> Attention:
    return Attention(HEADS, num_kv_heads, HEAD_DIM, window)


def _record(model_type: str, architecture: str, layers: tuple[LayerRecord, ...]) -> ModelRecord:
    return ModelRecord(
        model_type=model_type,
        architecture=architecture,
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN,
        layers=layers,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        rope=Rope(),
        tie_word_embeddings=True,
    )


PARENT = _record("llama", "LlamaForCausalLM", (LayerRecord(_attention(4), GatedFFN(FFN)),) * 8)
PUZZLE = _record(
    "nemotron-nas",
    "DeciLMForCausalLM",
    (
        LayerRecord(_attention(4), GatedFFN(384)),
        LayerRecord(_attention(2), GatedFFN(384)),
        LayerRecord(_attention(4, window=32), GatedFFN(256)),
        LayerRecord(LinearMap(), GatedFFN(256)),
        LayerRecord(_attention(2), None),
        LayerRecord(None, GatedFFN(384)),
        LayerRecord(None, GatedFFN(256)),
        LayerRecord(None, GatedFFN(128)),
    ),
)


def config_of(record: ModelRecord) -> dict[str, Any]:
    """config.json of a pocket model."""
    is_puzzle = record.model_type == "nemotron-nas"
    shapes: dict[str, Any] = {"num_key_value_heads": HEADS, "intermediate_size": FFN}
    if is_puzzle:
        blocks = [_block_config(layer) for layer in record.layers]
        shapes = {"num_key_value_heads": None, "intermediate_size": None, "block_configs": blocks}
    return {
        "architectures": [record.architecture],
        "model_type": record.model_type,
        "vocab_size": record.vocab_size,
        "hidden_size": record.hidden_size,
        "num_hidden_layers": len(record.layers),
        "num_attention_heads": HEADS,
        "head_dim": HEAD_DIM,
        **shapes,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": record.rms_norm_eps,
        "rope_theta": record.rope.rope_theta,
        "rope_scaling": None,
        "max_position_embeddings": record.max_position_embeddings,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": END,
        "pad_token_id": PAD,
        "torch_dtype": record.dtype,
        "use_cache": True,
    }


def _block_config(layer: LayerRecord) -> dict[str, Any]:
    attention, ffn = layer.attention, layer.ffn
    live = attention if isinstance(attention, Attention) else None
    return {
        "attention": {
            "n_heads_in_group": live.num_heads // live.num_kv_heads if live else None,
            "no_op": attention is None,
            "replace_with_linear": isinstance(attention, LinearMap),
            "window_length": live.sliding_window if live else None,
            "num_sink_tokens": None,
            "sparsify": None,
            "unshifted_sink": False,
            "use_prefill_window_in_sink_attention": False,
        },
        "ffn": {
            "intermediate_size": ffn.intermediate_size if isinstance(ffn, GatedFFN) else None,
            "no_op": ffn is None,
            "replace_with_linear": False,
            "sparsify": None,
        },
    }


def export(model: PocketModel, folder: Path) -> None:
    """Write a model folder: configuration, bf16 weights, tokenizer and chat template. README.md is left alone."""
    write_tokenizer(folder)
    _write_json(folder / "config.json", config_of(model.record))
    # vLLM ignores do_sample and would sample at temperature 1; both spellings say greedy.
    greedy = {"do_sample": False, "temperature": 0.0, "eos_token_id": END, "pad_token_id": PAD}
    _write_json(folder / "generation_config.json", greedy)
    tensors = {name: tensor.detach().to(torch.bfloat16) for name, tensor in model.named_tensors().items()}
    _write(folder / "model.safetensors", save(tensors, metadata={"format": "pt"}))


def load(folder: Path) -> PocketModel:
    """An exported pocket model, its bf16 weights held as float32."""
    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    model = PocketModel(PARENT if model_type == "llama" else PUZZLE)
    model.load_tensors({name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()})
    return model


def _write_json(path: Path, content: dict[str, Any]) -> None:
    _write(path, (json.dumps(content, indent=2) + "\n").encode())


def _write(path: Path, content: bytes) -> None:
    path.with_suffix(".new").write_bytes(content)
    os.replace(path.with_suffix(".new"), path)
