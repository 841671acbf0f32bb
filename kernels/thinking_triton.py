"""The thinking machine (`thinking.py`, the specification) on device tensors, one Triton program per request.

State lives in one row of int32 per request slot (`Column`) and one run length per distance (`runs`). A launch feeds
each scheduled request the tokens committed since the last one, stores its state, then walks its drafts on a local copy
and writes 1e9 into the logit of each forced token. Nothing is read back, so the host never waits; a step costs each
request the tokens it got, not its length. A slot that was (re)filled scans its prompt for the open marker once and
replays the outputs that came with it.
"""
# Device code below has Triton's types, which mypy cannot state.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
import triton
import triton.language as tl
from vllm_puzzle.kernels import thinking
from vllm_puzzle.kernels.thinking import PHRASE_SHARE, ThinkingLimits, ThinkingMarkers
from vllm_puzzle.kernels.variant import Variant

# End reasons by their number in a state row.
REASONS = (None, thinking.NATURAL, thinking.BUDGET, thinking.LOOP, thinking.TOOL_CALL, thinking.USER)
ROW_SIZE = 32  # one cache line of int32
INT32_MAX = 2**31 - 1
SCAN_BLOCK = 512
_COUNT_MAX = 2**20  # copies of a pattern, so that their tokens fit 32 bits


class Column(IntEnum):
    """Where a state row holds what. The first eight are written by the host, the rest by the kernel."""

    BUDGET = 0  # -1: none
    GRACE = 1
    MIN_PATTERN = 2
    MAX_PATTERN = 3  # 0: no loop rule
    COUNT = 4
    IS_TRACKED = 5
    CLOSE_ASKED = 6  # a user ends the thought at the next launch
    SCANNED = 7  # tokens fed so far, prompt included; -1: the slot has just been filled
    MODE = 8
    QUEUE_OFFSET = 9  # where the forced tokens begin in phrase + closing
    QUEUE_POSITION = 10
    WHY = 11
    REASON = 12
    NUM_TOKENS = 13
    NUM_THINKING = 14
    NUM_MARKERS = 15
    NUM_BLOCKS = 16
    TAIL_SIZE = 17  # tokens since the last block was opened or left: no marker reaches further back


def state_row(limits: ThinkingLimits | None) -> list[int]:
    """The row of a slot just filled: ROW_SIZE numbers. None: not tracked."""
    row = [0] * ROW_SIZE
    row[Column.SCANNED] = -1
    if limits is None:
        return row
    row[Column.IS_TRACKED] = 1
    row[Column.BUDGET] = -1 if limits.budget is None else min(limits.budget, INT32_MAX)
    row[Column.GRACE] = min(limits.grace, INT32_MAX)
    if limits.loop is not None:
        row[Column.MIN_PATTERN], row[Column.MAX_PATTERN] = limits.loop.min_pattern, limits.loop.max_pattern
        row[Column.COUNT] = min(limits.loop.count, _COUNT_MAX)
    return row


