"""When requests go out: arrival times as a pure function of load, number and seed, and the two loops that send them.

In an open loop each request has its own time, whatever the server does; it is kept, and latencies count from it, so
that a slow server or client delays nobody's clock (no coordinated omission).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import nullcontext
from typing import TypeVar

import numpy as np
from vllm_puzzle.bench.efficiency.arm import CONSTANT, GAMMA, POISSON, TRACE, Load
from vllm_puzzle.model_configs.schema import ConfigError

T = TypeVar("T")
# Sends one request that was due at a time of the loop's clock (None: now) and returns when it has ended.
SendOne = Callable[[T, float | None], Awaitable[None]]


def arrivals(load: Load, count: int, seed: int) -> list[float]:
    """Times of an open load in seconds, ascending, the first at 0. Raises ConfigError when a trace is too short."""
    if load.kind == TRACE:
        if len(load.times) < count:
            raise ConfigError(f"load, trace: found {len(load.times)} times, allowed: at least the {count} requests")
        times = np.sort(np.asarray(load.times[:count], dtype=np.float64))
        return [float(time) for time in times - times[0]]
    rng = np.random.default_rng(seed)
    shape = {POISSON: 1.0, GAMMA: load.burstiness}
    unit = np.ones(count) if load.kind == CONSTANT else rng.gamma(shape[load.kind], 1 / shape[load.kind], size=count)
    times = np.cumsum(unit / _rates(load, count))
    return [float(time) for time in times - times[0]] if count else []


def _rates(load: Load, count: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Requests per second at each request; over a ramp as in vLLM, by the place in the list."""
    if load.ramp is None:
        return np.full(count, load.rate, dtype=np.float64)
    assert load.rate_start is not None and load.rate_end is not None
    place = np.linspace(0.0, 1.0, count)
    if load.ramp == "linear":
        return load.rate_start + (load.rate_end - load.rate_start) * place
    return load.rate_start * (load.rate_end / load.rate_start) ** place


async def closed_loop(items: Sequence[T], concurrency: int, send: SendOne[T], stop: asyncio.Event) -> None:
    """`concurrency` at a time; the next goes out when one has ended. Ends with the last, or when `stop` is set."""
    waiting = iter(items)

    async def worker() -> None:
        for item in waiting:
            if stop.is_set():
                return
            await send(item, None)

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(items))):
            group.create_task(worker())


async def open_loop(
    items: Sequence[T],
    times: Sequence[float],
    begin: float,
    limit: int | None,
    send: SendOne[T],
    stop: asyncio.Event,
) -> None:
    """Each at its time after `begin` of the loop's clock; at most `limit` at once, where who waits keeps its time."""
    loop = asyncio.get_running_loop()
    slots = asyncio.Semaphore(limit) if limit is not None else nullcontext()

    async def one(item: T, due: float) -> None:
        async with slots:
            if not stop.is_set():
                await send(item, due)

    async with asyncio.TaskGroup() as group:
        for item, time in zip(items, times, strict=True):
            due = begin + time
            if due > loop.time():
                await asyncio.sleep(due - loop.time())
            if stop.is_set():
                return
            group.create_task(one(item, due))
