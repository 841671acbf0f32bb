"""How a kernel is timed: CUDA-graph replay over rotating inputs, by CUDA events; the wall clock without a GPU.

One sample is one replay of a graph that runs every call once, each on inputs of its own, divided by their number. The
inputs of one replay together exceed five times the L2, so that nothing is found there that the memory bus should carry.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

Call = Callable[[], Any]
Spoil = Callable[[Any], None]
L2_MULTIPLE = 5  # the rotating inputs' share of the L2
MAX_SETS = 4096  # calls in one graph
MIN_SAMPLES, MAX_SAMPLES = 15, 200
WARM_UP = 0.02  # seconds of replays before the first sample, for clocks and caches
MEASURE = 0.15  # seconds of replays that are measured, where MIN_SAMPLES take no longer


@dataclass(frozen=True, slots=True)
class Summary:
    """Microseconds of one call over all samples: 20th, 50th and 80th percentile."""

    p20: float
    p50: float
    p80: float
    num_samples: int

    @property
    def spread(self) -> float:
        """(p80 − p20) / p50."""
        return (self.p80 - self.p20) / self.p50


def summarize(samples: Sequence[float]) -> Summary:
    """Percentiles of seconds, in microseconds (linear between neighbours). Raises ValueError without a sample."""
    if not samples:
        raise ValueError("timing: found no sample, allowed: at least one")
    ordered = sorted(samples)

    def percentile(share: float) -> float:
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return 1e6 * (ordered[low] + (ordered[high] - ordered[low]) * (place - low))

    return Summary(percentile(0.2), 1e6 * statistics.median(ordered), percentile(0.8), len(ordered))


def number_of_sets(bytes_of_one: int, l2_bytes: int) -> int:
    """How many input sets rotate: enough that one round exceeds five times the L2, and never fewer than two."""
    return min(MAX_SETS, max(2, -(-L2_MULTIPLE * l2_bytes // max(bytes_of_one, 1)) + 1))


class Timer(Protocol):
    """Seconds of one call, one number a sample, and what the first call returned when it was last run."""

    def __call__(self, calls: Sequence[Call], spoil: Spoil | None = None) -> tuple[list[float], Any]:
        """Run all `calls` in turn, many times; `spoil` is given the first one's output before the runs that count."""


def cuda_graph_timer(calls: Sequence[Call], spoil: Spoil | None = None) -> tuple[list[float], Any]:
    """Times the replay of a CUDA graph of all calls. The first call's result is that of the last replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compile, choose algorithms, allocate workspaces: none of it may be captured
        for call in (*calls[:3], *calls[-1:]):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        first = calls[0]()
        for call in calls[1:]:
            call()
    if spoil is not None:
        spoil(first)
    one = _seconds(graph.replay)
    for _ in range(min(MAX_SAMPLES, int(WARM_UP / one) + 1)):
        graph.replay()
    count = max(MIN_SAMPLES, min(MAX_SAMPLES, int(MEASURE / one)))
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    for start, stop in events:
        start.record()
        graph.replay()
        stop.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) / 1e3 / len(calls) for start, stop in events], first


def _seconds(run: Call) -> float:
    """A first estimate of one run."""
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    run()
    torch.cuda.synchronize()
    start.record()
    run()
    stop.record()
    torch.cuda.synchronize()
    return max(float(start.elapsed_time(stop)) / 1e3, 1e-6)


def wall_clock_timer(calls: Sequence[Call], spoil: Spoil | None = None) -> tuple[list[float], Any]:
    """Times the calls on a CPU, eagerly; for tests of everything around the timing."""
    first, samples = calls[0](), []
    if spoil is not None:
        spoil(first)
    for _ in range(MIN_SAMPLES):
        start = time.perf_counter()
        for index, call in enumerate(calls):
            result = call()
            first = result if index == 0 else first
        samples.append((time.perf_counter() - start) / len(calls))
    return samples, first


def count_launches(call: Call) -> int | None:
    """How many kernels and copies one call launches on the GPU, None where the profiler sees none."""
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        call()
        torch.cuda.synchronize()
    launched = [event for event in record.events() if event.device_type.name == "CUDA"]
    return len(launched) or None
