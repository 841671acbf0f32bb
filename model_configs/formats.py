"""Published configurations → one `ModelRecord`. config.json stays as it is; no remote code is needed or run.

Read here:
- DeciLM / nemotron-nas `block_configs` (`n_heads_in_group` or `num_key_value_heads`, `ffn_mult` or `intermediate_size`,
  `no_op`, `replace_with_linear`, `window_length`): NVIDIA's configuration_decilm.py and block_config.py.
- Hugging Face `per_layer_config` with sparse overrides and `skip` (transformers 5, integrations/heterogeneity).
- Homogeneous Llama, Mistral, Qwen2, Qwen3 and Qwen3-MoE configurations, so that `inspect` reads parents too.
Anything else, and any key that is not understood, is refused with its place. Standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_puzzle.model_configs.schema import (
    Attention,
    AttentionKind,
    ConfigError,
    FFNKind,
    GatedFFN,
    LayerRecord,
    LinearMap,
    ModelRecord,
    MoE,
    Rope,
)

Json = Mapping[str, Any]

FAMILIES = ("nemotron-nas", "llama", "mistral", "qwen2", "qwen3", "qwen3_moe")
DECI_ATTENTION_KEYS = (
    "n_heads_in_group",
    "no_op",
    "num_key_value_heads",
    "num_sink_tokens",
    "replace_with_linear",
    "sparsify",
    "unshifted_sink",
    "use_prefill_window_in_sink_attention",
    "weights_precision",
    "window_length",
)
DECI_FFN_KEYS = (
    "ffn_mult",
    "gated",
    "hidden_act",
    "intermediate_size",
    "no_op",
    "replace_with_linear",
    "sparsify",
    "weights_precision",
)
# Keys of the published schemas that ask for something this version cannot do: allowed only when empty.
DECI_UNSUPPORTED = ("llama4", "mamba", "moe", "num_sink_tokens", "parallel_blocks", "sparsify")
SKIP_ATTENTION = ("attention", "self_attn")
SKIP_FFN = ("ffn", "mlp")
PER_LAYER_KEYS = (
    "head_dim",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "skip",
    "sliding_window",
)


def read_model(config: Json) -> ModelRecord:
    """The record of a config.json (parsed). Raises ConfigError naming layer, key, found and allowed."""
    model_type = _required(config, "model_type")
    if model_type not in FAMILIES:
        raise ConfigError(f"model, key `model_type`: found {model_type!r}, allowed: {', '.join(FAMILIES)}")
    activation = config.get("hidden_act") or "silu"
    if activation != "silu":
        raise ConfigError(f"model, key `hidden_act`: found {activation!r}, allowed: 'silu'")
    layers = _deci_layers(config) if model_type == "nemotron-nas" else _llama_layers(config)
    attention_bias = bool(config.get("attention_bias", False))
    return ModelRecord(
        model_type=model_type,
        architecture=(config.get("architectures") or ["unknown"])[0],
        vocab_size=_required(config, "vocab_size"),
        hidden_size=_required(config, "hidden_size"),
        layers=layers,
        max_position_embeddings=_required(config, "max_position_embeddings"),
        rms_norm_eps=float(_required(config, "rms_norm_eps")),
        rope=_read_rope(config),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=attention_bias or model_type == "qwen2",
        o_bias=attention_bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
        qk_norm=model_type in ("qwen3", "qwen3_moe"),
        dtype=_dtype_name(config),
    )


def ffn_mult_to_width(ffn_mult: float, hidden_size: int) -> int:
    """DeciLM's FFN width: `int(2 · ffn_mult · hidden / 3)`, rounded up to a multiple of 256."""
    width = int(2 * ffn_mult * hidden_size / 3)
    return width if width % 256 == 0 else width + 256 - width % 256


def _required(config: Json, key: str) -> Any:
    if config.get(key) is None:
        raise ConfigError(f"model, key `{key}`: found nothing, allowed: a value (config.json must have it)")
    return config[key]


def _dtype_name(config: Json) -> str:
    dtype = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    return str(dtype).removeprefix("torch.")


