"""One arm under one load, from an empty folder to its manifest, records and summary.

Whatever ends a run, the records that were written stay, and the manifest says what it was.
"""

from __future__ import annotations

import asyncio
import signal
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
from vllm_puzzle.bench.efficiency.arm import Arm, Load, refuse_forbidden
from vllm_puzzle.bench.efficiency.client import is_up
from vllm_puzzle.bench.efficiency.facts import Window
from vllm_puzzle.bench.efficiency.lag import LIMIT_S
from vllm_puzzle.bench.efficiency.manifest import (
    DISK_FULL,
    FAILED,
    INTERRUPTED,
    INVALID,
    new_manifest,
    write_manifest,
)
from vllm_puzzle.bench.efficiency.question import Ask, Question
from vllm_puzzle.bench.efficiency.record import STEADY, WARM_UP, RequestRecord
from vllm_puzzle.bench.efficiency.record_file import RecordFile
from vllm_puzzle.bench.efficiency.run_folder import COMPLETE, MANIFEST, REQUESTS
from vllm_puzzle.bench.efficiency.runner import Edge, Options, Runner
from vllm_puzzle.bench.efficiency.server_facts import Sample, ServerFacts, read_counters, read_server
from vllm_puzzle.bench.efficiency.speculation import by_category, difference
from vllm_puzzle.bench.efficiency.stationarity import stationarity
from vllm_puzzle.bench.efficiency.summary import Deployment, cache_hits, summary_of, whole_span, write_summary
from vllm_puzzle.model_configs.schema import ConfigError

AUTO, SALTED, WARM = "auto", "salted", "warm"
CACHES = (AUTO, SALTED, WARM)
STATUS_OF = {COMPLETE: 0, INVALID: 4, INTERRUPTED: 130}
PARTIAL = 3
MAX_ERRORS = 5


@dataclass(frozen=True, slots=True)
class Setup:
    """What runs of one sweep, or of one command, have in common.

    seed: of arrivals. cache: `salted` makes each run's prompts new to the server's prefix cache, `warm` does not,
    `auto` does where the server is a vLLM. config: declared beforehand. found: facts of the machine for the manifest.
    per_task: questions of each task to ask once more by themselves, for its acceptance; 0 asks none. lag_limit: in
    seconds, what the client's lateness may reach at its 99th percentile.
    """

    seed: int = 0
    cache: str = AUTO
    deployment: Deployment = field(default_factory=Deployment)
    config: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    found: Mapping[str, Any] = field(default_factory=dict)
    per_task: int = 0
    lag_limit: float = LIMIT_S
    options: Options = field(default_factory=Options)


async def run_arm(
    arm: Arm,
    load: Load,
    asks: Sequence[Ask],
    warm_up: Sequence[Question],
    folder: Path,
    transport: httpx.AsyncBaseTransport,
    setup: Setup,
) -> dict[str, Any]:
    """Run it and return its summary, which is in `folder` too. Raises ConfigError when it cannot begin."""
    for ask in asks:
        refuse_forbidden(f"question {ask.question.id} of {ask.question.task}", ask.question.fields)
    _prepare(folder)
    server = await read_server(transport, arm)
    before = await read_counters(transport, arm)
    is_salted = setup.cache == SALTED or (setup.cache == AUTO and server.is_vllm)
    salt = uuid.uuid4().hex if is_salted else None
    options = replace(setup.options, seed=setup.seed, salt=salt)
    manifest = new_manifest(
        arm,
        load,
        asks,
        warm_up,
        seed=setup.seed,
        block=options.block,
        config=setup.config,
        metadata=setup.metadata,
        found={**setup.found, "server": _server_object(server), "prefix_cache": SALTED if is_salted else WARM},
    )
    write_manifest(folder, manifest)
    begun, used = time.monotonic(), time.process_time()
    with RecordFile(folder / REQUESTS) as file:
        runner = Runner(transport, arm, load, asks, warm_up, file, options)
        try:
            with _signals(runner):
                await runner.run()
        except Exception:
            runner.stop(FAILED)
            write_manifest(folder, manifest | {"status": FAILED})
            raise
    client = {
        "lag": runner.lag.summary(),
        "cpu_share": (time.process_time() - used) / max(time.monotonic() - begun, 1e-9),
        "token_sources": _sources(runner.records),
    }
    after = await read_counters(transport, arm)
    categories: dict[str, Any] = {}
    if setup.per_task and runner.status == COMPLETE:
        categories = await _categories(transport, arm, asks, load, setup.per_task, runner)
    return _finish(folder, manifest, runner, setup, client, before, after, categories)


