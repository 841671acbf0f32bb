"""Device code of the KV-cache write: rotate, quantise and store in one launch (host side: kv_write.py).

A program takes BLOCK_T tokens of one head and BLOCK_D dimensions of each half of it, since rotation pairs dimension i
with i + D/2. The heads' axis of the grid holds the KV heads of K, those of V, then the query heads, which are rotated
and not stored. Head size and head counts are run-time numbers: one program serves layers of every shape.

Launch without floating-point fusion (`UNFUSED`): a rotation by fused multiply-adds rounds once less than the twin's,
and a code at a tie would differ.
"""
# Device code below has Triton's types, which mypy cannot state.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

UNFUSED = {"enable_fp_fusion": False}
_E4M3_MAX = tl.constexpr(448.0)


@triton.jit
def rotate_half(first, second, cos, sin):
    """NeoX rotation of a head's two halves; everything float32."""
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def stored(values, scale, QUANTISE: tl.constexpr, dtype: tl.constexpr):
    """float32 → what the cache holds: e4m3 of values / scale, to nearest even, ±448 at most, NaN stays; else a cast."""
    if QUANTISE:
        # A division that rounds as IEEE says: Triton's plain one is up to two units off.
        scaled = tl.div_rn(values, tl.zeros_like(values) + scale)
        values = tl.clamp(scaled, -_E4M3_MAX, _E4M3_MAX, propagate_nan=tl.PropagateNan.ALL)
    return values.to(dtype)


@triton.jit
def _load_halves(source, dims, half, mask):
    at = source[:, None] + dims[None, :]
    first, second = tl.load(at, mask=mask, other=0.0), tl.load(at + half, mask=mask, other=0.0)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def _store_halves(target, first, second, dims, half, mask, scale, QUANTISE: tl.constexpr):
    at = target[:, None] + dims[None, :]
    tl.store(at, stored(first, scale, QUANTISE, target.dtype.element_ty), mask=mask)
    tl.store(at + half, stored(second, scale, QUANTISE, target.dtype.element_ty), mask=mask)


@triton.jit
def _rotate_rows(source, target, angles, dims, half, is_read, is_stored, scale, QUANTISE: tl.constexpr):
    first, second = _load_halves(source, dims, half, is_read)
    cos, sin = _load_halves(angles, dims, half, is_read)
    first, second = rotate_half(first, second, cos, sin)
    _store_halves(target, first, second, dims, half, is_stored, scale, QUANTISE)


@triton.jit
def _copy_rows(source, target, dims, half, is_read, is_stored, scale, QUANTISE: tl.constexpr):
    first, second = _load_halves(source, dims, half, is_read)
    _store_halves(target, first, second, dims, half, is_stored, scale, QUANTISE)


@triton.jit
def kv_write_kernel(
    q, k, v, q_out, k_cache, v_cache, slots, positions, cos_sin, k_scale, v_scale,
    num_tokens, num_kv_heads, half, page_size,
    q_token, q_head, k_token, k_head, v_token, v_head, out_token, out_head,
    k_block, k_cache_head, k_page, v_block, v_cache_head, v_page,
    cos_sin_row, k_scale_step, v_scale_step,
    ROTATE: tl.constexpr, QUANTISE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid: (⌈num_tokens / BLOCK_T⌉, 2 · num_kv_heads + (query heads, where ROTATE), ⌈half / BLOCK_D⌉)."""
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    head = tl.program_id(1)
    dims = tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    is_token = tokens < num_tokens
    is_read = is_token[:, None] & (dims < half)[None, :]
    if ROTATE:
        angles = cos_sin + tl.load(positions + tokens, mask=is_token, other=0).to(tl.int64) * cos_sin_row
    if head < 2 * num_kv_heads:
        slot = tl.load(slots + tokens, mask=is_token, other=-1)
        is_stored = is_read & (slot >= 0)[:, None]
        # A cache has fewer than 2³¹ slots (the host checks), but not fewer elements.
        block, row = (slot.to(tl.int32) // page_size).to(tl.int64), (slot.to(tl.int32) % page_size).to(tl.int64)
        if head < num_kv_heads:
            k_rows, k_target = k + tokens * k_token + head * k_head, k_cache + block * k_block + row * k_page
            by_k = tl.load(k_scale + head * k_scale_step) if QUANTISE else 1.0
            k_target += head * k_cache_head
            if ROTATE:
                _rotate_rows(k_rows, k_target, angles, dims, half, is_read, is_stored, by_k, QUANTISE)
            else:
                _copy_rows(k_rows, k_target, dims, half, is_read, is_stored, by_k, QUANTISE)
        else:
            head -= num_kv_heads
            by_v = tl.load(v_scale + head * v_scale_step) if QUANTISE else 1.0
            v_target = v_cache + block * v_block + row * v_page + head * v_cache_head
            _copy_rows(v + tokens * v_token + head * v_head, v_target, dims, half, is_read, is_stored, by_v, QUANTISE)
    elif ROTATE:
        head -= 2 * num_kv_heads
        q_rows, q_target = q + tokens * q_token + head * q_head, q_out + tokens * out_token + head * out_head
        _rotate_rows(q_rows, q_target, angles, dims, half, is_read, is_read, 1.0, False)
