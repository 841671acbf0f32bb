"""Goes through a suite within its time: starts engines, asks for cases, writes each row as soon as it is known.

What was measured before, with the same commit, card and set-up, is not measured again. A case that fails costs itself
and a new start; what no time is left for is `skipped` and measured by the next call.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from vllm_puzzle.bench.engine.case import Case, EngineVariant
from vllm_puzzle.bench.engine.driver import EngineChild, EngineError
from vllm_puzzle.bench.engine.pair_runner import run_pair
from vllm_puzzle.bench.engine.plan import Estimate, cache_bytes, estimate_of, memory_plan, planned_batch
from vllm_puzzle.bench.engine.rows import SKIPPED
from vllm_puzzle.bench.engine.session import Run, ok_row, refuse, row_of, setup, start, started_line, wait

# The first cases of an engine may come out far from the estimate; a limit is there for what hangs.
MIN_LIMIT_S, LIMIT_FACTOR = 120.0, 8.0
ROUTING_TOKENS = (1, 32, 256)


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
        if not run.has_time_to_start:
            run.give_up(todo, SKIPPED, "no time left")
            return
        try:
            with start(run, variant) as child:
                todo = _run_cases(run, child, estimate, todo)
        except EngineError as error:
            run.give_up(todo, run.failure(), f"start: {error}")
            return


def _run_cases(run: Run, child: EngineChild, estimate: Estimate, todo: list[Case]) -> list[Case]:
    """Cases of one started engine; returns those that are still to be done after one that ended the engine."""
    variant = todo[0].variant
    ready = wait(run, variant, child)
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
            run.keep(row_of(run, case, run.failure(), batch, reason=str(error)))
            return todo[number + 1 :]
        took = time.monotonic() - began
        run.corrections[variant.name] = min(10.0, max(0.1, took / estimate.case_s(case, batch)))
        run.keep(ok_row(run, case, batch, ready, event))
    return []


def run_routing(run: Run) -> None:
    """Which experts the random weights choose, once per model, in an engine of its own: a compiled one cannot tell."""
    by_model = {variant.model: variant for variant in reversed(run.suite.variants)}
    for model, variant in by_model.items():
        name = f"{variant.name}-routing"
        mark = {"model": model, "commit": run.commit, "setup": setup(run.suite.cases(variant)[0])}
        if not run.is_again and any(mark.items() <= entry.items() for entry in run.results.routing):
            continue
        if not run.has_time_to_start or (run.gpu and not memory_plan(variant, run.gpu).fits):
            run.show(f"{name}: no time left, or no room")
            continue
        try:
            with start(run, replace(variant, name=name), enforce_eager=True, max_model_len=2048) as child:
                wait(run, variant, child)
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
