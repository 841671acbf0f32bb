"""One FFN half as our kernel, as a compiled chain of library calls, and as those calls one by one, on the same data.

A chain ends with what the next half takes: FP8 kinds end with the quantized hidden vector, as vLLM's own path does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear, silu
from vllm_puzzle.kernels import ffn, reference
from vllm_puzzle.kernels.ffn_table import Config

Call = Callable[[], Any]
Inputs = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # x, weight, x_scale, weight_scale
Product = Callable[[Tensor, Tensor, Any, Any], Tensor]
E4M3 = torch.float8_e4m3fn
HIDDEN_SCALE = 1 / 64  # of e4m3 hidden vectors; those of the inputs below stay under 7
BLOCK = 128
NUM_CHECKED = 64  # rows that are compared at each end of a batch


class Chains:
    """One op, kind and shape. m tokens; n = I for gate_up, d for down; k = d for gate_up, I for down."""

    def __init__(self, op: str, kind: str, m: int, n: int, k: int, device: torch.device, num_sets: int) -> None:
        self.op, self.kind, self.device = op, kind, device
        self.sets = [self._make(m, n * (2 if op == "gate_up" else 1), k) for _ in range(num_sets)]

    def _make(self, m: int, rows: int, k: int) -> Inputs:
        x = torch.randn(m, k, device=self.device, dtype=torch.bfloat16)
        weight = torch.randn(rows, k, device=self.device, dtype=torch.bfloat16).mul_(k**-0.5)
        if self.kind == "bf16":
            return x, weight, None, None
        (codes, x_scale), (weight, weight_scale) = quantized(x, self.kind), quantized(weight, self.kind, is_weight=True)
        return codes, weight, x_scale, weight_scale

    @property
    def out_type(self) -> torch.dtype:
        """Of what our kernel writes."""
        return E4M3 if (self.op, self.kind) == ("gate_up", "fp8") else torch.bfloat16

    def matrices(self) -> tuple[Tensor, Tensor]:
        """(x, weight) of the first set."""
        return self.sets[0][:2]

    def ours(self, config: Config) -> list[Call]:
        """Our kernel in one configuration, on each set."""
        return [partial(self._ours, config, *inputs) for inputs in self.sets]

    def stock(self, product: Product) -> list[Call]:
        """A library's product and everything after it as one compiled function."""
        after = compiled(self._after(), self.device)
        return [partial(chain, product, [after], *arranged(inputs, self.kind)) for inputs in self.sets]

    def fallback(self, product: Product) -> list[Call]:
        """The same as inside our operators: activation and a quantization by token are kernels of their own."""
        steps = [self._after()]
        if self.op == "gate_up" and self.kind in ("fp8-token", "fp8-block"):
            steps = [silu_mul, partial(quantize_rows, kind=self.kind)]
        after = [compiled(step, self.device) for step in steps]
        return [partial(chain, product, after, *arranged(inputs, self.kind)) for inputs in self.sets]

    def products(self) -> dict[str, Product]:
        """What a library offers for this kind, by name."""
        found: dict[str, Product] = {"torch": PRODUCTS[self.kind]}
        if self.kind != "bf16" and self.device.type == "cuda" and (cutlass := vllm_product()) is not None:
            found["vllm"] = cutlass
        return found

    def error(self, call: Call, product: Product) -> tuple[float, float]:
        """(relative error of a chain on the first set, twice that of the library's), against float32 arithmetic."""
        x, weight, x_scale, weight_scale = self.sets[0]
        rows = torch.arange(x.shape[0], device=self.device)
        rows = rows if len(rows) <= 2 * NUM_CHECKED else torch.cat((rows[:NUM_CHECKED], rows[-NUM_CHECKED:]))
        part = x_scale if x_scale is None or x_scale.numel() == 1 else x_scale[rows]
        if self.op == "gate_up":
            exact = reference.gate_up_silu(x[rows], weight, weight_scale=weight_scale, x_scale=part)
        else:
            exact = reference.down(x[rows], weight, weight_scale=weight_scale, h_scale=part)
        ours, own = (
            (self._values(run())[rows] - exact).norm() / exact.norm() for run in (call, self.stock(product)[0])
        )
        return float(ours), 2 * float(own) + 1e-6

    def _ours(self, config: Config, x: Tensor, weight: Tensor, x_scale: Any, weight_scale: Any) -> Any:
        if self.op == "down":
            return ffn.down(x, weight, weight_scale=weight_scale, h_scale=x_scale, config=config)
        out_scale = hidden_scale(self.device) if self.kind == "fp8" else None
        scales = {"weight_scale": weight_scale, "x_scale": x_scale, "out_scale": out_scale}
        hidden = ffn.gate_up_silu(x, weight, config=config, **scales)
        if self.kind in ("fp8-token", "fp8-block"):
            return compiled(partial(quantize_rows, kind=self.kind), self.device)(hidden)
        return hidden

    def _after(self) -> Callable[[Tensor], Any]:
        if self.op == "down":
            return unchanged
        if self.kind == "fp8":
            return partial(silu_mul_quantize, scale=hidden_scale(self.device))
        return silu_mul if self.kind == "bf16" else partial(silu_mul_quantize_rows, kind=self.kind)

    def _values(self, result: Any) -> Tensor:
        if isinstance(result, tuple):
            return reference.dequantize(*result)
        return result.float() * HIDDEN_SCALE if result.dtype == E4M3 else result.float()


