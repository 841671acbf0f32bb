"""Which form of the attention kernels runs, over how many programs: from shapes and upper bounds, on the host."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from vllm_puzzle.kernels.variant import Variant
from vllm_puzzle.kernels.window_attention_triton import NOT_SPECIALIZED, decode_kernel, reduce_kernel, rows_kernel

MAX_DECODE_LEN = 8  # up to here a sequence's queries are decoding (drafts to verify), and its keys may be split
MAX_SPLITS = 64
# Of `modelled_time`: the second launch, and a tile whose program has its SM alone. Assumed, not measured.
REDUCE_COST, LONE_TILE_COST = 3.0, 0.6


@dataclass(frozen=True, slots=True)
class Config:
    """One compiled form: ROWS query rows and TILE keys to a step of a kernel."""

    kernel: Any
    rows: int
    tile: int
    num_warps: int
    num_stages: int

    def constexprs(self, head_dim: int, kind: Any) -> dict[str, Any]:
        """The kernel's compile-time arguments. kind: Triton's type of the products' operands."""
        shape = {"ROWS": self.rows, "TILE": self.tile, "D": padded_dim(head_dim), "KIND": kind}
        if self.kernel is decode_kernel:
            return shape | {"WARPS": self.num_warps}
        # At D=256 a second loop would spill.
        return shape | {"HAS_INNER": padded_dim(head_dim) < 256}


def padded_dim(head_dim: int) -> int:
    """The compiled head dimension that serves `head_dim`, the rest masked: 64, 128 or 256."""
    return max(64, triton.next_power_of_2(head_dim))


def choose_config(cache_dtype: torch.dtype, head_dim: int, num_rows: int) -> Config:
    """For blocks of `num_rows` rows (query tokens · group). Read off the machine code, not timed (kernels.md §2.1).

    Five stages keep two tiles on their way while one is used, because the block table is read two steps ahead. At D=256
    one form does for both: 16 rows of 256 sums and 256 queries would be too many registers for a warp. 64 rows at a
    time leave room for a second program on the SM, so that one converts codes while the other multiplies; a 16-bit
    cache has nothing to convert, and 128 rows take a fifth fewer instructions.
    """
    padded, is_fp8 = padded_dim(head_dim), cache_dtype.itemsize == 1
    if padded == 256:
        return Config(rows_kernel, rows=64, tile=32, num_warps=8, num_stages=5)
    if num_rows <= 16:
        return Config(decode_kernel, rows=16, tile=128 if is_fp8 or padded == 64 else 64, num_warps=4, num_stages=5)
    if is_fp8 or padded == 64:
        return Config(rows_kernel, rows=64, tile=64, num_warps=4, num_stages=5)
    return Config(rows_kernel, rows=128, tile=64, num_warps=8, num_stages=5)


def modelled_time(num_programs: int, num_tiles: int, splits: int, num_sms: int) -> float:
    """Of `num_programs` programs with `num_tiles` tiles each, when split: in the time of a tile on a full card.

    Two programs share an SM. Until the card is full a tile takes LONE_TILE_COST; what is left over after full waves
    runs as on an empty card.
    """
    waves, rest = divmod(num_programs * splits, 2 * num_sms)
    last = max(LONE_TILE_COST, rest / (2 * num_sms)) if rest else 0.0
    return math.ceil(num_tiles / splits) * (waves + last) + REDUCE_COST * (splits > 1)


@functools.lru_cache(maxsize=4096)
def choose_num_splits(num_programs: int, num_tiles: int, num_sms: int, max_splits: int) -> int:
    """Over how many programs to split each of `num_programs`' tiles: the least modelled time, the fewest of equals."""
    candidates = range(1, max(1, min(num_tiles, max_splits, MAX_SPLITS)) + 1)
    return min(candidates, key=lambda splits: modelled_time(num_programs, num_tiles, splits, num_sms))


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch over the sequences with min_query_len to max_query_len queries. blocks_per_seq 0: by their lengths."""

    config: Config
    min_query_len: int
    max_query_len: int
    blocks_per_seq: int
    num_tiles: int  # at most, of one block

    def num_programs(self, num_seqs: int, num_tokens: int, group: int) -> int:
        """Size of the grid's first axis."""
        if self.blocks_per_seq:
            return num_seqs * self.blocks_per_seq
        return num_tokens * group // self.config.rows + num_seqs


