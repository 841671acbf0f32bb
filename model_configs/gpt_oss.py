"""gpt-oss and gpt-oss-puzzle: the flat `block_configs`, and the tensors of a checkpoint.

gpt-oss-puzzle-88B differs from its parent in two per-layer numbers, `num_local_experts` and `sliding_window`, which
its `block_configs` list (NVIDIA's published shape; no `block_type` key). Everything else is read as for any family
(`per_layer.py`). Standard library only.
"""

from __future__ import annotations

from typing import Any

from vllm_puzzle.model_configs.json_values import Json, known_keys, optional_integer
from vllm_puzzle.model_configs.per_layer import GPT_OSS, blocks_of
from vllm_puzzle.model_configs.schema import MAX_EXPERTS, Attention, ConfigError, LayerRecord, ModelRecord, MoE, Shape

BLOCK_KEYS = ("num_local_experts", "sliding_window")
MXFP4_BLOCK = 32  # values that share one scale, two to a byte


def has_flat_blocks(config: Json) -> bool:
    """Whether `block_configs` is gpt-oss-puzzle's (puzzletron v1 and v2 entries hold objects)."""
    blocks = config.get("block_configs")
    if config["model_type"] not in GPT_OSS or not isinstance(blocks, list | tuple):
        return config["model_type"] in GPT_OSS
    return not any(isinstance(block, dict) and block.keys() & {"attention", "ffn"} for block in blocks)


def read_overrides(config: Json) -> dict[int, dict[str, Any]]:
    """Per layer the expert count and the window, null for full attention."""
    return {index: _block(block, f"layer {index}") for index, block in enumerate(blocks_of(config))}


def _block(block: Any, where: str) -> dict[str, Any]:
    if not isinstance(block, dict):
        raise ConfigError(f"{where}: found {block!r}, allowed: an object with {', '.join(BLOCK_KEYS)}")
    known_keys(where, block, BLOCK_KEYS)
    overrides: dict[str, Any] = {"sliding_window": optional_integer(where, block, "sliding_window")}
    if block.get("num_local_experts") is not None:
        overrides["num_local_experts"] = optional_integer(where, block, "num_local_experts", MAX_EXPERTS)
    return overrides


def layer_tensors(model: ModelRecord, layer: LayerRecord) -> dict[str, Shape]:
    """Tensors of one layer in the bf16 layout, relative to the layer; experts are stacked, their biases too."""
    hidden, tensors = model.hidden_size, dict[str, Shape]()
    if isinstance(layer.attention, Attention):
        tensors |= {"input_layernorm.weight": (hidden,)} | _attention_tensors(hidden, layer.attention)
    if isinstance(layer.ffn, MoE):
        tensors |= {"post_attention_layernorm.weight": (hidden,)} | _expert_tensors(hidden, layer.ffn)
    return tensors


def mxfp4_tensors(tensors: dict[str, Shape]) -> dict[str, Shape]:
    """The same layer as stored in MXFP4: an expert matrix [E, in, out] becomes blocks [E, out, in / 32, 16] of packed
    4-bit values and scales [E, out, in / 32]. Raises ConfigError where `in` is no multiple of 32.
    """
    stored: dict[str, Shape] = {}
    for name, shape in tensors.items():
        if len(shape) != 3:
            stored[name] = shape
            continue
        experts, size_in, size_out = shape
        if size_in % MXFP4_BLOCK:
            raise ConfigError(f"moe, tensor `{name}`: found {size_in} inputs, allowed: a multiple of 32 (MXFP4)")
        scales = (experts, size_out, size_in // MXFP4_BLOCK)
        stored |= {f"{name}_blocks": (*scales, MXFP4_BLOCK // 2), f"{name}_scales": scales}
    return stored


def _attention_tensors(hidden: int, attention: Attention) -> dict[str, Shape]:
    tensors: dict[str, Shape] = {"self_attn.sinks": (attention.num_heads,)}
    for name, size in (("q", attention.q_size), ("k", attention.kv_size), ("v", attention.kv_size)):
        tensors |= {f"self_attn.{name}_proj.weight": (size, hidden), f"self_attn.{name}_proj.bias": (size,)}
    return tensors | {"self_attn.o_proj.weight": (hidden, attention.q_size), "self_attn.o_proj.bias": (hidden,)}


def _expert_tensors(hidden: int, moe: MoE) -> dict[str, Shape]:
    experts, width = moe.num_experts, moe.intermediate_size
    return {
        "mlp.router.weight": (experts, hidden),
        "mlp.router.bias": (experts,),
        "mlp.experts.gate_up_proj": (experts, hidden, 2 * width),
        "mlp.experts.gate_up_proj_bias": (experts, 2 * width),
        "mlp.experts.down_proj": (experts, width, hidden),
        "mlp.experts.down_proj_bias": (experts, hidden),
    }
