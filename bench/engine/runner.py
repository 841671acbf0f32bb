"""Goes through a suite within its time: starts engines, asks for cases, writes each row as soon as it is known.

What was measured before, with the same commit, card and set-up, is not measured again. A case that fails costs itself
and a new start; what no time is left for is `skipped` and measured by the next call.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from vllm_puzzle.bench.engine import rows as record
from vllm_puzzle.bench.engine.case import Case, EngineVariant
from vllm_puzzle.bench.engine.driver import COMMAND, EngineChild, EngineError
from vllm_puzzle.bench.engine.model_folder import configuration, is_reconstructed, served_weights, write_folder
from vllm_puzzle.bench.engine.paired import A, B, Comparison, Visit, compare, order
from vllm_puzzle.bench.engine.plan import (
    START_S,
    Estimate,
    cache_bytes,
    estimate_of,
    memory_plan,
    planned_batch,
)
from vllm_puzzle.bench.engine.report import case_line, pair_line
from vllm_puzzle.bench.engine.rows import FAILED, OK, REFUSED, SKIPPED, Machine, Results, Row
from vllm_puzzle.bench.engine.suites import Suite
from vllm_puzzle.model_configs.memory_plan import Gpu

# The first cases of an engine may come out far from the estimate; a limit is there for what hangs.
MIN_LIMIT_S, LIMIT_FACTOR = 120.0, 8.0
RESERVE_S = 3.0  # for stopping an engine and writing the rows
KV_WORDS = {"bf16": "bfloat16", "fp8": "fp8"}
ROUTING_TOKENS = (1, 32, 256)


@dataclass(slots=True)
class Run:
    """One call: what, where, until when (monotonic seconds), and what is known so far. `work` is a folder for models
    and the engines' logs.
    """

    suite: Suite
    machine: Machine
    gpu: Gpu | None
    commit: str
    results: Results
    folder: Path | None
    work: Path
    deadline: float
    is_again: bool
    show: Callable[[str], None]
    command: Sequence[str] = COMMAND
    corrections: dict[str, float] = field(default_factory=dict)

    @property
    def left(self) -> float:
        """Seconds until the limit."""
        return self.deadline - time.monotonic() - RESERVE_S

    def keep(self, row: Row) -> None:
        """Take a row in, write the files, show it; a measured one is not replaced by one without a speed."""
        known = self.results.known(row.case, row.setup, row.commit)
        if row.status == OK or known is None:
            self.results.add(row)
            self.save()
        self.show(case_line(row))

    def save(self) -> None:
        """Write the files that were asked for."""
        if self.folder is not None:
            self.results.save(self.folder)

    def is_known(self, case: Case) -> bool:
        """Whether there is nothing to measure."""
        return not self.is_again and self.results.known(case.name, setup(case), self.commit) is not None


def run_suite(run: Run) -> None:
    """Measure all of it that is not known yet. Nothing is raised for an engine that fails: that is a row."""
    if run.suite.pairs:
        for first, second in run.suite.pairs:
            variants = {variant.name: variant for variant in run.suite.variants}
            run_pair(run, variants[first], variants[second])
    else:
        for variant in run.suite.variants:
            run_variant(run, variant)
    if run.suite.has_routing:
        run_routing(run)
    run.save()


def setup(case: Case) -> str:
    """A fingerprint of everything that a case asks of an engine."""
    variant = case.variant
    asked = [configuration(variant), engine_arguments(variant), dict(variant.env), case.name, case.role]
    asked.append(case.request(case.batch or 1, 0))
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:12]


def engine_arguments(variant: EngineVariant) -> dict[str, Any]:
    """Keyword arguments of vLLM's `LLM`."""
    kv = {} if variant.kv_dtype == "auto" else {"kv_cache_dtype": KV_WORDS[variant.kv_dtype]}
    return {**variant.flags, **kv}