def plan_launches(
    cache_dtype: torch.dtype,
    head_dim: int,
    group: int,
    num_seqs: int,
    max_query_len: int,
    sliding_window: int | None,
    num_sink_tokens: int,
    max_seq_len: int,
) -> tuple[Launch, ...]:
    """One launch when all sequences decode; else one for those that do, up to as many tokens as fit a tile of 16 rows,
    and one for the rest. A single sequence with a long query needs no launch for the others.
    """

    def launch(low: int, high: int, by_length: bool) -> Launch:
        config = choose_config(cache_dtype, head_dim, group * high)
        live = max_seq_len if sliding_window is None else min(max_seq_len, sliding_window + high - 1)
        tiles = math.ceil(live / config.tile) + math.ceil(min(num_sink_tokens, max_seq_len - live) / config.tile)
        return Launch(config, low, high, 0 if by_length else math.ceil(group * high / config.rows), tiles)

    if max_query_len <= MAX_DECODE_LEN:
        return (launch(1, max_query_len, False),)
    if num_seqs == 1:
        return (launch(1, max_query_len, True),)
    decode_len = min(max(1, 16 // group), MAX_DECODE_LEN)
    return (launch(1, decode_len, False), launch(decode_len + 1, max_query_len, True))


REDUCE_CONSTEXPRS = {"COLUMNS": 64, "SPLITS": 16}
_TYPES = {
    torch.float8_e4m3fn: ("fp8e4nv", tl.float16), torch.bfloat16: ("bf16", tl.bfloat16),
}  # fmt: skip


def variants() -> tuple[Variant, ...]:
    """What a bfloat16 model launches with an e4m3 or a bfloat16 cache; page, group and window are run-time numbers.

    Head dimensions between are padded (96 to 128). Compiled at first use and not here, for want of room: float16
    models (the same code but for the rounding of the output), and a bfloat16 cache at D=256.
    """
    forms = [
        (dtype, head_dim, num_rows)
        for dtype, dims in ((torch.float8_e4m3fn, (64, 128, 256)), (torch.bfloat16, (64, 128)))
        for head_dim in dims
        for num_rows in ((16, 64) if head_dim < 256 else (64,))
    ]
    return (*(_variant(*form) for form in forms), _reduce_variant())


def _variant(cache_dtype: torch.dtype, head_dim: int, num_rows: int) -> Variant:
    config = choose_config(cache_dtype, head_dim, num_rows)
    name, kind = _TYPES[cache_dtype]
    constexprs = config.constexprs(head_dim, kind)
    is_decode = config.kernel is decode_kernel
    pointers = dict.fromkeys(("k_scale", "v_scale", "sinks", "partial_outputs", "partial_statistics"), "*fp32")
    pointers |= dict.fromkeys(("block_table", "seq_lens", "query_start_loc"), "*i32")
    pointers |= {"q": "*bf16", "out": "*bf16", "k_cache": f"*{name}"}
    pointers["v_cache"] = "*i16" if is_decode and name == "fp8e4nv" else f"*{name}"
    numbers = [key for key in config.kernel.arg_names if key not in pointers and key not in constexprs]
    return Variant(
        name=f"attention {'decode' if is_decode else 'rows'} {name} D{head_dim}",
        kernel=config.kernel,
        signature=pointers | {key: "fp32" if key == "softmax_scale" else "i32" for key in numbers},
        constexprs=constexprs,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        claims=frozenset() if is_decode else frozenset({"wgmma"}),
        aligned=(*pointers, *(key for key in numbers if key not in (*NOT_SPECIALIZED, "softmax_scale"))),
    )


def _reduce_variant() -> Variant:
    pointers = {"out": "*bf16", "partial_outputs": "*fp32", "partial_statistics": "*fp32", "sinks": "*fp32",
                "seq_lens": "*i32", "query_start_loc": "*i32"}  # fmt: skip
    numbers = [key for key in reduce_kernel.arg_names if key not in pointers and key not in REDUCE_CONSTEXPRS]
    return Variant(
        name="attention reduce bf16",
        kernel=reduce_kernel,
        signature=pointers | dict.fromkeys(numbers, "i32"),
        constexprs=REDUCE_CONSTEXPRS,
        num_warps=4,
        num_stages=1,
        aligned=(*pointers, "head_dim", "out_token_stride", "out_head_stride"),
    )
