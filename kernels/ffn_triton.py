"""Device code of the gated FFN for Hopper: both halves on plain vLLM weights, any width, and what is shipped of it.

Every matrix kernel keeps two accumulators over two tiles of weight rows, `pair` rows apart. In the gated half these are
a tile of gate rows and the tile of up rows that belongs to it (`pair` = I), and the epilogue computes silu(gate) · up;
in the down projection they are neighbours. So `[gate; up]` needs no other layout, and one binary serves both halves.

* `_skinny_kernel`, M ≤ 64: operands swapped (`W · xᵀ`), since warp-group instructions want 64 rows and there are fewer
  tokens; K may be split over programs, whose float32 partials `_reduce_kernel` adds in order.
* `_wide_kernel`, M > 64: persistent, tiles in groups of `GROUP` rows for L2, result stored by TMA.

Speed, predicted and not measured: at M ≤ 64 the floor is 2·d·I·w bytes over the copy bandwidth (gate and up of
d = 8192, I = 17920 in bf16: 587 MB, 196 µs at 3.0 TB/s), to come within 10 % of it at M ≤ 16 as three programs fit
on each SM with 48 KB of weights in flight each; at M ≥ 2048 4·M·d·I FLOPs over the matmul rate, with the activation
kernel (6·M·I bytes) saved.

FP8 is accumulated exactly in `SCALES = per block` (each 128 of K added in float32, after its scales) and in the tensor
core's own shorter accumulator in `SCALES = once`, as cuBLAS and CUTLASS do in their fast mode.
"""
# Device code below has Triton's types, which mypy cannot state.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from vllm_puzzle.kernels.variant import Variant

SCALE_BLOCK = 128  # elements of K (and rows of the weight) that share a scale in block quantization
MAX_SPLITS = 16
REDUCE_BLOCK = 256
NO_SCALES, SCALES_ONCE, SCALES_PER_BLOCK = range(3)


@dataclass(frozen=True, slots=True)
class Form:
    """One compiled form: kernel, what is fixed in it, and what it promises (variant.py)."""

    kernel: Any
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int
    claims: frozenset[str]


_HOPPER = frozenset({"wgmma", "tma"})


def _skinny(block_m: int, block_k: int, scales: int, num_stages: int, is_aligned: bool = True) -> Form:
    fixed = {"BLOCK_M": block_m, "BLOCK_N": 64, "BLOCK_K": block_k, "IS_SCALED": scales == SCALES_PER_BLOCK}
    claims = _HOPPER if is_aligned else frozenset({"wgmma"})
    return Form(_skinny_kernel, fixed | {"TMA": is_aligned, "OUT": tl.bfloat16}, 4, num_stages, claims)


def _wide(block_n: int, block_k: int, scales: int, num_stages: int, is_gated: bool = True, out: Any = None) -> Form:
    fixed = {"BLOCK_M": 128, "BLOCK_N": block_n, "BLOCK_K": block_k, "SCALES": scales, "GROUP": 8}
    out = tl.bfloat16 if out is None else out
    return Form(_wide_kernel, fixed | {"IS_GATED": is_gated, "OUT": out}, 8, num_stages, _HOPPER)


def forms() -> dict[str, Form]:
    """Every compiled form by name: tile, what is multiplied, and for wide tiles which half and what comes out."""
    return {
        "skinny-16 bf16": _skinny(16, 64, NO_SCALES, 4),
        "skinny-64 bf16": _skinny(64, 64, NO_SCALES, 4),
        "skinny-16 fp8": _skinny(16, 128, SCALES_PER_BLOCK, 4),
        "skinny-64 fp8": _skinny(64, 128, SCALES_PER_BLOCK, 4),
        "unaligned bf16": _skinny(16, 32, NO_SCALES, 2, is_aligned=False),
        "unaligned fp8": _skinny(16, 32, SCALES_PER_BLOCK, 2, is_aligned=False),
        "wide bf16 gated": _wide(128, 64, NO_SCALES, 4),
        "wide fp8 gated": _wide(128, 128, SCALES_ONCE, 3),
        "wide fp8 gated to fp8": _wide(128, 128, SCALES_ONCE, 3, out=tl.float8e4nv),
        "wide-exact fp8 gated": _wide(64, 128, SCALES_PER_BLOCK, 4),
        "wide-exact fp8 plain": _wide(64, 128, SCALES_PER_BLOCK, 4, is_gated=False),
        "reduce": Form(
            _reduce_kernel, {"SPLITS": MAX_SPLITS, "BLOCK": REDUCE_BLOCK, "OUT": tl.bfloat16}, 4, 1, frozenset()
        ),
    }


