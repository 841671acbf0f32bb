"""One new token per sequence: rotate q and k, store K and V, attend; one launch for a small window.

Definition: `reference.fused_decode`. Each program walks its window alone, so the launch takes as long as one window
does; beyond MAX_WINDOW keys a split over the window (window_attention.py) is the better way.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from vllm_puzzle.kernels.cache_layout import as_e4m3, check, scale_step
from vllm_puzzle.kernels.fused_decode_triton import fused_decode_kernel
from vllm_puzzle.kernels.kv_write_triton import UNFUSED
from vllm_puzzle.kernels.variant import Variant

MAX_WINDOW = 1024
GROUP = 16  # rows of the smallest matrix instruction
MIN_HALF = 16
NUM_STAGES = 3
_NO_WINDOW = 2**31 - 1


def fused_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    out: Tensor,
    *,
    slot_mapping: Tensor,
    positions: Tensor,
    cos_sin_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    softmax_scale: float,
    sliding_window: int | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    sinks: Tensor | None = None,
    num_sink_tokens: int = 0,
) -> None:
    """`reference.fused_decode` into `out`, [B, H, D]. Tensors of caches, scales and rotation as in kv_write.py.

    q: [B, H, D], k, v: [B, KH, D], not rotated yet; block_table: [B, pages] int32; seq_lens: [B] int32, the new token
    included; sinks: [H]. `sliding_window` counts the keys seen, the new one included. ValueError for tensors that do
    not fit each other.
    """
    k_cache, v_cache = as_e4m3(k_cache), as_e4m3(v_cache)
    quantises = check("fused decode", k, v, k_cache, v_cache, k_scale, v_scale)
    (num_seqs, num_kv_heads, head_dim), num_heads = k.shape, q.shape[1]
    if q.shape != out.shape or q.shape[0] != num_seqs or q.shape[2] != head_dim or num_heads % num_kv_heads:
        shapes = [[*tensor.shape] for tensor in (q, k, out)]
        raise ValueError(f"fused decode, q, k and out: found {shapes}, allowed: [B, H, D], [B, KH, D], [B, H, D]")
    if cos_sin_cache.shape[-1] != head_dim or q.stride(2) != 1 or out.stride(2) != 1:
        found = [*cos_sin_cache.shape], q.stride(2), out.stride(2)
        raise ValueError(f"fused decode, rotation: found {found}, allowed: [max_position, {head_dim}], strides of 1")
    if num_seqs == 0:
        return
    group = num_heads // num_kv_heads
    half, tile, num_warps = _shape(head_dim)
    fused_decode_kernel[num_seqs, num_kv_heads, triton.cdiv(group, GROUP)](
        q, k, v, k_cache, v_cache, out, slot_mapping, positions, cos_sin_cache, block_table, seq_lens,
        k_scale if quantises else None, v_scale if quantises else None, sinks,
        group, head_dim // 2, k_cache.shape[2], sliding_window or _NO_WINDOW, num_sink_tokens, softmax_scale,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *out.stride()[:2], *k_cache.stride()[:3],
        *v_cache.stride()[:3], cos_sin_cache.stride(0), block_table.stride(0), scale_step(k_scale), scale_step(v_scale),
        QUANTISE=quantises, P_DTYPE=_weights_dtype(q.dtype, k_cache.dtype), GROUP=GROUP, HALF=half, TILE=tile,
        num_warps=num_warps, num_stages=NUM_STAGES, **UNFUSED,
    )  # fmt: skip


def _shape(head_dim: int) -> tuple[int, int, int]:
    """(HALF, TILE, warps) that spill nothing."""
    half = max(MIN_HALF, triton.next_power_of_2(head_dim // 2))
    return half, 64 if half <= 64 else 32, 4 if half <= 32 else 8


def _weights_dtype(q: torch.dtype, cache: torch.dtype) -> tl.dtype:
    """In what P·V is multiplied: e4m3 values are exact in float16, where weights up to 1 keep 11 bits."""
    if q == torch.float32 or cache == torch.float32:
        return tl.float32
    return tl.bfloat16 if cache == torch.bfloat16 else tl.float16


def variants() -> tuple[Variant, ...]:
    """bfloat16 with an e4m3 cache, D of 64 (with learned sinks) and of 96 to 128; others take the same program."""
    pointers = dict.fromkeys(("q", "k", "v", "out", "cos_sin"), "*bf16")
    pointers |= dict.fromkeys(("k_cache", "v_cache"), "*fp8e4nv") | dict.fromkeys(("slots", "positions"), "*i64")
    pointers |= dict.fromkeys(("block_table", "seq_lens"), "*i32") | dict.fromkeys(("k_scale", "v_scale"), "*fp32")
    # What need not be a multiple of 16.
    odd = {"group", "page_size", "window", "num_sink_tokens", "softmax_scale", "table_row"}
    odd |= {"k_scale_step", "v_scale_step"}
    found = []
    for head_dim, sinks in ((64, {"sinks": "*fp32"}), (128, {})):
        signature = pointers | sinks
        names = [n for n in fused_decode_kernel.arg_names if n not in signature and not n.isupper() and n != "sinks"]
        signature |= dict.fromkeys(names, "i32") | {"softmax_scale": "fp32"}
        half, tile, num_warps = _shape(head_dim)
        constants = {"QUANTISE": True, "P_DTYPE": tl.float16, "GROUP": GROUP, "HALF": half, "TILE": tile}
        found.append(
            Variant(
                name=f"fused_decode_d{head_dim}_bf16_e4m3",
                kernel=fused_decode_kernel,
                signature=signature,
                constexprs=constants | ({} if sinks else {"sinks": None}),
                num_warps=num_warps,
                num_stages=NUM_STAGES,
                aligned=tuple(name for name in signature if name not in odd),
                options=UNFUSED,
            )
        )
    return tuple(found)
