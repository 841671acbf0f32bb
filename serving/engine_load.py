"""One shape through a running engine: a closed loop over requests of one length, timed by vLLM's own clocks.

`max_concurrency` requests are submitted; each end submits the next one at once. Prompts are random token ids.

The **steady part** is the time while `max_concurrency` requests are in flight and the first prompts are behind: it
begins with the step that makes every one of the first `max_concurrency` requests have a token, or with the first end of
a request if that comes earlier (long prompts: the mix of prefill and decode is the same from then on), and ends with
the step in which the first request without a successor ends. Its tokens are those of the steps after the first, up to
and with the last. With num_requests = max_concurrency that is decoding alone; with more it has the successors' prompts.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from vllm_puzzle.model_configs.schema import MAX_SIZE, ConfigError

INTEGERS = ("input_len", "output_len", "num_requests", "max_concurrency")


@dataclass(frozen=True, slots=True)
class Load:
    """One case: lengths in tokens, requests in all and at a time, seed of the prompts, sampling temperature (0: greedy)
    and the most seconds that it may take. ConfigError for values outside what each allows."""

    input_len: int
    output_len: int
    num_requests: int
    max_concurrency: int
    seed: int = 0
    temperature: float = 0.0
    time_limit_s: float = 600.0

    @classmethod
    def from_line(cls, line: dict[str, Any]) -> Load:
        """A case as the parent sends it. ConfigError for an unknown or missing key."""
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(line) - set(known)):
            raise ConfigError(f"case: found key `{unknown[0]}`, allowed: {', '.join(known)}, or `routing` alone")
        if missing := [name for name in INTEGERS if name not in line]:
            raise ConfigError(f"case, key `{missing[0]}`: found nothing, allowed: an integer from 1 to {MAX_SIZE}")
        return cls(**line)

    def __post_init__(self) -> None:
        for name in INTEGERS:
            _require(name, getattr(self, name), (int,), 1, MAX_SIZE)
        _require("seed", self.seed, (int,), 0, MAX_SIZE)
        _require("temperature", self.temperature, (int, float), 0, 10)
        _require("time_limit_s", self.time_limit_s, (int, float), 1, 86_400)
        if self.max_concurrency > self.num_requests:
            raise ConfigError(
                f"case, key `max_concurrency`: found {self.max_concurrency}, allowed: up to num_requests "
                f"{self.num_requests}"
            )

    def check_fits(self, config: Any) -> None:
        """ConfigError where an engine of this VllmConfig would refuse a request or could not run so many at once."""
        longest, most = config.model_config.max_model_len, config.scheduler_config.max_num_seqs
        if self.input_len + self.output_len > longest:
            raise ConfigError(
                f"case: found input_len + output_len = {self.input_len + self.output_len}, allowed: up to "
                f"max_model_len {longest}"
            )
        if self.max_concurrency > most:
            raise ConfigError(
                f"case, key `max_concurrency`: found {self.max_concurrency}, allowed: up to max_num_seqs {most}"
            )

    def prompts(self, vocab_size: int) -> list[list[int]]:
        """Token ids [num_requests][input_len], the same for the same seed and vocabulary.

        No two share their first KV block: 16 random tokens of even a small vocabulary do not come twice.
        """
        generator = np.random.default_rng(self.seed)
        ids: list[list[int]] = generator.integers(0, vocab_size, size=(self.num_requests, self.input_len)).tolist()
        return ids


def _require(name: str, value: object, types: tuple[type, ...], low: int, high: int) -> None:
    if type(value) not in types or not low <= value <= high:  # type: ignore[operator]
        kind = "an integer" if types == (int,) else "a number"
        raise ConfigError(f"case, key `{name}`: found {value!r}, allowed: {kind} from {low} to {high}")


@dataclass(frozen=True, slots=True)
class Step:
    """One engine step: when this process had its tokens (time.perf_counter, seconds), tokens, requests that got their
    first token, requests that ended, and what the scheduler says: requests that ran and that waited, the share of KV
    blocks in use after it."""

    time_s: float
    num_tokens: int
    num_first_tokens: int
    num_ends: int
    num_running: int
    num_waiting: int
    kv_cache_usage: float


class StepRecorder:
    """Keeps every step and every end; takes the place of vLLM's statistics loggers, whose Prometheus counters cost time
    for each token."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.ends: list[Any] = []

    def clear(self) -> None:
        """Forget what was recorded."""
        self.steps, self.ends = [], []

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int | None = None
    ) -> None:
        """Called by LLMEngine.step with vLLM's SchedulerStats and IterationStats (None in a step without tokens)."""
        tokens = first_tokens = 0
        ends: list[Any] = []
        if iteration_stats is not None:
            tokens, ends = iteration_stats.num_generation_tokens, iteration_stats.finished_requests
            first_tokens = len(iteration_stats.time_to_first_tokens_iter)
        self.ends += ends
        self.steps.append(
            Step(
                time.perf_counter(), tokens, first_tokens, len(ends), scheduler_stats.num_running_reqs + len(ends),
                scheduler_stats.num_waiting_reqs, scheduler_stats.kv_cache_usage,
            )
        )  # fmt: skip

    def log(self) -> None:
        """vLLM asks for a log line now and then."""

    def log_engine_initialized(self) -> None:
        """As above, once."""


