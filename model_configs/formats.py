"""Published configurations → one `ModelRecord`. config.json stays as it is; no remote code is needed or run.

Read here:
- DeciLM / nemotron-nas `block_configs` (`n_heads_in_group` or `num_key_value_heads`, `ffn_mult` or `intermediate_size`,
  `no_op`, `replace_with_linear`, `window_length`): NVIDIA's configuration_decilm.py and block_config.py.
- puzzletron v1 `block_configs` (the same list, in the newer spelling) on the families below; a size left null there is
  the model's own.
- Hugging Face `per_layer_config` with sparse overrides and `skip` (transformers 5, integrations/heterogeneity), on the
  families below, with `architectures: ["AnyModel"]` too.
- gpt-oss, gpt-oss-puzzle and NemotronH, for `inspect` (`gpt_oss.py`, `nemotron_h.py`).
- Homogeneous Llama, Mistral, Qwen2, Qwen3 and Qwen3-MoE configurations, so that `inspect` reads parents too.
Any other model type, and in a layer's entry any key that is not understood, is refused with its place. Standard library
only.
"""

from __future__ import annotations

from typing import Any

from vllm_puzzle.model_configs import gpt_oss, nemotron_h
from vllm_puzzle.model_configs.json_values import (
    Json,
    flag,
    integer,
    known_keys,
    mapping,
    optional_integer,
    optional_number,
    refuse,
    strings,
    text,
)
from vllm_puzzle.model_configs.schema import (
    MAX_EXPERTS,
    MAX_LAYERS,
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

FAMILIES = ("nemotron-nas", "llama", "mistral", "qwen2", "qwen3", "qwen3_moe")
# Read for `inspect`; vLLM's own classes serve them, or none yet.
INSPECTED = {
    "gpt_oss": gpt_oss.read_layers,
    "gpt_oss_puzzle": gpt_oss.read_layers,
    "nemotron_h": nemotron_h.read_layers,
    "nemotron_h_puzzle": nemotron_h.read_layers,
}
MODEL = "model"
BASE_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
# What transformers assumes where a family's config.json is silent.
DEFAULT_HEAD_DIM = {"qwen3": 128}
DEFAULT_WINDOW = {"mistral": 4096}

# DeciLM's keys. The last ones ask for something this version cannot do: allowed only when null or empty.
UNSUPPORTED = ("llama4", "mamba", "moe", "num_sink_tokens", "parallel_blocks", "sparsify")
DECI_ATTENTION_SIZES = ("n_heads_in_group", "num_key_value_heads", "window_length")
DECI_ATTENTION_FLAGS = ("no_op", "replace_with_linear", "unshifted_sink", "use_prefill_window_in_sink_attention")
DECI_FFN_SIZES = ("ffn_mult", "intermediate_size")
DECI_FFN_FLAGS = ("no_op", "replace_with_linear", "gated")
DECI_OTHER = ("hidden_act", "weights_precision")

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
    model_type = text(MODEL, config, "model_type", "")
    if model_type not in (*FAMILIES, *INSPECTED):
        raise refuse(MODEL, "model_type", model_type or None, ", ".join((*FAMILIES, *INSPECTED)))
    _check_any_model(config)
    activation = text(MODEL, config, "hidden_act", "silu")
    if activation != "silu":
        raise refuse(MODEL, "hidden_act", activation, "'silu'")
    epsilon = optional_number(MODEL, config, "rms_norm_eps") or optional_number(MODEL, config, "norm_eps")
    if epsilon is None and model_type in FAMILIES:
        raise refuse(MODEL, "rms_norm_eps", None, "a number above 0")
    attention_bias = flag(MODEL, config, "attention_bias")
    return ModelRecord(
        model_type=model_type,
        architecture=next(iter(strings(MODEL, config, "architectures")), "unknown"),
        vocab_size=integer(MODEL, config, "vocab_size"),
        hidden_size=integer(MODEL, config, "hidden_size"),
        layers=_read_layers(config, model_type),
        max_position_embeddings=integer(MODEL, config, "max_position_embeddings"),
        rms_norm_eps=epsilon or 1e-5,
        rope=_read_rope(config),
        tie_word_embeddings=flag(MODEL, config, "tie_word_embeddings"),
        qkv_bias=attention_bias or model_type == "qwen2",
        o_bias=attention_bias,
        mlp_bias=flag(MODEL, config, "mlp_bias"),
        qk_norm=model_type in ("qwen3", "qwen3_moe"),
        dtype=str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch."),
    )


def ffn_mult_to_width(ffn_mult: float, hidden_size: int) -> int:
    """DeciLM's FFN width: `int(2 · ffn_mult · hidden / 3)`, rounded up to a multiple of 256."""
    width = int(2 * ffn_mult * hidden_size / 3)
    return width + -width % 256


def _read_rope(config: Json) -> Rope:
    """Either transformers 5's `rope_parameters` or the older `rope_theta` + `rope_scaling`."""
    merged = {
        "rope_theta": config.get("rope_theta"),
        **mapping(MODEL, config, "rope_scaling"),
        **mapping(MODEL, config, "rope_parameters"),
    }
    theta = optional_number("rope", merged, "rope_theta")
    return Rope(
        rope_theta=10000.0 if theta is None else theta,
        rope_type=text("rope", merged, "rope_type", text("rope", merged, "type", "default")),
        factor=optional_number("rope", merged, "factor"),
        low_freq_factor=optional_number("rope", merged, "low_freq_factor"),
        high_freq_factor=optional_number("rope", merged, "high_freq_factor"),
        original_max_position_embeddings=optional_integer("rope", merged, "original_max_position_embeddings"),
    )


def _read_layers(config: Json, model_type: str) -> tuple[LayerRecord, ...]:
    if model_type in INSPECTED:
        return INSPECTED[model_type](config)
    has_blocks, has_overrides = config.get("block_configs") is not None, bool(config.get("per_layer_config"))
    if has_blocks and has_overrides:
        raise ConfigError("model, key `per_layer_config`: found beside `block_configs`, allowed: one of the two")
    if model_type == "nemotron-nas" and has_overrides:
        raise ConfigError("model, key `per_layer_config`: found on nemotron-nas, allowed: `block_configs`")
    return _deci_layers(config) if has_blocks or model_type == "nemotron-nas" else _llama_layers(config)


def _check_any_model(config: Json) -> None:
    """AnyModel (ModelOpt puzzletron's export) names the real class in `base_architecture`."""
    if strings(MODEL, config, "architectures") != ["AnyModel"]:
        return
    base = text(MODEL, config, "base_architecture", "")
    allowed = BASE_ARCHITECTURES.get(config["model_type"])
    if base != allowed:
        raise refuse(MODEL, "base_architecture", base or None, f"{allowed} for model_type {config['model_type']}")
    if config.get("anymodel_arch_info"):
        raise refuse(MODEL, "anymodel_arch_info", config["anymodel_arch_info"], "null (not supported yet)")


# --- DeciLM / nemotron-nas, puzzletron v1 -----------------------------------------------------------------------------


def _deci_layers(config: Json) -> tuple[LayerRecord, ...]:
    blocks, num_layers = config.get("block_configs"), integer(MODEL, config, "num_hidden_layers", MAX_LAYERS)
    if not isinstance(blocks, list | tuple):
        raise refuse(MODEL, "block_configs", blocks, f"a list of {num_layers} objects")
    if len(blocks) != num_layers:
        raise ConfigError(
            f"model, key `block_configs`: found {len(blocks)} entries, allowed: num_hidden_layers = {num_layers}"
        )
    return tuple(_deci_layer(config, block, index) for index, block in enumerate(blocks))


def _deci_layer(config: Json, block: Any, index: int) -> LayerRecord:
    where = f"layer {index}"
    if not isinstance(block, dict):
        raise ConfigError(f"{where}: found {block!r}, allowed: an object with `attention` and `ffn`")
    known_keys(where, block, ("attention", "ffn", "parallel_blocks"))
    _refuse_unsupported(where, block)
    for part in ("attention", "ffn"):
        if not isinstance(block.get(part), dict):
            raise refuse(where, part, block.get(part), "an object")
    attention = _deci_attention(config, block["attention"], index)
    return LayerRecord(attention, _deci_ffn(config, block["ffn"], f"{where}, ffn"))


def _deci_attention(config: Json, block: Json, index: int) -> AttentionKind:
    where = f"layer {index}, attention"
    known_keys(where, block, DECI_ATTENTION_SIZES + DECI_ATTENTION_FLAGS + DECI_OTHER + UNSUPPORTED)
    sizes = {key: optional_integer(where, block, key) for key in DECI_ATTENTION_SIZES}
    for key in DECI_ATTENTION_FLAGS:
        flag(where, block, key)
    if _is_replaced(block, where, DECI_ATTENTION_SIZES):
        return LinearMap() if flag(where, block, "replace_with_linear") else None
    heads = integer(MODEL, config, "num_attention_heads")
    group, kv_heads = sizes["n_heads_in_group"], sizes["num_key_value_heads"]
    window = sizes["window_length"]
    if config["model_type"] != "nemotron-nas":
        kv_heads = kv_heads or (None if group else optional_integer(MODEL, config, "num_key_value_heads"))
        window = window or global_window(config, index)
    if group is None and kv_heads is None:
        raise refuse(where, "n_heads_in_group", None, "a number (the attention is live)")
    if group is not None and heads % group:
        raise refuse(where, "n_heads_in_group", group, f"a divisor of the {heads} attention heads")
    if group is not None and kv_heads not in (None, heads // group):
        raise refuse(where, "num_key_value_heads", kv_heads, f"{heads // group}, as `n_heads_in_group` = {group} says")
    kv_heads = kv_heads if group is None else heads // group
    return _at(where, Attention, heads, kv_heads, _head_dim(config), window)


def _deci_ffn(config: Json, block: Json, where: str) -> FFNKind:
    known_keys(where, block, DECI_FFN_SIZES + DECI_FFN_FLAGS + DECI_OTHER + UNSUPPORTED)
    if not flag(where, {"gated": True, **block}, "gated"):
        raise refuse(where, "gated", block["gated"], "true")
    if text(where, block, "hidden_act", "silu") != "silu":
        raise refuse(where, "hidden_act", block["hidden_act"], "'silu'")
    width, mult = optional_integer(where, block, "intermediate_size"), optional_number(where, block, "ffn_mult")
    if _is_replaced(block, where, DECI_FFN_SIZES):
        return LinearMap() if flag(where, block, "replace_with_linear") else None
    if mult is None:
        if config["model_type"] != "nemotron-nas":
            width = width or optional_integer(MODEL, config, "intermediate_size")
        if width is None:
            raise refuse(where, "ffn_mult", None, "a number (the FFN is live)")
        return _at(where, GatedFFN, width)
    from_mult = ffn_mult_to_width(mult, integer(MODEL, config, "hidden_size"))
    if width not in (None, from_mult):
        raise refuse(where, "intermediate_size", width, f"{from_mult}, as `ffn_mult` = {mult} says")
    return _at(where, GatedFFN, from_mult)


def _is_replaced(block: Json, where: str, sizes: tuple[str, ...]) -> bool:
    """Whether the sub-block is a no-op or a linear map; sizes beside either, or both at once, contradict it."""
    _refuse_unsupported(where, block)
    kinds = [key for key in ("no_op", "replace_with_linear") if flag(where, block, key)]
    if len(kinds) == 2:
        raise refuse(where, "replace_with_linear", True, "false, as `no_op` is true")
    if kinds:
        for key in sizes:
            if block.get(key) is not None:
                raise refuse(where, key, block[key], f"null, as `{kinds[0]}` is true")
    return bool(kinds)


def _refuse_unsupported(where: str, block: Json) -> None:
    for key in UNSUPPORTED:
        if block.get(key) not in (None, [], {}, False):
            raise refuse(where, key, block[key], "null (not supported yet)")


# --- Llama family, with or without per_layer_config --------------------------------------------------------------


def _llama_layers(config: Json) -> tuple[LayerRecord, ...]:
    num_layers = integer(MODEL, config, "num_hidden_layers", MAX_LAYERS)
    overrides = _layer_overrides(config, num_layers)
    return tuple(_llama_layer(config, index, overrides.get(index, {})) for index in range(num_layers))


def _layer_overrides(config: Json, num_layers: int) -> dict[int, Json]:
    """`per_layer_config` by layer number; its keys may be padded (`"07"`) or, in memory, integers."""
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


def _llama_layer(config: Json, index: int, override: Json) -> LayerRecord:
    where = f"layer {index}"
    known_keys(f"{where}, per_layer_config", override, PER_LAYER_KEYS)
    skip = strings(f"{where}, per_layer_config", override, "skip")
    for name in skip:
        if name not in SKIP_ATTENTION + SKIP_FFN:
            raise refuse(f"{where}, per_layer_config", "skip", name, ", ".join(SKIP_ATTENTION + SKIP_FFN))
    resolved = {**config, **override}
    window = optional_integer(where, override, "sliding_window")
    if "sliding_window" not in override:
        window = global_window(config, index)
    attention = None if set(skip) & set(SKIP_ATTENTION) else _llama_attention(resolved, where, window)
    return LayerRecord(attention, None if set(skip) & set(SKIP_FFN) else _llama_ffn(resolved, index, where))


def _llama_attention(config: Json, where: str, window: int | None) -> Attention:
    heads = integer(where, config, "num_attention_heads")
    kv_heads = optional_integer(where, config, "num_key_value_heads")
    return _at(f"{where}, attention", Attention, heads, kv_heads or heads, _head_dim(config), window)


def global_window(config: Json, index: int) -> int | None:
    """The window a layer has without an override of its own.

    Hugging Face: `layer_types` decides where it exists; Qwen ignores the window unless `use_sliding_window`.
    """
    model_type = text(MODEL, config, "model_type", "")
    window = optional_integer(MODEL, {"sliding_window": DEFAULT_WINDOW.get(model_type), **config}, "sliding_window")
    layer_types = strings(MODEL, config, "layer_types")
    if layer_types:
        if index >= len(layer_types):
            raise refuse(MODEL, "layer_types", layer_types, "an entry for every layer")
        return window if layer_types[index] == "sliding_attention" else None
    if model_type.startswith("qwen"):
        first = optional_integer(MODEL, config, "max_window_layers") or 0
        return window if flag(MODEL, config, "use_sliding_window") and index >= first else None
    return window


def _llama_ffn(config: Json, index: int, where: str) -> FFNKind:
    if config["model_type"] == "qwen3_moe" and _is_sparse(config, index):
        return _at(
            f"{where}, moe",
            MoE,
            # transformers writes `num_local_experts` where the published files say `num_experts`.
            optional_integer(where, config, "num_local_experts", MAX_EXPERTS)
            or integer(where, config, "num_experts", MAX_EXPERTS),
            integer(where, config, "num_experts_per_tok", MAX_EXPERTS),
            integer(where, config, "moe_intermediate_size"),
        )
    return _at(f"{where}, ffn", GatedFFN, integer(f"{where}, ffn", config, "intermediate_size"))


def _is_sparse(config: Json, index: int) -> bool:
    """Qwen3-MoE: every `decoder_sparse_step`-th layer has experts, those in `mlp_only_layers` excepted."""
    dense = config.get("mlp_only_layers") or []
    if not isinstance(dense, list | tuple) or not all(type(layer) is int for layer in dense):
        raise refuse(MODEL, "mlp_only_layers", dense, "a list of layer numbers")
    step = optional_integer(MODEL, config, "decoder_sparse_step") or 1
    return index not in dense and (index + 1) % step == 0


# --- shared ------------------------------------------------------------------------------------------------------


def _head_dim(config: Json) -> int:
    explicit = optional_integer(MODEL, config, "head_dim") or DEFAULT_HEAD_DIM.get(config["model_type"])
    if explicit is not None:
        return explicit
    hidden, heads = integer(MODEL, config, "hidden_size"), integer(MODEL, config, "num_attention_heads")
    if hidden % heads:
        raise refuse(MODEL, "hidden_size", hidden, f"a multiple of the {heads} attention heads")
    return hidden // heads


def _at(where: str, build: Any, *sizes: Any) -> Any:
    """Build a record; its own complaint gets the place in front."""
    try:
        return build(*sizes)
    except ConfigError as error:
        raise ConfigError(f"{where.partition(',')[0]}, {error}") from None
