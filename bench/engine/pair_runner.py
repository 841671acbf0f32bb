"""Two engines that live at once: each case is visited in ABBA blocks (paired.py), and both get a row."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from vllm_puzzle.bench.engine.case import Case, EngineVariant
from vllm_puzzle.bench.engine.driver import EngineChild, EngineError
from vllm_puzzle.bench.engine.paired import A, B, Comparison, Visit, compare, order
from vllm_puzzle.bench.engine.report import pair_line
from vllm_puzzle.bench.engine.rows import OK, SKIPPED
from vllm_puzzle.bench.engine.session import Run, ok_row, refuse, setup, start, started_line, wait


def run_pair(run: Run, first: EngineVariant, second: EngineVariant) -> None:
    """Both alive, visited in ABBA blocks (paired.py)."""
    cases = [
        (a, b)
        for a, b in zip(run.suite.cases(first), run.suite.cases(second), strict=True)
        if not (run.is_known(a) and run.is_known(b) and _has_pair(run, a, b))
    ]
    if not cases:
        run.show(f"{first.name}, {second.name}: every case is measured")
        return
    todo = [case for pair in cases for case in pair]
    if any(refuse(run, variant, [c for c in todo if c.variant is variant]) for variant in (first, second)):
        return
    if not run.has_time_to_start:
        run.give_up(todo, SKIPPED, "no time left")
        return
    try:
        with start(run, first) as a:
            # On a GPU the second starts after the first, whose memory it measures; on a CPU both import meanwhile.
            ready_a = wait(run, first, a) if run.machine.has_gpu else None
            with start(run, second) as b:
                ready = (ready_a or wait(run, first, a), wait(run, second, b))
                for variant, event in zip((first, second), ready, strict=True):
                    run.show(started_line(variant, event))
                for pair in cases:
                    _run_pair_case(run, (a, b), ready, pair)
    except EngineError as error:
        status = run.failure()
        run.give_up([c for c in todo if not _was_added(run, c)], status, str(error))


def _run_pair_case(
    run: Run, children: tuple[EngineChild, EngineChild], ready: tuple[dict[str, Any], ...], pair: tuple[Case, Case]
) -> None:
    arms = dict(zip((A, B), zip(children, pair, ready, strict=True), strict=True))
    events: dict[str, list[dict[str, Any]]] = {A: [], B: []}
    visits: list[Visit] = []
    slowest = 0.0
    for child, case, _ in arms.values():
        began = time.monotonic()
        child.ask(case.request(case.batch, 0), max(1.0, run.left))
        slowest = max(slowest, time.monotonic() - began)
    for block in range(run.suite.blocks):
        if run.left < 4.5 * slowest:
            break
        for arm in order(block):
            child, case, _ = arms[arm]
            event = child.ask(case.request(case.batch, block + 1), max(1.0, run.left))
            slowest = max(slowest, event["duration_s"])
            visits.append(Visit(block, arm, event["duration_s"]))
            events[arm].append(event)
    if not visits:
        run.give_up(pair, SKIPPED, f"a block takes about {4 * slowest:.0f} s, {max(0, run.left):.0f} s left")
        return
    for arm, (_, case, about) in arms.items():
        run.keep(ok_row(run, case, case.batch, about, median_event(events[arm])))
    a, b = pair
    comparison = compare(_pair_name(a), a.variant.name, b.variant.name, visits, run.suite.tolerance)
    run.results.add_pair(_pair_object(run, a, b, comparison))
    run.save()
    run.show(pair_line(comparison.as_object()))


def median_event(events: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The visit whose duration is the (upper) median: a row holds one real visit, the comparison holds all."""
    return sorted(events, key=lambda event: float(event["duration_s"]))[len(events) // 2]


def _pair_name(case: Case) -> str:
    return case.name.partition(" ")[2]


def _pair_object(run: Run, a: Case, b: Case, comparison: Comparison) -> dict[str, Any]:
    return comparison.as_object() | {"setups": [setup(a), setup(b)], "commit": run.commit, "wanted": run.suite.blocks}


def _has_pair(run: Run, a: Case, b: Case) -> bool:
    """Whether the comparison is there, with as many blocks as wanted."""
    for pair in run.results.pairs:
        is_its = (pair["case"], pair["a"], pair["b"]) == (_pair_name(a), a.variant.name, b.variant.name)
        if is_its and pair["setups"] == [setup(a), setup(b)] and pair["commit"] == run.commit:
            return bool(pair["blocks"] >= run.suite.blocks)
    return False


def _was_added(run: Run, case: Case) -> bool:
    return any(row.case == case.name and row.setup == setup(case) and row.status == OK for row in run.results.rows)