def row_of(run: Run, case: Case, status: str, batch: int | None = None, **more: Any) -> Row:
    """A row of a case, its own facts filled in."""
    variant = case.variant
    return Row(
        run.suite.name, case.name, variant.name, variant.model, is_reconstructed(variant.model),
        served_weights(variant), variant.kv_dtype, case.shape.input_len, case.shape.output_len,
        batch or case.batch or None, case.role, status, setup(case), run.machine.card, run.commit, **more,
    )  # fmt: skip


# --- one engine after the other ------------------------------------------------------------------------------------


def run_variant(run: Run, variant: EngineVariant) -> None:
    """Its cases that are not known yet, in as few starts as the failures among them allow."""
    todo = [case for case in run.suite.cases(variant) if not run.is_known(case)]
    if not todo:
        run.show(f"{variant.name}: every case is measured")
        return
    if refuse(run, variant, todo):
        return
    estimate = estimate_of(variant, run.machine.card, run.machine.has_gpu)
    while todo:
        if run.left < 0.5 * START_S[run.machine.has_gpu]:
            _give_up(run, todo, SKIPPED, "no time left")
            return
        try:
            with start(run, variant) as child:
                todo = _run_cases(run, child, estimate, todo)
        except EngineError as error:
            _give_up(run, todo, SKIPPED if run.left <= 0 else FAILED, f"start: {error}")
            return


def _run_cases(run: Run, child: EngineChild, estimate: Estimate, todo: list[Case]) -> list[Case]:
    """Cases of one started engine; returns those that are still to be done after one that ended the engine."""
    ready = child.ready(max(run.left, 1.0))
    variant = todo[0].variant
    kv_bytes = None if run.gpu is None else cache_bytes(variant, ready, run.gpu)
    run.show(started_line(variant, ready))
    for number, case in enumerate(todo):
        batch = planned_batch(case, run.gpu, kv_bytes)
        expected = estimate.case_s(case, batch) * run.corrections.get(variant.name, 1.0)
        if expected > run.left:
            run.keep(row_of(run, case, SKIPPED, batch, reason=f"about {expected:.0f} s, {max(0, run.left):.0f} s left"))
            continue
        limit = min(run.left, max(MIN_LIMIT_S, LIMIT_FACTOR * expected))
        began = time.monotonic()
        try:
            child.ask(case.warm_up(batch, 2 * number), limit)
            event = child.ask(case.request(batch, 2 * number + 1), max(1.0, limit - (time.monotonic() - began)))
        except EngineError as error:
            run.keep(row_of(run, case, SKIPPED if run.left <= 0 else FAILED, batch, reason=str(error)))
            return todo[number + 1 :]
        took = time.monotonic() - began
        run.corrections[variant.name] = min(10.0, max(0.1, took / estimate.case_s(case, batch)))
        run.keep(ok_row(run, case, batch, ready, event))
    return []


def start(run: Run, variant: EngineVariant, **changes: Any) -> EngineChild:
    """An engine of a variant, not waited for. `changes` go over its flags."""
    folder = write_folder(variant, run.work / variant.name)
    engine = engine_arguments(variant) | changes
    log = run.work / f"{variant.name}.log"
    return EngineChild(variant.name, folder, engine, variant.env, log, run.command)


def refuse(run: Run, variant: EngineVariant, todo: Sequence[Case]) -> bool:
    """Whether the variant does not fit the card; then its rows say so, and the arithmetic is shown."""
    if run.gpu is None:
        return False
    plan = memory_plan(variant, run.gpu)
    if plan.fits:
        return False
    run.show(f"{variant.name} does not fit {run.gpu.name}:")
    for line in (*plan.lines(), *(f"would fit with {flag}" for flag in plan.advice())):
        run.show(f"  {line}")
    _give_up(run, todo, REFUSED, f"does not fit {run.gpu.name}")
    return True


