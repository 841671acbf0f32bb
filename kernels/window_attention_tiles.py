"""Device functions that the attention kernels share: which keys a block of query rows sees, where they lie, softmax.

The rows of a block are (token, query head) pairs of one sequence and one KV head, token by token, so that any group
size fills a tile. Its keys are the live window, from the first key of its first row to its last row's own, cut into
tiles that start at the window's first key and not at a multiple of the tile (a window of one tile's size is one tile);
before them come the sink tokens that lie left of the window. Nothing is visited twice.
"""
# Device code has Triton's types, which mypy cannot state.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import math

import triton
import triton.language as tl

LOG2_E = tl.constexpr(math.log2(math.e))
FAR = tl.constexpr(2**30)  # beyond any position
FP16_MAX = tl.constexpr(65504.0)


@triton.jit
def find_rows(query_start_loc, pid, num_seqs, blocks_per_seq, group, ROWS: tl.constexpr):
    """A program's sequence and its block of ROWS rows there. blocks_per_seq 0: sequences have blocks by their length.

    Then sequence b's blocks start at `query_start_loc[b] · group // ROWS + b`, which leaves room for all of them.
    """
    if blocks_per_seq > 0:
        sequence = pid // blocks_per_seq
        block = pid % blocks_per_seq
    else:
        sequence = 0
        high = num_seqs
        while high - sequence > 1:
            middle = (sequence + high) // 2
            if tl.load(query_start_loc + middle) * group // ROWS + middle <= pid:
                sequence = middle
            else:
                high = middle
        block = pid - tl.load(query_start_loc + sequence) * group // ROWS - sequence
    return sequence, block


@triton.jit
def find_work(
    query_start_loc, seq_lens, pid, num_seqs, blocks_per_seq, min_query_len, max_query_len, group, ROWS: tl.constexpr
):
    """What a program works on: sequence, block, the sequence's first row of q, its lengths; and whether at all.

    Not at all: a sequence whose query length is another launch's, padding (length 0), a block beyond the last row.
    """
    sequence, block = find_rows(query_start_loc, pid, num_seqs, blocks_per_seq, group, ROWS)
    q_start = tl.load(query_start_loc + sequence)
    query_len = tl.load(query_start_loc + sequence + 1) - q_start
    seq_len = tl.load(seq_lens + sequence)
    is_mine = (query_len >= min_query_len) & (query_len <= max_query_len) & (seq_len > 0)
    return sequence, block, q_start, query_len, seq_len, is_mine & (block * ROWS < query_len * group)


@triton.jit
def row_coordinates(block, query_len, group, kv_head, ROWS: tl.constexpr):
    """Of a block's rows: their number in the sequence, their token there, query head, and whether they exist."""
    rows = block * ROWS + tl.arange(0, ROWS)
    tokens = rows // group
    return rows, tokens, kv_head * group + rows - tokens * group, tokens < query_len