def variants() -> tuple[Variant, ...]:
    """What the launcher in ffn.py may run on a GPU."""
    return tuple(
        Variant(
            name=f"ffn {name}",
            kernel=form.kernel,
            signature=_signature(name, form),
            constexprs=form.constexprs,
            num_warps=form.num_warps,
            num_stages=form.num_stages,
            claims=form.claims,
        )
        for name, form in forms().items()
    )


_FLOATS = ("row_scale", "weight_scale", "x_scale", "out_scale", "partial")


def _signature(name: str, form: Form) -> dict[str, str]:
    element = "fp8e4nv" if "fp8" in name else "bf16"
    fixed = form.constexprs
    found = {key: "i32" for key in form.kernel.arg_names if key not in fixed}
    found |= {key: "*fp32" for key in _FLOATS if key in found} | {"out": "*u8"}
    if form.kernel is _skinny_kernel and not fixed["TMA"]:
        return found | {"x": f"*{element}", "weight": f"*{element}"}
    if form.kernel is not _reduce_kernel:
        found["x"] = f"tensordesc<{element}[{fixed['BLOCK_M']}, {fixed['BLOCK_K']}]>"
        found["weight"] = f"tensordesc<{element}[{fixed['BLOCK_N']}, {fixed['BLOCK_K']}]>"
    if form.kernel is _wide_kernel:
        result = "fp8e4nv" if fixed["OUT"] is tl.float8e4nv else "bf16"
        found["out"] = f"tensordesc<{result}[{fixed['BLOCK_M']}, {fixed['BLOCK_N']}]>"
    return found


def is_interpreted() -> bool:
    """Whether kernels run under Triton's interpreter instead of on a GPU."""
    return not isinstance(_skinny_kernel, triton.JITFunction)


def triton_type(dtype: torch.dtype) -> Any:
    """Triton's name of an output type."""
    names = {
        torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32,
        torch.float8_e4m3fn: tl.float8e4nv,
    }  # fmt: skip
    return names[dtype]


# --- device code ---------------------------------------------------------------------------------------------------

_ONCE, _PER_BLOCK = tl.constexpr(SCALES_ONCE), tl.constexpr(SCALES_PER_BLOCK)
_SCALE_BLOCK = tl.constexpr(SCALE_BLOCK)
_E4M3_MAX = tl.constexpr(448.0)


@triton.jit
def _tile(
    source, row, column, stride, num_rows, num_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr
):
    """source[row : row + ROWS, column : column + COLUMNS], zero beyond the matrix."""
    if TMA:
        tile = source.load([row, column])
    else:
        rows = row + tl.arange(0, ROWS)
        columns = column + tl.arange(0, COLUMNS)
        inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
        tile = tl.load(source + rows[:, None].to(tl.int64) * stride + columns[None, :], mask=inside, other=0.0)
    return tile


