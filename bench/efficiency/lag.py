"""Whether the client itself was in time: how late the event loop comes back from a sleep. Standard library only.

A loop that is blocked for 100 ms misses many ticks; each counts with the lateness it would have had, or a few long
blocks would hide behind many good ticks.
"""

from __future__ import annotations

import asyncio
import math
from array import array

TICK_S = 0.005
LIMIT_S = 0.005
_MAX_SAMPLES = 2_000_000  # 2.8 hours; a longer run keeps every other one, and so on


class LagMonitor:
    """Watches the running loop from `start` to `stop`."""

    def __init__(self, tick: float = TICK_S) -> None:
        self.tick = tick
        self.samples = array("f")
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin, within a running loop."""
        self._task = asyncio.create_task(self._watch())

    def stop(self) -> None:
        """End; the samples stay."""
        if self._task is not None:
            self._task.cancel()
            self._task = None

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time() + self.tick
        while True:
            await asyncio.sleep(due - loop.time())
            due = self.record(due, loop.time())

    def record(self, due: float, now: float) -> float:
        """A tick that was due came now; returns when the next one is due."""
        missed = max(0, int((now - due) // self.tick))
        for index in range(min(missed, _MAX_SAMPLES) + 1):
            self.samples.append(max(0.0, now - due - index * self.tick))
        if len(self.samples) > _MAX_SAMPLES:
            self.samples = self.samples[::2]
        return due + (missed + 1) * self.tick

    def quantile(self, share: float) -> float | None:
        """Seconds of lateness that `share` of the ticks did not exceed; None before the first tick."""
        if not self.samples:
            return None
        ordered = sorted(self.samples)
        return ordered[max(0, math.ceil(share * len(ordered)) - 1)]

    def summary(self) -> dict[str, float | int | None]:
        """p50, p99 and the worst, in seconds."""
        values = {"p50_s": self.quantile(0.5), "p99_s": self.quantile(0.99), "max_s": self.quantile(1.0)}
        return {"ticks": len(self.samples), **values}