def chain(product: Product, after: Sequence[Callable[[Any], Any]], *inputs: Any) -> Any:
    """A product and what follows it."""
    result: Any = product(*inputs)
    for step in after:
        result = step(result)
    return result


def unchanged(product: Tensor) -> Tensor:
    """Nothing follows a down projection."""
    return product


def silu_mul(both: Tensor) -> Tensor:
    """[M, 2I] → [M, I]."""
    gate, up = both.chunk(2, dim=-1)
    return silu(gate) * up


def silu_mul_quantize(both: Tensor, scale: Tensor) -> Tensor:
    """The same as e4m3 by one fixed scale."""
    return reference.quantize_e4m3(silu_mul(both).float(), scale)


def quantize_rows(hidden: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """(e4m3, scales) of a hidden vector: [M, 1] for fp8-token, [M, ⌈I/128⌉] for fp8-block."""
    wide = hidden.float()
    if kind == "fp8-token":
        scale = wide.abs().amax(1, keepdim=True).clamp_min(1e-9) / 448
        return reference.quantize_e4m3(wide, scale), scale
    padded = torch.nn.functional.pad(wide, (0, -wide.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK))
    scale = padded.abs().amax(2).clamp_min(1e-9) / 448
    codes = reference.quantize_e4m3(padded, scale[:, :, None]).flatten(1)[:, : wide.shape[1]]
    return codes.contiguous(), scale


def silu_mul_quantize_rows(both: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Activation and quantization, for a compiler to fuse."""
    return quantize_rows(silu_mul(both), kind)


def quantized(values: Tensor, kind: str, is_weight: bool = False) -> tuple[Tensor, Tensor]:
    """(e4m3, scales) of x or of a weight, as the kernels take them."""
    if kind == "fp8":
        scale = (values.abs().max().float() / 448).reshape(1)
        return reference.quantize_e4m3(values, scale), scale
    if kind == "fp8-token" or not is_weight:
        return quantize_rows(values, kind)
    rows, columns = (-(-size // BLOCK) for size in values.shape)
    padded = values.new_zeros(rows * BLOCK, columns * BLOCK)
    padded[: values.shape[0], : values.shape[1]] = values
    scale = padded.view(rows, BLOCK, columns, BLOCK).abs().amax((1, 3)).float().clamp_min(1e-9) / 448
    ones = torch.ones_like(values, dtype=torch.float32)
    return reference.quantize_e4m3(values, reference.dequantize(ones, scale)), scale


def arranged(inputs: Inputs, kind: str) -> Inputs:
    """The inputs as libraries take them: scales of blocks of x by column, as vLLM's quantization writes them; those of
    the weight [⌈K/128⌉, ⌈N/128⌉], in columns padded to a multiple of four.
    """
    x, weight, x_scale, weight_scale = inputs
    if kind != "fp8-block" or x_scale is None or weight_scale is None:
        return inputs
    padded = torch.nn.functional.pad(weight_scale, (0, -weight_scale.shape[1] % 4))
    return x, weight, x_scale.t().contiguous().t(), padded.t()[: weight_scale.shape[1]]


def scaled_rows(x: Tensor, weight: Tensor, x_scale: Any, weight_scale: Any) -> Tensor:
    """cuBLAS's FP8 product, scales per tensor or per row."""
    scales = (
        (x_scale[0], weight_scale[0]) if x_scale.numel() == 1 == weight_scale.numel() else (x_scale, weight_scale.t())
    )
    return torch._scaled_mm(x, weight.t(), *scales, out_dtype=torch.bfloat16, use_fast_accum=True)


def scaled_blocks(x: Tensor, weight: Tensor, x_scale: Any, weight_scale: Any) -> Tensor:
    """cuBLAS's FP8 product, scales per 128 × 128."""
    kinds = torch.nn.functional.ScalingType
    return torch.nn.functional.scaled_mm(
        x, weight.t(), x_scale, kinds.BlockWise1x128, weight_scale, kinds.BlockWise128x128, output_dtype=torch.bfloat16
    )


PRODUCTS: dict[str, Product] = {
    "bf16": lambda x, weight, x_scale, weight_scale: linear(x, weight),
    "fp8": scaled_rows,
    "fp8-token": scaled_rows,
    "fp8-block": scaled_blocks,
}


def vllm_product() -> Product | None:
    """vLLM's own FP8 product, where vLLM is installed."""
    try:
        from vllm_puzzle.serving.vllm_linear import cutlass_product
    except ImportError:
        return None
    return cutlass_product


@lru_cache(maxsize=1)
def hidden_scale(device: torch.device) -> Tensor:
    """HIDDEN_SCALE as the kernels take it."""
    return torch.full((1,), HIDDEN_SCALE, device=device)


_compiled: dict[tuple[Any, ...], Any] = {}


def compiled(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """By torch.compile on a GPU, once for each function; as it is on a CPU."""
    if device.type != "cuda":
        return function
    key = (function.func, *sorted(function.keywords.items(), key=str)) if isinstance(function, partial) else (function,)
    key = tuple(map(str, key))
    if key not in _compiled:
        _compiled[key] = torch.compile(function, dynamic=True)  # as vLLM compiles, and once for all shapes
    return _compiled[key]
