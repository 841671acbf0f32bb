"""Attention over a paged KV cache, made for sliding windows.

The twin is `reference.paged_attention`. No call waits for the device: grids, splits and scratch follow from shapes and
upper bounds (the batch, the longest query, window, width of the block table), so a call can stand in a CUDA graph, and
padded sequences (length 0) cost a program that ends at once.

Least time: every live key and value read once, `2 · KV heads · (min(length, window) + sinks) · head_dim · bytes` per
sequence, over the card's copy bandwidth (kernels.md §5). Predicted, not measured: decoding stays near it, since a tile
of 128 keys at D=128 takes about 1,000 instructions per warp (read off the machine code) where 132 SMs that share 3 TB/s
have about 2,400 cycles; at a window of 128 a launch costs more than the bytes. Prefill from e4m3 is bound by issue as
much as by products (540 instructions per warp to 512 cycles of matrix work): about half of the matrix peak.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from vllm_puzzle.kernels.window_attention_plan import (
    MAX_DECODE_LEN,
    MAX_SPLITS,
    REDUCE_CONSTEXPRS,
    Launch,
    choose_num_splits,
    plan_launches,
)
from vllm_puzzle.kernels.window_attention_triton import decode_kernel, reduce_kernel

# Partial results for so many (token, split) pairs: 512 · 64 heads · 130 · 4 bytes = 17 MB at D=128.
SPLIT_TOKENS = 512
NO_WINDOW = 2**30
H100_SMS = 132  # stands for the device that has none (the interpreter)
# Type of the cache → of the products' operands.
KINDS = {
    torch.float8_e4m3fn: tl.float16, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Scratch:
    """Partial results of split sequences, made once and shared by all layers.

    outputs: float32, one row of head_dim per (split, token, head); statistics: float32, maximum and sum of each.
    """

    outputs: Tensor
    statistics: Tensor

    @classmethod
    def allocate(
        cls, max_num_seqs: int, num_heads: int, head_dim: int, *, max_query_len: int = 8, device: torch.device | str
    ) -> Scratch:
        """For batches of up to `max_num_seqs` and layers of up to `num_heads` query heads of up to `head_dim`.

        max_query_len: drafts to verify, and one. Larger batches and layers are served too, with fewer splits.
        """
        tokens = max_num_seqs * min(max_query_len, MAX_DECODE_LEN)
        return cls.for_rows(min(tokens * MAX_SPLITS, SPLIT_TOKENS) * num_heads, head_dim, device)

    @classmethod
    def for_rows(cls, num_rows: int, head_dim: int, device: torch.device | str) -> Scratch:
        """With room for `num_rows` (split, token, head) triples."""
        return cls(
            torch.empty(num_rows * head_dim, dtype=torch.float32, device=device),
            torch.empty(num_rows * 2, dtype=torch.float32, device=device),
        )

    def max_splits(self, num_rows: int, head_dim: int) -> int:
        """How often `num_rows` (token, head) pairs fit."""
        return min(self.outputs.numel() // (num_rows * head_dim), self.statistics.numel() // (2 * num_rows))


@functools.cache
def _ones(device: torch.device) -> Tensor:
    """A scale of one; also what is passed where there are no sinks, and no scratch, and read by nobody."""
    return torch.ones(1, dtype=torch.float32, device=device)


@functools.cache
def _num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else H100_SMS


def _division(page: int) -> tuple[int, int]:
    """n // page = (n · magic >> 32) >> shift, exact for n < 2^30 (Granlund and Montgomery 1994)."""
    bits = (page - 1).bit_length()
    return -(-(2 ** (30 + bits)) // page), bits - 2


def _require(holds: bool, what: str, found: object, allowed: str) -> None:
    if not holds:
        raise ValueError(f"window_attention, {what}: found {found}, allowed: {allowed}")


def _check(q: Tensor, k_cache: Tensor, v_cache: Tensor, out: Tensor, indices: dict[str, Tensor]) -> None:
    num_heads, head_dim = q.shape[1:]
    num_kv_heads, page = k_cache.shape[1:3]
    _require(head_dim % 16 == 0 and head_dim <= 256, "head dimension", head_dim, "a multiple of 16 up to 256")
    _require(page % 16 == 0, "page size", page, "a multiple of 16")
    _require(num_heads % num_kv_heads == 0, "query heads", num_heads, f"a multiple of the {num_kv_heads} KV heads")
    _require(
        k_cache.shape == v_cache.shape and k_cache.shape[3] == head_dim, "shape of the caches",
        (tuple(k_cache.shape), tuple(v_cache.shape)), f"[blocks, KV heads, page, {head_dim}] twice",
    )  # fmt: skip
    _require(out.shape == q.shape, "shape of the output", tuple(out.shape), f"{tuple(q.shape)}")
    kinds = (torch.float8_e4m3fn, torch.float32, q.dtype)
    _require(
        k_cache.dtype == v_cache.dtype and k_cache.dtype in kinds, "type of the caches", k_cache.dtype,
        f"float8_e4m3fn (also as uint8), or {q.dtype} as the queries",
    )  # fmt: skip
    for name, tensor in {"q": q, "k_cache": k_cache, "v_cache": v_cache, "out": out}.items():
        _require(tensor.stride(-1) == 1, f"last stride of {name}", tensor.stride(-1), "1")
    for name, tensor in indices.items():
        _require(tensor.dtype == torch.int32 and tensor.stride(-1) == 1, name, tensor.dtype, "int32, contiguous")


def _per_head(name: str, values: Tensor | None, sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, int]:
    """A float32 tensor of one of the `sizes` and its stride, 0 for one number; a one for None."""
    if values is None:
        return _ones(device), 0
    good = values.dtype == torch.float32 and values.ndim == 1 and len(values) in sizes and values.is_contiguous()
    _require(good, name, f"{values.dtype} {tuple(values.shape)}", f"float32 of {' or '.join(map(str, sizes))}")
    return values, int(len(values) > 1)


def window_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    out: Tensor,
    *,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    max_query_len: int,
    softmax_scale: float,
    sliding_window: int | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    sinks: Tensor | None = None,
    num_sink_tokens: int = 0,
    scratch: Scratch | None = None,
    num_splits: int | None = None,
) -> None:
    """`reference.paged_attention` of the same arguments into `out`, on the current stream. ValueError: what is wrong.

    q, out: [T, H, D], T ≥ query_start_loc[-1] (rows of no sequence are not written). k_cache, v_cache: [blocks, KV,
    page, D] with any strides but the last, e4m3 (or its codes as uint8) or q's type. block_table: int32 [B, pages];
    seq_lens: int32 [B], new tokens included, 0 for padding; query_start_loc: int32 [B + 1]. max_query_len: at least the
    longest query. k_scale, v_scale: float32 [1] or [KV]. sinks: float32 [H], logits. softmax_scale > 0.
    num_splits: None chooses; a number is for tests.
    """
    k_cache, v_cache = (c.view(torch.float8_e4m3fn) if c.dtype == torch.uint8 else c for c in (k_cache, v_cache))
    _check(q, k_cache, v_cache, out, {"block_table": block_table, "seq_lens": seq_lens,
                                      "query_start_loc": query_start_loc})  # fmt: skip
    _require(softmax_scale > 0, "softmax_scale", softmax_scale, "a positive number")
    _require(
        sliding_window is None or sliding_window > 0, "sliding_window", sliding_window, "None or a positive number"
    )
    _require(num_sink_tokens >= 0, "num_sink_tokens", num_sink_tokens, "0 or more")
    num_heads, head_dim = q.shape[1:]
    num_kv_heads, page = k_cache.shape[1:3]
    num_seqs, num_pages = block_table.shape
    if num_seqs == 0 or q.shape[0] == 0:
        return
    group = num_heads // num_kv_heads
    k_scale, k_scale_stride = _per_head("k_scale", k_scale, (1, num_kv_heads), q.device)
    v_scale, v_scale_stride = _per_head("v_scale", v_scale, (1, num_kv_heads), q.device)
    sink_logits, _ = _per_head("sinks", sinks, (num_heads,), q.device)
    magic, shift = _division(page)
    common = {
        "q": q, "out": out, "seq_lens": seq_lens, "query_start_loc": query_start_loc, "block_table": block_table,
        "k_scale": k_scale, "v_scale": v_scale, "sinks": sink_logits, "softmax_scale": float(softmax_scale),
        "window": NO_WINDOW if sliding_window is None else min(sliding_window, NO_WINDOW),
        "num_sink_tokens": num_sink_tokens, "has_sinks": int(sinks is not None), "group": group,
        "num_kv_heads": num_kv_heads, "head_dim": head_dim, "page": page, "page_magic": magic, "page_shift": shift,
        "q_token_stride": q.stride(0), "q_head_stride": q.stride(1), "out_token_stride": out.stride(0),
        "out_head_stride": out.stride(1), "table_stride": block_table.stride(0), "k_scale_stride": k_scale_stride,
        "v_scale_stride": v_scale_stride, "num_seqs": num_seqs,
    }  # fmt: skip
    for launch in plan_launches(
        k_cache.dtype, head_dim, group, num_seqs, max_query_len, sliding_window, num_sink_tokens, num_pages * page
    ):
        _run(launch, common, k_cache, v_cache, scratch, num_splits)