@dataclass(frozen=True, slots=True)
class MarkerTables:
    """One server's markers on the device.

    table: int32 [M, L], one marker a row (starts, ends, tool starts), right-aligned, -1 where any token will do, -2 in
    rows of no marker. sizes: int32 [M]. queue: int32 [Q], phrase + closing. boundaries: int8 [vocab_size].
    M, L and Q are powers of two.
    """

    table: torch.Tensor
    sizes: torch.Tensor
    queue: torch.Tensor
    boundaries: torch.Tensor
    num_starts: int
    num_ends: int
    phrase_size: int
    queue_size: int

    @classmethod
    def build(cls, markers: ThinkingMarkers, vocab_size: int, device: torch.device) -> MarkerTables:
        """Tables for a vocabulary of `vocab_size`; ValueError when a marker names a token beyond it."""
        rows = (*markers.starts, *markers.ends, *markers.tool_starts)
        queue = markers.phrase + markers.closing
        beyond = sorted({t for row in (*rows, queue, markers.boundaries) for t in row if not 0 <= t < vocab_size})
        if beyond:
            raise ValueError(f"thinking markers: found the token ids {beyond}, allowed: 0 to {vocab_size - 1}")
        width = triton.next_power_of_2(max(map(len, rows)))
        table = torch.full((triton.next_power_of_2(len(rows)), width), -2, dtype=torch.int32)
        sizes = torch.zeros(table.shape[0], dtype=torch.int32)
        for index, row in enumerate(rows):
            table[index] = torch.tensor([-1] * (width - len(row)) + list(row))
            sizes[index] = len(row)
        padded = torch.zeros(triton.next_power_of_2(len(queue)), dtype=torch.int32)
        padded[: len(queue)] = torch.tensor(queue)
        boundaries = torch.zeros(vocab_size, dtype=torch.int8)
        boundaries[sorted(markers.boundaries)] = 1
        return cls(
            table.to(device), sizes.to(device), padded.to(device), boundaries.to(device),
            len(markers.starts), len(markers.ends), len(markers.phrase), len(queue),
        )  # fmt: skip


def launch_thinking(
    logits: torch.Tensor,
    slots: torch.Tensor,
    local_positions: torch.Tensor,
    input_ids: torch.Tensor,
    all_token_ids: torch.Tensor,
    prompt_len: torch.Tensor,
    total_len: torch.Tensor,
    rows: torch.Tensor,
    runs: torch.Tensor,
    tables: MarkerTables,
    max_rows: int,
) -> None:
    """Feed the tracked requests of a batch and force tokens in `logits`, in place, on the current stream.

    logits: float32 [N, V]. slots, local_positions, input_ids: [N], of each logits row its request's slot, its place
    among that request's rows (0, 1, …, in a line) and the token fed there; that of place 0 is the last committed one.
    all_token_ids: int32 [slots, length]; prompt_len, total_len: int32 [slots]. rows: int32 [slots, ROW_SIZE]; runs:
    int32 [slots, R], R a power of two and no smaller than any rule's max_pattern. max_rows: most rows of one request.
    """
    if logits.shape[0] == 0:
        return
    _thinking_kernel[(logits.shape[0],)](
        logits, logits.stride(0), slots, local_positions, input_ids, logits.shape[0],
        all_token_ids, all_token_ids.stride(0), prompt_len, total_len, rows, runs,
        tables.table, tables.sizes, tables.queue, tables.boundaries,
        tables.num_starts, tables.num_ends, tables.phrase_size, tables.queue_size, tables.boundaries.shape[0],
        ROW_SIZE=ROW_SIZE, M=tables.table.shape[0], L=tables.table.shape[1], Q=tables.queue.shape[0],
        R=runs.shape[1], ROWS=triton.next_power_of_2(max_rows), BLOCK=SCAN_BLOCK, num_warps=1,
    )  # fmt: skip


def variants() -> tuple[Variant, ...]:
    """The kernel for tables and batches of several sizes; a server compiles the one of its own markers."""
    pointers = ("slots", "local_positions", "input_ids", "all_token_ids", "prompt_len", "total_len")
    tables = ("rows", "runs_ptr", "table_ptr", "sizes_ptr", "queue")
    signature = {"logits": "*fp32", "boundaries": "*i8"} | dict.fromkeys((*pointers, *tables), "*i32")
    numbers = set(_thinking_kernel.arg_names) - set(signature) - {"ROW_SIZE", "M", "L", "Q", "R", "ROWS", "BLOCK"}
    signature |= dict.fromkeys(sorted(numbers), "i32")
    shapes = (((2, 1, 1), 1), ((4, 4, 8), 8), ((16, 16, 256), 16))
    return tuple(
        Variant(
            name=f"thinking M{m} L{length} Q{q} rows{rows}",
            kernel=_thinking_kernel,
            signature=signature,
            constexprs={"M": m, "L": length, "Q": q, "ROWS": rows, "R": 64, "ROW_SIZE": ROW_SIZE, "BLOCK": SCAN_BLOCK},
            num_warps=1,
            num_stages=1,
        )
        for (m, length, q), rows in shapes
    )


