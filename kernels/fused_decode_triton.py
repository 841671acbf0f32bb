"""Device code of the fused decode step: rotate, store and attend in one launch (host side: fused_decode.py).

A program serves up to GROUP query heads that share one KV head of one sequence. It holds its sequence's new token in
registers, in the form that the cache stores, so it need not wait for the store; only older keys are read from pages.
"""
# Device code below has Triton's types, which mypy cannot state.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl
from vllm_puzzle.kernels.kv_write_triton import rotate_half, stored

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load(pointer, mask):
    return tl.load(pointer, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _new_key(k, k_row, dims, half, is_dim, cos, sin, scale, is_writer, QUANTISE: tl.constexpr):
    """The new token's rotated key, stored in its row by one of the programs that need it; as the cache holds it."""
    first, second = rotate_half(_load(k + dims, is_dim), _load(k + half + dims, is_dim), cos, sin)
    first = stored(first, scale, QUANTISE, k_row.dtype.element_ty)
    second = stored(second, scale, QUANTISE, k_row.dtype.element_ty)
    tl.store(k_row + dims, first, mask=is_dim & is_writer)
    tl.store(k_row + half + dims, second, mask=is_dim & is_writer)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def _older_keys(
    q1, q2, top, total, sums, k_heads, v_heads, pages, seq_len, window, num_sink_tokens, dims, columns, half, page_size,
    k_block, k_page, v_block, v_page, scale, P_DTYPE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The running softmax after the first tokens, where some stay in view, and the window: (total, sums)."""
    begin = tl.maximum(seq_len - window, 0)
    kept = tl.minimum(num_sink_tokens, begin)
    count = kept + seq_len - 1 - begin
    is_dim, is_column = (dims < half)[:, None], (columns < 2 * half)[None, :]
    for start in tl.range(0, count, TILE):
        index = start + tl.arange(0, TILE)
        is_key = index < count
        key = tl.where(index < kept, index, index - kept + begin)
        page = tl.load(pages + key // page_size, mask=is_key, other=0).to(tl.int64)
        row = (key % page_size).to(tl.int64)
        k_at = (k_heads + page * k_block + row * k_page)[None, :] + dims[:, None]
        v_at = (v_heads + page * v_block + row * v_page)[:, None] + columns[None, :]
        k1 = tl.load(k_at, mask=is_dim & is_key[None, :], other=0.0)
        k2 = tl.load(k_at + half, mask=is_dim & is_key[None, :], other=0.0)
        values = tl.load(v_at, mask=is_key[:, None] & is_column, other=0.0)
        scores = tl.dot(q1, k1.to(q1.dtype), input_precision="ieee")
        scores = tl.dot(q2, k2.to(q1.dtype), scores, input_precision="ieee") * scale
        scores = tl.where(is_key[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        shrink, weights = tl.exp2(top - new_top), tl.exp2(scores - new_top[:, None])
        total = total * shrink + tl.sum(weights, axis=1)
        sums = tl.dot(weights.to(P_DTYPE), values.to(P_DTYPE), sums * shrink[:, None], input_precision="ieee")
        top = new_top
    return total, sums


@triton.jit
def fused_decode_kernel(
    q, k, v, k_cache, v_cache, out, slots, positions, cos_sin, block_table, seq_lens, k_scale, v_scale, sinks,
    group, half, page_size, window, num_sink_tokens, softmax_scale,
    q_token, q_head, k_token, k_head, v_token, v_head, out_token, out_head,
    k_block, k_cache_head, k_page, v_block, v_cache_head, v_page,
    cos_sin_row, table_row, k_scale_step, v_scale_step,
    QUANTISE: tl.constexpr, P_DTYPE: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Grid: (sequences, KV heads, ⌈group / GROUP⌉). HALF is half a head, filled up to a power of two."""
    sequence, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    member = tl.program_id(2) * GROUP + tl.arange(0, GROUP)
    heads, is_head = head * group + member, member < group
    dims, columns = tl.arange(0, HALF), tl.arange(0, 2 * HALF)
    is_dim, is_column = dims < half, columns < 2 * half
    seq_len, slot = tl.load(seq_lens + sequence), tl.load(slots + sequence)
    out_at = out + sequence * out_token + heads[:, None] * out_head + columns[None, :]
    is_out = is_head[:, None] & is_column[None, :]
    if (slot < 0) | (seq_len <= 0):
        tl.store(out_at, tl.zeros([GROUP, 2 * HALF], tl.float32).to(out.dtype.element_ty), mask=is_out)
        return

    angles = cos_sin + tl.load(positions + sequence).to(tl.int64) * cos_sin_row + dims
    cos, sin = _load(angles, is_dim), _load(angles + half, is_dim)
    q_at, is_q = q + sequence * q_token + heads[:, None] * q_head + dims[None, :], is_head[:, None] & is_dim[None, :]
    q1, q2 = rotate_half(_load(q_at, is_q), _load(q_at + half, is_q), cos[None, :], sin[None, :])
    q1, q2 = q1.to(q.dtype.element_ty), q2.to(q.dtype.element_ty)

    by_k = tl.load(k_scale + head * k_scale_step) if QUANTISE else 1.0
    by_v = tl.load(v_scale + head * v_scale_step) if QUANTISE else 1.0
    block, row, is_writer = slot // page_size, slot % page_size, tl.program_id(2) == 0
    k_heads, v_heads = k_cache + head * k_cache_head, v_cache + head * v_cache_head
    k_at, k_row = k + sequence * k_token + head * k_head, k_heads + block * k_block + row * k_page
    new_k1, new_k2 = _new_key(k_at, k_row, dims, half, is_dim, cos, sin, by_k, is_writer, QUANTISE)
    new_v = _load(v + sequence * v_token + head * v_head + columns, is_column)
    new_v = stored(new_v, by_v, QUANTISE, v_cache.dtype.element_ty)
    tl.store(v_heads + block * v_block + row * v_page + columns, new_v, mask=is_column & is_writer)

    # In powers of two; the new token, and the sink if there is one, start the running softmax.
    scale = softmax_scale * by_k * _LOG2_E
    score = tl.sum(q1.to(tl.float32) * new_k1[None, :] + q2.to(tl.float32) * new_k2[None, :], axis=1) * scale
    top, total = score, tl.full([GROUP], 1.0, tl.float32)
    if sinks is not None:
        sink = tl.load(sinks + heads, mask=is_head, other=0.0).to(tl.float32) * _LOG2_E
        top = tl.maximum(score, sink)
        total = tl.exp2(score - top) + tl.exp2(sink - top)
    weight = tl.exp2(score - top).to(P_DTYPE).to(tl.float32)
    total, sums = _older_keys(
        q1, q2, top, total, weight[:, None] * new_v.to(tl.float32)[None, :], k_heads, v_heads,
        block_table + sequence * table_row, seq_len, window, num_sink_tokens, dims, columns, half, page_size,
        k_block, k_page, v_block, v_page, scale, P_DTYPE, TILE,
    )  # fmt: skip
    tl.store(out_at, (sums * (by_v / total)[:, None]).to(out.dtype.element_ty), mask=is_out)
