"""Attention and KV-write cases with data: a paged cache in vLLM's layout, of which only live pages exist.

A window layer's pages before the window are gone in vLLM (their entries of the block table name the null block), so a
context of 128k needs no more memory here than its window. Every input set has pages of its own in one pool, shuffled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from vllm_puzzle.bench.kernel.cases import AttentionCase
from vllm_puzzle.bench.kernel.problem import BASELINE_BOUND, Check, Prepare, as_bits, relative_error
from vllm_puzzle.bench.kernel.timing import Call
from vllm_puzzle.kernels import reference

# Relative L2 distance to float32 arithmetic on the same dequantised cache: rounding to bf16 gives 1.7e-3 (2⁻⁹ / √… of
# each number), bf16 inputs of both products the rest; vLLM's own kernel shows 2.9e-3.
BF16_BOUND = 3e-3
CHECKED_ROWS = 64  # query rows that are compared at the start, in the middle and at the end of each sequence
ROPE_BASE = 10000.0
WRITES = ("kv_write", "rope_kv_write")
HAS_NEW_TOKENS = (*WRITES, "fused_decode")


@dataclass(frozen=True, slots=True)
class Inputs:
    """One set. q: [T, H, D]; k, v: [T, KH, D] or None; block_table: [B, P] int32; out: as q, which the op writes."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    block_table: Tensor
    slot_mapping: Tensor


