"""Published configurations → one `ModelRecord`. config.json stays as it is; no remote code is needed or run.

Read here:
- DeciLM / nemotron-nas `block_configs`, and puzzletron v1's on the families below (`decilm.py`).
- Hugging Face `per_layer_config` with sparse overrides and `skip`, on the families below, with
  `architectures: ["AnyModel"]` too (`per_layer.py`).
- puzzletron v2 `subblock_configs` on the families below (`puzzletron.py`).
- gpt-oss, and gpt-oss-puzzle with its own `block_configs` (`gpt_oss.py`).
- NemotronH, for `inspect` (`nemotron_h.py`); vLLM's class serves it.
- Homogeneous Llama, Mistral, Qwen2, Qwen3, Qwen3-MoE and gpt-oss configurations, so that `inspect` reads parents too.
Any other model type, and in a layer's entry any key that is not understood, is refused with its place. Standard library
only.
"""

from __future__ import annotations

from vllm_puzzle.model_configs import decilm, gpt_oss, nemotron_h, per_layer, puzzletron
from vllm_puzzle.model_configs.json_values import (
    Json,
    flag,
    integer,
    mapping,
    optional_integer,
    optional_number,
    refuse,
    strings,
    text,
)
from vllm_puzzle.model_configs.per_layer import GPT_OSS
from vllm_puzzle.model_configs.schema import ConfigError, LayerRecord, ModelRecord, Rope

FAMILIES = ("nemotron-nas", "llama", "mistral", "qwen2", "qwen3", "qwen3_moe", *GPT_OSS)
# Read for `inspect`; vLLM's own class serves them.
INSPECTED = ("nemotron_h", "nemotron_h_puzzle")
MODEL = "model"
BASE_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
}
DEFAULT_EPSILON = {"gpt_oss": 1e-5, "gpt_oss_puzzle": 1e-5, "nemotron_h": 1e-5, "nemotron_h_puzzle": 1e-5}
# Hugging Face's GptOssConfig, which writes nothing else; gpt-oss-puzzle changed the factor, so it has no default.
GPT_OSS_ROPE = {
    "rope_theta": 150000.0, "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
    "truncate": False, "original_max_position_embeddings": 4096,
}  # fmt: skip


def read_model(config: Json) -> ModelRecord:
    """The record of a config.json (parsed). Raises ConfigError naming layer, key, found and allowed."""
    model_type = text(MODEL, config, "model_type", "")
    if model_type not in FAMILIES + INSPECTED:
        raise refuse(MODEL, "model_type", model_type or None, ", ".join(FAMILIES + INSPECTED))
    _check_any_model(config)
    activation = text(MODEL, config, "hidden_act", "silu")
    if activation != "silu":
        raise refuse(MODEL, "hidden_act", activation, "'silu'")
    epsilon = optional_number(MODEL, config, "rms_norm_eps") or optional_number(MODEL, config, "norm_eps")
    epsilon = epsilon or DEFAULT_EPSILON.get(model_type)
    if epsilon is None:
        raise refuse(MODEL, "rms_norm_eps", None, "a number above 0")
    attention_bias = flag(MODEL, {"attention_bias": model_type in GPT_OSS, **config}, "attention_bias")
    if model_type in GPT_OSS and not attention_bias:
        raise refuse(MODEL, "attention_bias", False, "true (gpt-oss)")
    return ModelRecord(
        model_type=model_type,
        architecture=next(iter(strings(MODEL, config, "architectures")), "unknown"),
        vocab_size=integer(MODEL, config, "vocab_size"),
        hidden_size=integer(MODEL, config, "hidden_size"),
        layers=_read_layers(config, model_type),
        max_position_embeddings=integer(MODEL, config, "max_position_embeddings"),
        rms_norm_eps=epsilon,
        rope=_read_rope(config),
        tie_word_embeddings=flag(MODEL, config, "tie_word_embeddings"),
        qkv_bias=attention_bias or model_type == "qwen2",
        o_bias=attention_bias,
        mlp_bias=flag(MODEL, config, "mlp_bias"),
        qk_norm=model_type in ("qwen3", "qwen3_moe"),
        dtype=str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch."),
        is_mxfp4=mapping(MODEL, config, "quantization_config").get("quant_method") in ("mxfp4", "gpt_oss_mxfp4"),
    )


def _read_rope(config: Json) -> Rope:
    """Either transformers 5's `rope_parameters` or the older `rope_theta` + `rope_scaling`."""
    default = GPT_OSS_ROPE if config["model_type"] == "gpt_oss" else {}
    merged = {
        **default,
        "rope_theta": config.get("rope_theta") or default.get("rope_theta"),
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
        beta_fast=optional_number("rope", merged, "beta_fast"),
        beta_slow=optional_number("rope", merged, "beta_slow"),
        attention_factor=optional_number("rope", merged, "attention_factor"),
        truncate=flag("rope", {"truncate": True, **merged}, "truncate"),
    )


def _read_layers(config: Json, model_type: str) -> tuple[LayerRecord, ...]:
    if model_type in INSPECTED:
        return nemotron_h.read_layers(config)
    has_blocks, has_overrides = config.get("block_configs") is not None, bool(config.get("per_layer_config"))
    if model_type == "nemotron-nas":
        if has_overrides:
            raise ConfigError("model, key `per_layer_config`: found on nemotron-nas, allowed: `block_configs`")
        return decilm.read_layers(config)
    from_overrides = None
    if has_overrides or not has_blocks:
        if model_type == "gpt_oss_puzzle" and not has_overrides:
            raise refuse(MODEL, "block_configs", None, "an object per layer")
        from_overrides = per_layer.read_layers(config, per_layer.overrides_of(config))
        if not has_blocks:
            return from_overrides
    from_blocks = _read_blocks(config)
    if from_overrides not in (None, from_blocks):  # ModelOpt's export may keep both; they must say the same
        different = next(i for i, (a, b) in enumerate(zip(from_overrides or (), from_blocks, strict=True)) if a != b)
        raise ConfigError(
            f"layer {different}, key `per_layer_config`: found another layer than in `block_configs`, allowed: the same"
        )
    return from_blocks


def _read_blocks(config: Json) -> tuple[LayerRecord, ...]:
    if puzzletron.is_v2(config):
        return per_layer.read_layers(config, puzzletron.read_overrides(config))
    if gpt_oss.has_flat_blocks(config):
        return per_layer.read_layers(config, gpt_oss.read_overrides(config))
    return decilm.read_layers(config)


def _check_any_model(config: Json) -> None:
    """AnyModel (ModelOpt puzzletron's export) names the real class in `base_architecture`.

    Its `anymodel_arch_info` names the private fork's modules for that class; ours is known from the name, so it is
    not read.
    """
    if strings(MODEL, config, "architectures") != ["AnyModel"]:
        return
    base = text(MODEL, config, "base_architecture", "")
    allowed = BASE_ARCHITECTURES.get(config["model_type"])
    if base != allowed:
        raise refuse(MODEL, "base_architecture", base or None, f"{allowed} for model_type {config['model_type']}")
