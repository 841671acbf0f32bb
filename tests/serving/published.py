"""The published layer lists at toy width: every layer keeps its kind, its key set and its ratios.

Read from model_configs/published (gpt-oss-puzzle's is a third party's reconstruction) and shrunk: hidden size,
heads and vocabulary small, FFN widths scaled before the format's own rounding to 256, so that the smallest ones
coincide. A `head_dim` of 32 is added, the smallest that vLLM's CPU attention has; the published files leave it to
hidden / heads. Every other key stays as published, `auto_map` and `torch_dtype` included.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from checkpoints import BASE

CONFIGS = Path(__file__).resolve().parents[2] / "model_configs" / "published"
HIDDEN, HEAD_DIM, VOCABULARY = 16, 32, 97
# The published hidden size × this gives the widest common FFN (28672 of 49B, 53248 of 253B) about 1024 columns.
FFN_SCALE = {"llama-3.3-nemotron-super-49b-v1": 1024 / 28672, "llama-3.1-nemotron-ultra-253b-v1": 768 / 53248}
# Windows 128 and 8192 of gpt-oss-puzzle: both must be shorter than a test's prompt.
WINDOWS = {128: 16, 8192: 48, None: None}
# What the reconstruction lacks (models at hand do not tell): shape and names as in gpt-oss-120b, the factor invented.
YARN = {
    "rope_type": "yarn", "factor": 8.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 64,
}  # fmt: skip
MXFP4 = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head",
    ],
}  # fmt: skip


def _published(name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((CONFIGS / f"{name}.json").read_text())
    return config


def toy_nemotron(name: str) -> dict[str, Any]:
    """Super 49B or Ultra 253B: as many query heads per KV head as published, and one KV head."""
    config = _published(name)
    groups = {block["attention"]["n_heads_in_group"] for block in config["block_configs"]} - {None}
    assert len(groups) == 1, "both models have one group size"
    # width = int(2 · mult · hidden / 3) before rounding; the hidden size shrinks, so the multiplier grows.
    scale = FFN_SCALE[name] * config["hidden_size"] / HIDDEN
    for block in config["block_configs"]:
        if block["ffn"]["ffn_mult"] is not None:
            block["ffn"]["ffn_mult"] *= scale
    sizes = {"hidden_size": HIDDEN, "num_attention_heads": groups.pop(), "head_dim": HEAD_DIM}
    rope = config["rope_scaling"] | {"original_max_position_embeddings": 64}  # so that its three bands show
    return config | sizes | {"vocab_size": VOCABULARY, "max_position_embeddings": 512, "rope_scaling": rope}


def toy_gpt_oss_puzzle(is_mxfp4: bool) -> dict[str, Any]:
    """gpt-oss-puzzle-88B: 16 and 8 experts for its 128 and 64, windows 16 and 48 for its 128 and 8192."""
    config = _published("gpt-oss-puzzle-88b")
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    for block in config["block_configs"]:
        block["num_local_experts"] //= 8
        block["sliding_window"] = WINDOWS[block["sliding_window"]]
    # MXFP4 packs 32 values, and vLLM's CPU experts come in steps of 32 per rank.
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 8, "num_key_value_heads": 1}
    sizes |= {"head_dim": HEAD_DIM, "vocab_size": VOCABULARY, "max_position_embeddings": 512}
    added: dict[str, Any] = {"rope_scaling": YARN, "rope_theta": 150000, "torch_dtype": "bfloat16"}
    return config | sizes | added | ({"quantization_config": MXFP4} if is_mxfp4 else {})


# TensorRT-LLM's 14-layer test model of this format (test_modeling_nemotron_nas.py): query heads per KV head and FFN
# multiplier per layer; "linear" for the linear map, None for the no-op.
MINI_LAYERS: tuple[tuple[int | str | None, float | str | None], ...] = (
    (8, 2.0), (16, 2.0), ("linear", 2.0), (None, 2.0), (8, "linear"), (4, None), (8, 2.0),
    (8, 2.0), (16, 2.0), ("linear", 2.0), (None, 2.0), (8, "linear"), (4, None), (8, 2.0),
)  # fmt: skip


def toy_mini() -> dict[str, Any]:
    """That model's list in the key set it uses, which leaves out windows, sinks and `sparsify`; its own `model_type`
    is the older `deci`, which we do not read.
    """
    blocks = [
        {
            "attention": {
                "n_heads_in_group": group if isinstance(group, int) else None,
                "no_op": group is None,
                "replace_with_linear": group == "linear",
            },
            "ffn": {
                "ffn_mult": mult if isinstance(mult, float) else None,
                "no_op": mult is None,
                "replace_with_linear": mult == "linear",
            },
        }
        for group, mult in MINI_LAYERS
    ]
    sizes = {"hidden_size": 64, "num_attention_heads": 32, "num_key_value_heads": None, "intermediate_size": None}
    names = {"architectures": ["DeciLMForCausalLM"], "model_type": "nemotron-nas", "attention_bias": False}
    return BASE | names | sizes | {"rms_norm_eps": 1e-6, "num_hidden_layers": len(blocks), "block_configs": blocks}


PUBLISHED: dict[str, dict[str, Any]] = {
    "nemotron super 49b": toy_nemotron("llama-3.3-nemotron-super-49b-v1"),
    "nemotron ultra 253b": toy_nemotron("llama-3.1-nemotron-ultra-253b-v1"),
    "nemotron-nas mini": toy_mini(),
    "gpt-oss-puzzle 88b": toy_gpt_oss_puzzle(is_mxfp4=False),
    "gpt-oss-puzzle 88b mxfp4": toy_gpt_oss_puzzle(is_mxfp4=True),
}
