"""The two halves of a gated FFN as one launch each: `silu(x · gateᵀ) · (x · upᵀ)`, and the down projection.

Arguments are those of the plain definitions in `reference.py`; the device code is in `ffn_triton.py`. bfloat16 and FP8
(e4m3) on a Hopper GPU; float32 and float16 under Triton's interpreter only. Nothing is read back, so that a launch may
be part of a CUDA graph; every launch uses a configuration of the table or of `default_config`, none is tried out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor
from vllm_puzzle.kernels import ffn_triton
from vllm_puzzle.kernels.ffn_table import MAX_SPLIT_TOKENS, Config, default_config
from vllm_puzzle.kernels.ffn_triton import MAX_SPLITS, REDUCE_BLOCK, SCALE_BLOCK, Form

E4M3 = torch.float8_e4m3fn
HOPPER = 9  # compute capability's first number
ALIGNMENT = 16  # bytes, of what TMA loads and stores
MAX_OUT_STRIDE = 2**24  # so that places within a tile fit 32 bits
INTERPRETED_SMS = 2


def gate_up_silu(
    x: Tensor,
    weight: Tensor,
    *,
    row_scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
    x_scale: Tensor | None = None,
    out_scale: Tensor | None = None,
    out: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """`silu(g) · u` with `[g, u] = row_scale · (x · weightᵀ)`. x: [M, d], weight: [2I, d], gate rows first → [M, I].

    FP8: weight_scale float32 [1], [2] (gate, up), [2I] or [⌈2I/128⌉, ⌈d/128⌉]; x_scale float32 [1], [M] or
    [M, ⌈d/128⌉]. row_scale: float32 [M], the norm's 1/rms. out_scale: float32 [1]; the result is then e4m3. Any row
    strides. ValueError names the argument.
    """
    job = _Job.gate_up(x, weight, row_scale, weight_scale, x_scale, out_scale, out)
    return _run(job, config)


def down(
    h: Tensor,
    weight: Tensor,
    *,
    weight_scale: Tensor | None = None,
    h_scale: Tensor | None = None,
    out: Tensor | None = None,
    config: Config | None = None,
) -> Tensor:
    """`h · weightᵀ`. h: [M, I], weight: [d, I] → [M, d]; scales as in `gate_up_silu`, with [d] for each channel."""
    return _run(_Job.plain(h, weight, weight_scale, h_scale, out), config)


def fused_ffn(
    x: Tensor,
    gate_up_weight: Tensor,
    down_weight: Tensor,
    *,
    row_scale: Tensor | None = None,
    gate_up_scale: Tensor | None = None,
    x_scale: Tensor | None = None,
    hidden_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Both halves. x: [M, d], gate_up_weight: [2I, d], down_weight: [d, I] → [M, d].

    FP8 needs `hidden_scale`, float32 [1]: a scale per token is known only after a whole row of the first half.
    """
    if (down_weight.dtype == E4M3) != (hidden_scale is not None):
        found = "none" if hidden_scale is None else "one"
        raise ValueError(f"hidden_scale: found {found}, allowed: one for a float8 down projection, none for another")
    hidden = gate_up_silu(
        x, gate_up_weight, row_scale=row_scale, weight_scale=gate_up_scale, x_scale=x_scale, out_scale=hidden_scale
    )
    return down(hidden, down_weight, weight_scale=down_scale, h_scale=hidden_scale, out=out)


def why_unsupported(device: torch.device) -> str | None:
    """None where the kernels run; else what was found and what is allowed."""
    if ffn_triton.is_interpreted():
        return None
    found = f"a {device.type} device"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major == HOPPER and torch.version.hip is None:  # AMD's numbers mean something else
            return None
        found = f"compute capability {major}.{minor}"
    return f"found {found}, allowed: an NVIDIA GPU of compute capability {HOPPER}.x"


def default_for(x: Tensor, weight: Tensor, is_gated: bool, out_dtype: torch.dtype, kind: str) -> Config:
    """What to run without a table on these matrices and a fresh output; kind: one of ffn_table.KINDS."""
    if not (_suits_tma(x) and _suits_tma(weight)):
        return Config("unaligned")
    n = weight.shape[0] // (2 if is_gated else 1)
    found = default_config("gate_up" if is_gated else "down", kind, x.shape[0], n, x.shape[1], _num_sms(x.device))
    # Some wide forms are not shipped: the exact one writes no e4m3, the bfloat16 one neither, nor plain products.
    tiles = [found.tile, *(["wide"] if kind in ("fp8", "fp8-token") else []), "skinny-64"]
    usable = (
        config for config in (found, *map(Config, tiles[1:])) if is_usable(config, x, weight, is_gated, out_dtype)
    )
    return next(usable)


