"""What the kernels ask of a paged KV cache and of its scales: checks and views shared by their host sides."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
MAX_SLOTS = 2**31 - 1


def as_e4m3(cache: Tensor) -> Tensor:
    """A cache of bytes as e4m3, which is what vLLM keeps in them; others as they are."""
    return cache.view(torch.float8_e4m3fn) if cache.dtype == torch.uint8 else cache


def scale_step(scale: Tensor | None) -> int:
    """0 for one scale of a layer, 1 for one per KV head."""
    return 0 if scale is None or scale.numel() == 1 else 1


def check(
    where: str,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> bool:
    """Whether the cache is quantised; ValueError where the tensors do not fit each other. Shapes as in `write_kv`."""
    (_, num_kv_heads, head_dim), (num_blocks, cache_heads, page_size, cache_dim) = k.shape, k_cache.shape
    if k.shape != v.shape or k_cache.shape != v_cache.shape or (cache_heads, cache_dim) != (num_kv_heads, head_dim):
        shapes = [[*tensor.shape] for tensor in (k, v, k_cache, v_cache)]
        raise ValueError(f"{where}, shapes of k, v and caches: found {shapes}, allowed: [T, KH, D], [N, KH, page, D]")
    if any(tensor.stride(-1) != 1 for tensor in (k, v, k_cache, v_cache)) or head_dim % 2:
        raise ValueError(f"{where}, last dimension: found {head_dim} elements or gaps, allowed: even, without gaps")
    if num_blocks * page_size > MAX_SLOTS:
        raise ValueError(f"{where}, slots: found {num_blocks * page_size}, allowed: up to {MAX_SLOTS}")
    if k_cache.dtype != v_cache.dtype or k_cache.dtype not in (torch.float8_e4m3fn, *FLOATS):
        dtypes = k_cache.dtype, v_cache.dtype
        raise ValueError(f"{where}, cache dtype: found {dtypes}, allowed: e4m3, {', '.join(map(str, FLOATS))}")
    if k_cache.dtype != torch.float8_e4m3fn:
        return False
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scale is None or scale.dtype != torch.float32 or scale.numel() not in (1, num_kv_heads):
            found = "nothing" if scale is None else f"{scale.dtype} {[*scale.shape]}"
            raise ValueError(f"{where}, {name}: found {found}, allowed: float32, [1] or [{num_kv_heads}] (e4m3 cache)")
    return True
