"""One FFN half as our kernel, as a compiled chain of library calls, and as those calls one by one, on the same data.

A chain ends with what the next half takes: FP8 kinds end with the quantized hidden vector, as vLLM's own path does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from vllm_puzzle.bench.kernel.cases import FfnCase
from vllm_puzzle.bench.kernel.ffn import PRECISIONS, FfnProblem, Inputs, quantize_rows
from vllm_puzzle.bench.kernel.ffn_baselines import scaled_product, silu_mul, silu_mul_quantize
from vllm_puzzle.bench.kernel.problem import Check, compiled
from vllm_puzzle.bench.kernel.timing import Call
from vllm_puzzle.kernels import ffn
from vllm_puzzle.kernels.ffn_table import Config

Product = Callable[[Inputs], Call]  # a library's product of one set


class Chains:
    """One op and kind of ffn_table, m tokens, one shape; `num_sets` sets of inputs."""

    def __init__(self, op: str, kind: str, m: int, width: int, hidden: int, device: str, num_sets: int) -> None:
        self.op, self.kind, self.is_cuda = op, kind, device == "cuda"
        self.problem = FfnProblem(FfnCase(op, m, hidden, width, PRECISIONS[kind]), device)
        self.problem.make(num_sets)

    @property
    def matrices(self) -> tuple[Tensor, Tensor]:
        """(x, weight) of the first set."""
        first = self.problem.sets[0]
        weight = first.gate_up if first.gate_up is not None else first.down
        assert weight is not None
        return first.x, weight

    @property
    def out_type(self) -> torch.dtype:
        """Of what our kernel writes."""
        return torch.float8_e4m3fn if (self.op, self.kind) == ("gate_up", "fp8") else torch.bfloat16

    def ours(self, config: Config) -> list[Call]:
        """Our kernel in one configuration and what still follows it, on each set."""
        after = [] if self._quantize is None else [compiled(self._quantize, self.is_cuda, "dynamic")]
        return [partial(chain, partial(self.kernel, config, inputs), after) for inputs in self.problem.sets]

    def kernel(self, config: Config, inputs: Inputs) -> Tensor:
        """Our kernel alone."""
        if inputs.gate_up is None:
            assert inputs.down is not None
            scales = {"weight_scale": inputs.weight_scale, "h_scale": inputs.x_scale}
            return ffn.down(inputs.x, inputs.down, config=config, **scales)
        scales = {"weight_scale": inputs.weight_scale, "x_scale": inputs.x_scale, "out_scale": inputs.out_scale}
        return ffn.gate_up_silu(inputs.x, inputs.gate_up, config=config, **scales)

    def check(self, config: Config) -> Check:
        """What the kernel computes, against float32 arithmetic."""
        return self.problem.check(self.kernel(config, self.problem.sets[0]))

    def products(self) -> dict[str, Product]:
        """What libraries offer for this kind, by name."""
        if self.kind == "bf16":
            return {"torch": plain_product}
        found: dict[str, Product] = {"torch": partial(scaled_product, self.problem)}
        cutlass = vllm_product() if self.is_cuda else None
        return found if cutlass is None else found | {"vllm": cutlass}

    def stock(self, product: Product) -> list[Call]:
        """A library's product, and everything after it as one compiled function."""
        return self._chains(product, [self._whole])

    def fallback(self, product: Product) -> list[Call]:
        """The same as inside our operators: an activation and a quantization by token are kernels of their own."""
        return self._chains(product, [self._whole] if self._quantize is None else [silu_mul, self._quantize])

    def _chains(self, product: Product, steps: Sequence[Callable[..., Any] | None]) -> list[Call]:
        after = [compiled(step, self.is_cuda, "dynamic") for step in steps if step is not None]
        static = self.op == "gate_up" and self.kind == "fp8"
        return [
            partial(chain, product(inputs), after, *((inputs.out_scale,) if static else ()))
            for inputs in self.problem.sets
        ]

    @property
    def _whole(self) -> Callable[..., Any] | None:
        """Everything after the product of the first half; nothing follows a down projection."""
        if self.op == "down":
            return None
        later: dict[str, Callable[..., Any]] = {
            "bf16": silu_mul, "fp8": silu_mul_quantize, "fp8-token": silu_mul_by_token, "fp8-block": silu_mul_by_block
        }  # fmt: skip
        return later[self.kind]

    @property
    def _quantize(self) -> Callable[..., Any] | None:
        """What our kernel leaves to do."""
        later = {"fp8-token": quantize_by_token, "fp8-block": quantize_by_block}
        return later.get(self.kind) if self.op == "gate_up" else None


def chain(first: Call, after: Sequence[Callable[..., Any]], *more: Any) -> Any:
    """A call, and what follows it."""
    result = first()
    for step in after:
        result = step(result, *more)
    return result


def plain_product(inputs: Inputs) -> Call:
    """cuBLAS's product in bf16."""
    weight = inputs.gate_up if inputs.gate_up is not None else inputs.down
    assert weight is not None
    return partial(torch.nn.functional.linear, inputs.x, weight)


def vllm_product() -> Product | None:
    """vLLM's own FP8 product, where vLLM is installed."""
    try:
        from vllm_puzzle.serving.vllm_linear import cutlass_product
    except ImportError:
        return None

    def product(inputs: Inputs) -> Call:
        x_scale, weight_scale = inputs.x_scale, inputs.weight_scale
        weight = inputs.gate_up if inputs.gate_up is not None else inputs.down
        assert weight is not None and x_scale is not None and weight_scale is not None
        if weight_scale.dim() == 2:  # blocks, by column
            x_scale, weight_scale = x_scale.t().contiguous().t(), weight_scale.t()
        elif weight_scale.numel() <= 2:
            weight_scale = weight_scale[:1]
        return partial(cutlass_product, inputs.x, weight, x_scale, weight_scale)

    return product


def quantize_by_token(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """[M, I] → (e4m3, scales [M])."""
    return quantize_rows(hidden.float(), "channel")


def quantize_by_block(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """[M, I] → (e4m3, scales [M, ⌈I/128⌉])."""
    return quantize_rows(hidden.float(), "block")


def silu_mul_by_token(both: Tensor) -> tuple[Tensor, Tensor]:
    """Activation and quantization, for a compiler to fuse."""
    return quantize_by_token(silu_mul(both))


def silu_mul_by_block(both: Tensor) -> tuple[Tensor, Tensor]:
    """Activation and quantization, for a compiler to fuse."""
    return quantize_by_block(silu_mul(both))
