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

from typing import Any

from vllm_puzzle.model_configs import decilm, gpt_oss, nemotron_h, per_layer, puzzletron
from vllm_puzzle.model_configs.json_values import (
    Json,
    flag,
    integer,
    mapping,
    optional_number,
    refuse,
    strings,
    text,
)
from vllm_puzzle.model_configs.per_layer import GPT_OSS, MOE_KEYS
from vllm_puzzle.model_configs.rope import read_rope
from vllm_puzzle.model_configs.schema import MAX_CONTEXT, ConfigError, LayerRecord, ModelRecord

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
# What transformers assumes where a family's config.json is silent (a null is not silent).
FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "max_window_layers": 28},
    "qwen3": {"num_key_value_heads": 32, "max_window_layers": 28, "head_dim": 128},
    "qwen3_moe": {"num_key_value_heads": 4},
    "gpt_oss": {"num_key_value_heads": 8, "head_dim": 64, "sliding_window": 128, "attention_bias": True},
}
FAMILY_DEFAULTS["gpt_oss_puzzle"] = FAMILY_DEFAULTS["gpt_oss"]
DEFAULT_EPSILON = dict.fromkeys(("gpt_oss", "gpt_oss_puzzle", "nemotron_h", "nemotron_h_puzzle"), 1e-5)
DTYPES = ("bfloat16", "float16", "float32")
# Keys of other families that change what a model computes, each with the value that changes nothing. No class here
# reads them, so any other value would be dropped in silence.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention_multiplier": (None,),  # Granite
    "attn_logit_softcapping": (None,),  # Gemma
    "attn_temperature_tuning": (None, False),  # Llama 4
    "clip_qkv": (None,),  # OLMo
    "embedding_multiplier": (None, 1, 1.0),
    "final_logit_softcapping": (None,),
    "logit_scale": (None, 1, 1.0),  # Cohere
    "logits_scaling": (None, 1, 1.0),
    "no_rope_layers": (None, []),  # SmolLM3, Llama 4
    "position_embedding_type": (None, "rope"),  # DeciLM
    "residual_multiplier": (None, 1, 1.0),
    "use_qk_norm": (None, False),  # Llama 4, Hunyuan
}
# vLLM takes a model with any of these for one with experts.
DENSE: dict[str, tuple[Any, ...]] = dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), (None, 0))


def is_described(config: Json) -> bool:
    """Whether the file describes its layers one by one; if not, vLLM's own class knows what to make of it."""
    descriptions = (config.get("block_configs"), config.get("per_layer_config"))
    is_puzzle = config.get("model_type") in ("nemotron-nas", "gpt_oss_puzzle") or any(descriptions)
    return is_puzzle or config.get("architectures") == ["AnyModel"]


def read_model(config: Json) -> ModelRecord:
    """The record of a config.json (parsed). Raises ConfigError naming layer, key, found and allowed."""
    model_type = text(MODEL, config, "model_type", "")
    if model_type not in FAMILIES + INSPECTED:
        raise refuse(MODEL, "model_type", model_type or None, ", ".join(FAMILIES + INSPECTED))
    config = {**FAMILY_DEFAULTS.get(model_type, {}), **config}
    _check_any_model(config)
    mapping(MODEL, config, "auto_map")  # remote code, which is not run; transformers fails on anything but an object
    neutral = NEUTRAL if model_type in (*MOE_KEYS, *INSPECTED) else {**NEUTRAL, **DENSE}
    for key, values in neutral.items():
        if config.get(key) not in values:
            raise refuse(MODEL, key, config[key], " or ".join(map(str, values)))
    activation = text(MODEL, config, "hidden_act", "silu")
    if activation != "silu":
        raise refuse(MODEL, "hidden_act", activation, "'silu'")
    epsilon = optional_number(MODEL, config, "rms_norm_eps") or optional_number(MODEL, config, "norm_eps")
    epsilon = epsilon or DEFAULT_EPSILON.get(model_type)
    if epsilon is None:
        raise refuse(MODEL, "rms_norm_eps", None, "a number above 0")
    attention_bias = flag(MODEL, config, "attention_bias")
    if model_type in GPT_OSS and not attention_bias:
        raise refuse(MODEL, "attention_bias", False, "true (gpt-oss)")
    return ModelRecord(
        model_type=model_type,
        architecture=next(iter(strings(MODEL, config, "architectures")), "unknown"),
        vocab_size=integer(MODEL, config, "vocab_size"),
        hidden_size=integer(MODEL, config, "hidden_size"),
        layers=_read_layers(config, model_type),
        max_position_embeddings=integer(MODEL, config, "max_position_embeddings", MAX_CONTEXT),
        rms_norm_eps=epsilon,
        rope=read_rope(config),
        tie_word_embeddings=flag(MODEL, config, "tie_word_embeddings"),
        qkv_bias=attention_bias or model_type == "qwen2",
        o_bias=attention_bias,
        mlp_bias=flag(MODEL, config, "mlp_bias"),
        qk_norm=model_type in ("qwen3", "qwen3_moe"),
        dtype=_read_dtype(config),
        is_mxfp4=model_type in GPT_OSS
        and mapping(MODEL, config, "quantization_config").get("quant_method") in ("mxfp4", "gpt_oss_mxfp4"),
    )


def _read_dtype(config: Json) -> str:
    """transformers 5 writes `dtype`, older files `torch_dtype`."""
    for key in ("dtype", "torch_dtype"):
        name = text(MODEL, config, key, "bfloat16").removeprefix("torch.")
        if name not in DTYPES:
            raise refuse(MODEL, key, config[key], ", ".join(DTYPES))
        if config.get(key) is not None:
            return name
    return "bfloat16"


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