def _read_rope(config: Json) -> Rope:
    """Either transformers 5's `rope_parameters` or the older `rope_theta` + `rope_scaling`."""
    parameters = dict(config.get("rope_parameters") or {})
    scaling = dict(config.get("rope_scaling") or {})
    merged = {"rope_theta": config.get("rope_theta"), **scaling, **parameters}
    if merged.get("rope_theta") is None:
        merged["rope_theta"] = 10000.0
    rope_type = merged.get("rope_type") or merged.get("type") or "default"
    optional = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return Rope(
        rope_theta=float(merged["rope_theta"]), rope_type=rope_type, **{key: merged.get(key) for key in optional}
    )


# --- DeciLM / nemotron-nas ---------------------------------------------------------------------------------------


def _deci_layers(config: Json) -> tuple[LayerRecord, ...]:
    blocks = _required(config, "block_configs")
    if len(blocks) != _required(config, "num_hidden_layers"):
        raise ConfigError(
            f"model, key `block_configs`: found {len(blocks)} entries, allowed: num_hidden_layers = "
            f"{config['num_hidden_layers']}"
        )
    return tuple(_at_layer(index, _deci_layer, config, block) for index, block in enumerate(blocks))


def _deci_layer(config: Json, block: Json) -> LayerRecord:
    _refuse_unknown("block", block, ("attention", "ffn", "parallel_blocks"))
    _refuse_unsupported("block", block)
    for part in ("attention", "ffn"):
        if not isinstance(block.get(part), Mapping):
            raise ConfigError(f"key `{part}`: found {block.get(part)!r}, allowed: an object")
    return LayerRecord(_deci_attention(config, block["attention"]), _deci_ffn(config, block["ffn"]))


def _deci_attention(config: Json, block: Json) -> AttentionKind:
    _refuse_unsupported("attention", block)
    _refuse_unknown("attention", block, DECI_ATTENTION_KEYS)
    if block.get("no_op"):
        return None
    if block.get("replace_with_linear"):
        return LinearMap()
    heads = _required(config, "num_attention_heads")
    group: Any = block.get("n_heads_in_group")
    kv_heads: Any = block.get("num_key_value_heads")
    if group is None and kv_heads is None:
        raise ConfigError("attention, key `n_heads_in_group`: found null, allowed: a number (the attention is live)")
    if group is not None:
        if not isinstance(group, int) or group < 1 or heads % group:
            raise ConfigError(
                f"attention, key `n_heads_in_group`: found {group!r}, allowed: a divisor of the {heads} attention heads"
            )
        if kv_heads is not None and kv_heads != heads // group:
            raise ConfigError(
                f"attention, key `num_key_value_heads`: found {kv_heads}, allowed: {heads // group}, "
                f"as `n_heads_in_group` = {group} says"
            )
        kv_heads = heads // group
    return Attention(heads, kv_heads, _head_dim(config), block.get("window_length"))


def _deci_ffn(config: Json, block: Json) -> FFNKind:
    _refuse_unsupported("ffn", block)
    _refuse_unknown("ffn", block, DECI_FFN_KEYS)
    for key, allowed in (("gated", True), ("hidden_act", "silu")):
        if block.get(key) not in (None, allowed):
            raise ConfigError(f"ffn, key `{key}`: found {block[key]!r}, allowed: {allowed!r}")
    if block.get("no_op"):
        return None
    if block.get("replace_with_linear"):
        return LinearMap()
    width: Any = block.get("intermediate_size")
    mult: Any = block.get("ffn_mult")
    if width is None and mult is None:
        raise ConfigError("ffn, key `ffn_mult`: found null, allowed: a number (the FFN is live)")
    if mult is not None:
        if isinstance(mult, bool) or not isinstance(mult, int | float) or mult <= 0:
            raise ConfigError(f"ffn, key `ffn_mult`: found {mult!r}, allowed: a number above 0")
        from_mult = ffn_mult_to_width(mult, config["hidden_size"])
        if width is not None and width != from_mult:
            raise ConfigError(
                f"ffn, key `intermediate_size`: found {width}, allowed: {from_mult}, as `ffn_mult` = {mult} says"
            )
        width = from_mult
    return GatedFFN(width)


