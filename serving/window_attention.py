"""Which attention layers take our backend, and what it needs to know of them."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from vllm import envs
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm_puzzle.kernels import attention_table
from vllm_puzzle.model_configs.schema import Attention, ConfigError
from vllm_puzzle.serving.overrides import say_once
from vllm_puzzle.serving.window_attention_mode import AUTO, FLAG, OFF, ON, is_interpreting, window_attention_mode

if TYPE_CHECKING:
    from vllm_puzzle.serving.window_attention_backend import WindowAttentionBackend

CACHE_NAMES = {"fp8": "e4m3", "fp8_e4m3": "e4m3", "bfloat16": "bfloat16", "float16": "float16"}
# In `additional_config`, which vLLM hashes into the key of its compile cache: with our backend, rotation is not in the
# compiled graph.
HASHED = "puzzle_window_attention"


def choose_backend(
    spec: Attention, config: VllmConfig, prefix: str, rotary: nn.Module
) -> tuple[type[WindowAttentionBackend] | None, dict[str, Any]]:
    """(the layer's backend, None for vLLM's own; arguments of its implementation).

    Only layers with a window are ours. ConfigError where the flag says `on` and the backend cannot run.
    """
    mode = window_attention_mode()
    if spec.sliding_window is None or mode == OFF:
        return None, {}
    cache_dtype = _cache_dtype(spec, config, prefix)
    reasons = obstacles(spec, config, cache_dtype)
    if reasons and mode == ON:
        raise ConfigError(f"flag {FLAG}: found on, allowed: {AUTO} or {OFF}, as {'; '.join(reasons)} ({prefix})")
    choice = None
    if mode == AUTO and not reasons:
        cache_name = CACHE_NAMES.get(cache_dtype, str(torch.get_default_dtype()).removeprefix("torch."))
        choice = attention_table.choose(
            current_platform.get_device_name(), spec.head_dim, cache_name, spec.sliding_window + spec.num_sink_tokens
        )
    if mode == AUTO and choice is None:
        return None, {}
    from vllm_puzzle.serving.window_attention_backend import WindowAttentionBackend  # late: only where it is used

    say_once(logging.INFO, f"window layers attend by our kernels ({FLAG} off keeps vLLM's)")
    arguments: dict[str, Any] = {"window": spec.sliding_window, "num_sink_tokens": spec.num_sink_tokens}
    if choice is not None:
        arguments["fuses_decode"] = choice.fused
    # vLLM's V1 runner leaves the positions out of a micro-batch's metadata.
    if can_rotate(rotary, spec.head_dim) and not config.parallel_config.enable_dbo:
        arguments["rotary"] = rotary
    if isinstance(config.additional_config, dict):
        names = config.additional_config.setdefault(HASHED, [])
        names.append(f"{prefix}{' rotates' if 'rotary' in arguments else ''}")
    return WindowAttentionBackend, arguments


def can_rotate(rotary: nn.Module, head_dim: int) -> bool:
    """Whether the rotation is the kernel's: NeoX halves of whole heads, angles by position."""
    shape = getattr(getattr(rotary, "cos_sin_cache", None), "shape", (0,))
    return bool(getattr(rotary, "is_neox_style", False)) and shape[-1] == head_dim


def obstacles(spec: Attention, config: VllmConfig, cache_dtype: str) -> list[str]:
    """Why our backend cannot run this layer here, in vLLM's words; nothing where it can."""
    if not current_platform.is_cuda() and not (current_platform.is_cpu() and is_interpreting()):
        return ["it runs on NVIDIA GPUs (on a CPU under TRITON_INTERPRET=1, for tests)"]
    from vllm_puzzle.serving.window_attention_backend import WindowAttentionBackend

    parallel, cache = config.parallel_config, config.cache_config
    quantization: Any = config.quant_config
    scheme = getattr(quantization, "kv_cache_scheme", None) or {}
    return WindowAttentionBackend.validate_configuration(
        head_size=spec.head_dim,
        dtype=torch.get_default_dtype(),
        kv_cache_dtype=cache_dtype,
        block_size=cache.block_size if cache.user_specified_block_size else None,
        use_mla=False,
        has_sink=spec.has_sinks,
        use_sparse=False,
        use_mm_prefix=False,
        use_per_head_quant_scales=scheme.get("strategy") == "attn_head",
        device_capability=current_platform.get_device_capability(),
        attn_type="decoder",
        has_sliding_window=True,
        use_batch_invariant=envs.VLLM_BATCH_INVARIANT,
        use_pcp=parallel.prefill_context_parallel_size > 1,
        use_dcp=parallel.decode_context_parallel_size > 1,
    )


def _cache_dtype(spec: Attention, config: VllmConfig, prefix: str) -> str:
    """The layer's own: `--kv-cache-dtype-skip-layers` names layers, or all with a window that vLLM knows of."""
    skipped = config.cache_config.kv_cache_dtype_skip_layers or ()
    number = next((part for part in prefix.split(".") if part.isdigit()), "")
    is_skipped = number in skipped or ("sliding_window" in skipped and not spec.num_sink_tokens)
    return "auto" if is_skipped else str(config.cache_config.cache_dtype)
