"""Layers of a Hugging Face family: the model's own sizes, and per layer what overrides them.

The overrides come from Hugging Face's `per_layer_config` (transformers 5, integrations/heterogeneity), from
gpt-oss-puzzle's `block_configs` (`gpt_oss.py`) or from puzzletron v2's `subblock_configs` (`puzzletron.py`); all three
use the words of the family's config.json. Standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_puzzle.model_configs.json_values import (
    Json,
    flag,
    integer,
    known_keys,
    mapping,
    optional_integer,
    refuse,
    strings,
    text,
)
from vllm_puzzle.model_configs.schema import (
    MAX_EXPERTS,
    MAX_LAYERS,
    Attention,
    ConfigError,
    FFNKind,
    GatedFFN,
    LayerRecord,
    MoE,
)

MODEL = "model"
GPT_OSS = ("gpt_oss", "gpt_oss_puzzle")

SKIP_ATTENTION = ("attention", "self_attn")
SKIP_FFN = ("ffn", "mlp")
COMMON_KEYS = (
    "head_dim", "intermediate_size", "layer_types", "num_attention_heads", "num_key_value_heads", "skip",
    "sliding_window",
)  # fmt: skip
MOE_KEYS = {
    "qwen3_moe": ("moe_intermediate_size", "num_experts", "num_experts_per_tok", "num_local_experts"),
    "gpt_oss": ("num_experts_per_tok", "num_local_experts"),
    "gpt_oss_puzzle": ("num_experts_per_tok", "num_local_experts"),
}
# Constants of vLLM's and Hugging Face's gpt-oss activation; another value would be computed wrongly.
SWIGLU = {"swiglu_alpha": 1.702, "swiglu_limit": 7.0}


def read_layers(config: Json, overrides: Mapping[int, Json]) -> tuple[LayerRecord, ...]:
    """One record per layer: `config`, changed per layer by `overrides`."""
    num_layers = integer(MODEL, config, "num_hidden_layers", MAX_LAYERS)
    experts = config.get("num_experts")  # one number under two names
    if config["model_type"] in MOE_KEYS and experts is not None and config.get("num_local_experts", experts) != experts:
        raise refuse(MODEL, "num_experts", experts, "as `num_local_experts`")
    if config["model_type"] in GPT_OSS:
        for key, value in SWIGLU.items():
            if config.get(key) not in (None, value):
                raise refuse(MODEL, key, config[key], str(value))
    return tuple(_layer(config, index, overrides.get(index, {})) for index in range(num_layers))


def overrides_of(config: Json) -> dict[int, Json]:
    """`per_layer_config` by layer number; its keys may be padded (`"07"`) or, in memory, integers."""
    num_layers = integer(MODEL, config, "num_hidden_layers", MAX_LAYERS)
    overrides: dict[int, Json] = {}
    for key, override in mapping(MODEL, config, "per_layer_config").items():
        if not str(key).isdecimal() or not int(key) < num_layers:
            raise ConfigError(f"model, key `per_layer_config`: found layer {key!r}, allowed: 0 to {num_layers - 1}")
        if not isinstance(override, dict):
            raise ConfigError(f"layer {key}, per_layer_config: found {override!r}, allowed: an object")
        if int(key) in overrides:
            raise ConfigError(f"layer {key}, per_layer_config: found twice, allowed: once")
        overrides[int(key)] = override
    return overrides


def blocks_of(config: Json) -> list[Any]:
    """`block_configs`, one entry per layer, whatever the entries hold."""
    blocks, num_layers = config.get("block_configs"), integer(MODEL, config, "num_hidden_layers", MAX_LAYERS)
    if not isinstance(blocks, list | tuple):
        raise refuse(MODEL, "block_configs", blocks, f"a list of {num_layers} objects")
    if len(blocks) != num_layers:
        raise ConfigError(
            f"model, key `block_configs`: found {len(blocks)} entries, allowed: num_hidden_layers = {num_layers}"
        )
    return list(blocks)


def global_window(config: Json, index: int) -> int | None:
    """The window a layer has without an override of its own.

    Hugging Face: `layer_types` decides where it exists; Qwen ignores the window unless `use_sliding_window`; gpt-oss
    has it on every even layer.
    """
    model_type = text(MODEL, config, "model_type", "")
    window = optional_integer(MODEL, config, "sliding_window")
    layer_types = strings(MODEL, config, "layer_types")
    if layer_types:
        if index >= len(layer_types):
            raise refuse(MODEL, "layer_types", layer_types, "an entry for every layer")
        return window if layer_types[index] == "sliding_attention" else None
    if model_type in GPT_OSS:
        return window if index % 2 == 0 else None
    if model_type.startswith("qwen"):
        first = optional_integer(MODEL, config, "max_window_layers") if config.get("max_window_layers") else 0
        return window if flag(MODEL, config, "use_sliding_window") and index >= (first or 0) else None
    return window


def head_dim_of(config: Json) -> int:
    """`head_dim`, or what the family computes where it is missing."""
    explicit = optional_integer(MODEL, config, "head_dim")
    if explicit is not None:
        return explicit
    hidden, heads = integer(MODEL, config, "hidden_size"), integer(MODEL, config, "num_attention_heads")
    if hidden % heads:
        raise refuse(MODEL, "hidden_size", hidden, f"a multiple of the {heads} attention heads")
    return hidden // heads


def family_routing(config: Json) -> str:
    """How a family's router weighs the chosen experts (schema.ROUTINGS)."""
    is_plain = config["model_type"] == "qwen3_moe" and not flag(MODEL, config, "norm_topk_prob")
    return "softmax" if is_plain else "renormalize"