# --- device code ---------------------------------------------------------------------------------------------------
# Triton reads module-level numbers only when they are constexpr. Their order is that of `thinking` and of REASONS.

_OUTSIDE, _THINKING, _CLOSING = (tl.constexpr(mode) for mode in range(3))
_NATURAL, _BUDGET, _LOOP, _TOOL_CALL, _USER = (tl.constexpr(number) for number in range(1, 6))
_SHARE = tl.constexpr(PHRASE_SHARE)
_NO_TOKEN = tl.constexpr(-3)  # equals no token and no entry of a table
_C_GRACE = tl.constexpr(int(Column.GRACE))
_C_MIN_PATTERN, _C_MAX_PATTERN = tl.constexpr(int(Column.MIN_PATTERN)), tl.constexpr(int(Column.MAX_PATTERN))
_C_COUNT, _C_IS_TRACKED = tl.constexpr(int(Column.COUNT)), tl.constexpr(int(Column.IS_TRACKED))
_C_CLOSE_ASKED, _C_SCANNED = tl.constexpr(int(Column.CLOSE_ASKED)), tl.constexpr(int(Column.SCANNED))
_C_MODE, _C_OFFSET = tl.constexpr(int(Column.MODE)), tl.constexpr(int(Column.QUEUE_OFFSET))
_C_POSITION, _C_WHY = tl.constexpr(int(Column.QUEUE_POSITION)), tl.constexpr(int(Column.WHY))
_C_REASON, _C_TOKENS = tl.constexpr(int(Column.REASON)), tl.constexpr(int(Column.NUM_TOKENS))
_C_NUM_THINKING, _C_MARKERS = tl.constexpr(int(Column.NUM_THINKING)), tl.constexpr(int(Column.NUM_MARKERS))
_C_BLOCKS, _C_TAIL = tl.constexpr(int(Column.NUM_BLOCKS)), tl.constexpr(int(Column.TAIL_SIZE))


@triton.jit
def _tokens_at(positions, is_valid, history, drafts, total):
    """Tokens of one request: committed ones below `total`, drafts from there on; _NO_TOKEN where not valid."""
    committed = tl.load(history + positions, mask=is_valid & (positions < total), other=_NO_TOKEN).to(tl.int32)
    drafted = tl.load(drafts + (positions - total), mask=is_valid & (positions >= total), other=_NO_TOKEN).to(tl.int32)
    return tl.where(positions < total, committed, drafted)


@triton.jit
def _opens_thought(history, prompt_size, table, sizes, num_starts, num_ends, L: tl.constexpr, BLOCK: tl.constexpr):
    """Whether the last marker in the prompt is the start. Backwards by blocks, as far as the first with a marker."""
    high = prompt_size
    start = -1
    end = -1
    while (high > 0) & (start < 0) & (end < 0):
        low = tl.maximum(high - BLOCK, 0)
        places = low + tl.arange(0, BLOCK)
        for marker in tl.range(0, num_starts + num_ends):
            size = tl.load(sizes + marker)
            same = (places < high) & (places + size <= prompt_size)
            for index in tl.range(0, size):
                expected = tl.load(table + marker * L + L - size + index)
                same = same & (tl.load(history + places + index, mask=same, other=_NO_TOKEN) == expected)
            last = tl.max(tl.where(same, places, -1), axis=0)
            start = tl.where(marker < num_starts, tl.maximum(start, last), start)
            end = tl.where(marker < num_starts, end, tl.maximum(end, last))
        high = low
    return start > end