def _give_up(run: Run, todo: Sequence[Case], status: str, reason: str) -> None:
    for case in todo:
        run.keep(row_of(run, case, status, reason=reason))


def ok_row(run: Run, case: Case, batch: int, ready: Mapping[str, Any], event: Mapping[str, Any]) -> Row:
    """The row of a measured case."""
    asked = case.request(batch, 0)["num_requests"]
    own = {"num_requests": asked} | record.of_engine(ready) | record.measured(event)
    own["memory_bytes"] = event.get("memory_bytes", own["memory_bytes"])
    return row_of(run, case, OK, batch, **own)


def started_line(variant: EngineVariant, ready: Mapping[str, Any]) -> str:
    """What is shown once an engine runs."""
    facts = [f"{ready.get('model_class')}", f"{ready.get('start_s') or 0:.1f} s to start"]
    if ready.get("kv_capacity_tokens"):
        facts.append(f"KV cache of {ready['kv_capacity_tokens']:,} tokens")
    return f"{variant.name}: {', '.join(facts)}"


# --- two engines at once -------------------------------------------------------------------------------------------


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
    if run.left < 0.5 * START_S[run.machine.has_gpu]:
        _give_up(run, todo, SKIPPED, "no time left")
        return
    try:
        with start(run, first) as a:
            # On a GPU the second starts after the first, whose memory it measures; on a CPU both import meanwhile.
            ready_a = a.ready(run.left) if run.machine.has_gpu else None
            with start(run, second) as b:
                ready = (ready_a or a.ready(run.left), b.ready(run.left))
                for variant, event in zip((first, second), ready, strict=True):
                    run.show(started_line(variant, event))
                for pair in cases:
                    _run_pair_case(run, (a, b), ready, pair)
    except EngineError as error:
        status = SKIPPED if run.left <= 0 else FAILED
        _give_up(run, [c for c in todo if not _was_added(run, c)], status, str(error))


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
        _give_up(run, pair, SKIPPED, f"a block takes about {4 * slowest:.0f} s, {max(0, run.left):.0f} s left")
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


# --- routing -------------------------------------------------------------------------------------------------------


def run_routing(run: Run) -> None:
    """Which experts the random weights choose, once per model: an engine of its own, since a compiled one cannot tell."""
    by_model = {variant.model: variant for variant in reversed(run.suite.variants)}
    for model, variant in by_model.items():
        name = f"{variant.name}-routing"
        mark = {"model": model, "commit": run.commit, "setup": setup(run.suite.cases(variant)[0])}
        if not run.is_again and any(mark.items() <= entry.items() for entry in run.results.routing):
            continue
        if run.left < 0.5 * START_S[run.machine.has_gpu] or (run.gpu and not memory_plan(variant, run.gpu).fits):
            run.show(f"{name}: no time left, or no room")
            continue
        try:
            with start(run, replace(variant, name=name), enforce_eager=True, max_model_len=2048) as child:
                child.ready(run.left)
                answers = [_routing(run, child, tokens) for tokens in ROUTING_TOKENS]
        except EngineError as error:
            run.show(f"{name}: {error}")
            continue
        if any(answer is None for answer in answers):
            continue
        kept = [entry for entry in run.results.routing if entry["model"] != model]
        run.results.routing = [*kept, mark | {"steps": [answer for answer in answers if answer is not None]}]
        run.save()


def _routing(run: Run, child: EngineChild, num_tokens: int) -> dict[str, Any] | None:
    event = child.ask({"routing": {"num_tokens": num_tokens, "seed": 1}}, max(1.0, run.left))
    layers = event.get("layers") or []
    if not layers:
        return None
    shares = [layer["coverage"] for layer in layers]
    run.show(
        f"  routing, {num_tokens} tokens a step: {100 * min(shares):.0f} to {100 * max(shares):.0f} % of the experts "
        f"of {len(layers)} layers"
    )
    return {"num_tokens": num_tokens, "layers": layers}
