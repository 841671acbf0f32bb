"""vLLM's own kernels as callables, for comparison only: nothing that serves uses them from here."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

# Where vLLM 0.32 keeps each. What is missing in an installation (a CPU build, another version) is told by name.
PLACES = {
    "unified_attention": "vllm.v1.attention.ops.triton_unified_attention",
    "KVQuantMode": "vllm.v1.kv_cache_interface",
    "triton_reshape_and_cache_flash": "vllm.v1.attention.ops.triton_reshape_and_cache_flash",
    "w8a8_triton_block_scaled_mm": "vllm.model_executor.layers.quantization.utils.fp8_utils",
    "flash_attn_varlen_func": "vllm.vllm_flash_attn",
}


def find_stock(name: str) -> Callable[..., Any]:
    """One of PLACES from the installed vLLM. Raises ImportError or AttributeError with the reason."""
    return getattr(importlib.import_module(PLACES[name]), name)
