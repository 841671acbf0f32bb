"""The report's section on speculative decoding: what is accepted, by position and task, and its speed-up by load."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from vllm_puzzle.bench.efficiency import html
from vllm_puzzle.bench.efficiency.report_runs import ReportRun
from vllm_puzzle.bench.efficiency.resampling import Interval, geometric_mean
from vllm_puzzle.bench.efficiency.tables import factor, number, percent

# Manifest keys that a run and its baseline have in common; all but the server.
_SAME = ("fields", "budget", "max_tokens", "sampling", "tasks", "load")


def speculation_section(runs: Sequence[ReportRun]) -> str:
    """Acceptance of speculative decoding and its speed-up by load; nothing where no run speculated."""
    rows = []
    for run in runs:
        for where, found in _speculated(run.summary):
            by_position = ", ".join(percent(rate) for rate in found.get("rate_by_position") or ())
            rows.append([run.title, where, number(found.get("length")), percent(found.get("rate")), by_position or "-"])
    if not rows:
        return ""
    header = ["run", "of", "tokens per step", "accepted", "accepted by position"]
    text = (
        "Tokens per step: those accepted and the one that the model samples itself. On real questions; random tokens "
        "are accepted otherwise."
    )
    parts = [html.table(header, rows, {1: "words"})]
    gains = [cells for run in runs if (cells := _gain(run, runs)) is not None]
    if gains:
        header = ["load", "run", "without speculation", "output tokens/s, relative", "95 %", "time per token, relative",
                  "accuracy with", "without"]  # fmt: skip
        parts.append(html.table(header, gains, {1: "words", 2: "words"}, apart=1))
    return html.section("Speculative decoding", text, *parts)


def _speculated(summary: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    found: list[tuple[str, Mapping[str, Any]]] = []
    parts = [(f"block {part.get('block')}", part.get("speculation")) for part in summary.get("by_block") or ()]
    for where, whole in [("all", summary.get("speculation")), *parts]:
        if isinstance(whole, dict):
            found.append((where, whole))
            found += [(f"{where}, {task}", one) for task, one in (whole.get("by_task") or {}).items()]
    return found


def baseline(run: ReportRun, runs: Sequence[ReportRun]) -> ReportRun | None:
    """The one run of the same requests under the same load without speculation; None where there is none or several."""
    wanted = [run.manifest.get(key) for key in _SAME]
    found = [
        other
        for other in runs
        if not _speculated(other.summary) and [other.manifest.get(key) for key in _SAME] == wanted
    ]
    return found[0] if len(found) == 1 else None


def speed_up(run: ReportRun, base: ReportRun) -> Interval | None:
    """Output tokens per second over the baseline's: geometric mean over blocks, Student's t over their logarithms.

    With one block the bounds are 0 and infinite; None where a run has no steady window.
    """
    rates, base_rates = block_rates(run), block_rates(base)
    logs = [math.log(rates[block] / base_rates[block]) for block in rates if block in base_rates]
    return geometric_mean(logs) if logs else None


def block_rates(run: ReportRun) -> dict[int, float]:
    """Output tokens per second of each block's steady window; blocks without any are left out."""
    if run.facts is None:
        return {}
    tokens: Counter[int] = Counter()
    for record in run.facts.ended_inside(run.records):
        tokens[record.block] += record.output_tokens or 0
    return {
        window.block: tokens[window.block] / window.duration for window in run.facts.windows if tokens[window.block]
    }


def _gain(run: ReportRun, runs: Sequence[ReportRun]) -> list[str] | None:
    base = baseline(run, runs) if _speculated(run.summary) else None
    gain = None if base is None else speed_up(run, base)
    if base is None or gain is None:
        return None
    times = [found.metrics.get("tpot_p50") for found in (base, run)]
    per_token = times[1] / times[0] if times[0] and times[1] else None
    bounds = f"{factor(gain.low)} … {factor(gain.high)}" if gain.low > 0 else "-"
    shares = ["-" if found.accuracy is None else percent(found.accuracy.estimate) for found in (run, base)]
    return [run.load, f"{run.group}, {run.arm}", f"{base.group}, {base.arm}", factor(gain.estimate), bounds,
            factor(per_token), *shares]  # fmt: skip
