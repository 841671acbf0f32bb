"""Other ways to write K and V into a paged cache: torch's operations, vLLM's Triton kernel, our own in two launches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm_puzzle.bench.kernel import stock
from vllm_puzzle.bench.kernel.problem import Absent, Prepare
from vllm_puzzle.bench.kernel.timing import Call

if TYPE_CHECKING:
    from vllm_puzzle.bench.kernel.attention import AttentionProblem, Inputs

E4M3_MAX = 448.0


def baselines(problem: AttentionProblem) -> Mapping[str, Prepare]:
    """By name."""
    if problem.case.op == "fused_decode":
        return {"two_launches": partial(two_launches, problem)}
    found: dict[str, Prepare] = {"torch": partial(torch_operations, problem)}
    if problem.case.op == "kv_write":
        found["vllm_write"] = partial(vllm_write, problem)
    return found


def torch_operations(problem: AttentionProblem) -> Sequence[Call]:
    """Rotate (where the case does), divide, clamp, cast and scatter, one operation of torch after the other."""
    page = problem.case.page
    rotates = problem.case.op == "rope_kv_write"
    caches = [cache.view(torch.uint8 if problem.is_quantized else torch.int16)
              for cache in (problem.k_cache, problem.v_cache)]  # fmt: skip

    def rotate(x: Tensor) -> Tensor:
        cos, sin = problem.cos_sin_cache[problem.positions][:, None].float().chunk(2, dim=-1)
        first, second = x.float().chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    def store(x: Tensor, cache: Tensor, scale: Tensor | None, slots: Tensor) -> None:
        if scale is None:
            codes = x.bfloat16().view(torch.int16)
        else:
            codes = (x.float() / scale[:, None]).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
        cache[slots // page, :, slots % page] = codes

    def call(inputs: Inputs) -> Inputs:
        k = inputs.k
        if rotates:
            inputs.out.copy_(rotate(inputs.q))
            k = rotate(k)
        store(k, caches[0], problem.k_scale, inputs.slot_mapping)
        store(inputs.v, caches[1], problem.v_scale, inputs.slot_mapping)
        return inputs

    return [partial(call, inputs) for inputs in problem.sets]


def vllm_write(problem: AttentionProblem) -> Sequence[Call]:
    """vLLM's Triton reshape-and-cache kernel."""
    if problem.case.per_head:
        raise Absent("vLLM's Triton write has one scale for all heads")
    op: Any = stock.find(problem.vllm_source).get("triton_reshape_and_cache_flash")
    kind = "fp8" if problem.is_quantized else "auto"
    one = torch.ones(1, device=problem.device)
    scales = [one if scale is None else scale for scale in (problem.k_scale, problem.v_scale)]
    caches = [cache.transpose(1, 2) for cache in (problem.k_cache, problem.v_cache)]

    def call(inputs: Inputs) -> Inputs:
        op(inputs.k, inputs.v, *caches, inputs.slot_mapping, kind, *scales)
        return inputs

    return [partial(call, inputs) for inputs in problem.sets]


def two_launches(problem: AttentionProblem) -> Sequence[Call]:
    """Our rotation and write, then our window attention, in place of the fused decode."""
    from dataclasses import replace

    from vllm_puzzle.kernels.kv_write import rope_and_write_kv

    rotated = [replace(inputs, q=torch.empty_like(inputs.q)) for inputs in problem.sets]
    attends = problem.own_attention(rotated)

    def call(inputs: Inputs, own: Inputs, attend: Call) -> Inputs:
        problem.rope_and_write(rope_and_write_kv, replace(inputs, out=own.q))
        attend()
        return inputs

    return [partial(call, *three) for three in zip(problem.sets, rotated, attends, strict=True)]