def _finish(
    folder: Path,
    manifest: dict[str, Any],
    runner: Runner,
    setup: Setup,
    client: Mapping[str, Any],
    before: Sequence[Sample],
    after: Sequence[Sample],
    categories: Mapping[str, Any],
) -> dict[str, Any]:
    """Summary and last manifest; on a full disk as much of it as fits."""
    reasons = _reasons(runner, setup)
    status = INVALID if reasons and runner.status == COMPLETE else runner.status
    window, is_steady = _window(runner)
    facts = setup.deployment.facts([window]) if window is not None else None
    speculated = difference(before, after)
    ends = {
        "status": status,
        "invalid_because": reasons,
        "issued": runner.sent,
        "ended": runner.ended,
        "abandoned": runner.abandoned,
        "errors": _errors(runner.records),
        "offered_rate": _offered(runner.records),
        "facts": facts.to_object() if facts is not None else {"windows": []},
        "is_steady": is_steady,
        "energy_source": None if runner.options.meter is None else runner.options.meter.source,
    }
    label: dict[str, Any] = {"label": "no steady window"}
    if window is not None and is_steady:
        label = stationarity(runner.records, window.start, window.end)
    rest = {
        **{key: manifest[key] for key in ("arm", "block", "planned")},
        "load": manifest["load"]["name"],
        **ends,
        "stationarity": label,
        "client": client,
        "cache": cache_hits([record for record in runner.records if record.phase != WARM_UP], before, after),
        "speculation": None if speculated is None else {**speculated.to_object(), "by_task": dict(categories)},
    }
    try:
        summary = summary_of(runner.records, facts, rest)
        write_summary(folder, summary)
    except OSError:
        summary["status"] = ends["status"] = DISK_FULL
    write_manifest(folder, manifest | ends | {"stationarity": label["label"]})
    return summary


def exit_status(status: str) -> int:
    """Of the command: 0 complete, 3 partial, 4 not valid, 130 interrupted."""
    return STATUS_OF.get(status, PARTIAL)


async def wait_until_up(transport: httpx.AsyncBaseTransport, arm: Arm, timeout_s: float) -> None:
    """Until the server answers anything. Raises ConfigError after `timeout_s`."""
    loop = asyncio.get_running_loop()
    until = loop.time() + timeout_s
    while True:
        for path in ("/v1/models", "/health"):
            if await is_up(transport, arm.root + path, arm.headers):
                return
        if loop.time() >= until:
            raise ConfigError(f"server: found none at {arm.root}, allowed: the address of one that runs")
        await asyncio.sleep(0.5)


def _prepare(folder: Path) -> None:
    """Raises ConfigError for a folder that holds a run already."""
    if (folder / MANIFEST).exists() or (folder / REQUESTS).exists():
        raise ConfigError(f"{folder}: found a run, allowed: a folder without one")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{folder}: found {error.strerror}, allowed: a folder that can be written") from None


def _reasons(runner: Runner, setup: Setup) -> list[str]:
    """Why the numbers are not to be trusted."""
    late = runner.lag.quantile(0.99)
    if late is None or late <= setup.lag_limit:
        return []
    return [f"client: event loop late by {late * 1000:.1f} ms at p99, allowed: {setup.lag_limit * 1000:g} ms"]


def _window(runner: Runner) -> tuple[Window | None, bool]:
    """The steady window, else all of the run; and whether it is the former."""
    opened, closed, block = runner.opened, runner.closed, runner.options.block
    if opened is not None and closed is not None and opened.time < closed.time and _has_steady(runner.records):
        return Window(opened.time, closed.time, block, _joules(opened, closed)), True
    span = whole_span(runner.records)
    return (None if span is None else Window(*span, block)), False


def _has_steady(records: Sequence[RequestRecord]) -> bool:
    return any(record.phase == STEADY for record in records)


def _joules(opened: Edge, closed: Edge) -> float | None:
    return None if opened.joules is None or closed.joules is None else closed.joules - opened.joules


def _sources(records: Sequence[RequestRecord]) -> dict[str, int]:
    """How many requests' tokens were counted by whom."""
    named = [record.token_source or "nobody" for record in records]
    return {name: named.count(name) for name in sorted(set(named))}


def _offered(records: Sequence[RequestRecord]) -> float | None:
    """Requests per second that an open load asked for, as the seed had it; None of a closed one."""
    times = [record.scheduled for record in records if record.scheduled is not None]
    span = max(times) - min(times) if times else 0.0
    return (len(times) - 1) / span if span > 0 else None


def _errors(records: Sequence[RequestRecord]) -> dict[str, int]:
    """How often each error came, the most frequent first."""
    found = Counter(record.error for record in records if record.error is not None)
    return {error: times for error, times in found.most_common(MAX_ERRORS) if error is not None}


def _server_object(server: ServerFacts) -> dict[str, Any]:
    return {"version": server.version, "model": dict(server.model), "cache_config": dict(server.cache)}


async def _categories(
    transport: httpx.AsyncBaseTransport, arm: Arm, asks: Sequence[Ask], load: Load, per_task: int, runner: Runner
) -> dict[str, Any]:
    chosen: dict[str, list[Question]] = {}
    for ask in asks:
        group = chosen.setdefault(ask.question.task, [])
        if len(group) < per_task and ask.question not in group:
            group.append(ask.question)
    questions = [question for group in chosen.values() for question in group]
    fields = {} if runner.options.salt is None else {"cache_salt": f"{runner.options.salt}-by-category"}
    clock = asyncio.get_running_loop().time
    found = await by_category(transport, arm, questions, load.concurrency or 8, clock, fields)
    return {task: accepted.to_object() for task, accepted in found.items()}


@contextmanager
def _signals(runner: Runner) -> Iterator[None]:
    """Ctrl-C and SIGTERM break the run off in order; a second one as ever."""
    loop = asyncio.get_running_loop()
    handled: list[signal.Signals] = []

    def interrupt() -> None:
        runner.stop(INTERRUPTED)
        restore()

    def restore() -> None:
        while handled:
            loop.remove_signal_handler(handled.pop())

    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            loop.add_signal_handler(number, interrupt)
        except (RuntimeError, NotImplementedError, ValueError):  # not the main thread, or not a POSIX system
            continue
        handled.append(number)
    try:
        yield
    finally:
        restore()
