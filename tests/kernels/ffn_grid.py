"""Every FFN case against its plain twin: `ffn_grid.py cpu|cuda` prints JSON, case → what was found.

On "cpu" the kernels run under Triton's interpreter. Matrices lie in larger buffers full of NaN, outputs start as NaN,
and what surrounds an output must still be NaN afterwards. Errors are relative to a float64 computation on the same
(dequantized) values and come with the error of the same steps in torch's bfloat16, which bounds them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__" and sys.argv[1] == "cpu":
    sys.path.insert(0, str(Path(__file__).parent))
    import interpreter

    interpreter.install()

import torch
from torch import Tensor
from vllm_puzzle.kernels import ffn, reference
from vllm_puzzle.kernels.ffn_table import Config

E4M3 = torch.float8_e4m3fn
DEVICE = torch.device(sys.argv[1] if __name__ == "__main__" else "cpu")
BF16, FP8 = "bf16", ("fp8 tensor", "fp8 channel", "fp8 block")
TOKENS = (1, 3, 16, 17, 64, 65, 130)
Found = dict[str, Any]
Cases = Iterator[tuple[str, Callable[[], Found]]]


def poisoned(rows: int, columns: int, dtype: torch.dtype, gap: int = 0, unit: int = 16) -> Tensor:
    """An uninitialized matrix between NaN rows, with `gap` NaN columns (rounded up to whole `unit`s) after each row."""
    width = columns + -(-gap // unit) * unit
    wide = torch.full((rows + 2, width), float("nan"), device=DEVICE).to(dtype)
    return wide[1:-1, :columns]


def is_untouched(out: Tensor) -> bool:
    """Whether everything around a matrix made by `poisoned` is NaN still."""
    wide = out._base.float().clone()
    assert torch.isfinite(wide[1:-1, : out.shape[1]]).all(), "an output was not written"
    wide[1:-1, : out.shape[1]] = float("nan")
    return bool(wide.isnan().all())


def filled(values: Tensor, dtype: torch.dtype, gap: int = 0, unit: int = 16) -> Tensor:
    matrix = poisoned(*values.shape, dtype, gap, unit)
    matrix.copy_(values.to(dtype))
    return matrix


def quantized(values: Tensor, kind: str, is_weight: bool, halves: int = 1) -> tuple[Tensor, Tensor]:
    """e4m3 values and their float32 scales; of a weight with two halves each has its own scale for `fp8 tensor`."""
    if kind == "fp8 tensor":
        parts = values.chunk(halves) if is_weight else (values,)
        scale = torch.stack([part.abs().max() / 448 for part in parts])
    elif kind == "fp8 channel":
        scale = values.abs().amax(1, keepdim=is_weight) / 448
    else:
        rows = 128 if is_weight else 1
        padded = torch.nn.functional.pad(values, (0, -values.shape[1] % 128, 0, -values.shape[0] % rows))
        blocks = padded.unflatten(1, (-1, 128)).unflatten(0, (-1, rows))
        scale = blocks.abs().amax((1, 3)) / 448 + 1e-6
    ones = torch.ones(values.shape, dtype=torch.float64, device=DEVICE)
    codes = (values / reference.dequantize(ones, scale, halves == 2)).clamp(-448, 448)
    return codes.float(), scale.float()


class Case:
    """One FFN's matrices, in the layout that is asked for."""

    def __init__(self, kind: str, m: int, width: int, size: int, gap: int = 0, unit: int = 16) -> None:
        torch.manual_seed(m + width)
        x, gate_up = torch.randn(m, size), torch.randn(2 * width, size) / size**0.5
        hidden, down = torch.randn(m, width), torch.randn(size, width) / width**0.5
        matrices = [tensor.to(DEVICE) for tensor in (x, gate_up, hidden, down)]
        self.kind, self.gap, self.unit = kind, gap, unit
        self.scales: list[Tensor | None] = [None] * 4
        self.dtype = {"bf16": torch.bfloat16, "float32": torch.float32}.get(kind, E4M3)
        if kind in FP8:
            scaled = [quantized(t, kind, i % 2 == 1, 2 if i == 1 else 1) for i, t in enumerate(matrices)]
            matrices, self.scales = [t for t, _ in scaled], [s for _, s in scaled]
        self.x, self.gate_up, self.hidden, self.down = (filled(t, self.dtype, gap, unit) for t in matrices)
        self.row_scale = torch.rand(m, device=DEVICE) + 0.5

    def out(self, columns: int, dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or (torch.bfloat16 if self.dtype == E4M3 else self.dtype)
        return poisoned(self.x.shape[0], columns, dtype, self.gap, self.unit)

    def run_gate_up(self, config: Config | None, **more: Any) -> Tensor:
        scales = {"x_scale": self.scales[0], "weight_scale": self.scales[1], "row_scale": self.row_scale}
        return ffn.gate_up_silu(self.x, self.gate_up, **scales, config=config, **more)

    def check_gate_up(self, config: Config | None = None) -> Found:
        out = self.out(self.gate_up.shape[0] // 2)
        self.run_gate_up(config, out=out)
        wide = [self.x.double(), self.gate_up.double()]
        scales = {"x_scale": self.scales[0], "weight_scale": self.scales[1], "row_scale": self.row_scale}
        truth = reference.gate_up_silu(*wide, **scales)
        both = self._product(self.x, self.gate_up, *self.scales[:2], halves=2)
        gate, up = (both * self.row_scale[:, None].to(both.dtype)).chunk(2, dim=1)
        return self._judge(out, truth, torch.nn.functional.silu(gate) * up)

    def check_down(self, config: Config | None = None) -> Found:
        out = self.out(self.down.shape[0])
        scales = {"h_scale": self.scales[2], "weight_scale": self.scales[3]}
        ffn.down(self.hidden, self.down, **scales, out=out, config=config)
        truth = reference.down(self.hidden.double(), self.down.double(), **scales)
        return self._judge(out, truth, self._product(self.hidden, self.down, *self.scales[2:]))

    def _product(self, x: Tensor, weight: Tensor, x_scale: Any, weight_scale: Any, halves: int = 1) -> Tensor:
        """As torch computes it: the plain product in bfloat16, of FP8 the exact one rounded to bfloat16."""
        if self.kind in FP8:
            wide = reference.dequantize(x, x_scale), reference.dequantize(weight, weight_scale, halves == 2)
            return (wide[0].double() @ wide[1].double().T).to(torch.bfloat16)
        return torch.nn.functional.linear(x, weight)

    def _judge(self, out: Tensor, truth: Tensor, torchs: Tensor) -> Found:
        norm = truth.norm()
        error, own = (float((value.double() - truth).norm() / norm) for value in (out, torchs))
        return {"error": error, "bound": 2 * own + 1e-6, "untouched": is_untouched(out)}

    def check_codes(self, config: Config | None = None) -> Found:
        """e4m3 outputs: the twin's code, or a neighbour where sums in float32 may differ across a rounding boundary.

        Two orders of summation differ by less than √K·2⁻²²·Σ|a·b|; the fast form's own accumulator keeps 13 bits.
        """
        scales = {"x_scale": self.scales[0], "weight_scale": self.scales[1], "row_scale": self.row_scale}
        hidden = reference.gate_up_silu(self.x, self.gate_up, **scales)
        out_scale = (hidden.abs().max() / 600).reshape(1)  # the largest saturate
        out = self.out(self.gate_up.shape[0] // 2, E4M3)
        self.run_gate_up(config, out_scale=out_scale, out=out)
        twin = reference.quantize_e4m3(hidden, out_scale)
        rows = self.row_scale[:, None].double()
        x, weight = self._dequantized()
        sums, sizes = rows * (x @ weight.T), rows * (x.abs() @ weight.abs().T)
        is_fast = DEVICE.type == "cuda" and config is not None and config.tile == "wide"
        slack = sizes * (2**-12 if is_fast else x.shape[1] ** 0.5 * 2**-22)
        (gate, up), (gate_slack, up_slack) = sums.chunk(2, 1), slack.chunk(2, 1)
        reach = 1.1 * gate_slack * up.abs() + torch.nn.functional.silu(gate).abs() * up_slack + 2**-22 * hidden.abs()
        low, high = (reference.quantize_e4m3(hidden.double() + s * reach, out_scale).float() for s in (-1, 1))
        found = out.float()
        return {
            "outside": int(((found < low) | (found > high)).sum()),
            "differing": float((out.view(torch.uint8) != twin.view(torch.uint8)).float().mean()),
            "saturated": int((found.abs() == 448).sum()),
            "untouched": is_untouched(out),
        }

    def _dequantized(self) -> tuple[Tensor, Tensor]:
        x = reference.dequantize(self.x, self.scales[0])
        return x.double(), reference.dequantize(self.gate_up, self.scales[1], is_gate_up=True).double()


def cases(device: str) -> dict[str, Callable[[], Found]]:
    """Every case of a device by name; nothing is computed yet."""
    groups = (matrix_cases(device), width_cases(), config_cases(), code_cases(), far_cases(), property_cases())
    return {name: run for group in groups for name, run in group}


def name(config: Config | None) -> str:
    return "default" if config is None else f"{config.tile}/{config.splits}"


def both_halves(label: str, config: Config | None, *shape: Any) -> Cases:
    yield f"{label}, gate_up", lambda: Case(*shape).check_gate_up(config)
    if config is None or config.tile != "wide":  # a plain product in wide tiles is left to cuBLAS
        yield f"{label}, down", lambda: Case(*shape).check_down(config)


def matrix_cases(device: str) -> Cases:
    for kind in (BF16, *FP8):
        for m in TOKENS:
            yield from both_halves(f"{kind}, M {m}", None, kind, m, 352, 208)
    if device == "cpu":  # float32 shows what bfloat16's rounding would hide
        for m in (17, 130):
            yield from both_halves(f"float32, M {m}", None, "float32", m, 352, 208)


def width_cases() -> Cases:
    for width, size, gap, unit in ((176, 144, 40, 16), (100, 72, 5, 16), (90, 50, 3, 1), (44, 1040, 0, 16)):
        for kind in (BF16, "fp8 channel", "fp8 block"):
            for m in (5, 70):
                label = f"{kind}, I {width}, d {size}, gap {gap}, M {m}"
                yield from both_halves(label, None, kind, m, width, size, gap, unit)


CONFIGS = (
    (BF16, 3, Config("skinny-64")), (BF16, 33, Config("skinny-16")), (BF16, 17, Config("wide")),
    (BF16, 300, Config("wide")), (BF16, 5, Config("skinny-16", 2)), (BF16, 60, Config("skinny-64", 16)),
    (BF16, 5, Config("unaligned")), (BF16, 5, Config("unaligned", 3)), ("fp8 tensor", 130, Config("wide")),
    ("fp8 channel", 140, Config("wide")), ("fp8 tensor", 130, Config("wide-exact")),
    ("fp8 block", 20, Config("wide-exact")), ("fp8 block", 5, Config("skinny-16", 4)),
    ("fp8 channel", 60, Config("skinny-64", 3)), ("fp8 block", 9, Config("unaligned", 2)),
)  # fmt: skip
CODES = (
    (BF16, 5, None), (BF16, 60, Config("skinny-64")), (BF16, 5, Config("skinny-16", 3)), (BF16, 5, Config("unaligned")),
    ("fp8 tensor", 5, None), ("fp8 tensor", 130, Config("wide")), ("fp8 channel", 70, Config("skinny-64")),
    ("fp8 block", 130, None), ("fp8 block", 3, Config("skinny-16", 2)), (BF16, 130, None),
)  # fmt: skip


def config_cases() -> Cases:
    for kind, m, config in CONFIGS:
        yield from both_halves(f"{kind}, M {m}, {name(config)}", config, kind, m, 352, 336)


def code_cases() -> Cases:
    for kind, m, config in CODES:
        label = f"{kind}, M {m}, {name(config)}, to e4m3"
        yield label, lambda kind=kind, m=m, config=config: Case(kind, m, 352, 336).check_codes(config)


def far_apart(values: Tensor, stride: int) -> Tensor:
    """The same matrix, rows so far apart that the last lie beyond 2³¹ elements; the space between is not touched."""
    rows, columns = values.shape
    assert (rows - 1) * stride > 2**31
    space = torch.empty((rows - 1) * stride + columns, dtype=values.dtype, device=DEVICE)
    matrix = space.as_strided((rows, columns), (stride, 1))
    matrix.copy_(values)
    return matrix


FAR = (
    (BF16, Config("skinny-16"), 16), (BF16, Config("unaligned"), 1), ("fp8 block", Config("skinny-16"), 16),
    (BF16, Config("wide"), 16),
)  # fmt: skip


def far_cases() -> Cases:
    """Offsets that do not fit 32 bits change no bit of the result."""
    for kind, config, unit in FAR:
        label = f"inputs beyond 2^31, {kind}, {name(config)}"
        yield label, lambda kind=kind, config=config, unit=unit: far_inputs(kind, config, unit)
    for config in (Config("skinny-64"), Config("wide")):
        yield f"output beyond 2^31, {name(config)}", lambda config=config: far_output(config)


def far_inputs(kind: str, config: Config, unit: int) -> Found:
    case = Case(kind, 3, 72, 64)
    near = case.run_gate_up(config)
    case.x, case.gate_up = far_apart(case.x, 2**30 + unit), far_apart(case.gate_up, 2**24 + unit)
    return {"equal": torch.equal(case.run_gate_up(config), near)}


def far_output(config: Config) -> Found:
    case = Case(BF16, 130, 48, 32)
    near = case.run_gate_up(config)
    out = far_apart(torch.full_like(near, float("nan")), 2**24)
    case.run_gate_up(config, out=out)
    return {"equal": torch.equal(out, near)}


def property_cases() -> Cases:
    yield "n FFNs at once are the sum of n", sum_of_ffns
    for kind, config in ((BF16, Config("skinny-16", 4)), ("fp8 block", Config("skinny-64", 2)), (BF16, Config("wide"))):
        label = f"twice the same bits, {kind}, {name(config)}"
        yield label, lambda kind=kind, config=config: twice(kind, config)
    yield "no row scale is a row scale of one", without_row_scale
    yield "NaN stays NaN in e4m3", not_a_number
    yield "no tokens", lambda: {"empty": fused(Case(BF16, 1, 352, 208), 0).shape == (0, 208)}


def twice(kind: str, config: Config) -> Found:
    case = Case(kind, 20, 352, 336)
    return {"equal": torch.equal(case.run_gate_up(config), case.run_gate_up(config))}


def without_row_scale() -> Found:
    case = Case(BF16, 5, 352, 208)
    ones = ffn.gate_up_silu(case.x, case.gate_up, row_scale=torch.ones_like(case.row_scale))
    return {"equal": torch.equal(ffn.gate_up_silu(case.x, case.gate_up), ones)}


def not_a_number() -> Found:
    case = Case(BF16, 5, 352, 208)
    case.x[2, 7] = float("nan")
    codes = ffn.gate_up_silu(case.x, case.gate_up, out_scale=torch.ones(1, device=DEVICE)).float()
    return {"is NaN": bool(codes[2].isnan().all()), "others": bool(codes[[0, 1, 3, 4]].isfinite().all())}


def fused(case: Case, tokens: int) -> Tensor:
    return ffn.fused_ffn(case.x[:tokens], case.gate_up, case.down)


def sum_of_ffns() -> Found:
    """Three FFNs of different widths, stacked gates first, against three calls."""
    dtype = torch.float32 if DEVICE.type == "cpu" else torch.bfloat16
    torch.manual_seed(1)
    x = torch.randn(7, 96)
    parts = [(torch.randn(w, 96) / 10, torch.randn(w, 96) / 10, torch.randn(96, w) / 10) for w in (48, 112, 80)]
    x, *flat = (tensor.to(DEVICE, dtype) for tensor in (x, *(t for part in parts for t in part)))
    parts = [tuple(flat[i : i + 3]) for i in range(0, 9, 3)]
    gates, ups, downs = zip(*parts, strict=True)
    fused = ffn.fused_ffn(x, torch.cat((*gates, *ups)), torch.cat(downs, dim=1))
    single = torch.stack([ffn.fused_ffn(x, torch.cat((g, u)), d).double() for g, u, d in parts]).sum(0)
    # Each of four results is rounded once to the dtype: half a unit in the last place.
    bound = 4 * torch.finfo(dtype).eps / 2 + 2**-20
    return {"error": float((fused.double() - single).norm() / single.norm()), "bound": bound}


if __name__ == "__main__":
    print(json.dumps({label: run() for label, run in cases(DEVICE.type).items()}))
