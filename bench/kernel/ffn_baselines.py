"""Other implementations of a gated FFN, on the same inputs: torch.compile, cuBLAS and a separate activation, vLLM's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm_puzzle.bench.kernel import stock
from vllm_puzzle.bench.kernel.problem import Prepare, compiled
from vllm_puzzle.bench.kernel.timing import Call
from vllm_puzzle.kernels.cost import BLOCK

if TYPE_CHECKING:
    from vllm_puzzle.bench.kernel.ffn import FfnProblem, Inputs

E4M3_MAX = 448.0
linear, silu = torch.nn.functional.linear, torch.nn.functional.silu


def baselines(problem: FfnProblem) -> Mapping[str, Prepare]:
    """By name."""
    case = problem.case
    if case.op == "ffn":
        return {
            "one_by_one": partial(one_by_one, problem, True),
            "one_by_one_cublas": partial(one_by_one, problem, False),
            "torch_compile": partial(_each, problem, compiled_ffn),
            "cublas": partial(_each, problem, cublas_ffn),
        }
    if case.precision == "bf16":
        if case.op == "down":
            return {"cublas": partial(_each, problem, cublas_down)}
        return {
            "torch_compile": partial(_each, problem, compiled_swiglu),
            "cublas": partial(_each, problem, cublas_swiglu),
        }
    found: dict[str, Prepare] = {"scaled_mm": partial(scaled_mm, problem)}
    if case.precision == "fp8_block":
        found["vllm_block"] = partial(vllm_block, problem)
    return found


def swiglu(x: Tensor, weight: Tensor) -> Tensor:
    """silu(gate) · up of [gate; up] rows."""
    return silu_mul(linear(x, weight))


def silu_mul(gate_up: Tensor) -> Tensor:
    """[M, 2I] → [M, I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate) * up


def silu_mul_quantize(gate_up: Tensor, out_scale: Tensor) -> Tensor:
    """The same as e4m3 of a static scale."""
    hidden = silu_mul(gate_up).float() / out_scale
    return hidden.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def _each(problem: FfnProblem, function: Callable[[Inputs, bool], Tensor]) -> Sequence[Call]:
    is_cuda = problem.device.startswith("cuda")
    return [partial(function, inputs, is_cuda) for inputs in problem.sets]


def compiled_swiglu(inputs: Inputs, is_cuda: bool) -> Tensor:
    """One compiled function with max-autotune."""
    return compiled(swiglu, is_cuda, "max-autotune")(inputs.x, inputs.gate_up)


def cublas_swiglu(inputs: Inputs, is_cuda: bool) -> Tensor:
    """cuBLAS, then a compiled activation."""
    assert inputs.gate_up is not None
    return compiled(silu_mul, is_cuda)(linear(inputs.x, inputs.gate_up))


def cublas_down(inputs: Inputs, is_cuda: bool) -> Tensor:
    """cuBLAS."""
    assert inputs.down is not None
    return linear(inputs.x, inputs.down)


def whole_ffn(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """All three products, one after the other."""
    return linear(swiglu(x, gate_up), down)


def compiled_ffn(inputs: Inputs, is_cuda: bool) -> Tensor:
    """The wide FFN as one compiled function with max-autotune."""
    return compiled(whole_ffn, is_cuda, "max-autotune")(inputs.x, inputs.gate_up, inputs.down)


def cublas_ffn(inputs: Inputs, is_cuda: bool) -> Tensor:
    """The wide FFN on cuBLAS, activation compiled."""
    assert inputs.down is not None
    return linear(cublas_swiglu(inputs, is_cuda), inputs.down)


def one_by_one(problem: FfnProblem, is_own: bool) -> Sequence[Call]:
    """The n FFNs, each with weights of its own, on our kernels or on cuBLAS with a compiled activation. Gives the n
    outputs: their sum is the residual stream's, which a model adds inside the next norm in either way.
    """
    case, is_cuda = problem.case, problem.device.startswith("cuda")

    def own(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return problem.run_ours(replace(problem.sets[0], x=x, gate_up=gate_up, down=down), case.width)

    def plain(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return linear(compiled(silu_mul, is_cuda)(linear(x, gate_up)), down)

    run = own if is_own else plain

    def call(x: Tensor, weights: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
        return [run(x, gate_up, down) for gate_up, down in weights]

    calls = []
    for inputs in problem.sets:
        assert inputs.gate_up is not None and inputs.down is not None
        gates, ups = inputs.gate_up.chunk(2)
        parts = (gates.split(case.width), ups.split(case.width), inputs.down.split(case.width, dim=1))
        weights = [(torch.cat((gate, up)), down.contiguous()) for gate, up, down in zip(*parts, strict=True)]
        calls.append(partial(call, inputs.x, weights))
    return calls


def scaled_mm(problem: FfnProblem) -> Sequence[Call]:
    """`torch._scaled_mm` per tensor or per row (`F.scaled_mm` for 128×128 blocks), then the compiled activation (and
    quantisation, where ours quantises).
    """
    is_cuda = problem.device.startswith("cuda")

    def call(inputs: Inputs, product: Callable[[], Tensor]) -> Tensor:
        if problem.case.op == "down":
            return product()
        if inputs.out_scale is not None:
            return compiled(silu_mul_quantize, is_cuda)(product(), inputs.out_scale)
        return compiled(silu_mul, is_cuda)(product())

    return [partial(call, inputs, scaled_product(problem, inputs)) for inputs in problem.sets]


def scaled_product(problem: FfnProblem, inputs: Inputs) -> Callable[[], Tensor]:
    """cuBLAS's FP8 product of one set, scales as it wants them."""
    weight = inputs.down if inputs.gate_up is None else inputs.gate_up
    assert weight is not None and inputs.x_scale is not None and inputs.weight_scale is not None
    columns = weight.t()
    if problem.case.precision == "fp8_block":
        kinds = torch.nn.functional.ScalingType
        # cuBLAS wants the activations' scales column by column, the weights' in columns padded to a multiple of four.
        x_scale = inputs.x_scale.t().contiguous().t()
        padded = torch.nn.functional.pad(inputs.weight_scale, (0, -inputs.weight_scale.shape[1] % 4))
        return partial(
            torch.nn.functional.scaled_mm, inputs.x, columns, x_scale, kinds.BlockWise1x128,
            padded.t(), kinds.BlockWise128x128, output_dtype=torch.bfloat16,
        )  # fmt: skip
    if problem.case.precision == "fp8_tensor":
        scales = inputs.x_scale.reshape(()), inputs.weight_scale[0]
    else:
        scales = inputs.x_scale[:, None], inputs.weight_scale[None, :]
    return partial(torch._scaled_mm, inputs.x, columns, *scales, out_dtype=torch.bfloat16, use_fast_accum=True)


def vllm_block(problem: FfnProblem) -> Sequence[Call]:
    """vLLM's Triton product of 128×128 scaled blocks, then the compiled activation."""
    product: Any = stock.find(problem.vllm_source).get("w8a8_triton_block_scaled_mm")
    is_cuda, is_down = problem.device.startswith("cuda"), problem.case.op == "down"

    def call(inputs: Inputs) -> Tensor:
        weight = inputs.down if inputs.gate_up is None else inputs.gate_up
        out = product(inputs.x, weight, inputs.x_scale, inputs.weight_scale, [BLOCK, BLOCK], torch.bfloat16)
        return out if is_down else compiled(silu_mul, is_cuda)(out)

    return [partial(call, inputs) for inputs in problem.sets]
