"""Attention over a paged cache (`reference.paged_attention`): a kernel for few rows, one for many, and the reduction.

Both visit live keys only (`window_attention_tiles.py`) and may split them over programs; then each writes its share and
`reduce_kernel` joins them in a fixed order. e4m3 codes become fp16, which is exact, and their scales are put on the
scores and on the output, never on a tile. The arguments of both are alike; `window_attention.py` says what they hold.
"""
# Device code has Triton's types, which mypy cannot state.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl
from vllm_puzzle.kernels.window_attention_tiles import (
    LOG2_E,
    find_keys,
    find_work,
    is_visible,
    live_keys,
    load_queries,
    normalizer,
    row_coordinates,
    softmax_step,
    store_rows,
    tile_span,
    unpack,
)

# They change from layer to layer and from step to step: one compiled form does for all.
NOT_SPECIALIZED = (
    "window", "num_sink_tokens", "has_sinks", "group", "num_kv_heads", "page", "page_magic", "page_shift",
    "table_stride", "k_scale_stride", "v_scale_stride", "num_seqs", "blocks_per_seq", "min_query_len",
    "max_query_len", "num_splits",
)  # fmt: skip


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def decode_kernel(
    q, k_cache, v_cache, out, partial_outputs, partial_statistics, block_table, seq_lens, query_start_loc,
    k_scale, v_scale, sinks, softmax_scale, window, num_sink_tokens, has_sinks, group, num_kv_heads, head_dim,
    page, page_magic, page_shift, q_token_stride, q_head_stride, out_token_stride, out_head_stride, table_stride,
    k_block_stride, k_head_stride, k_slot_stride, v_block_stride, v_head_stride, v_slot_stride,
    k_scale_stride, v_scale_stride, num_seqs, blocks_per_seq, min_query_len, max_query_len, num_splits,
    ROWS: tl.constexpr, TILE: tl.constexpr, D: tl.constexpr, KIND: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """Few rows: each warp takes a WARPS-th of every tile's keys and keeps a maximum, sum and output; joined at the end.

    So warps exchange nothing in the loop. `v_cache` holds two e4m3 codes to an int16 (a view), since shared memory is
    read transposed 16 bits at a time; even and odd columns are two products. Other caches come as they are.
    """
    split = tl.program_id(2)
    kv_head = tl.program_id(1)
    sequence, block, q_start, query_len, seq_len, has_work = find_work(
        query_start_loc, seq_lens, tl.program_id(0), num_seqs, blocks_per_seq, min_query_len, max_query_len, group, ROWS
    )
    if not has_work:
        return
    PAIRED: tl.constexpr = v_cache.dtype.element_ty == tl.int16
    COLUMNS: tl.constexpr = D // 2 if PAIRED else D
    queries = load_queries(
        q, q_token_stride, q_head_stride, q_start, block, query_len, group, kv_head, head_dim, ROWS, D, KIND
    )
    queries = tl.broadcast_to(queries[None, :, :], WARPS, ROWS, D)
    _, _, low, high, num_sinks, sink_tiles, num_tiles = live_keys(
        block, seq_len, query_len, group, window, num_sink_tokens, ROWS, TILE
    )
    share = tl.cdiv(num_tiles, num_splits)
    begin = split * share
    end = tl.minimum(begin + share, num_tiles)
    scale = tl.load(k_scale + kv_head * k_scale_stride) * softmax_scale * LOG2_E
    acc, acc_odd, top, total = _attend_by_warps(
        queries, begin, end, low, high, num_sinks, sink_tiles, num_sink_tokens, window, block, seq_len, query_len,
        group, kv_head, scale, k_cache + kv_head.to(tl.int64) * k_head_stride,
        v_cache + kv_head.to(tl.int64) * v_head_stride, block_table + sequence.to(tl.int64) * table_stride, page,
        page_magic, page_shift, k_block_stride, k_slot_stride, v_block_stride, v_slot_stride, head_dim,
        ROWS, TILE, D, KIND, WARPS, PAIRED, COLUMNS,
    )  # fmt: skip
    joint = tl.max(top, 0)
    shares = tl.exp2(top - tl.where(joint == float("-inf"), 0.0, joint)[None, :])
    result = tl.sum(acc * shares[:, :, None], 0)
    if PAIRED:
        result = tl.reshape(tl.join(result, tl.sum(acc_odd * shares[:, :, None], 0)), (ROWS, D))
    store_rows(
        result, joint, tl.sum(total * shares, 0), tl.load(v_scale + kv_head * v_scale_stride), sequence, block,
        q_start, query_len, kv_head, split, begin < end, out, partial_outputs, partial_statistics, sinks, has_sinks,
        group, num_kv_heads, head_dim, out_token_stride, out_head_stride, max_query_len, num_splits, ROWS, D,
    )  # fmt: skip


@triton.jit
def _attend_by_warps(
    queries, begin, end, low, high, num_sinks, sink_tiles, num_sink_tokens, window, block, seq_len, query_len, group,
    kv_head, scale, k_head, v_head, table, page, page_magic, page_shift, k_block_stride, k_slot_stride,
    v_block_stride, v_slot_stride, head_dim, ROWS: tl.constexpr, TILE: tl.constexpr, D: tl.constexpr,
    KIND: tl.constexpr, WARPS: tl.constexpr, PAIRED: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The loop of `decode_kernel` over tiles begin to end. queries: [WARPS, ROWS, D], the same WARPS times.

    Returns [WARPS, ROWS, COLUMNS] twice, the second for odd columns, and [WARPS, ROWS] maxima and sums.
    """
    _, tokens, _, is_row = row_coordinates(block, query_len, group, kv_head, ROWS)
    last_key = tl.where(is_row, seq_len - query_len + tokens, -1)[None, :, None]
    first_key = last_key - window + 1
    dims = tl.arange(0, D)[None, None, :]
    columns = tl.arange(0, COLUMNS)[None, None, :]
    num_columns = head_dim // 2 if PAIRED else head_dim
    places = tl.arange(0, WARPS)[:, None] * (TILE // WARPS) + tl.arange(0, TILE // WARPS)[None, :]
    top = tl.full([WARPS, ROWS], float("-inf"), tl.float32)
    total = tl.zeros([WARPS, ROWS], tl.float32)
    acc = tl.zeros([WARPS, ROWS, COLUMNS], tl.float32)
    acc_odd = tl.zeros([WARPS, ROWS, COLUMNS], tl.float32)
    for index in range(begin, end):
        start, limit = tile_span(index, low, high, num_sinks, sink_tiles, TILE)
        keys = start + places
        # Beyond the end the last key is read again: it exists, and costs no memory traffic.
        blocks, slots = find_keys(tl.minimum(keys, limit - 1), table, page, page_magic, page_shift)
        k_rows = k_head + (blocks * k_block_stride + slots * k_slot_stride)[:, :, None]
        v_rows = v_head + (blocks * v_block_stride + slots * v_slot_stride)[:, :, None]
        v = tl.load(v_rows + columns, mask=columns < num_columns, other=0)
        k = tl.load(k_rows + dims, mask=dims < head_dim, other=0.0).to(KIND)
        scores = tl.dot(queries, tl.permute(k, (0, 2, 1)), input_precision="ieee")
        seen = is_visible(keys, limit, num_sink_tokens, first_key, last_key, 1)
        weights, fade, top, total = softmax_step(tl.where(seen, scores, float("-inf")), top, total, scale, 2)
        weights = weights.to(KIND)
        if PAIRED:
            even, odd = unpack(v, KIND)
            acc = tl.dot(weights, even, acc * fade[:, :, None], input_precision="ieee")
            acc_odd = tl.dot(weights, odd, acc_odd * fade[:, :, None], input_precision="ieee")
        else:
            acc = tl.dot(weights, v.to(KIND), acc * fade[:, :, None], input_precision="ieee")
    return acc, acc_odd, top, total


@triton.jit
def _attend_tile(
    acc, top, total, queries, index, low, high, num_sinks, sink_tiles, num_sink_tokens, first_key, last_key, scale,
    k_head, v_head, table, page, page_magic, page_shift, k_block_stride, k_slot_stride, v_block_stride, v_slot_stride,
    head_dim, IS_EDGE: tl.constexpr, TILE: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """One tile of `rows_kernel`. Only an edge tile has keys that some row does not see, or that do not exist."""
    start, limit = tile_span(index, low, high, num_sinks, sink_tiles, TILE)
    keys = start + tl.arange(0, TILE)
    read = tl.minimum(keys, limit - 1) if IS_EDGE else keys
    blocks, slots = find_keys(read, table, page, page_magic, page_shift)
    dims = tl.arange(0, D)[None, :]
    k_rows = k_head + (blocks * k_block_stride + slots * k_slot_stride)[:, None]
    v_rows = v_head + (blocks * v_block_stride + slots * v_slot_stride)[:, None]
    k = tl.load(k_rows + dims, mask=dims < head_dim, other=0.0).to(queries.dtype)
    v = tl.load(v_rows + dims, mask=dims < head_dim, other=0.0).to(queries.dtype)
    scores = tl.dot(queries, tl.trans(k), input_precision="ieee")
    if IS_EDGE:
        seen = is_visible(keys, limit, num_sink_tokens, first_key[:, None], last_key[:, None], 0)
        scores = tl.where(seen, scores, float("-inf"))
    weights, fade, top, total = softmax_step(scores, top, total, scale, 1)
    acc = tl.dot(weights.to(queries.dtype), v, acc * fade[:, None], input_precision="ieee")
    return acc, top, total


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def rows_kernel(
    q, k_cache, v_cache, out, partial_outputs, partial_statistics, block_table, seq_lens, query_start_loc,
    k_scale, v_scale, sinks, softmax_scale, window, num_sink_tokens, has_sinks, group, num_kv_heads, head_dim,
    page, page_magic, page_shift, q_token_stride, q_head_stride, out_token_stride, out_head_stride, table_stride,
    k_block_stride, k_head_stride, k_slot_stride, v_block_stride, v_head_stride, v_slot_stride,
    k_scale_stride, v_scale_stride, num_seqs, blocks_per_seq, min_query_len, max_query_len, num_splits,
    ROWS: tl.constexpr, TILE: tl.constexpr, D: tl.constexpr, KIND: tl.constexpr, HAS_INNER: tl.constexpr,
):  # fmt: skip
    """Many rows (prefill, chunks, drafts to verify): all warps share a tile, and its matrices fill a warp group's.

    With HAS_INNER the tiles that every row sees whole have a loop of their own, without masks; its registers are more.
    """
    split = tl.program_id(2)
    kv_head = tl.program_id(1)
    # The last blocks first: without a window they see the most keys.
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    sequence, block, q_start, query_len, seq_len, has_work = find_work(
        query_start_loc, seq_lens, pid, num_seqs, blocks_per_seq, min_query_len, max_query_len, group, ROWS
    )
    if not has_work:
        return
    queries = load_queries(
        q, q_token_stride, q_head_stride, q_start, block, query_len, group, kv_head, head_dim, ROWS, D, KIND
    )
    first_token, last_token, low, high, num_sinks, sink_tiles, num_tiles = live_keys(
        block, seq_len, query_len, group, window, num_sink_tokens, ROWS, TILE
    )
    share = tl.cdiv(num_tiles, num_splits)
    begin = split * share
    end = tl.minimum(begin + share, num_tiles)
    scale = tl.load(k_scale + kv_head * k_scale_stride) * softmax_scale * LOG2_E
    acc, top, total = _attend_by_edges(
        queries, begin, end, first_token, last_token, low, high, num_sinks, sink_tiles, num_sink_tokens, window, block,
        seq_len, query_len, group, kv_head, scale, k_cache + kv_head.to(tl.int64) * k_head_stride,
        v_cache + kv_head.to(tl.int64) * v_head_stride, block_table + sequence.to(tl.int64) * table_stride, page,
        page_magic, page_shift, k_block_stride, k_slot_stride, v_block_stride, v_slot_stride, head_dim,
        ROWS, TILE, D, HAS_INNER,
    )  # fmt: skip
    store_rows(
        acc, top, total, tl.load(v_scale + kv_head * v_scale_stride), sequence, block, q_start, query_len, kv_head,
        split, begin < end, out, partial_outputs, partial_statistics, sinks, has_sinks, group, num_kv_heads, head_dim,
        out_token_stride, out_head_stride, max_query_len, num_splits, ROWS, D,
    )  # fmt: skip


@triton.jit
def _attend_by_edges(
    queries, begin, end, first_token, last_token, low, high, num_sinks, sink_tiles, num_sink_tokens, window, block,
    seq_len, query_len, group, kv_head, scale, k_head, v_head, table, page, page_magic, page_shift, k_block_stride,
    k_slot_stride, v_block_stride, v_slot_stride, head_dim, ROWS: tl.constexpr, TILE: tl.constexpr, D: tl.constexpr,
    HAS_INNER: tl.constexpr,
):  # fmt: skip
    """The loops of `rows_kernel` over tiles begin to end: edges first, then the inner ones. Output, maxima and sums."""
    _, tokens, _, is_row = row_coordinates(block, query_len, group, kv_head, ROWS)
    last_key = tl.where(is_row, seq_len - query_len + tokens, -1)
    first_key = last_key - window + 1
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D], tl.float32)
    left, right = end, end
    if HAS_INNER:  # from the last row's first key up to the first row's own
        position = seq_len - query_len
        left = sink_tiles + tl.cdiv(tl.maximum(position + last_token - window + 1 - low, 0), TILE)
        left = tl.minimum(tl.maximum(left, begin), end)
        right = sink_tiles + (position + first_token + 1 - low) // TILE
        right = tl.minimum(tl.maximum(right, left), end)
    for step in range(begin, end - (right - left)):
        index = tl.where(step < left, step, step + right - left)
        acc, top, total = _attend_tile(
            acc, top, total, queries, index, low, high, num_sinks, sink_tiles, num_sink_tokens, first_key, last_key,
            scale, k_head, v_head, table, page, page_magic, page_shift, k_block_stride, k_slot_stride, v_block_stride,
            v_slot_stride, head_dim, True, TILE, D,
        )  # fmt: skip
    if HAS_INNER:
        for index in range(left, right):
            acc, top, total = _attend_tile(
                acc, top, total, queries, index, low, high, num_sinks, sink_tiles, num_sink_tokens, first_key,
                last_key, scale, k_head, v_head, table, page, page_magic, page_shift, k_block_stride, k_slot_stride,
                v_block_stride, v_slot_stride, head_dim, False, TILE, D,
            )  # fmt: skip
    return acc, top, total


@triton.jit(do_not_specialize=NOT_SPECIALIZED)
def reduce_kernel(
    out, partial_outputs, partial_statistics, seq_lens, query_start_loc, sinks, has_sinks, group, num_kv_heads,
    head_dim, out_token_stride, out_head_stride, min_query_len, max_query_len, num_splits,
    COLUMNS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Join the splits of one token and head, SPLITS at a time, in their order. Splits without keys are not read."""
    sequence = tl.program_id(0) // max_query_len
    token = tl.program_id(0) % max_query_len
    head = tl.program_id(1)
    q_start = tl.load(query_start_loc + sequence)
    query_len = tl.load(query_start_loc + sequence + 1) - q_start
    is_mine = (query_len >= min_query_len) & (query_len <= max_query_len) & (tl.load(seq_lens + sequence) > 0)
    if (not is_mine) | (token >= query_len):
        return
    dims = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    first = (sequence * num_kv_heads + head // group).to(tl.int64) * num_splits * max_query_len * group
    first += token * group + head % group
    top = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, num_splits, SPLITS):
        splits = start + tl.arange(0, SPLITS)
        rows = first + splits * (max_query_len * group)
        tops = tl.load(partial_statistics + 2 * rows, mask=splits < num_splits, other=float("-inf"))
        totals = tl.load(partial_statistics + 2 * rows + 1, mask=splits < num_splits, other=0.0)
        mask = (totals > 0.0)[:, None] & (dims < head_dim)[None, :]
        outputs = tl.load(partial_outputs + rows[:, None] * head_dim + dims[None, :], mask=mask, other=0.0)
        new_top = tl.maximum(top, tl.max(tops, 0))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        shares = tl.exp2(tops - base)
        fade = tl.exp2(top - base)
        top = new_top
        total = total * fade + tl.sum(totals * shares, 0)
        acc = acc * fade + tl.sum(outputs * shares[:, None], 0)
    heads = head + tl.zeros([1], tl.int32)
    result = acc * normalizer(top, total, sinks, heads, heads >= 0, has_sinks)
    offset = (q_start + token).to(tl.int64) * out_token_stride + head * out_head_stride
    tl.store(out + offset + dims, result.to(out.dtype.element_ty), mask=dims < head_dim)