def _refuse_unsupported(part: str, block: Json) -> None:
    for key in DECI_UNSUPPORTED:
        if block.get(key):
            raise ConfigError(f"{part}, key `{key}`: found {block[key]!r}, allowed: null (not supported yet)")


# --- Llama family, with or without per_layer_config --------------------------------------------------------------


def _llama_layers(config: Json) -> tuple[LayerRecord, ...]:
    num_layers = _required(config, "num_hidden_layers")
    overrides = {int(index): value for index, value in (config.get("per_layer_config") or {}).items()}
    outside = sorted(index for index in overrides if not 0 <= index < num_layers)
    if outside:
        raise ConfigError(f"model, key `per_layer_config`: found layers {outside}, allowed: 0 to {num_layers - 1}")
    return tuple(_at_layer(index, _llama_layer, config, index, overrides.get(index, {})) for index in range(num_layers))


def _llama_layer(config: Json, index: int, override: Json) -> LayerRecord:
    _refuse_unknown("per_layer_config", override, PER_LAYER_KEYS)
    skip = override.get("skip", [])
    for name in skip:
        if name not in SKIP_ATTENTION + SKIP_FFN:
            allowed = ", ".join(SKIP_ATTENTION + SKIP_FFN)
            raise ConfigError(f"per_layer_config, key `skip`: found {name!r}, allowed: {allowed}")
    layer_config = {**config, **override}
    attention = None if set(skip) & set(SKIP_ATTENTION) else _llama_attention(layer_config, index, override)
    return LayerRecord(attention, None if set(skip) & set(SKIP_FFN) else _llama_ffn(layer_config, index))


def _llama_attention(config: Json, index: int, override: Json) -> Attention:
    heads = _required(config, "num_attention_heads")
    kv_heads = config.get("num_key_value_heads")
    window = override.get("sliding_window") if "sliding_window" in override else _global_window(config, index)
    return Attention(heads, heads if kv_heads is None else kv_heads, _head_dim(config), window)


def _global_window(config: Json, index: int) -> int | None:
    """Hugging Face: `layer_types` decides where it exists; Qwen ignores the window unless `use_sliding_window`."""
    window: int | None = config.get("sliding_window")
    layer_types = config.get("layer_types")
    if layer_types is not None:
        return window if layer_types[index] == "sliding_attention" else None
    if config["model_type"].startswith("qwen"):
        return None if not config.get("use_sliding_window") or index < config.get("max_window_layers", 0) else window
    return window


def _llama_ffn(config: Json, index: int) -> FFNKind:
    is_sparse = config["model_type"] == "qwen3_moe" and index not in (config.get("mlp_only_layers") or [])
    if is_sparse and (index + 1) % (config.get("decoder_sparse_step") or 1) == 0:
        experts = config.get("num_experts") or config.get("num_local_experts")
        if experts is None:
            raise ConfigError("model, key `num_experts`: found nothing, allowed: a number")
        return MoE(experts, _required(config, "num_experts_per_tok"), _required(config, "moe_intermediate_size"))
    return GatedFFN(_required(config, "intermediate_size"))


# --- shared ------------------------------------------------------------------------------------------------------


def _head_dim(config: Json) -> int:
    explicit = config.get("head_dim")
    if explicit is not None:
        return int(explicit)
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    if hidden % heads:
        raise ConfigError(
            f"model, key `hidden_size`: found {hidden}, allowed: a multiple of the {heads} attention heads"
        )
    return int(hidden // heads)


def _refuse_unknown(part: str, block: Json, allowed: tuple[str, ...]) -> None:
    for key in block:
        if key not in allowed and key not in DECI_UNSUPPORTED:
            raise ConfigError(f"{part}, key `{key}`: found an unknown key, allowed: {', '.join(allowed)}")


def _at_layer(index: int, read: Any, *arguments: Any) -> LayerRecord:
    try:
        layer: LayerRecord = read(*arguments)
    except ConfigError as error:
        raise ConfigError(f"layer {index}, {error}") from None
    return layer
