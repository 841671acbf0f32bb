"""FFN cases with data: weights of the size of real ones, bf16 or FP8 with their scales, for each input set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
# What the tuning table calls them.
PRECISIONS = {"bf16": "bf16", "fp8": "fp8_tensor", "fp8-token": "fp8_channel", "fp8-block": "fp8_block"}
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
        self.config = ""
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
        """Our op on each set, in the configuration that the table measured on this device, else the default one."""
        self.config = ", ".join(f"{op} {describe(self.choose(op))}" for op in self._halves())
        return [partial(self.run_ours, inputs) for inputs in self.sets]

    def run_ours(self, inputs: Inputs, width: int | None = None) -> Tensor:
        """Our op on one set; `width`: of one of the parallel FFNs, whose own shape decides its configuration."""
        from vllm_puzzle.kernels import ffn

        x = inputs.x
        if inputs.gate_up is not None:
            scales = {"weight_scale": inputs.weight_scale, "x_scale": inputs.x_scale, "out_scale": inputs.out_scale}
            x = ffn.gate_up_silu(x, inputs.gate_up, config=self.choose("gate_up", width), **scales)
        if inputs.down is None:
            return x
        scales = {"weight_scale": inputs.weight_scale, "h_scale": inputs.x_scale}
        return ffn.down(x, inputs.down, config=self.choose("down", width), **scales)

    def _halves(self) -> Sequence[str]:
        return ("gate_up", "down") if self.case.op == "ffn" else (self.case.op,)

    def choose(self, op: str, width: int | None = None) -> Any:
        """The table's configuration of gate_up or down at this shape, None where there is none."""
        from vllm_puzzle.kernels import ffn_table

        if not self.device.startswith("cuda"):
            return None
        case = self.case
        kind = next(kind for kind, precision in PRECISIONS.items() if precision == case.precision)
        sizes = (width or case.intermediate, case.hidden)
        n, k = sizes if op == "gate_up" else sizes[::-1]
        return ffn_table.choose(op, torch.cuda.get_device_name(), kind, case.num_tokens, n, k)

    def poison(self, output: Any) -> None:
        """NaN into what an earlier call returned."""
        if isinstance(output, Tensor):
            output.view(torch.uint8).fill_(0xFF)  # a NaN in bf16 and in e4m3

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
        """The twin on the same arguments, in float32, without rounding of the result."""
        inputs = self.sets[0]
        if self.case.op == "ffn":
            assert inputs.gate_up is not None and inputs.down is not None
            return reference.fused_ffn(inputs.x, inputs.gate_up, inputs.down)
        if self.case.op == "down":
            assert inputs.down is not None
            return reference.down(inputs.x, inputs.down, weight_scale=inputs.weight_scale, h_scale=inputs.x_scale)
        assert inputs.gate_up is not None
        return reference.gate_up_silu(
            inputs.x, inputs.gate_up, weight_scale=inputs.weight_scale, x_scale=inputs.x_scale
        )

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
        x = reference.dequantize(inputs.x, inputs.x_scale).to(dtype)
        weights = [
            None if codes is None else reference.dequantize(codes, inputs.weight_scale, is_gate_up).to(dtype)
            for codes, is_gate_up in ((inputs.gate_up, True), (inputs.down, False))
        ]
        return x, weights[0], weights[1]

    def baselines(self) -> Mapping[str, Prepare]:
        """Those of the case's op."""
        from vllm_puzzle.bench.kernel import ffn_baselines

        return ffn_baselines.baselines(self)


def _bf16(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.bfloat16()


def describe(config: Any) -> str:
    """A configuration in words."""
    return "default" if config is None else f"{config.tile} in {config.splits} splits, by the table"


def quantize_weight(weight: Tensor | None, granularity: str) -> tuple[Tensor, Tensor]:
    """e4m3 codes and scales of a weight [N, K]: "tensor" [1], "channel" [N], "block" [⌈N/128⌉, ⌈K/128⌉]."""
    assert weight is not None
    if granularity != "block":
        return quantize_rows(weight, granularity)
    rows, columns = (-(-size // BLOCK) for size in weight.shape)
    padded = torch.zeros(rows * BLOCK, columns * BLOCK, device=weight.device)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    scale = padded.view(rows, BLOCK, columns, BLOCK).abs().amax((1, 3)).clamp_min(1e-9) / E4M3_MAX
    wide = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return reference.quantize_e4m3(weight, wide[: weight.shape[0], : weight.shape[1]]), scale


def quantize_rows(x: Tensor, granularity: str) -> tuple[Tensor, Tensor]:
    """e4m3 codes and scales of rows [M, K]: "tensor" [1], "channel" [M], "block" [M, ⌈K/128⌉]."""
    if granularity == "tensor":
        scale = x.abs().amax().clamp_min(1e-9).reshape(1) / E4M3_MAX
        return reference.quantize_e4m3(x, scale), scale
    if granularity == "channel":
        scale = x.abs().amax(1).clamp_min(1e-9) / E4M3_MAX
        return reference.quantize_e4m3(x, scale[:, None]), scale
    blocks = -(-x.shape[1] // BLOCK)
    padded = torch.zeros(x.shape[0], blocks * BLOCK, device=x.device)
    padded[:, : x.shape[1]] = x
    scale = padded.view(x.shape[0], blocks, BLOCK).abs().amax(2).clamp_min(1e-9) / E4M3_MAX
    return reference.quantize_e4m3(x, scale.repeat_interleave(BLOCK, dim=1)[:, : x.shape[1]]), scale
