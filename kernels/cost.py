"""The least work of each op: bytes that must cross the memory bus and floating-point operations.

No launch can be faster than its bytes over the card's copy bandwidth, nor than its operations over the card's matrix
rate. Tests, benchmarks and users share these formulas; what an implementation moves beyond them (tiles that reach over
a window, partial results of a split) is its own. Formulas: roofline section of the kernel notes (the arithmetic is in
each docstring), in elements and bytes, no hidden constants.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

BF16 = 2
FP8 = 1
SCALE = 4  # fp32
BLOCK = 128  # side of a scaled block of FP8 weights


@dataclass(frozen=True, slots=True)
class Cost:
    """Bytes that cross the memory bus, and floating-point operations."""

    num_bytes: int
    flops: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.num_bytes + other.num_bytes, self.flops + other.flops)

    def seconds(self, bytes_per_second: float, flops_per_second: float) -> float:
        """The floor: neither faster than the memory bus nor than the matrix units."""
        return max(self.num_bytes / bytes_per_second, self.flops / flops_per_second)

    def is_memory_bound(self, bytes_per_second: float, flops_per_second: float) -> bool:
        """Whether the memory bus is the floor."""
        return self.num_bytes / bytes_per_second >= self.flops / flops_per_second


def ceil_div(number: int, divisor: int) -> int:
    """Smallest whole number that times `divisor` reaches `number`."""
    return -(-number // divisor)


def weight_scales(rows: int, columns: int, scales: str | None) -> int:
    """Bytes of the fp32 scales of a weight [rows, columns]: None, "tensor", "channel" (one a row) or "block" (128²)."""
    if scales is None:
        return 0
    if scales == "tensor":
        return SCALE
    if scales == "channel":
        return SCALE * rows
    if scales == "block":
        return SCALE * ceil_div(rows, BLOCK) * ceil_div(columns, BLOCK)
    raise ValueError(f"weight scales: found {scales!r}, allowed: None, 'tensor', 'channel', 'block'")


def gate_up(
    num_tokens: int,
    hidden: int,
    intermediate: int,
    weight_bytes: int = BF16,
    activation_bytes: int = BF16,
    output_bytes: int = BF16,
    scales: str | None = None,
) -> Cost:
    """`silu(x·Gᵀ) · (x·Uᵀ)`, x [M, d], G and U [I, d]: flops 4·M·d·I, bytes 2·d·I·w + M·d·a + M·I·o and scales."""
    weights = 2 * hidden * intermediate * weight_bytes + weight_scales(2 * intermediate, hidden, scales)
    activations = num_tokens * (hidden * activation_bytes + intermediate * output_bytes)
    return Cost(weights + activations, 4 * num_tokens * hidden * intermediate)


def activation(num_tokens: int, intermediate: int, output_bytes: int = BF16) -> Cost:
    """A separate `silu(gate) · up` over bf16 [M, 2I], which a fused gate_up does without: bytes 4·M·I + M·I·o."""
    return Cost(num_tokens * intermediate * (2 * BF16 + output_bytes))


def down(
    num_tokens: int,
    hidden: int,
    intermediate: int,
    weight_bytes: int = BF16,
    activation_bytes: int = BF16,
    output_bytes: int = BF16,
    scales: str | None = None,
) -> Cost:
    """`h·Dᵀ`, h [M, I], D [d, I]: flops 2·M·d·I, bytes d·I·w + M·I·a + M·d·o and scales."""
    weights = hidden * intermediate * weight_bytes + weight_scales(hidden, intermediate, scales)
    activations = num_tokens * (intermediate * activation_bytes + hidden * output_bytes)
    return Cost(weights + activations, 2 * num_tokens * hidden * intermediate)


def ffn(
    num_tokens: int,
    hidden: int,
    intermediate: int,
    weight_bytes: int = BF16,
    activation_bytes: int = BF16,
    output_bytes: int = BF16,
    scales: str | None = None,
) -> Cost:
    """gate_up, then down: flops 6·M·d·I, bytes 3·d·I·w + 2·M·I·a + M·d·(a + o) and scales."""
    first = gate_up(num_tokens, hidden, intermediate, weight_bytes, activation_bytes, activation_bytes, scales)
    return first + down(num_tokens, hidden, intermediate, weight_bytes, activation_bytes, output_bytes, scales)


def linear(num_tokens: int, hidden: int, weight_bytes: int = BF16, activation_bytes: int = BF16) -> Cost:
    """A square linear map in place of a block: flops 2·M·d², bytes d²·w + 2·M·d·a."""
    return Cost(hidden * hidden * weight_bytes + 2 * num_tokens * hidden * activation_bytes, 2 * num_tokens * hidden**2)


def live_keys(query_len: int, seq_len: int, window: int | None, num_sink_tokens: int = 0) -> int:
    """Keys that some query of a sequence sees, the last `query_len` of whose `seq_len` tokens ask. A window counts the
    query itself, so the first query reaches window − 1 tokens back; sink tokens are seen beside the window.
    """
    if window is None:
        return seq_len
    return min(seq_len, window + query_len - 1 + num_sink_tokens)


def visible_pairs(query_len: int, seq_len: int, window: int | None, num_sink_tokens: int = 0) -> int:
    """Pairs of a query and a key it sees: Σⱼ min(c + j, W + sinks), j = 1 … query_len, c = seq_len − query_len."""
    context = seq_len - query_len
    if window is None:
        return query_len * context + query_len * (query_len + 1) // 2
    reach = window + num_sink_tokens
    num_growing = max(0, min(query_len, reach - context))  # queries that see everything before them
    growing = num_growing * context + num_growing * (num_growing + 1) // 2
    return growing + (query_len - num_growing) * reach


def attention(
    batch: Sequence[tuple[int, int]],
    window: int | None,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    cache_bytes: int = BF16,
    page: int = 16,
    num_sink_tokens: int = 0,
) -> Cost:
    """Attention over a paged cache. `batch`: (query_len, seq_len) of each sequence; with e = `cache_bytes` and L live
    keys: bytes Σ 2·KH·L·D·e (K and V) + 4·q·H·D (bf16 queries in, outputs out) + 4·⌈L/page⌉ (block table); flops
    4·H·D a visible pair (two products, a multiplication and an addition each).
    """
    num_bytes = flops = 0
    for query_len, seq_len in batch:
        keys = live_keys(query_len, seq_len, window, num_sink_tokens)
        num_bytes += 2 * num_kv_heads * keys * head_dim * cache_bytes
        num_bytes += 2 * BF16 * query_len * num_heads * head_dim + 4 * ceil_div(keys, page)
        flops += 4 * num_heads * head_dim * visible_pairs(query_len, seq_len, window, num_sink_tokens)
    return Cost(num_bytes, flops)


def kv_write(num_tokens: int, num_kv_heads: int, head_dim: int, cache_bytes: int = FP8) -> Cost:
    """Quantise and store: bytes 2·T·KH·D·(2 + e) + 8·T (bf16 K and V in, e bytes out, int64 slots)."""
    return Cost(2 * num_tokens * num_kv_heads * head_dim * (BF16 + cache_bytes) + 8 * num_tokens)


def rope_and_write_kv(
    num_tokens: int, num_heads: int, num_kv_heads: int, head_dim: int, cache_bytes: int = FP8
) -> Cost:
    """As `kv_write`, and the queries rotated: + 4·T·H·D (bf16 in and out) + 8·T (positions) + 2·T·D (cos and sin)."""
    queries = num_tokens * (2 * BF16 * num_heads * head_dim + 8 + BF16 * head_dim)
    return kv_write(num_tokens, num_kv_heads, head_dim, cache_bytes) + Cost(queries)


def fused_decode(
    seq_lens: Sequence[int],
    window: int | None,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    cache_bytes: int = FP8,
    page: int = 16,
    num_sink_tokens: int = 0,
) -> Cost:
    """Rotate, store and attend for one new token of each sequence: the attention, the new K and V in and out (already
    counted once as cache) and cos and sin.
    """
    batch = [(1, seq_len) for seq_len in seq_lens]
    attend = attention(batch, window, num_heads, num_kv_heads, head_dim, cache_bytes, page, num_sink_tokens)
    new = len(seq_lens) * (2 * BF16 * num_kv_heads * head_dim + 8 + 8 + BF16 * head_dim)
    return attend + Cost(new)