@triton.jit
def live_keys(block, seq_len, query_len, group, window, num_sink_tokens, ROWS: tl.constexpr, TILE: tl.constexpr):
    """Of a block: first and last token, its keys [low, high) and [0, num_sinks), the tiles of the sinks, of all."""
    first_token = block * ROWS // group
    last_token = tl.minimum((block * ROWS + ROWS - 1) // group, query_len - 1)
    low = tl.maximum(seq_len - query_len + first_token - window + 1, 0)
    high = seq_len - query_len + last_token + 1
    num_sinks = tl.minimum(num_sink_tokens, low)
    sink_tiles = tl.cdiv(num_sinks, TILE)
    return first_token, last_token, low, high, num_sinks, sink_tiles, sink_tiles + tl.cdiv(high - low, TILE)


@triton.jit
def tile_span(index, low, high, num_sinks, sink_tiles, TILE: tl.constexpr):
    """The first key of tile `index`, sink tiles first, and the key that it must stop before."""
    is_sink = index < sink_tiles
    start = tl.where(is_sink, index * TILE, low + (index - sink_tiles) * TILE)
    return start, tl.where(is_sink, num_sinks, high)


@triton.jit
def find_keys(keys, table, page, page_magic, page_shift):
    """Block (int64) and slot of each key. The division by the page size is a multiplication, exact below 2^30."""
    pages = tl.umulhi(keys, page_magic) >> page_shift
    return tl.load(table + pages).to(tl.int64), keys - pages * page


@triton.jit
def is_visible(keys, limit, num_sink_tokens, first_key, last_key, AXIS: tl.constexpr):
    """Which rows see which keys; `keys` and the rows' bounds lack each other's dimension, keys that of AXIS."""
    upper = tl.expand_dims(tl.where(keys < limit, keys, FAR), AXIS)
    lower = tl.expand_dims(tl.where(keys < num_sink_tokens, FAR, keys), AXIS)
    return (upper <= last_key) & (lower >= first_key)


@triton.jit
def softmax_step(scores, top, total, scale, AXIS: tl.constexpr):
    """One tile of the online softmax, base 2: weights, the factor on what was summed before, new maximum, new sum."""
    new_top = tl.maximum(top, tl.max(scores, AXIS) * scale)
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(scores * scale - tl.expand_dims(base, AXIS))
    fade = tl.exp2(top - base)
    return weights, fade, new_top, total * fade + tl.sum(weights, AXIS)


@triton.jit
def normalizer(top, total, sinks, heads, is_row, has_sinks):
    """1 / the softmax's denominator, the learned sinks in it (logits as they are: no softmax scale). 0 without keys.

    They come last and not as the first maximum, so that weights in fp16 stay relative to the largest key.
    """
    sink = tl.load(sinks + heads, mask=is_row & (has_sinks != 0), other=float("-inf")) * LOG2_E
    base = tl.maximum(top, sink)
    base = tl.where(base == float("-inf"), 0.0, base)
    fade = tl.exp2(top - base)
    denominator = total * fade + tl.exp2(sink - base)
    return fade / tl.where(denominator > 0.0, denominator, 1.0)


@triton.jit
def load_queries(
    q, q_token_stride, q_head_stride, q_start, block, query_len, group, kv_head, head_dim,
    ROWS: tl.constexpr, D: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    """A block's query rows as KIND [ROWS, D], saturated when that is fp16 (a bfloat16 query may be larger)."""
    _, tokens, heads, is_row = row_coordinates(block, query_len, group, kv_head, ROWS)
    dims = tl.arange(0, D)
    offsets = (q_start + tokens).to(tl.int64) * q_token_stride + heads * q_head_stride
    mask = is_row[:, None] & (dims < head_dim)[None, :]
    values = tl.load(q + offsets[:, None] + dims[None, :], mask=mask, other=0.0)
    if KIND != q.dtype.element_ty and KIND == tl.float16:  # noqa: SIM300
        values = tl.clamp(values.to(tl.float32), -FP16_MAX, FP16_MAX)
    return values.to(KIND)


@triton.jit
def unpack(pairs, KIND: tl.constexpr):
    """Two e4m3 codes to an int16 → the even and the odd columns as KIND."""
    even = pairs.to(tl.int8).to(tl.float8e4nv, bitcast=True)
    odd = (pairs >> 8).to(tl.int8).to(tl.float8e4nv, bitcast=True)
    return even.to(KIND), odd.to(KIND)


@triton.jit
def store_rows(
    acc, top, total, v_scale, sequence, block, q_start, query_len, kv_head, split, has_keys,
    out, partial_outputs, partial_statistics, sinks, has_sinks, group, num_kv_heads, head_dim,
    out_token_stride, out_head_stride, max_query_len, num_splits, ROWS: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Store a block's output rows, or this split's share of them. acc: [ROWS, D], weights times V's codes."""
    rows, tokens, heads, is_row = row_coordinates(block, query_len, group, kv_head, ROWS)
    dims = tl.arange(0, D)
    mask = is_row[:, None] & (dims < head_dim)[None, :]
    if num_splits > 1:
        first = ((sequence * num_kv_heads + kv_head).to(tl.int64) * num_splits + split) * (max_query_len * group)
        tl.store(partial_statistics + 2 * (first + rows), top, mask=is_row)
        tl.store(partial_statistics + 2 * (first + rows) + 1, total, mask=is_row)
        if has_keys:  # else the reduction finds a sum of 0 and does not read the output
            tl.store(partial_outputs + (first + rows)[:, None] * head_dim + dims[None, :], acc * v_scale, mask=mask)
    else:
        result = acc * (v_scale * normalizer(top, total, sinks, heads, is_row, has_sinks))[:, None]
        offsets = (q_start + tokens).to(tl.int64) * out_token_stride + heads * out_head_stride
        tl.store(out + offsets[:, None] + dims[None, :], result.to(out.dtype.element_ty), mask=mask)