def is_usable(config: Config, x: Tensor, weight: Tensor, is_gated: bool, out_dtype: torch.dtype) -> bool:
    """Whether a configuration fits these matrices and a fresh output of `out_dtype`: alignment and shipped forms."""
    num_outputs = weight.shape[0] // (2 if is_gated else 1)
    suits_tma = _suits_tma(x) and _suits_tma(weight)
    if config.tile == "unaligned" or config.splits > 1:
        return config.splits <= MAX_SPLITS and x.shape[0] <= MAX_SPLIT_TOKENS and (suits_tma or "un" in config.tile)
    can_store = num_outputs * out_dtype.itemsize % ALIGNMENT == 0
    name = _form_name(config.tile, x.dtype == E4M3, is_gated, out_dtype == E4M3)
    return suits_tma and (can_store or not config.tile.startswith("wide")) and name in _forms()


@dataclass(frozen=True, slots=True)
class _Scales:
    """Where a matrix's scales are: element strides for each `rows_per_scale` rows and for each 128 of K."""

    values: Tensor
    rows_per_scale: int
    row_stride: int
    block_stride: int


@dataclass(frozen=True, slots=True)
class _Job:
    """One checked call."""

    x: Tensor
    weight: Tensor
    out: Tensor
    is_gated: bool
    row_scale: Tensor | None
    weight_scales: _Scales | None
    x_scales: _Scales | None
    out_scale: Tensor | None

    @classmethod
    def gate_up(cls, x: Tensor, weight: Tensor, row_scale: Any, weight_scale: Any, x_scale: Any, out_scale: Any,
                out: Tensor | None) -> _Job:  # fmt: skip
        _check_matrices(x, weight, "x")
        if weight.shape[0] % 2:
            raise ValueError(f"weight: found {weight.shape[0]} rows, allowed: an even number, gate rows then up rows")
        _check_vector("row_scale", row_scale, (x.shape[0],), x.device)
        _check_vector("out_scale", out_scale, (1,), x.device)
        out = _output(out, x, weight.shape[0] // 2, E4M3 if out_scale is not None else None)
        scales = _weight_scales(weight, weight_scale, 2), _x_scales(x, x_scale, "x")
        return cls(x, weight, out, True, row_scale, *scales, out_scale)

    @classmethod
    def plain(cls, x: Tensor, weight: Tensor, weight_scale: Any, x_scale: Any, out: Tensor | None) -> _Job:
        _check_matrices(x, weight, "h")
        out = _output(out, x, weight.shape[0], None)
        scales = _weight_scales(weight, weight_scale, 1), _x_scales(x, x_scale, "h")
        return cls(x, weight, out, False, None, *scales, None)

    @property
    def kind(self) -> str:
        """As in the table's KINDS."""
        if self.weight_scales is None or self.x_scales is None:
            return "bf16"
        return "fp8-block" if self.weight_scales.block_stride or self.x_scales.block_stride else "fp8"

    def default(self) -> Config:
        """What to run without a table."""
        found = default_for(self.x, self.weight, self.is_gated, self.out.dtype, self.kind)
        return Config("skinny-64") if "wide" in found.tile and not _suits_tma(self.out) else found


def _run(job: _Job, config: Config | None) -> Tensor:
    if (reason := why_unsupported(job.x.device)) is not None:
        raise ValueError(f"x: {reason}")
    if job.x.shape[0] == 0 or job.out.shape[1] == 0:
        return job.out
    config = job.default() if config is None else config
    form = _form(job, config)
    if config.tile.startswith("wide"):
        _launch_wide(job, form)
    elif config.splits == 1:
        is_other = job.out.dtype == E4M3
        _launch_skinny(job, form, job.out, job.is_gated, is_other, splits=1)
    else:
        num_rows = job.weight.shape[0]
        partial = torch.empty((config.splits, job.x.shape[0], num_rows), dtype=torch.float32, device=job.x.device)
        _launch_skinny(job, form, partial, False, True, config.splits)
        _launch_reduce(job, partial)
    return job.out


def _launch_skinny(job: _Job, form: Form, out: Tensor, is_gated: bool, is_other: bool, splits: int) -> None:
    (m, k), fixed = job.x.shape, form.constexprs
    n = job.weight.shape[0] // (2 if is_gated else 1)
    pair = n if is_gated else fixed["BLOCK_N"]
    num_tiles = triton.cdiv(m, fixed["BLOCK_M"]) * triton.cdiv(n, fixed["BLOCK_N"] * (1 if is_gated else 2))
    split_size = triton.cdiv(triton.cdiv(k, fixed["BLOCK_K"]), splits) * fixed["BLOCK_K"]
    x, weight = job.x, job.weight
    strides = x.stride(0), weight.stride(0)
    if fixed["TMA"]:
        x = _descriptor(x, fixed["BLOCK_M"], fixed["BLOCK_K"])
        weight = _descriptor(weight, fixed["BLOCK_N"], fixed["BLOCK_K"])
    form.kernel[(num_tiles, splits)](
        x, weight, out.view(torch.uint8), *_scale_pointers(job),
        m, n, k, *strides, out.stride(-2), pair, split_size, int(is_gated), int(is_other),
        int(job.row_scale is not None), *_scale_strides(job), num_warps=form.num_warps, num_stages=form.num_stages,
        **(fixed | {"OUT": _main_type(job.out)}),
    )  # fmt: skip


def _launch_wide(job: _Job, form: Form) -> None:
    (m, k), n, fixed = job.x.shape, job.out.shape[1], form.constexprs
    block_m, block_n, block_k = fixed["BLOCK_M"], fixed["BLOCK_N"], fixed["BLOCK_K"]
    pair = n if job.is_gated else block_n
    num_tiles = triton.cdiv(m, block_m) * triton.cdiv(n, block_n * (1 if job.is_gated else 2))
    num_programs = min(num_tiles, _num_sms(job.x.device))
    form.kernel[(num_programs,)](
        _descriptor(job.x, block_m, block_k), _descriptor(job.weight, block_n, block_k),
        _descriptor(job.out, block_m, block_n), *_scale_pointers(job),
        m, n, k, pair, int(job.row_scale is not None), *_scale_strides(job), num_programs,
        num_warps=form.num_warps, num_stages=form.num_stages,
        **(fixed | {"OUT": ffn_triton.triton_type(job.out.dtype)}),
    )  # fmt: skip


def _launch_reduce(job: _Job, partial: Tensor) -> None:
    form, (m, n) = _forms()["reduce"], job.out.shape
    form.kernel[(triton.cdiv(n, REDUCE_BLOCK), m)](
        partial, job.out.view(torch.uint8), _pointer(job.out_scale, job),
        n, partial.shape[0], partial.stride(0), job.out.stride(0), int(job.is_gated), int(job.out.dtype == E4M3),
        num_warps=form.num_warps, num_stages=form.num_stages, **(form.constexprs | {"OUT": _main_type(job.out)}),
    )  # fmt: skip


def _form_name(tile: str, is_fp8: bool, is_gated: bool, is_quantized: bool) -> str:
    name = f"{tile} {'fp8' if is_fp8 else 'bf16'}"
    if tile.startswith("wide"):
        name += " gated" if is_gated else " plain"
        name += " to fp8" if is_quantized else ""
    return name


def _form(job: _Job, config: Config) -> Form:
    is_quantized = job.out.dtype == E4M3
    name = _form_name(config.tile, job.kind != "bf16", job.is_gated, is_quantized)
    found = _forms().get(name)
    if found is None or (config.tile == "wide" and job.kind == "fp8-block"):
        raise ValueError(f"config: found {config} for {name} with {job.kind} scales, allowed: {', '.join(_forms())}")
    needs = [job.x, job.weight] if config.tile != "unaligned" else []
    needs += [job.out] if config.tile.startswith("wide") else []
    if not all(map(_suits_tma, needs)):
        raise ValueError(f"config: found {config} for rows that are not {ALIGNMENT}-byte aligned, allowed: unaligned")
    is_split = config.splits > 1
    if not 1 <= config.splits <= MAX_SPLITS or (is_split and ("wide" in config.tile or job.x.shape[0] > 64)):
        raise ValueError(f"config: found {config} for {job.x.shape[0]} tokens, allowed: up to 16 splits for up to 64")
    return found


@lru_cache(maxsize=1)
def _forms() -> dict[str, Form]:
    return ffn_triton.forms()


@lru_cache(maxsize=8)
def _num_sms(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETED_SMS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@lru_cache(maxsize=8)
def _nothing(device: torch.device) -> Tensor:
    return torch.empty(0, dtype=torch.float32, device=device)


def _pointer(tensor: Tensor | None, job: _Job) -> Tensor:
    """A kernel argument that is never read where it is None."""
    return _nothing(job.x.device) if tensor is None else tensor


def _scale_pointers(job: _Job) -> tuple[Tensor, ...]:
    scales = [None if scales is None else scales.values for scales in (job.weight_scales, job.x_scales)]
    return tuple(_pointer(tensor, job) for tensor in (job.row_scale, *scales, job.out_scale))


def _scale_strides(job: _Job) -> tuple[int, ...]:
    weight, x = job.weight_scales, job.x_scales
    if weight is None or x is None:
        return 1, 0, 0, 0, 0
    return weight.rows_per_scale, weight.row_stride, weight.block_stride, x.row_stride, x.block_stride


def _main_type(out: Tensor) -> Any:
    """The type of outputs that are not e4m3; its form is compiled for bfloat16."""
    return ffn_triton.triton_type(torch.bfloat16 if out.dtype == E4M3 else out.dtype)


def _descriptor(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns])


def _suits_tma(matrix: Tensor) -> bool:
    return matrix.data_ptr() % ALIGNMENT == 0 and matrix.stride(0) * matrix.element_size() % ALIGNMENT == 0


def allowed_types() -> tuple[torch.dtype, ...]:
    """The types of x and weight."""
    return (torch.bfloat16, E4M3, *((torch.float16, torch.float32) if ffn_triton.is_interpreted() else ()))


def _check_matrices(x: Tensor, weight: Tensor, name: str) -> None:
    allowed = allowed_types()
    for what, matrix in ((name, x), ("weight", weight)):
        if matrix.dim() != 2 or (matrix.stride(1) != 1 and matrix.shape[1] > 1):
            found = f"shape {tuple(matrix.shape)}, strides {matrix.stride()}"
            raise ValueError(f"{what}: found {found}, allowed: a matrix with contiguous rows")
        if matrix.dtype not in allowed:
            raise ValueError(f"{what}: found {matrix.dtype}, allowed: {', '.join(map(str, allowed))}")
    if x.dtype != weight.dtype or x.device != weight.device:
        raise ValueError(f"weight: found {weight.dtype} on {weight.device}, allowed: {name}'s {x.dtype} on {x.device}")
    if x.shape[1] != weight.shape[1] or x.shape[1] == 0:
        raise ValueError(f"weight: found {weight.shape[1]} columns, allowed: {name}'s {x.shape[1]}, at least one")


def _check_vector(name: str, vector: Tensor | None, shape: tuple[int, ...], device: torch.device) -> None:
    if vector is None:
        return
    is_right = vector.dtype == torch.float32 and vector.numel() == math.prod(shape) and vector.is_contiguous()
    if not is_right or vector.device != device:
        found = f"{vector.dtype} {tuple(vector.shape)} on {vector.device}"
        raise ValueError(f"{name}: found {found}, allowed: contiguous float32 {list(shape)} on {device}")


def _output(out: Tensor | None, x: Tensor, width: int, quantized: torch.dtype | None) -> Tensor:
    dtype = quantized or (torch.bfloat16 if x.dtype == E4M3 else x.dtype)
    if out is None:
        return torch.empty((x.shape[0], width), dtype=dtype, device=x.device)
    if ffn_triton.is_interpreted() and dtype == torch.bfloat16 and out.dtype in (torch.float16, torch.float32):
        dtype = out.dtype
    is_right = out.shape == (x.shape[0], width) and out.dtype == dtype and out.device == x.device
    if not is_right or (out.stride(1) != 1 and width > 1) or out.stride(0) > MAX_OUT_STRIDE:
        found = f"{out.dtype} {tuple(out.shape)}, strides {out.stride()}, on {out.device}"
        raise ValueError(f"out: found {found}, allowed: {dtype} {[x.shape[0], width]}, contiguous rows, on {x.device}")
    return out


def _weight_scales(weight: Tensor, scale: Tensor | None, num_halves: int) -> _Scales | None:
    rows, k = weight.shape
    shapes: dict[tuple[int, ...], int] = {(): rows, (1,): rows, (num_halves,): rows // num_halves}
    shapes |= {(rows,): 1, (rows, 1): 1, (-(-rows // SCALE_BLOCK), -(-k // SCALE_BLOCK)): SCALE_BLOCK}
    return _scales("weight_scale", weight, scale, shapes)


def _x_scales(x: Tensor, scale: Tensor | None, name: str) -> _Scales | None:
    m, k = x.shape
    shapes: dict[tuple[int, ...], int] = {(): m, (1,): m, (m,): 1, (m, 1): 1, (m, -(-k // SCALE_BLOCK)): 1}
    return _scales(f"{name}_scale", x, scale, shapes)


def _scales(name: str, matrix: Tensor, scale: Tensor | None, shapes: dict[tuple[int, ...], int]) -> _Scales | None:
    if (scale is not None) != (matrix.dtype == E4M3):
        found = "none" if scale is None else "one"
        raise ValueError(f"{name}: found {found} for {matrix.dtype}, allowed: one for float8, none for another type")
    if scale is None:
        return None
    shape = tuple(scale.shape)
    if scale.dtype != torch.float32 or scale.device != matrix.device or shape not in shapes:
        found = f"{scale.dtype} {list(shape)} on {scale.device}"
        raise ValueError(f"{name}: found {found}, allowed: float32 {', '.join(str(list(s)) for s in shapes)}")
    strides = [0 if size == 1 else stride for size, stride in zip(shape, scale.stride(), strict=True)]
    row_stride, block_stride = [*strides, 0, 0][:2]
    return _Scales(scale, shapes[shape], row_stride, block_stride)
