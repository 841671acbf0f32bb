"""What is printed: a line for each case, comparisons, derived figures, and last ours beside the papers'."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm_puzzle.bench.efficiency.tables import number, percent, table
from vllm_puzzle.bench.engine.anchors import Answer, anchors_of, answer, derived_shapes
from vllm_puzzle.bench.engine.case import DECODE, FIT, FULL, PREFILL
from vllm_puzzle.bench.engine.derived import Derived, derive
from vllm_puzzle.bench.engine.model_folder import is_reconstructed
from vllm_puzzle.bench.engine.plan import START_S, estimate_of, fitting_batch, memory_plan
from vllm_puzzle.bench.engine.rows import OK, Results, Row
from vllm_puzzle.bench.engine.suites import GPU, Suite
from vllm_puzzle.model_configs.memory_plan import Gpu

UNMEASURED = "not measured"


def case_line(row: Row) -> str:
    """One case on one line."""
    if row.status != OK:
        return f"  {row.case}: {row.status}, {row.reason}"
    batch = "" if f"b{row.batch}" in row.case else f" (batch {row.batch})"
    if row.role == PREFILL and row.duration_s and row.num_requests:
        return f"  {row.case}{batch}: {1000 * row.duration_s / row.num_requests:.1f} ms a prompt"
    parts = [f"{number(row.output_throughput)} tokens/s"]
    if row.role == DECODE:
        parts = [f"{number(row.steady_output_throughput)} tokens/s while all decode"]
    parts += [f"{name} {1000 * value:.2f} ms" for name, value in (("TTFT", row.ttft_p50_s), ("TPOT", row.tpot_p50_s))
              if value is not None]  # fmt: skip
    parts += [f"{row.num_preempted} preempted"] if row.num_preempted else []
    return f"  {row.case}{batch}: {', '.join(parts)}"


def pair_line(pair: Mapping[str, Any]) -> str:
    """One comparison on one line: b's speed over a's, or, where a loss is judged, by how much it differs."""
    head, blocks = f"  {pair['case']}: {pair['b']}", f"{pair['blocks']} blocks"
    if pair["tolerance"] is None:
        reach = f"{pair['low']:.3f} to {pair['high']:.3f}, {blocks}"
        return f"{head} at {pair['ratio']:.3f}x the speed of {pair['a']} ({reach})"
    change, low, high = (100 * (pair[key] - 1) for key in ("ratio", "low", "high"))
    wanted = f"at most {percent(pair['tolerance'], 0)} slower: {pair['verdict']}"
    return f"{head} {change:+.2f} % in speed against {pair['a']} ({low:+.2f} to {high:+.2f} %, {blocks}); {wanted}"


def finish(results: Results) -> list[Answer]:
    """Derive what can be derived and answer the papers' figures; both become part of the results."""
    derived = [each for shape in derived_shapes(results.suite) for each in derive(results.rows, shape)]
    answers = [answer(anchor, results.rows, derived, results.card) for anchor in anchors_of(results.suite)]
    results.derived = [each.as_object() for each in derived]
    results.anchors = [each.as_object() for each in answers]
    return answers


def summary(results: Results) -> str:
    """All of one suite: cases, comparisons, derived figures, the papers' figures."""
    answers = finish(results)
    counts: dict[str, int] = {}
    for row in results.rows:
        counts[row.status] = counts.get(row.status, 0) + 1
    told = ", ".join(f"{count} {status}" for status, count in sorted(counts.items())) or "nothing measured"
    lines = [f"{results.suite} on {results.card}: {told}"]
    lines += [case_line(row) for row in results.rows]
    if results.pairs:
        lines += ["both engines at once, 95 % intervals:", *map(pair_line, results.pairs)]
    if results.derived:
        lines += ["derived, not measured:", *(derived_line(Derived(**each), results.rows) for each in results.derived)]
    reconstructed = sorted({row.model for row in results.rows if row.is_reconstructed})
    lines += [f"{name}: its configuration is a reconstruction" for name in reconstructed]
    return "\n".join([*lines, *answer_lines(answers)])


