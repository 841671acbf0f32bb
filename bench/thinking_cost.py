"""What holding budgets costs per step with 256 running requests: `python -m vllm_puzzle.bench.thinking_cost [OUT]`.

Times one step's work in the sampler, ours and vLLM's, for requests that all think: none with limits, half with a budget
that is not reached, half with budget, grace and loop rule. V1 runner: `sync`-ed holder, `update_state` and
`apply_to_logits`, on this machine's CPU. V2 runner: `apply` on device tensors, on CUDA only, timed by CUDA events over
a window of steps, launches included.

Floor. V1: 128 requests × one slice of a list and one call per token; a call costs about 0.1 µs in CPython 3.11, so
25 µs. V2: one launch, about 5 µs, in which a program reads its row (128 bytes), its new token and the last tokens.
Prediction, written before the first run. V1: about 15 calls and 2 µs per token, 0.3 ms for 128 requests whatever the
length, the loop rule twice that; vLLM's holder scans all outputs for markers, so it grows with length: 128 × 1000
slices of 0.1 µs, 13 ms at 1000 tokens. V2: 10 to 20 µs; vLLM's two launches the same. None with limits: below 1 µs.
The claim to hold: at most 1 % of a decode step with 256 requests, which on an H100 takes 10 ms or more for the
models this is for, so 100 µs; and nothing without limits.
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from vllm_puzzle.kernels.thinking import ThinkingMarkers
from vllm_puzzle.serving import vllm_compat
from vllm_puzzle.serving.thinking_plan import PLAN_KEY
from vllm_puzzle.serving.thinking_v1 import ThinkingHolder

REQUESTS, VOCABULARY, STEPS, PROMPT = 256, 32_000, 60, (5, 1)
LENGTHS = (100, 1_000, 8_000)
MARKERS = ThinkingMarkers((1,), ((2,),), (2,))
PLANS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "half, budget": {"budget": 1_000_000, "grace": 0, "loop": None},
    "half, budget, grace, loop rule": {"budget": 1_000_000, "grace": 64, "loop": [1, 64, 4]},
}


@dataclass
class Params:
    """The two fields of SamplingParams that budgets read."""

    thinking_token_budget: int | None = None
    extra_args: dict[str, Any] | None = None


@dataclass
class Update:
    """vLLM's BatchUpdate: which requests came, left and moved."""

    added: list[Any]
    removed: list[int] = field(default_factory=list)
    moved: list[Any] = field(default_factory=list)


def params_of(index: int, plan: dict[str, Any] | None, is_stock: bool) -> Params:
    """Every second request has the plan; vLLM's own class knows its budget only."""
    if plan is None or index % 2:
        return Params()
    return Params(plan["budget"]) if is_stock else Params(None, {PLAN_KEY: plan})


def outputs_of(length: int) -> list[list[int]]:
    """Thoughts without repetition inside 64 tokens, without markers."""
    return [[10 + (7 * index + step) % 4001 for step in range(length)] for index in range(REQUESTS)]


def v1_step_us(plan: dict[str, Any] | None, length: int, is_stock: bool) -> list[float]:
    """Microseconds of each of STEPS steps of the V1 runner's budgets, from `length` output tokens on."""
    device = torch.device("cpu")
    holder: Any = (
        vllm_compat.stock_thinking_holder(MARKERS, REQUESTS, device) if is_stock else ThinkingHolder(MARKERS, False)
    )
    outputs = outputs_of(length)
    logits = torch.zeros(REQUESTS, VOCABULARY)
    holder.sync_batch(Update([(i, params_of(i, plan, is_stock), list(PROMPT), outputs[i]) for i in range(REQUESTS)]))
    times = []
    for step in range(STEPS + 5):
        for index, tokens in enumerate(outputs):
            tokens.append(10 + (7 * index + length + step) % 4001)
        start = time.perf_counter()
        if holder.has_tracked_requests():  # as vLLM's sampler asks
            holder.update_state(outputs, None)
            holder.apply_to_logits(logits, True, None)
        times.append(1e6 * (time.perf_counter() - start))
    return times[5:]


@dataclass
class Context:
    """The fields of vLLM's LogitsContext that budgets read."""

    idx_mapping_np: Any
    idx_mapping: torch.Tensor
    expanded_idx_mapping: torch.Tensor
    expanded_local_pos: torch.Tensor
    input_ids: torch.Tensor


def v2_step_us(plan: dict[str, Any] | None, length: int, is_stock: bool) -> list[float]:
    """Microseconds per step of the V2 runner's budgets on CUDA, each the mean of a window of 20 steps."""
    from vllm_puzzle.serving.thinking_v2 import DeviceThinkingBudgets

    device = torch.device("cuda")
    states = vllm_compat.v2_request_state(REQUESTS, length + 2_000, VOCABULARY, device)
    for index, tokens in enumerate(outputs_of(length)):
        states.add_request(str(index), len(PROMPT), [*PROMPT, *tokens], 0, 1)
    states.apply_staged_writes()
    budgets: Any
    if is_stock:
        budgets = vllm_compat.stock_thinking_budgets_v2(states, MARKERS)
    else:
        budgets = DeviceThinkingBudgets(states, None)
        budgets.set_markers(MARKERS)
    for index in range(REQUESTS):
        budgets.add_request(index, params_of(index, plan, is_stock))
    budgets.apply_staged_writes()
    order = torch.arange(REQUESTS, dtype=torch.int32)
    here = order.to(device)
    context = Context(order.numpy(), here, here, torch.zeros_like(here), here + 10)
    logits = torch.zeros(REQUESTS, VOCABULARY, device=device)
    budgets.apply(logits, context)  # compiles, and replays the outputs
    times, window = [], 20
    for _ in range(STEPS // 4):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        before.record()
        for _ in range(window):
            states.total_len.gpu += 1
            budgets.apply(logits, context)
        after.record()
        torch.cuda.synchronize()
        times.append(1e3 * before.elapsed_time(after) / window)
    return times


def measure() -> dict[str, Any]:
    """Median and quartiles in microseconds per step, by runner, class, limits and length."""
    torch.set_num_threads(1)
    runners = {"v1": v1_step_us} | ({"v2": v2_step_us} if torch.cuda.is_available() else {})
    rows = []
    for runner, step_us in runners.items():
        for name, plan in PLANS.items():
            for is_stock in (False, True):
                if is_stock and plan is not None and plan["loop"]:
                    continue  # vLLM has neither grace nor a loop rule
                for length in LENGTHS:
                    low, median, high = statistics.quantiles(step_us(plan, length, is_stock), n=4)
                    rows.append({
                        "runner": runner, "class": "vllm" if is_stock else "puzzle", "limits": name,
                        "output_tokens": length, "median_us": round(median, 2), "quartiles_us": [
                            round(low, 2), round(high, 2)],
                    })  # fmt: skip
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {"requests": REQUESTS, "steps": STEPS, "device": device, "torch": torch.__version__, "rows": rows}


def main() -> None:
    """Measure, print a table, write OUT (default: beside the other results)."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    results = Path(__file__).parent / "results"
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else results / f"thinking-cost-{kind}.json"
    found = measure()
    target.write_text(json.dumps(found, indent=1) + "\n")
    for row in found["rows"]:
        print("{runner} {class:7} {limits:32} {output_tokens:6} tokens {median_us:10.1f} µs".format(**row))


if __name__ == "__main__":
    main()
