"""Rotary position parameters, in Hugging Face's two spellings. Standard library only.

Every key under `rope_scaling` or `rope_parameters` changes the angles, so one that is not understood is refused.
"""

from __future__ import annotations

from typing import Any

from vllm_puzzle.model_configs.json_values import (
    Json,
    flag,
    known_keys,
    mapping,
    optional_integer,
    optional_number,
    refuse,
    text,
)
from vllm_puzzle.model_configs.schema import MAX_CONTEXT, ConfigError, Rope

# Per type what it needs beside the base, as transformers 5 has it (modeling_rope_utils).
REQUIRED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
KEYS = (
    "rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "low_freq_factor", "high_freq_factor",
    "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor", "truncate",
)  # fmt: skip
# Names of older models, which vLLM reads in place of rope_theta and partial_rotary_factor.
LEGACY_KEYS = ("rotary_emb_base", "rotary_pct", "rotary_emb_fraction")
# Hugging Face's GptOssConfig, when the file names nothing; gpt-oss-puzzle changed the factor, so it has no default.
GPT_OSS_ROPE = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip
DEFAULT_THETA = {"gpt_oss": 150000.0, "gpt_oss_puzzle": 150000.0}


def read_rope(config: Json) -> Rope:
    """Either transformers 5's `rope_parameters` or the older `rope_theta` + `rope_scaling`."""
    given = _parameters(config)
    rope_type = text("rope", given, "rope_type", text("rope", given, "type", "default"))
    if rope_type not in REQUIRED:
        raise refuse("rope", "rope_type", rope_type, ", ".join(REQUIRED))
    if given.get("type") not in (None, rope_type):
        raise refuse("rope", "type", given["type"], f"as `rope_type`, {rope_type!r}")
    for key in REQUIRED[rope_type]:
        if optional_number("rope", given, key) is None:
            raise refuse("rope", key, None, f"a number above 0 (rope type {rope_type!r})")
    original = optional_integer("rope", given, "original_max_position_embeddings")
    if original is None and rope_type in ("yarn", "llama3"):
        original = optional_integer("model", config, "max_position_embeddings")
    factor = optional_number("rope", given, "factor")
    if factor is not None and factor < 1 and rope_type != "default":
        raise refuse("rope", "factor", factor, "a number from 1 (it lengthens)")
    if factor is not None and original is not None and factor * original > MAX_CONTEXT:  # vLLM tabulates every position
        raise refuse(
            "rope", "factor", factor, f"at most {MAX_CONTEXT} positions over `original_max_position_embeddings`"
        )
    fast, slow = optional_number("rope", given, "beta_fast"), optional_number("rope", given, "beta_slow")
    if rope_type == "yarn" and (fast or 32.0) <= (slow or 1.0):
        raise refuse("rope", "beta_fast", fast or 32.0, f"more than beta_slow = {slow or 1.0}")
    outer = config.get("original_max_position_embeddings")  # Phi-3's place for it; vLLM lets it win
    if outer not in (None, original):
        raise refuse("model", "original_max_position_embeddings", outer, f"{original}, as under `rope_scaling`")
    low, high = (optional_number("rope", given, f"{end}_freq_factor") for end in ("low", "high"))
    if rope_type == "llama3" and low is not None and high is not None and low >= high:
        raise refuse("rope", "high_freq_factor", high, f"more than low_freq_factor = {low}")
    return Rope(
        rope_theta=_theta(config, given),
        rope_type=rope_type,
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position_embeddings=original,
        beta_fast=fast,
        beta_slow=slow,
        attention_factor=optional_number("rope", given, "attention_factor"),
        truncate=flag("rope", {"truncate": True, **given}, "truncate"),
    )


def _parameters(config: Json) -> dict[str, Any]:
    old, new = mapping("model", config, "rope_scaling"), mapping("model", config, "rope_parameters")
    if old and new and old != new:
        raise ConfigError("model, key `rope_scaling`: found beside another `rope_parameters`, allowed: one of the two")
    given = {**(old or new)}
    if not given and config["model_type"] == "gpt_oss":
        given = {**GPT_OSS_ROPE}
    known_keys("rope", given, KEYS)
    for key in LEGACY_KEYS:
        if config.get(key) is not None:
            raise refuse("model", key, config[key], "nothing (vLLM takes it for another rotary key)")
    for place, block in (("rope", given), ("model", config)):
        if optional_number(place, block, "partial_rotary_factor") not in (None, 1.0):
            raise refuse(
                place, "partial_rotary_factor", block["partial_rotary_factor"], "1.0 (whole heads are rotated)"
            )
    return given


def _theta(config: Json, given: Json) -> float:
    inner, outer = optional_number("rope", given, "rope_theta"), optional_number("rope", config, "rope_theta")
    theta = inner or outer or DEFAULT_THETA.get(config["model_type"], 10000.0)
    if theta <= 1:
        raise refuse("rope", "rope_theta", theta, "a number above 1")
    return theta
