"""gpt-oss and gpt-oss-puzzle: reading the configuration, and the tensors it implies.

gpt-oss-puzzle-88B differs from its parent in two per-layer numbers, `num_local_experts` and `sliding_window`, which
its `block_configs` list (NVIDIA's published shape; no `block_type` key). Not served yet. Standard library only.
"""

from __future__ import annotations

from typing import Any

from vllm_puzzle.model_configs.json_values import Json, integer, known_keys, optional_integer, refuse, strings
from vllm_puzzle.model_configs.schema import (
    MAX_EXPERTS,
    MAX_LAYERS,
    Attention,
    ConfigError,
    LayerRecord,
    ModelRecord,
    MoE,
    Shape,
)

BLOCK_KEYS = ("num_local_experts", "sliding_window")


def read_layers(config: Json) -> tuple[LayerRecord, ...]:
    """One record per layer: attention with learned sinks, and experts with biases."""
    num_layers = integer("model", config, "num_hidden_layers", MAX_LAYERS)
    blocks = config.get("block_configs")
    if blocks is None:
        blocks = [{"sliding_window": window} for window in _windows(config, num_layers)]
    if not isinstance(blocks, list | tuple) or len(blocks) != num_layers:
        raise refuse("model", "block_configs", blocks, f"a list of num_hidden_layers = {num_layers} objects")
    return tuple(_layer(config, block, f"layer {index}") for index, block in enumerate(blocks))


def layer_tensors(model: ModelRecord, layer: LayerRecord) -> dict[str, Shape]:
    """Tensors of one layer in the bf16 layout, relative to the layer; experts are stacked, their biases too."""
    hidden, attention, moe = model.hidden_size, layer.attention, layer.ffn
    assert isinstance(attention, Attention), "read_layers builds nothing else"
    assert isinstance(moe, MoE), "read_layers builds nothing else"
    tensors: dict[str, Shape] = {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
    for name, size in (("q", attention.q_size), ("k", attention.kv_size), ("v", attention.kv_size)):
        tensors |= {f"self_attn.{name}_proj.weight": (size, hidden), f"self_attn.{name}_proj.bias": (size,)}
    tensors |= {"self_attn.o_proj.weight": (hidden, attention.q_size), "self_attn.o_proj.bias": (hidden,)}
    experts, width = moe.num_experts, moe.intermediate_size
    return tensors | {
        "self_attn.sinks": (attention.num_heads,),
        "mlp.router.weight": (experts, hidden),
        "mlp.router.bias": (experts,),
        "mlp.experts.gate_up_proj": (experts, hidden, 2 * width),
        "mlp.experts.gate_up_proj_bias": (experts, 2 * width),
        "mlp.experts.down_proj": (experts, width, hidden),
        "mlp.experts.down_proj_bias": (experts, hidden),
    }


def _windows(config: Json, num_layers: int) -> list[int | None]:
    """Hugging Face's `layer_types`; without them, every even layer has the window."""
    window = optional_integer("model", config, "sliding_window")
    kinds = strings("model", config, "layer_types")
    if kinds and len(kinds) != num_layers:
        raise refuse("model", "layer_types", kinds, f"{num_layers} entries")
    is_windowed = [kind == "sliding_attention" for kind in kinds] or [index % 2 == 0 for index in range(num_layers)]
    return [window if windowed else None for windowed in is_windowed]


def _layer(config: Json, block: Any, where: str) -> LayerRecord:
    if not isinstance(block, dict):
        raise ConfigError(f"{where}: found {block!r}, allowed: an object with {', '.join(BLOCK_KEYS)}")
    known_keys(where, block, BLOCK_KEYS)
    experts = optional_integer(where, block, "num_local_experts", MAX_EXPERTS)
    attention = Attention(
        integer("model", config, "num_attention_heads"),
        integer("model", config, "num_key_value_heads"),
        integer("model", config, "head_dim"),
        optional_integer(where, block, "sliding_window"),
    )
    moe = MoE(
        experts or integer("model", config, "num_local_experts", MAX_EXPERTS),
        integer("model", config, "num_experts_per_tok", MAX_EXPERTS),
        integer("model", config, "intermediate_size"),
    )
    return LayerRecord(attention, moe)
