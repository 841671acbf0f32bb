"""Configurations of the families and spellings beside DeciLM's, at toy size."""

from __future__ import annotations

from typing import Any

from checkpoints import BASE

OVERRIDES: dict[str, dict[str, Any]] = {
    "0": {"skip": ["attention"]},
    "1": {"num_key_value_heads": 1},
    "2": {"skip": ["mlp"]},
    "3": {"sliding_window": 16, "intermediate_size": 40},
}


def config(model_type: str, architecture: str, **changes: Any) -> dict[str, Any]:
    sizes = {"num_key_value_heads": 2, "intermediate_size": 96, "num_hidden_layers": 5, "sliding_window": None}
    return BASE | sizes | {"model_type": model_type, "architectures": [architecture]} | changes


def v1_block(attention: dict[str, Any], ffn: dict[str, Any]) -> dict[str, Any]:
    """One entry of puzzletron v1's `block_configs` (ModelOpt block_config.py), all its keys written."""
    empty_attention = {"num_key_value_heads": None, "llama4": None, "mamba": None}
    common = {"no_op": False, "replace_with_linear": False, "sparsify": None, "weights_precision": "bf16"}
    empty_ffn = {"moe": None, "intermediate_size": None, "gated": True, "hidden_act": None}
    return {"attention": common | empty_attention | attention, "ffn": common | empty_ffn | ffn, "parallel_blocks": None}


V1_BLOCKS = [
    v1_block({"no_op": True}, {"intermediate_size": 48}),
    v1_block({"num_key_value_heads": 1}, {"intermediate_size": 96}),
    v1_block({"replace_with_linear": True}, {}),
    v1_block({}, {"no_op": True}),
    v1_block({"num_key_value_heads": 4}, {"replace_with_linear": True}),
]

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
HETEROGENEOUS_MOE = config("qwen3_moe", "Qwen3MoeForCausalLM", per_layer_config=OVERRIDES, **MOE)

# Mistral's global window is on every layer that does not say otherwise, as in its own class.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": config("llama", "LlamaForCausalLM", per_layer_config=OVERRIDES),
    "mistral": config("mistral", "MistralForCausalLM", per_layer_config=OVERRIDES, sliding_window=24),
    "qwen2": config("qwen2", "Qwen2ForCausalLM", per_layer_config=OVERRIDES, use_sliding_window=False),
    "qwen3": config("qwen3", "Qwen3ForCausalLM", per_layer_config=OVERRIDES),
    "anymodel": config("qwen3", "AnyModel", per_layer_config=OVERRIDES, base_architecture="Qwen3ForCausalLM"),
    "puzzletron v1": config("llama", "LlamaForCausalLM", block_configs=V1_BLOCKS),
}