@triton.jit
def _weight_scales(scales, rows, num_rows, rows_per_scale, row_stride, block, block_stride):
    places = (rows // rows_per_scale) * row_stride + block * block_stride
    return tl.load(scales + places, mask=rows < num_rows, other=0.0)


@triton.jit
def _token_scales(scales, tokens, num_tokens, token_stride, block, block_stride):
    return tl.load(scales + tokens * token_stride + block * block_stride, mask=tokens < num_tokens, other=0.0)


@triton.jit
def _row_scales(row_scale, tokens, num_tokens, has_row_scale):
    return tl.load(row_scale + tokens, mask=(tokens < num_tokens) & (has_row_scale != 0), other=1.0)


@triton.jit
def _silu_mul(gate, up):
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def _to_e4m3(value, out_scale):
    """value / scale as e4m3, saturating, to nearest even; NaN stays. The reciprocal is taken once, as vLLM does."""
    inverse = tl.div_rn(1.0, tl.load(out_scale))
    return tl.clamp(value * inverse, -_E4M3_MAX, _E4M3_MAX, propagate_nan=tl.PropagateNan.ALL).to(tl.float8e4nv)


@triton.jit
def _put(value, out, origin, places, mask, TYPE: tl.constexpr):
    """Store at `origin` (64 bits) plus `places` (32 bits, within a tile); `out` is bytes of TYPE."""
    tl.store(out.to(tl.pointer_type(TYPE), bitcast=True) + origin + places, value.to(TYPE), mask=mask)


@triton.jit
def _store(
    first, second, out, origin, places, pair, mask, second_mask, out_scale, is_gated, is_other, OUT: tl.constexpr
):
    """Both accumulators of a skinny tile, [tokens, rows]: one result if gated, else two `pair` columns apart."""
    if is_gated != 0:
        hidden = _silu_mul(first, second)
        if is_other != 0:
            _put(_to_e4m3(hidden, out_scale), out, origin, places, mask, tl.float8e4nv)
        else:
            _put(hidden, out, origin, places, mask, OUT)
    else:
        if is_other != 0:
            _put(first, out, origin, places, mask, tl.float32)
            _put(second, out, origin, places + pair, second_mask, tl.float32)
        else:
            _put(first, out, origin, places, mask, OUT)
            _put(second, out, origin, places + pair, second_mask, OUT)


# One binary for every batch and shape: no value or alignment of these may compile another one.
@triton.jit(
    do_not_specialize=[
        "num_tokens", "num_outputs", "size", "x_stride", "weight_stride", "out_stride", "pair", "split_size",
        "is_gated", "is_other", "has_row_scale", "rows_per_scale", "scale_row_stride", "scale_block_stride",
        "x_scale_row_stride", "x_scale_block_stride",
    ],
    do_not_specialize_on_alignment=["x", "weight", "out", "row_scale", "weight_scale", "x_scale", "out_scale"],
)  # fmt: skip
def _skinny_kernel(
    x, weight, out, row_scale, weight_scale, x_scale, out_scale,
    num_tokens, num_outputs, size, x_stride, weight_stride, out_stride, pair, split_size,
    is_gated, is_other, has_row_scale, rows_per_scale, scale_row_stride, scale_block_stride,
    x_scale_row_stride, x_scale_block_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    IS_SCALED: tl.constexpr, TMA: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """out[tokens, outputs] of a tile and a part of K. x: [num_tokens, size], weight: [outputs or 2 · outputs, size].

    `out` is bytes: of OUT, or, with is_other, of e4m3 (gated) or of float32 partials [splits, num_tokens, num_outputs].
    """
    num_token_tiles = tl.cdiv(num_tokens, BLOCK_M)
    token = (tl.program_id(0) % num_token_tiles) * BLOCK_M
    row = (tl.program_id(0) // num_token_tiles) * BLOCK_N * tl.where(is_gated != 0, 1, 2)
    num_rows = num_outputs * tl.where(is_gated != 0, 2, 1)
    split = tl.program_id(1)
    start = split * split_size
    tokens = token + tl.arange(0, BLOCK_M)
    rows = row + tl.arange(0, BLOCK_N)
    first = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    second = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for k in tl.range(start, tl.minimum(start + split_size, size), BLOCK_K):
        columns = _tile(x, token, k, x_stride, num_tokens, size, BLOCK_M, BLOCK_K, TMA).T
        a = _tile(weight, row, k, weight_stride, num_rows, size, BLOCK_N, BLOCK_K, TMA)
        b = _tile(weight, row + pair, k, weight_stride, num_rows, size, BLOCK_N, BLOCK_K, TMA)
        if IS_SCALED:
            block = k // _SCALE_BLOCK
            xs = _token_scales(x_scale, tokens, num_tokens, x_scale_row_stride, block, x_scale_block_stride)[None, :]
            a_scale = _weight_scales(
                weight_scale, rows, num_rows, rows_per_scale, scale_row_stride, block, scale_block_stride
            )
            b_scale = _weight_scales(
                weight_scale, rows + pair, num_rows, rows_per_scale, scale_row_stride, block, scale_block_stride
            )
            part, other_part = tl.dot(a, columns), tl.dot(b, columns)
            first += part * (a_scale[:, None] * xs)
            second += other_part * (b_scale[:, None] * xs)
        else:
            first = tl.dot(a, columns, first, input_precision="ieee")
            second = tl.dot(b, columns, second, input_precision="ieee")
    scale = _row_scales(row_scale, tokens, num_tokens, has_row_scale)[:, None]
    first = first.T * scale
    second = second.T * scale
    origin = (split.to(tl.int64) * num_tokens + token) * out_stride
    places = tl.arange(0, BLOCK_M)[:, None] * out_stride + rows[None, :]
    mask = (tokens < num_tokens)[:, None] & (rows < num_outputs)[None, :]
    second_mask = (tokens < num_tokens)[:, None] & (rows + pair < num_outputs)[None, :]
    _store(first, second, out, origin, places, pair, mask, second_mask, out_scale, is_gated, is_other, OUT)


@triton.jit(
    do_not_specialize=[
        "num_tokens", "num_outputs", "size", "pair", "has_row_scale", "rows_per_scale", "scale_row_stride",
        "scale_block_stride", "x_scale_row_stride", "x_scale_block_stride", "num_programs",
    ],
    do_not_specialize_on_alignment=["row_scale", "weight_scale", "x_scale", "out_scale"],
)  # fmt: skip
def _wide_kernel(
    x, weight, out, row_scale, weight_scale, x_scale, out_scale,
    num_tokens, num_outputs, size, pair, has_row_scale, rows_per_scale, scale_row_stride, scale_block_stride,
    x_scale_row_stride, x_scale_block_stride, num_programs,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SCALES: tl.constexpr, IS_GATED: tl.constexpr, OUT: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """All tiles of out[num_tokens, num_outputs], `num_programs` at a time; x, weight and out are tensor descriptors."""
    OUTPUTS: tl.constexpr = BLOCK_N if IS_GATED else 2 * BLOCK_N
    num_token_tiles = tl.cdiv(num_tokens, BLOCK_M)
    num_output_tiles = tl.cdiv(num_outputs, OUTPUTS)
    num_rows = num_outputs * (2 if IS_GATED else 1)
    # The epilogue of a tile overlaps with the loads of the next.
    for tile in tl.range(tl.program_id(0), num_token_tiles * num_output_tiles, num_programs, flatten=True):
        group = tile // (GROUP * num_output_tiles)
        within = tile % (GROUP * num_output_tiles)
        height = tl.minimum(num_token_tiles - group * GROUP, GROUP)
        token = (group * GROUP + within % height) * BLOCK_M
        row = (within // height) * OUTPUTS
        tokens = token + tl.arange(0, BLOCK_M)
        rows = row + tl.arange(0, BLOCK_N)
        first = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        second = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in tl.range(0, size, BLOCK_K):
            lines = x.load([token, k])
            a = weight.load([row, k]).T
            b = weight.load([row + pair, k]).T
            if SCALES == _PER_BLOCK:
                block = k // _SCALE_BLOCK
                xs = _token_scales(x_scale, tokens, num_tokens, x_scale_row_stride, block, x_scale_block_stride)
                a_scale = _weight_scales(
                    weight_scale, rows, num_rows, rows_per_scale, scale_row_stride, block, scale_block_stride
                )
                b_scale = _weight_scales(
                    weight_scale, rows + pair, num_rows, rows_per_scale, scale_row_stride, block, scale_block_stride
                )
                part, other_part = tl.dot(lines, a), tl.dot(lines, b)
                first += part * (xs[:, None] * a_scale[None, :])
                second += other_part * (xs[:, None] * b_scale[None, :])
            else:
                first = tl.dot(lines, a, first, input_precision="ieee")
                second = tl.dot(lines, b, second, input_precision="ieee")
        scale = _row_scales(row_scale, tokens, num_tokens, has_row_scale)
        if SCALES == _ONCE:
            scale *= _token_scales(x_scale, tokens, num_tokens, x_scale_row_stride, 0, 0)
            first *= _weight_scales(weight_scale, rows, num_rows, rows_per_scale, scale_row_stride, 0, 0)[None, :]
            second *= _weight_scales(weight_scale, rows + pair, num_rows, rows_per_scale, scale_row_stride, 0, 0)[
                None, :
            ]
        first *= scale[:, None]
        second *= scale[:, None]
        if IS_GATED:
            hidden = _silu_mul(first, second)
            if OUT == tl.float8e4nv:  # noqa: SIM300
                out.store([token, row], _to_e4m3(hidden, out_scale))
            else:
                out.store([token, row], hidden.to(OUT))
        else:
            out.store([token, row], first.to(OUT))
            out.store([token, row + pair], second.to(OUT))


@triton.jit(
    do_not_specialize=["num_outputs", "num_splits", "split_stride", "out_stride", "is_gated", "is_other"],
    do_not_specialize_on_alignment=["partial", "out", "out_scale"],
)
def _reduce_kernel(
    partial, out, out_scale, num_outputs, num_splits, split_stride, out_stride, is_gated, is_other,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    """out[token, outputs] from partial [num_splits, tokens, outputs or 2 · outputs], float32, always in one order."""
    token = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    split = tl.arange(0, SPLITS)
    width = num_outputs * tl.where(is_gated != 0, 2, 1)
    mask = (split < num_splits)[:, None] & (columns < num_outputs)[None, :]
    source = partial + split[:, None].to(tl.int64) * split_stride + token * width + columns[None, :]
    first = tl.sum(tl.load(source, mask=mask, other=0.0), axis=0)
    origin = token * out_stride
    inside = columns < num_outputs
    if is_gated != 0:
        hidden = _silu_mul(first, tl.sum(tl.load(source + num_outputs, mask=mask, other=0.0), axis=0))
        if is_other != 0:
            _put(_to_e4m3(hidden, out_scale), out, origin, columns, inside, tl.float8e4nv)
        else:
            _put(hidden, out, origin, columns, inside, OUT)
    else:
        _put(first, out, origin, columns, inside, OUT)