@triton.jit
def _begun(stop, tail_size, queue, queue_size, history, drafts, total, Q: tl.constexpr):
    """How many tokens of the queue already end the tail: the longest proper beginning of it, 0 if none."""
    longest = 0
    index = tl.arange(0, Q)
    for size in tl.range(1, tl.minimum(queue_size, tail_size + 1)):
        seen = _tokens_at(stop - size + index, index < size, history, drafts, total)
        wanted = tl.load(queue + index, mask=index < size, other=_NO_TOKEN)
        longest = tl.where(tl.min((seen == wanted).to(tl.int32), axis=0) > 0, size, longest)
    return longest


@triton.jit
def _count_rows(row, slot, slots, local_positions, num_rows, ROWS: tl.constexpr):
    """How many logits rows the request has whose first is `row`."""
    index = tl.arange(0, ROWS)
    is_inside = row + index < num_rows
    is_own = (tl.load(slots + row + index, mask=is_inside, other=-1) == slot) & (
        tl.load(local_positions + row + index, mask=is_inside, other=-1) == index
    )
    return tl.min(tl.where(is_own, ROWS, index), axis=0)


# One binary for every batch: none of these values or alignments may compile another one.
@triton.jit(
    do_not_specialize=[
        "logits_stride",
        "num_rows",
        "all_token_ids_stride",
        "num_starts",
        "num_ends",
        "phrase_size",
        "queue_size",
        "vocab_size",
    ],
    do_not_specialize_on_alignment=[
        "logits",
        "slots",
        "local_positions",
        "input_ids",
        "all_token_ids",
        "prompt_len",
        "total_len",
    ],
)
def _thinking_kernel(
    logits, logits_stride, slots, local_positions, input_ids, num_rows,
    all_token_ids, all_token_ids_stride, prompt_len, total_len, rows, runs_ptr,
    table_ptr, sizes_ptr, queue, boundaries, num_starts, num_ends, phrase_size, queue_size, vocab_size,
    ROW_SIZE: tl.constexpr, M: tl.constexpr, L: tl.constexpr, Q: tl.constexpr, R: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    slot = tl.load(slots + row).to(tl.int64)
    state = rows + slot * ROW_SIZE
    if (tl.load(local_positions + row) != 0) | (tl.load(state + _C_IS_TRACKED) == 0):
        return
    history = all_token_ids + slot * all_token_ids_stride
    drafts = input_ids + row + 1
    total = tl.load(total_len + slot).to(tl.int32)
    num_own = _count_rows(row, slot, slots, local_positions, num_rows, ROWS)

    scanned = tl.load(state + _C_SCANNED)
    is_opened = False
    if scanned < 0:
        scanned = tl.load(prompt_len + slot).to(tl.int32)
        is_opened = _opens_thought(history, scanned, table_ptr, sizes_ptr, num_starts, num_ends, L, BLOCK)
    _follow(
        scanned, is_opened, total, num_own, history, drafts, state, runs_ptr + slot * R,
        logits + row.to(tl.int64) * logits_stride, logits_stride,
        table_ptr, sizes_ptr, queue, boundaries, num_starts, num_ends, phrase_size, queue_size, vocab_size, M, L, Q, R,
    )  # fmt: skip


@triton.jit
def _feed(
    token, is_fed, is_opened, is_hit, sizes, mode, forced, offset, position, why, reason,
    num_thinking, num_markers, num_blocks, tail_size, num_starts, num_ends, phrase_size, queue_size, M: tl.constexpr,
):  # fmt: skip
    """The state after one token, before limits are looked at: `_answer`, `_think`, `_close`, `_leave` and `_open`."""
    marker = tl.arange(0, M)
    first = tl.min(tl.where((is_hit > 0) & (marker >= num_starts), marker, M), axis=0)
    first_start = tl.min(tl.where((is_hit > 0) & (marker < num_starts), marker, M), axis=0)
    starts = first_start < M
    start_size = tl.sum(tl.where(marker == first_start, sizes, 0), axis=0)
    tail_size += is_fed.to(tl.int32)

    follows = is_fed & (mode == _CLOSING) & (token == forced)
    thinks = is_fed & (mode != _OUTSIDE) & (follows == 0)
    position += follows.to(tl.int32)
    is_closed = follows & (offset + position == queue_size)
    is_left = thinks & (first < M)
    is_call = is_left & (first >= num_starts + num_ends)
    opens = (is_fed & (mode == _OUTSIDE) & starts) | is_opened

    size = tl.sum(tl.where(marker == first, sizes, 0), axis=0)
    removed = tl.where(is_left, size, tl.where(is_closed, queue_size - phrase_size, 0))
    num_thinking += (thinks | follows).to(tl.int32) - removed
    num_markers += tl.where(is_call, 0, removed) + tl.where(is_fed & opens, start_size, 0)
    num_blocks += opens.to(tl.int32)
    is_over = is_left | is_closed
    ending = tl.where(is_call, _TOOL_CALL, tl.where(is_left, _NATURAL, why))
    keeps = (reason != 0) & (reason != _NATURAL) & (reason != _TOOL_CALL)
    reason = tl.where(is_over & (keeps == 0), ending, reason)
    mode = tl.where(is_over, _OUTSIDE, tl.where(opens | thinks, _THINKING, mode))
    tail_size = tl.where(is_over | opens, 0, tail_size)
    goes_on = thinks & (is_left == 0)
    return mode, position, reason, num_thinking, num_markers, num_blocks, tail_size, opens, goes_on


@triton.jit
def _judge(
    state, token, stop, opens, goes_on, num_thinking, phrase, tail_size, runs, boundaries, vocab_size,
    history, drafts, total, R: tl.constexpr,
):  # fmt: skip
    """Why the thought must end here (0: it need not), and the run lengths: `_check_limits` and `_loops`."""
    budget = tl.load(state)
    left = budget - num_thinking - phrase
    in_grace = goes_on & (left <= tl.load(state + _C_GRACE)) & (token >= 0) & (token < vocab_size)
    is_boundary = tl.load(boundaries + token, mask=in_grace, other=0) != 0
    is_spent = (budget >= 0) & (((goes_on | opens) & (left <= 0)) | is_boundary)
    forces = tl.where(is_spent, _BUDGET, 0)
    max_pattern = tl.load(state + _C_MAX_PATTERN)
    if goes_on & (is_spent == 0) & (max_pattern > 0):
        distance = tl.arange(0, R) + 1
        within = distance <= tl.minimum(max_pattern, tail_size - 1)
        earlier = _tokens_at(stop - 1 - distance, within, history, drafts, total)
        runs = tl.where(within & (earlier == token), runs + 1, 0)
        repeats = tl.load(state + _C_COUNT) - 1
        is_loop = within & (distance >= tl.load(state + _C_MIN_PATTERN)) & (runs >= distance * repeats)
        forces = tl.where(tl.max(is_loop.to(tl.int32), axis=0) > 0, _LOOP, 0)
    return forces, runs


@triton.jit
def _follow(
    scanned, is_opened, total, num_own, history, drafts, state, own_runs, own_logits, logits_stride,
    table_ptr, sizes_ptr, queue, boundaries, num_starts, num_ends, phrase_size, queue_size, vocab_size,
    M: tl.constexpr, L: tl.constexpr, Q: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """One request's tokens from `scanned` on, then its drafts."""
    marker, back, distance = tl.arange(0, M), tl.arange(0, L), tl.arange(0, R) + 1
    table = tl.load(table_ptr + marker[:, None] * L + back[None, :])
    sizes = tl.load(sizes_ptr + marker)
    budget = tl.load(state)
    close_asked = tl.load(state + _C_CLOSE_ASKED) != 0
    has_runs = distance <= tl.load(state + _C_MAX_PATTERN)
    runs = tl.load(own_runs + distance - 1, mask=has_runs, other=0)
    # The phrase, where the budget has room for it (`_phrase_within`).
    phrase = tl.where((budget < 0) | (phrase_size <= budget // _SHARE), phrase_size, 0)
    mode, offset = tl.load(state + _C_MODE), tl.load(state + _C_OFFSET)
    position, why = tl.load(state + _C_POSITION), tl.load(state + _C_WHY)
    reason, num_tokens = tl.load(state + _C_REASON), tl.load(state + _C_TOKENS)
    num_thinking, num_markers = tl.load(state + _C_NUM_THINKING), tl.load(state + _C_MARKERS)
    num_blocks, tail_size = tl.load(state + _C_BLOCKS), tl.load(state + _C_TAIL)

    for stop in tl.range(scanned, total + num_own):
        # The token before `stop`; in the first round there is none, and the state is that of `stop` already.
        is_fed = stop > scanned
        tail = _tokens_at(stop - L + back, is_fed & (back >= L - tail_size - 1), history, drafts, total)
        token = tl.sum(tl.where(back == L - 1, tail, 0), axis=0)
        is_hit = tl.min(((table == -1) | (table == tail[None, :])).to(tl.int32), axis=1)
        forced = tl.load(queue + offset + position, mask=mode == _CLOSING, other=_NO_TOKEN)
        num_tokens += is_fed.to(tl.int32)
        mode, position, reason, num_thinking, num_markers, num_blocks, tail_size, opens, goes_on = _feed(
            token, is_fed, (stop == scanned) & is_opened, is_hit, sizes, mode, forced, offset, position, why, reason,
            num_thinking, num_markers, num_blocks, tail_size, num_starts, num_ends, phrase_size, queue_size, M,
        )  # fmt: skip
        runs = tl.where(opens, 0, runs)
        forces, runs = _judge(
            state, token, stop, opens, goes_on, num_thinking, phrase, tail_size, runs, boundaries, vocab_size,
            history, drafts, total, R,
        )  # fmt: skip
        forces = tl.where((forces == 0) & close_asked & (stop == total) & (mode == _THINKING), _USER, forces)
        if forces != 0:  # `_force`
            used = tl.where((budget >= 0) & (num_thinking > budget - phrase), 0, phrase)
            offset = phrase_size - used
            position = _begun(stop, tail_size, queue + offset, queue_size - offset, history, drafts, total, Q)
            why = tl.where(position > used, _NATURAL, forces)
            mode = tl.where(forces != 0, _CLOSING, mode)
        if stop == total:
            _store(
                state, total, mode, offset, position, why, reason, num_tokens, num_thinking, num_markers, num_blocks,
                tail_size,
            )  # fmt: skip
            tl.store(own_runs + distance - 1, runs, mask=has_runs)
        if (stop >= total) & (mode == _CLOSING):
            forced = tl.load(queue + offset + position)
            tl.store(own_logits + (stop - total).to(tl.int64) * logits_stride + forced, 1.0e9)


@triton.jit
def _store(
    state, total, mode, offset, position, why, reason, num_tokens, num_thinking, num_markers, num_blocks, tail_size
):
    tl.store(state + _C_CLOSE_ASKED, 0)
    tl.store(state + _C_SCANNED, total)
    tl.store(state + _C_MODE, mode)
    tl.store(state + _C_OFFSET, offset)
    tl.store(state + _C_POSITION, position)
    tl.store(state + _C_WHY, why)
    tl.store(state + _C_REASON, reason)
    tl.store(state + _C_TOKENS, num_tokens)
    tl.store(state + _C_NUM_THINKING, num_thinking)
    tl.store(state + _C_MARKERS, num_markers)
    tl.store(state + _C_BLOCKS, num_blocks)
    tl.store(state + _C_TAIL, tail_size)
