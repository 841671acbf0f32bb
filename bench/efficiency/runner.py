"""One run while it lasts: sends the work list under its load, writes each record as it ends, and finds the window.

The steady window opens when the last warm-up request has ended, with measured ones in flight behind it, and closes with
the last arrival (open load) or when the list is exhausted and a request ends (closed load): what is in flight is then
the same at both ends. Whatever ends later is the drain.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
from vllm_puzzle.bench.efficiency.account import CountTokens, to_record
from vllm_puzzle.bench.efficiency.arm import Arm, Load
from vllm_puzzle.bench.efficiency.client import CONNECTION, HTTP, Reply, ask
from vllm_puzzle.bench.efficiency.energy import Meter
from vllm_puzzle.bench.efficiency.lag import LagMonitor
from vllm_puzzle.bench.efficiency.load import arrivals, closed_loop, open_loop
from vllm_puzzle.bench.efficiency.manifest import DISK_FULL, REFUSED, RUNNING, SERVER_LOST
from vllm_puzzle.bench.efficiency.question import Ask, Question
from vllm_puzzle.bench.efficiency.record import DRAIN, RAMP, STEADY, WARM_UP, RequestRecord
from vllm_puzzle.bench.efficiency.record_file import RecordFile
from vllm_puzzle.bench.efficiency.run_folder import COMPLETE

# Failures in a row after which a server is given up; twice what is in flight, if that is more. That nobody listens
# at its address is plain sooner.
GIVE_UP_AFTER = 20
GIVE_UP_CONNECTING = 3
_POLL_S = 60.0


@dataclass(frozen=True, slots=True)
class Options:
    """How a run is done, besides arm, load and list.

    block: turn of the arm in a sweep. seed: of the arrivals. salt: makes prompts unlike those of other runs to the
    server's prefix cache; None sends none. tokenizer: counts tokens of a text where the server does not. meter: an
    energy counter of the machine that serves. on_record: called with each record.
    """

    block: int = 0
    seed: int = 0
    salt: str | None = None
    tokenizer: CountTokens | None = None
    keeps_text: bool = False
    meter: Meter | None = None
    on_record: Callable[[RequestRecord], None] | None = None


@dataclass(slots=True)
class Edge:
    """One end of the window: when, and what the energy counter said."""

    time: float
    joules: float | None


@dataclass(slots=True)
class Runner:
    """The state of a run. `status` is one of manifest.STATUSES; times are seconds since `origin`."""

    transport: httpx.AsyncBaseTransport
    arm: Arm
    load: Load
    asks: Sequence[Ask]
    warm_up: Sequence[Question]
    file: RecordFile
    options: Options
    status: str = RUNNING
    records: list[RequestRecord] = field(default_factory=list)
    opened: Edge | None = None
    closed: Edge | None = None
    sent: int = 0
    ended: int = 0
    lag: LagMonitor = field(default_factory=LagMonitor)
    origin: float = 0.0
    _failures: int = 0
    _unconnected: int = 0
    _warm_left: int = 0
    _stop: asyncio.Event = field(default_factory=asyncio.Event)
    _last_due: float | None = None

    @property
    def abandoned(self) -> int:
        """Requests that were in flight when the run was broken off; nothing is known of them."""
        return self.sent - self.ended

    def stop(self, status: str) -> None:
        """Break the run off. The first reason counts."""
        if self.status == RUNNING:
            self.status = status
            self._stop.set()

    async def run(self) -> None:
        """Until all is done or `stop` is called. An error of ours is raised after what is in flight was cancelled."""
        self._warm_left = len(self.warm_up)
        warm = [Ask(question, 0, index - len(self.warm_up)) for index, question in enumerate(self.warm_up)]
        items = [*warm, *self.asks]
        # What is there now stays out of the collector's way: going through all of it takes 10 ms.
        gc.freeze()
        self.origin = self._clock()
        if not self._warm_left:
            self.opened = self._edge(0.0)
        self.lag.start()
        poll = asyncio.create_task(self._poll())
        issue = asyncio.create_task(self._issue(items))
        stopped = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({issue, stopped}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.lag.stop()
            for task in (issue, stopped, poll):
                if not task.done():
                    task.cancel()
            results = await asyncio.gather(issue, stopped, poll, return_exceptions=True)
            gc.unfreeze()
        if isinstance(results[0], Exception):
            raise results[0]
        self._close()
        self.stop(COMPLETE)

    async def _issue(self, items: Sequence[Ask]) -> None:
        if not self.load.is_open:
            assert self.load.concurrency is not None
            await closed_loop(items, self.load.concurrency, self._send, self._stop)
            return
        times = arrivals(self.load, len(items), self.options.seed)
        self._last_due = times[-1]
        asyncio.get_running_loop().call_at(self.origin + times[-1], self._close)
        await open_loop(items, times, self.origin, self.load.concurrency, self._send, self._stop)

    async def _send(self, item: Ask, due: float | None) -> None:
        is_warm = item.order < 0
        salt = self.options.salt
        fields: Mapping[str, Any] = {} if salt is None else {"cache_salt": f"{salt}-{item.repeat}"}
        self.sent += 1
        reply = await ask(self.transport, self.arm, item.question, self._clock, fields)
        self.ended += 1
        self._move_window(is_warm)
        record = to_record(
            reply,
            item,
            self.arm,
            block=self.options.block,
            phase=WARM_UP if is_warm else self._phase(reply),
            origin=self.origin,
            scheduled=None if due is None else due - self.origin,
            tokenizer=self.options.tokenizer,
            keeps_text=self.options.keeps_text,
        )
        self._keep(record)
        self._judge(reply)

    def _move_window(self, is_warm: bool) -> None:
        now = self._now()
        if is_warm:
            self._warm_left -= 1
            if self._warm_left == 0:
                self.opened = self._edge(now)
                # Connections are open now, modules imported: what comes is what the window is judged by.
                del self.lag.samples[:]
        if not self.load.is_open and self.sent == len(self.asks) + len(self.warm_up):
            self._close()

    def _close(self) -> None:
        if self.closed is None:
            self.closed = self._edge(self._now() if self._last_due is None else min(self._now(), self._last_due))
            self.lag.stop()

    def _phase(self, reply: Reply) -> str:
        ended = reply.done - self.origin
        if self.opened is None or ended <= self.opened.time:
            return RAMP
        return STEADY if self.closed is None or ended <= self.closed.time else DRAIN

    def _keep(self, record: RequestRecord) -> None:
        self.records.append(record)
        try:
            self.file.add(record)
        except OSError:
            self.stop(DISK_FULL)
        if self.options.on_record is not None:
            self.options.on_record(record)

    def _judge(self, reply: Reply) -> None:
        """A server that answers nothing any more is not asked for ever."""
        if reply.failure is None:
            self._failures = self._unconnected = 0
            return
        self._failures += 1
        self._unconnected = self._unconnected + 1 if reply.failure == CONNECTION else 0
        is_over = self.sent == len(self.asks) + len(self.warm_up)
        if self._unconnected >= (1 if is_over else GIVE_UP_CONNECTING):
            self.stop(SERVER_LOST)
        elif self._failures >= max(GIVE_UP_AFTER, 2 * (self.load.concurrency or 0)):
            self.stop(REFUSED if reply.failure == HTTP else SERVER_LOST)

    def _edge(self, time: float) -> Edge:
        return Edge(time, self._joules())

    def _joules(self) -> float | None:
        if self.options.meter is None:
            return None
        try:
            return self.options.meter.read()
        except (OSError, ValueError):
            return None

    async def _poll(self) -> None:
        """The processors' counter wraps: it must not do so twice unseen."""
        while self.options.meter is not None:
            await asyncio.sleep(_POLL_S)
            self._joules()

    def _clock(self) -> float:
        return asyncio.get_running_loop().time()

    def _now(self) -> float:
        return self._clock() - self.origin