def derived_line(found: Derived, rows: Sequence[Row]) -> str:
    """One derived figure on one line, and the measured one where it was measured too."""
    lengths = (found.variant, found.input_len, found.output_len, found.batch, FULL, OK)
    same = [r for r in rows if (r.variant, r.input_len, r.output_len, r.batch, r.role, r.status) == lengths]
    beside = f"; measured {number(same[0].output_throughput)}" if same else ""
    return (
        f"  {found.variant} {found.input_len}/{found.output_len} b{found.batch}: {number(found.output_throughput)} "
        f"tokens/s from {number(found.prefill_s)} s a prompt and {1000 * found.step_s:.2f} ms a step{beside}"
    )


def answer_lines(answers: Sequence[Answer]) -> list[str]:
    """Ours beside each figure, and under it every difference between the set-ups."""
    if not answers:
        return []
    lines = ["ours beside the papers' figures:"]
    for each in answers:
        anchor = each.anchor
        lines.append(
            f"  {anchor.what}: ours {_value(each.ours, anchor.unit)}, theirs {_value(anchor.figure, anchor.unit)}"
        )
        lines.append(f"    theirs: {anchor.setup} ({anchor.source})")
        if each.differences:
            lines.append(f"    ours differs: {'; '.join(each.differences)}")
        else:
            lines.append("    ours: the same set-up")
    return lines


def short_table(results: Sequence[Results]) -> str:
    """Ours beside the papers' figures of several suites, a line each; how many differences there are stands beside."""
    lines = []
    for suite in results:
        for each in finish(suite):
            if each.ours is None:
                continue
            ours, theirs = (_value(value, each.anchor.unit) for value in (each.ours, each.anchor.figure))
            told = (
                "same set-up" if not each.differences else f"differs in {len(each.differences)}: {each.differences[0]}"
            )
            lines.append((f"{suite.suite}: {each.anchor.what}", ours, theirs, told))
        for pair in suite.pairs:
            change = f"{100 * (pair['ratio'] - 1):+.2f} %"
            reach = f"{100 * (pair['low'] - 1):+.2f} to {100 * (pair['high'] - 1):+.2f} %, {pair['verdict']}"
            lines.append(
                (f"{suite.suite}: {pair['b']} over {pair['a']}, {pair['case']}", change, UNMEASURED[:3], reach)
            )
    if not lines:
        return "no comparison is measured yet"
    return table(("what", "ours", "theirs", "set-up"), lines, "<>><")


def plan_text(suite: Suite, gpu: Gpu | None, card: str) -> tuple[str, bool]:
    """(models, memory plans, cases and estimated seconds; whether all variants fit). Nothing is started for it."""
    lines, total, fits, has_gpu = [f"{suite.name}: {suite.purpose}"], 0.0, True, suite.device == GPU
    for variant in suite.variants:
        marks = ["configuration reconstructed"] if is_reconstructed(variant.model) else []
        marks += ["under DeciLM's description"] if variant.as_decilm else []
        about = f", {variant.weights} weights, {variant.kv_dtype} KV cache" + "".join(f", {mark}" for mark in marks)
        lines += ["", f"{variant.name}: {variant.model}{about}"]
        if gpu is not None and has_gpu:
            plan = memory_plan(variant, gpu)
            lines += [f"  {line}" for line in plan.lines()]
            if not plan.fits:
                fits = False
                lines += [f"  does not fit {gpu.name}", *(f"  would fit with {flag}" for flag in plan.advice())]
                continue
        elif has_gpu:
            lines.append("  no memory plan without a card (--gpu)")
        estimate = estimate_of(variant, card, has_gpu)
        seconds = START_S[has_gpu]
        lines.append(f"  start: about {seconds:.0f} s")
        for case in suite.cases(variant):
            if case.batch == FIT and gpu is None:
                lines.append(f"  {case.name}: as many as fit")
                continue
            batch = fitting_batch(variant, case.shape, gpu) if case.batch == FIT and gpu is not None else case.batch
            visits = 2 * suite.blocks + 1 if suite.pairs else 1
            own = visits * estimate.case_s(case, batch)
            seconds += own
            shown = f"{case.name} (about {batch})" if case.batch == FIT else case.name
            lines.append(f"  {shown}: about {own:.0f} s")
        total += seconds
    lines += [
        "",
        f"about {total:.0f} s in all; every case is a file's row as soon as it is known, and not measured twice",
    ]
    return "\n".join(lines), fits


def _value(value: float | None, unit: str) -> str:
    if value is None:
        return UNMEASURED
    return f"{value:.2f}x" if unit == "x" else f"{number(value)} {unit}"