class AttentionProblem:
    """One attention or KV-write case on a device. Tensors that all sets share are attributes.

    k_cache, v_cache: [blocks, KH, page, D], halves of one tensor's last axis; k_scale, v_scale: [1] or [KH] float32.
    """

    def __init__(self, case: AttentionCase, device: str = "cuda", vllm_source: str | None = None) -> None:
        self.case, self.device, self.vllm_source = case, device, vllm_source
        self.config = ""
        self.is_quantized = case.cache == "fp8"
        query_lens = torch.tensor([0] + [query for query, _ in case.batch])
        self.query_start_loc = query_lens.cumsum(0).int().to(device)
        self.seq_lens = torch.tensor([seq for _, seq in case.batch], dtype=torch.int32, device=device)
        self.positions = torch.cat([torch.arange(seq - query, seq) for query, seq in case.batch]).to(device)
        self.max_query_len = max(query for query, _ in case.batch)
        self.max_seq_len = max(seq for _, seq in case.batch)
        self.softmax_scale = case.head_dim**-0.5
        self.sinks = torch.randn(case.num_heads, device=device) if case.sinks else None
        num_scales = case.num_kv_heads if case.per_head else 1
        # e4m3 holds a standard normal number without clipping at 1/32; per head the scales differ.
        scales = torch.full((num_scales,), 1 / 32, device=device) * (1 + torch.arange(num_scales, device=device) / 8)
        self.k_scale: Tensor | None = scales if self.is_quantized else None
        self.v_scale: Tensor | None = scales.flip(0).contiguous() if self.is_quantized else None
        self.sets: list[Inputs] = []
        self._wanted: Tensor | None = None

    def make(self, num_sets: int) -> None:
        """A pool of live pages for all sets, random contents, and each set's queries and block table."""
        case = self.case
        pages = [self._live_pages(query, seq) for query, seq in case.batch]
        num_live = sum(map(len, pages))
        self._make_pool(1 + num_sets * num_live)
        order = 1 + torch.randperm(num_sets * num_live)
        width = -(-self.max_seq_len // case.page)
        self.sets = []
        for number in range(num_sets):
            table = torch.zeros(len(pages), width, dtype=torch.int32)
            own = order[number * num_live : (number + 1) * num_live].int()
            for row, (live, blocks) in enumerate(zip(pages, own.split([len(p) for p in pages]), strict=True)):
                table[row, live] = blocks
            self.sets.append(self._make_set(table.to(self.device)))
        positions = torch.arange(self.max_seq_len, device=self.device).float()[:, None]
        frequencies = ROPE_BASE ** (-torch.arange(0, case.head_dim, 2, device=self.device) / case.head_dim)
        angles = positions * frequencies
        self.cos_sin_cache = torch.cat((angles.cos(), angles.sin()), dim=-1).bfloat16()

    def _live_pages(self, query: int, seq: int) -> Tensor:
        """Page numbers within a sequence that are read or written."""
        case = self.case
        first = seq - query
        if case.op not in WRITES:
            first = 0 if case.window is None else max(0, seq - query - case.window + 1)
        live = torch.arange(first // case.page, -(-seq // case.page))
        sinks = torch.arange(0, -(-min(case.num_sink_tokens, seq) // case.page))
        return torch.cat((sinks[sinks < first // case.page], live))

    def _make_pool(self, num_blocks: int) -> None:
        case = self.case
        shape = (num_blocks, case.num_kv_heads, case.page, 2 * case.head_dim)
        dtype = torch.float8_e4m3fn if self.is_quantized else torch.bfloat16
        self.pool = torch.empty(shape, dtype=dtype, device=self.device)
        step = max(1, (1 << 26) // self.pool[0].numel())  # random numbers in float32: a part at a time
        for start in range(0, num_blocks, step):
            part = self.pool[start : start + step]
            numbers = torch.randn(part.shape, device=self.device)
            part.copy_((32 * numbers).clamp(-448, 448) if self.is_quantized else numbers)
        self.k_cache, self.v_cache = self.pool.split(case.head_dim, dim=-1)

    def _make_set(self, table: Tensor) -> Inputs:
        case = self.case
        q, out = (torch.randn(case.num_tokens, case.num_heads, case.head_dim, device=self.device) for _ in range(2))
        k, v = (torch.randn(case.num_tokens, case.num_kv_heads, case.head_dim, device=self.device) for _ in range(2))
        owners = torch.repeat_interleave(torch.diff(self.query_start_loc))
        slots = table[owners, self.positions // case.page].long() * case.page + self.positions % case.page
        return Inputs(q.bfloat16(), k.bfloat16(), v.bfloat16(), out.bfloat16(), table, slots)

    @property
    def scales(self) -> dict[str, Any]:
        """k_scale and v_scale, as arguments."""
        return {"k_scale": self.k_scale, "v_scale": self.v_scale}

    @property
    def masking(self) -> dict[str, Any]:
        """What decides which keys count and how much, as arguments."""
        case = self.case
        return {
            "softmax_scale": self.softmax_scale, "sliding_window": case.window, "sinks": self.sinks,
            "num_sink_tokens": case.num_sink_tokens,
        }  # fmt: skip

    def rotation(self, inputs: Inputs) -> dict[str, Tensor]:
        """Slots, positions and the table of cosines and sines, as arguments."""
        return {
            "slot_mapping": inputs.slot_mapping, "positions": self.positions, "cos_sin_cache": self.cos_sin_cache,
        }  # fmt: skip

    def ours(self) -> Sequence[Call]:
        """Our op on each set; each call returns the set it ran on."""
        from vllm_puzzle.kernels import fused_decode, kv_write

        op = self.case.op
        if op == "kv_write":
            return [partial(self.write, kv_write.write_kv, inputs) for inputs in self.sets]
        if op == "rope_kv_write":
            return [partial(self.rope_and_write, kv_write.rope_and_write_kv, inputs) for inputs in self.sets]
        if op == "fused_decode":
            return [partial(self._decode, fused_decode.fused_decode, inputs) for inputs in self.sets]
        return self.own_attention(self.sets)

    def own_attention(self, sets: Sequence[Inputs]) -> Sequence[Call]:
        """`window_attention` on each of `sets`, whatever the case's op."""
        from vllm_puzzle.kernels.window_attention import Scratch, window_attention

        case = self.case
        scratch = Scratch.allocate(
            len(case.batch), case.num_heads, case.head_dim, max_query_len=min(8, self.max_query_len), device=self.device
        )
        return [partial(self._attend, window_attention, scratch, inputs) for inputs in sets]

    def _attend(self, op: Any, scratch: Any, inputs: Inputs) -> Inputs:
        op(
            inputs.q, self.k_cache, self.v_cache, inputs.out, block_table=inputs.block_table, seq_lens=self.seq_lens,
            query_start_loc=self.query_start_loc, max_query_len=self.max_query_len, scratch=scratch,
            **self.scales, **self.masking,
        )  # fmt: skip
        return inputs

    def write(self, op: Any, inputs: Inputs) -> Inputs:
        """`op` has the arguments of `reference.write_kv`."""
        op(inputs.k, inputs.v, self.k_cache, self.v_cache, inputs.slot_mapping, **self.scales)
        return inputs

    def rope_and_write(self, op: Any, inputs: Inputs) -> Inputs:
        """`op` has the arguments of `reference.rope_and_write_kv`; q goes to `out`."""
        caches = self.k_cache, self.v_cache
        op(inputs.q, inputs.k, inputs.v, *caches, **self.rotation(inputs), q_out=inputs.out, **self.scales)
        return inputs

    def _decode(self, op: Any, inputs: Inputs) -> Inputs:
        op(
            inputs.q, inputs.k, inputs.v, self.k_cache, self.v_cache, inputs.out, **self.rotation(inputs),
            block_table=inputs.block_table, seq_lens=self.seq_lens, **self.scales, **self.masking,
        )  # fmt: skip
        return inputs

    def poison(self, output: Any) -> None:
        """NaN into the first set's output, and into its slots of the cache where the op writes them."""
        first = self.sets[0]
        first.out.fill_(float("nan"))
        if self.case.op in HAS_NEW_TOKENS:
            for cache in (self.k_cache, self.v_cache):
                as_bits(cache)[self._place(first)] = -1  # all ones: a NaN in every format

    def _place(self, inputs: Inputs) -> tuple[Tensor, slice, Tensor]:
        """Index of the new tokens' rows in a cache: → [T, KH, D]."""
        return inputs.slot_mapping // self.case.page, slice(None), inputs.slot_mapping % self.case.page

    def check(self, output: Any) -> Check:
        """Written codes: how many differ, none may. Attention: the relative error over the rows that are compared."""
        op = self.case.op
        if op not in HAS_NEW_TOKENS:
            return Check(self._attention_error(output), BF16_BOUND)
        differing = self._differing_codes(output)
        if op == "kv_write" or differing:
            return Check(differing, 0)
        if op == "rope_kv_write":
            wanted = reference.rotate_from_cache(output.q, self.positions, self.cos_sin_cache)
            return Check(float((output.out != wanted.bfloat16()).sum()), 0)
        rotated = reference.rotate_from_cache(output.q, self.positions, self.cos_sin_cache).bfloat16()
        return Check(self._attention_error(output, rotated), BF16_BOUND)

    def check_baseline(self, output: Any) -> Check:
        """A baseline of attention gives its output [T, H, D], one of a write the set it ran on."""
        if isinstance(output, Inputs):
            check = self.check(output)
            if self.case.op in WRITES:
                # Rounding q to bf16 before the angles, or quantising k from bf16, is no other function.
                count = output.k.numel() + output.v.numel() + output.q.numel()
                return Check(check.error / count, BASELINE_BOUND)
            return Check(check.error, BASELINE_BOUND)
        return Check(self._attention_error(output), BASELINE_BOUND)

    def _differing_codes(self, inputs: Inputs) -> float:
        """Stored elements of the new tokens that are not the reference's, bit for bit."""
        case = self.case
        num_blocks = -(-case.num_tokens // case.page)
        shape = (num_blocks, case.num_kv_heads, case.page, case.head_dim)
        wanted = [torch.zeros(shape, dtype=self.pool.dtype, device=self.device) for _ in range(2)]
        slots = torch.arange(case.num_tokens, device=self.device)
        k = inputs.k
        if case.op != "kv_write":
            k = reference.rotate_from_cache(k, self.positions, self.cos_sin_cache)
        reference.write_kv(k, inputs.v, wanted[0], wanted[1], slots, **self.scales)
        place = slots // case.page, slice(None), slots % case.page
        found = (as_bits(cache)[self._place(inputs)] for cache in (self.k_cache, self.v_cache))
        return float(sum((f != as_bits(w)[place]).sum() for f, w in zip(found, wanted, strict=True)))

    def _attention_error(self, output: Inputs | Tensor, q: Tensor | None = None) -> float:
        """Against `reference.paged_attention` on the first set, `CHECKED_ROWS` query rows at a time."""
        if self._wanted is None:
            self._wanted = torch.cat([self._reference(*part, q) for part in self._parts()])
        out = output.out if isinstance(output, Inputs) else output
        return relative_error(torch.cat([out[rows] for rows, *_ in self._parts()]), self._wanted)

    def _parts(self) -> list[tuple[slice, int, int]]:
        """Rows of q that are compared, with their sequence and its length as of the last of them."""
        parts, start = [], 0
        for sequence, (query, seq) in enumerate(self.case.batch):
            for low, high in checked_rows(query):
                parts.append((slice(start + low, start + high), sequence, seq - query + high))
            start += query
        return parts

    def _reference(self, rows: slice, sequence: int, seq_len: int, q: Tensor | None) -> Tensor:
        first = self.sets[0]
        row = first.block_table[sequence]
        live = row.nonzero().squeeze(1)  # the other entries name the null block
        table = torch.zeros_like(row)
        table[live] = torch.arange(len(live), dtype=table.dtype, device=table.device)
        k_cache, v_cache = (blocks_of(cache, row[live].long()).float() for cache in (self.k_cache, self.v_cache))
        return reference.paged_attention(
            (first.q if q is None else q)[rows], k_cache, v_cache,
            block_table=table[None], seq_lens=torch.tensor([seq_len]),
            query_start_loc=torch.tensor([0, rows.stop - rows.start]), **self.scales, **self.masking,
        )  # fmt: skip

    def baselines(self) -> Mapping[str, Prepare]:
        """Those of the case's op."""
        from vllm_puzzle.bench.kernel import attention_baselines, write_baselines

        module = write_baselines if self.case.op in HAS_NEW_TOKENS else attention_baselines
        return module.baselines(self)


def checked_rows(query_len: int) -> list[tuple[int, int]]:
    """Ranges of query rows: all of a short query, else the first, middle and last CHECKED_ROWS."""
    if query_len <= 3 * CHECKED_ROWS:
        return [(0, query_len)]
    middle = (query_len - CHECKED_ROWS) // 2
    return [(low, low + CHECKED_ROWS) for low in (0, middle, query_len - CHECKED_ROWS)]


def blocks_of(cache: Tensor, blocks: Tensor) -> Tensor:
    """Some blocks of a cache, in a tensor of their own."""
    return as_bits(cache)[blocks].view(cache.dtype)
