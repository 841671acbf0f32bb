"""FFN cases with data: weights of the size of real ones, bf16 or FP8 with their scales, for each input set."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from vllm_puzzle.bench.kernel.cases import FfnCase
from vllm_puzzle.bench.kernel.problem import BASELINE_BOUND, Check, Prepare, relative_error
from vllm_puzzle.bench.kernel.timing import Call
from vllm_puzzle.kernels import reference
from vllm_puzzle.kernels.cost import BLOCK

E4M3_MAX = 448.0
# Rounding each number to bf16 costs what torch's own bf16 operations cost; twice that is allowed, as QuACK does.
OWN_ERROR_FACTOR, SLACK = 2.0, 1e-6
HIDDEN_SCALE = 1 / 64  # of an e4m3 hidden vector: |silu(gate) · up| of these inputs stays below 7


@dataclass(frozen=True, slots=True)
class Inputs:
    """One set. x: [M, d] (down: [M, I]); gate_up: [2I, d], all gates before all ups; down: [d, I]. Scales as the
    kernels take them, None for bf16.
    """

    x: Tensor
    gate_up: Tensor | None
    down: Tensor | None
    x_scale: Tensor | None = None
    weight_scale: Tensor | None = None
    out_scale: Tensor | None = None


class FfnProblem:
    """One FFN case on a device."""

    def __init__(self, case: FfnCase, device: str = "cuda", vllm_source: str | None = None) -> None:
        self.case, self.device, self.vllm_source = case, device, vllm_source
        self.sets: list[Inputs] = []

    def make(self, num_sets: int) -> None:
        """Random weights with variance 1 / columns, so that every product has variance 1."""
        self.sets = [self._make_set() for _ in range(num_sets)]

    def _make_set(self) -> Inputs:
        case = self.case
        columns = case.intermediate if case.op == "down" else case.hidden
        x = torch.randn(case.num_tokens, columns, device=self.device)
        gate_up = None if case.op == "down" else self._weight(2 * case.intermediate, case.hidden)
        down = None if case.op == "gate_up" else self._weight(case.hidden, case.intermediate)
        if case.precision == "bf16":
            return Inputs(x.bfloat16(), _bf16(gate_up), _bf16(down))
        granularity = case.precision.removeprefix("fp8_")
        codes, weight_scale = quantize_weight(gate_up if gate_up is not None else down, granularity)
        if case.op == "gate_up" and granularity == "tensor":
            # One scale for gate and up, so that torch's per-tensor product computes the same.
            weight_scale = weight_scale.repeat(2)
        x8, x_scale = quantize_rows(x, granularity)
        is_static = case.op == "gate_up" and granularity == "tensor"
        out_scale = torch.full((1,), HIDDEN_SCALE, device=self.device) if is_static else None
        up, other = (codes, None) if case.op == "gate_up" else (None, codes)
        return Inputs(x8, up, other, x_scale, weight_scale, out_scale)

    def _weight(self, rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, device=self.device).mul_(columns**-0.5)

    def ours(self) -> Sequence[Call]:
        """Our op on each set."""
        from vllm_puzzle.kernels import ffn

        ops = {"gate_up": ffn.gate_up_silu, "down": ffn.down, "ffn": ffn.fused_ffn}
        return [partial(self.apply, ops[self.case.op], inputs) for inputs in self.sets]

    def apply(self, op: Callable[..., Tensor], inputs: Inputs) -> Tensor:
        """`op` has the arguments of its twin in `reference`."""
        if self.case.op == "down":
            assert inputs.down is not None
            return op(inputs.x, inputs.down, weight_scale=inputs.weight_scale, h_scale=inputs.x_scale)
        assert inputs.gate_up is not None
        if self.case.op == "ffn":
            return op(inputs.x, inputs.gate_up, inputs.down)
        scales = {"weight_scale": inputs.weight_scale, "x_scale": inputs.x_scale, "out_scale": inputs.out_scale}
        return op(inputs.x, inputs.gate_up, **scales)

    def poison(self, output: Any) -> None:
        """NaN into what an earlier call returned."""
        if isinstance(output, Tensor):
            output.fill_(float("nan"))

    def check(self, output: Any) -> Check:
        """Against float32 arithmetic on the same (dequantised) inputs; at most twice the error of torch in bf16."""
        return Check(relative_error(self._values(output), self._exact), self._bound)

    def check_baseline(self, output: Any) -> Check:
        """A baseline's own precision; a list is the outputs of FFNs run one by one, to be summed."""
        total = torch.stack([part.float() for part in output]).sum(0) if isinstance(output, list) else output
        return Check(relative_error(self._values(total), self._exact), BASELINE_BOUND)

    def _values(self, output: Tensor) -> Tensor:
        scale = self.sets[0].out_scale
        return output.float() * scale if scale is not None and output.dtype == torch.float8_e4m3fn else output.float()

    @cached_property
    def _bound(self) -> float:
        own = relative_error(self._values(self.torch_bf16(self.sets[0])), self._exact)
        return OWN_ERROR_FACTOR * own + SLACK

    @cached_property
    def _exact(self) -> Tensor:
        """The twin in float32, without rounding of the result."""
        inputs = self.sets[0]
        x, gate_up, down = self.dequantized(inputs, torch.float32)
        if self.case.op == "down":
            assert down is not None
            return reference.down(x, down)
        assert gate_up is not None
        if self.case.op == "gate_up":
            return reference.gate_up_silu(x, gate_up)
        assert down is not None
        return reference.fused_ffn(x, gate_up, down)

    def torch_bf16(self, inputs: Inputs) -> Tensor:
        """The same in torch's bf16 operations, result quantised where ours is."""
        x, gate_up, down = self.dequantized(inputs, torch.bfloat16)
        linear = torch.nn.functional.linear
        if gate_up is not None:
            gate, up = linear(x, gate_up).chunk(2, dim=-1)
            x = torch.nn.functional.silu(gate) * up
        out = x if down is None else linear(x, down)
        return out if inputs.out_scale is None else reference.quantize_e4m3(out, inputs.out_scale)

    def dequantized(self, inputs: Inputs, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """x, gate_up and down as plain numbers."""
        if inputs.weight_scale is None or inputs.x_scale is None:
            return tuple(t if t is None else t.to(dtype) for t in (inputs.x, inputs.gate_up, inputs.down))  # type: ignore[return-value]
        x = inputs.x.float() * expand_scale(inputs.x_scale, inputs.x, BLOCK if inputs.x_scale.ndim == 2 else 1)
        weights = [
            None if codes is None else (codes.float() * expand_scale(inputs.weight_scale, codes)).to(dtype)
            for codes in (inputs.gate_up, inputs.down)
        ]
        return x.to(dtype), weights[0], weights[1]

    def baselines(self) -> Mapping[str, Prepare]:
        """Those of the case's op."""
        from vllm_puzzle.bench.kernel import ffn_baselines

        return ffn_baselines.baselines(self)


def _bf16(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.bfloat16()


def quantize_weight(weight: Tensor | None, granularity: str) -> tuple[Tensor, Tensor]:
    """e4m3 codes and scales of a weight [N, K]: "tensor" [1], "channel" [N], "block" [⌈N/128⌉, ⌈K/128⌉]."""
    assert weight is not None
    if granularity == "tensor":
        scale = weight.abs().amax().reshape(1) / E4M3_MAX
    elif granularity == "channel":
        scale = weight.abs().amax(1) / E4M3_MAX
    else:
        rows, columns = (-(-size // BLOCK) for size in weight.shape)
        padded = torch.zeros(rows * BLOCK, columns * BLOCK, device=weight.device)
        padded[: weight.shape[0], : weight.shape[1]] = weight
        scale = padded.view(rows, BLOCK, columns, BLOCK).abs().amax((1, 3)) / E4M3_MAX
    scale = scale.clamp_min(1e-12)
    return reference.quantize_e4m3(weight, expand_scale(scale, weight)), scale


def quantize_rows(x: Tensor, granularity: str) -> tuple[Tensor, Tensor]:
    """e4m3 codes and scales of activations [M, K]: "tensor" [1], "channel" [M], "block" [M, ⌈K/128⌉]."""
    if granularity == "tensor":
        scale = x.abs().amax().reshape(1) / E4M3_MAX
    elif granularity == "channel":
        scale = x.abs().amax(1) / E4M3_MAX
    else:
        blocks = -(-x.shape[1] // BLOCK)
        padded = torch.zeros(x.shape[0], blocks * BLOCK, device=x.device)
        padded[:, : x.shape[1]] = x
        scale = padded.view(x.shape[0], blocks, BLOCK).abs().amax(2) / E4M3_MAX
    scale = scale.clamp_min(1e-12)
    return reference.quantize_e4m3(x, expand_scale(scale, x, BLOCK if scale.ndim == 2 else 1)), scale


def expand_scale(scale: Tensor, target: Tensor, column_block: int = 0) -> Tensor:
    """A scale that multiplies [N, K]: [1], [2] (upper and lower half of the rows), [N], [⌈N/128⌉, ⌈K/128⌉] of a weight,
    or with `column_block` [N, ⌈K/128⌉] of activations.
    """
    rows, columns = target.shape
    if scale.ndim == 2:
        wide = scale.repeat_interleave(BLOCK, dim=1)[:, :columns]
        return wide if column_block else wide.repeat_interleave(BLOCK, dim=0)[:rows]
    if scale.numel() == 1:
        return scale
    if scale.numel() == 2 and rows != 2:
        return scale.repeat_interleave(rows // 2)[:, None]
    return scale[:, None]