def _run(
    launch: Launch,
    common: dict[str, Any],
    k_cache: Tensor,
    v_cache: Tensor,
    scratch: Scratch | None,
    wanted: int | None,
) -> None:
    q, group, num_kv_heads, head_dim = (common[name] for name in ("q", "group", "num_kv_heads", "head_dim"))
    config, num_seqs = launch.config, common["num_seqs"]
    programs = launch.num_programs(num_seqs, q.shape[0], group)
    num_rows = num_seqs * launch.max_query_len * group * num_kv_heads
    splits = 1
    if launch.max_query_len <= MAX_DECODE_LEN:
        room = MAX_SPLITS if scratch is None else scratch.max_splits(num_rows, head_dim)
        _require(wanted is None or wanted <= max(room, 1), "num_splits", wanted, f"up to the scratch's {room}")
        splits = wanted or choose_num_splits(programs * num_kv_heads, launch.num_tiles, _num_sms(q.device), room)
    if splits > 1 and scratch is None:
        scratch = Scratch.for_rows(num_rows * splits, head_dim, q.device)
    nothing = _ones(q.device)
    outputs, statistics = (scratch.outputs, scratch.statistics) if splits > 1 and scratch else (nothing, nothing)
    kind = tl.float32 if q.dtype == torch.float32 else KINDS[k_cache.dtype]
    if config.kernel is decode_kernel and v_cache.dtype == torch.float8_e4m3fn:
        v_cache = v_cache.view(torch.int16)
    config.kernel[(programs, num_kv_heads, splits)](
        **common, k_cache=k_cache, v_cache=v_cache, partial_outputs=outputs, partial_statistics=statistics,
        k_block_stride=k_cache.stride(0), k_head_stride=k_cache.stride(1), k_slot_stride=k_cache.stride(2),
        v_block_stride=v_cache.stride(0), v_head_stride=v_cache.stride(1), v_slot_stride=v_cache.stride(2),
        blocks_per_seq=launch.blocks_per_seq, min_query_len=launch.min_query_len, max_query_len=launch.max_query_len,
        num_splits=splits, **config.constexprs(head_dim, kind), num_warps=config.num_warps,
        num_stages=config.num_stages,
    )  # fmt: skip
    if splits > 1:
        columns = REDUCE_CONSTEXPRS["COLUMNS"]
        grid = (num_seqs * launch.max_query_len, group * num_kv_heads, math.ceil(head_dim / columns))
        shared = {key: value for key, value in common.items() if key in reduce_kernel.arg_names}
        reduce_kernel[grid](
            **shared, partial_outputs=outputs, partial_statistics=statistics, min_query_len=launch.min_query_len,
            max_query_len=launch.max_query_len, num_splits=splits, **REDUCE_CONSTEXPRS, num_warps=4,
        )  # fmt: skip