def run_load(engine: Any, recorder: StepRecorder, load: Load) -> dict[str, Any]:
    """Run one case in an LLMEngine whose only statistics logger is `recorder`; the measured values by name.

    Raises ConfigError for what does not fit the engine, TimeoutError past the limit, RuntimeError when the engine does
    not generate what was asked for.
    """
    from vllm import SamplingParams
    from vllm.inputs import tokens_input
    from vllm.sampling_params import RequestOutputKind

    load.check_fits(engine.vllm_config)
    params = SamplingParams(
        max_tokens=load.output_len, temperature=load.temperature, ignore_eos=True, detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )  # fmt: skip
    prompts = [tokens_input(ids) for ids in load.prompts(engine.model_config.get_vocab_size())]
    _forget_prompts(engine)
    recorder.clear()
    outputs: list[Any] = []
    num_sent = 0
    began = time.perf_counter()
    while len(outputs) < load.num_requests:
        while num_sent < load.num_requests and num_sent - len(outputs) < load.max_concurrency:
            engine.add_request(str(num_sent), prompts[num_sent], params)
            num_sent += 1
        outputs += engine.step()
        if time.perf_counter() - began > load.time_limit_s:
            raise TimeoutError(
                f"case: found {len(outputs)} of {load.num_requests} requests done, allowed: {load.time_limit_s} s"
            )
    duration = time.perf_counter() - began
    return _result(load, outputs, recorder, duration)


def _forget_prompts(engine: Any) -> None:
    """Empty the prefix cache of what an earlier case has left; an engine process may be freeing the last blocks yet."""
    for _ in range(100):
        if engine.reset_prefix_cache():
            return
        time.sleep(0.01)
    raise RuntimeError("case: found a prefix cache in use before the first request, allowed: an idle engine")


def _result(load: Load, outputs: list[Any], recorder: StepRecorder, duration: float) -> dict[str, Any]:
    num_tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    counted = sum(step.num_tokens for step in recorder.steps)
    if not num_tokens == counted == load.num_requests * load.output_len:
        raise RuntimeError(
            f"case: found {num_tokens} tokens in the replies and {counted} in the engine's steps, allowed: "
            f"{load.num_requests * load.output_len} in both"
        )
    if num_cached := sum(output.num_cached_tokens or 0 for output in outputs):
        raise RuntimeError(f"case: found {num_cached} prompt tokens taken from the prefix cache, allowed: 0")
    times = [output.metrics for output in outputs]
    num_input = load.num_requests * load.input_len
    part = steady_part(recorder.steps, load.num_requests, load.max_concurrency)
    per_token = [
        (one.last_token_ts - one.first_token_ts) / (one.num_generation_tokens - 1)
        for one in times
        if one.num_generation_tokens > 1
    ]
    return {
        "duration_s": duration,
        "input_tokens": num_input,
        "output_tokens": num_tokens,
        "output_throughput": num_tokens / duration,
        "total_token_throughput": (num_input + num_tokens) / duration,
        "request_throughput": load.num_requests / duration,
        "steady_output_throughput": part[0] / part[1] if part else None,
        "steady_output_tokens": part[0] if part else None,
        "steady_s": part[1] if part else None,
        "ttft_s": summary([one.first_token_latency for one in times]),
        "tpot_s": summary(per_token),
        "e2e_s": summary([end.e2e_latency for end in recorder.ends]),
        "queue_s": summary([one.scheduled_ts - one.queued_ts for one in times]),
        "num_preempted": sum(one.num_preemptions for one in times),
        "num_steps": len(recorder.steps),
        "max_running": max(step.num_running for step in recorder.steps),
        "max_waiting": max(step.num_waiting for step in recorder.steps),
        "max_kv_cache_usage": max(step.kv_cache_usage for step in recorder.steps),
    }


def steady_part(steps: list[Step], num_requests: int, max_concurrency: int) -> tuple[int, float] | None:
    """(tokens, seconds) of the steady part as the module defines it; None where it has no step."""
    num_first = num_ends = num_tokens = 0
    began: float | None = None
    for step in steps:
        num_first += step.num_first_tokens
        num_ends += step.num_ends
        if began is not None:
            num_tokens += step.num_tokens
        is_over = num_ends > num_requests - max_concurrency
        if is_over:
            return None if began is None else (num_tokens, step.time_s - began)
        if began is None and (num_first >= max_concurrency or num_ends):
            began = step.time_s
    return None


def summary(values: list[float]) -> dict[str, float] | None:
    """Mean, median and 99th percentile (linear between neighbours); None of nothing."""
    if not values:
        return None
    p50, p99 = np.percentile(values, [50, 99])
    return {"mean": float(np.mean(values)), "p50": float(p50), "p99": float(p99)}