def build_at(where: str, build: Any, *sizes: Any, **more: Any) -> Any:
    """Build a record; its own complaint gets the place in front."""
    try:
        return build(*sizes, **more)
    except ConfigError as error:
        raise ConfigError(f"{where.partition(',')[0]}, {error}") from None


def _layer(config: Json, index: int, override: Json) -> LayerRecord:
    where = f"layer {index}"
    model_type = config["model_type"]
    known_keys(f"{where}, per_layer_config", override, COMMON_KEYS + MOE_KEYS.get(model_type, ()))
    for key, value in override.items():
        if value is None and key != "sliding_window":  # a window may be taken away, a size may not
            raise refuse(f"{where}, per_layer_config", key, None, "a value, or no such key")
    skip = strings(f"{where}, per_layer_config", override, "skip")
    for name in skip:
        if name not in SKIP_ATTENTION + SKIP_FFN:
            raise refuse(f"{where}, per_layer_config", "skip", name, ", ".join(SKIP_ATTENTION + SKIP_FFN))
    resolved = {**config, **override}
    if override.get("num_attention_heads") is not None and override.get("head_dim") is None:
        resolved["head_dim"] = head_dim_of(config)  # other heads, of the model's size
    if override.get("num_experts") is not None:  # Qwen's name; transformers writes the model's own under the other
        if override.get("num_local_experts") not in (None, override["num_experts"]):
            raise refuse(where, "num_local_experts", override["num_local_experts"], "as `num_experts`")
        resolved["num_local_experts"] = override["num_experts"]
    window = optional_integer(where, override, "sliding_window")
    if "sliding_window" not in override:
        window = global_window(resolved, index)
    attention = None if set(skip) & set(SKIP_ATTENTION) else _attention(resolved, where, window)
    ffn = None if set(skip) & set(SKIP_FFN) else _ffn(resolved, index, where)
    # A size of something that the layer lacks: a contradiction, not a default.
    idle = () if isinstance(ffn, MoE) else tuple(k for k in MOE_KEYS.get(model_type, ()) if k != "intermediate_size")
    for key in (*idle, *(("intermediate_size",) if ffn is None else ())):
        if override.get(key) is not None:
            raise refuse(f"{where}, per_layer_config", key, override[key], "nothing, as the layer has no such block")
    return LayerRecord(attention, ffn)


def _attention(config: Json, where: str, window: int | None) -> Attention:
    heads = integer(where, config, "num_attention_heads")
    kv_heads = optional_integer(where, config, "num_key_value_heads")
    has_sinks = config["model_type"] in GPT_OSS
    sizes = (heads, kv_heads or heads, head_dim_of(config), window)
    attention: Attention = build_at(f"{where}, attention", Attention, *sizes, has_sinks=has_sinks)
    return attention


def _ffn(config: Json, index: int, where: str) -> FFNKind:
    model_type = config["model_type"]
    if model_type in GPT_OSS or (model_type == "qwen3_moe" and _is_sparse(config, index)):
        return _moe(config, f"{where}, moe", "intermediate_size" if model_type in GPT_OSS else "moe_intermediate_size")
    ffn: GatedFFN = build_at(f"{where}, ffn", GatedFFN, integer(f"{where}, ffn", config, "intermediate_size"))
    return ffn


def _moe(config: Json, where: str, width: str) -> MoE:
    # transformers writes `num_local_experts` where Qwen's published files say `num_experts`.
    experts = optional_integer(where, config, "num_local_experts", MAX_EXPERTS)
    is_qwen = config["model_type"] == "qwen3_moe"
    moe: MoE = build_at(
        where,
        MoE,
        experts or integer(where, config, "num_experts" if is_qwen else "num_local_experts", MAX_EXPERTS),
        integer(where, config, "num_experts_per_tok", MAX_EXPERTS),
        integer(where, config, width),
        routing=family_routing(config),
    )
    return moe


def _is_sparse(config: Json, index: int) -> bool:
    """Qwen3-MoE: every `decoder_sparse_step`-th layer has experts, those in `mlp_only_layers` excepted."""
    dense = config.get("mlp_only_layers") or []
    if not isinstance(dense, list | tuple) or not all(type(layer) is int for layer in dense):
        raise refuse(MODEL, "mlp_only_layers", dense, "a list of layer numbers")
    step = optional_integer(MODEL, config, "decoder_sparse_step") or 1
    return index not in dense and (index + 1) % step == 0
