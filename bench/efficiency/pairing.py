"""Which runs may be compared, and their requests as one table by question."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from vllm_puzzle.bench.efficiency.attribution import window_seconds
from vllm_puzzle.bench.efficiency.metrics import compute
from vllm_puzzle.bench.efficiency.metrics_outcome import is_completed
from vllm_puzzle.bench.efficiency.record import measured
from vllm_puzzle.bench.efficiency.resampling import Array
from vllm_puzzle.bench.efficiency.run_folder import COMPLETE, Run, canonical
from vllm_puzzle.model_configs.schema import ConfigError

CACHE_TOLERANCE = 0.05
CORRECT, ISSUED, COST, DONE = range(4)


def mismatches(a: Run, b: Run) -> list[str]:
    """Why cost and accuracy of two runs are not comparable, one line each; empty when they are."""
    lines = [
        f"{run.path}, status: found {run.status!r}, allowed: {COMPLETE}" for run in (a, b) if run.status != COMPLETE
    ]
    for key in ("tasks", "sampling", "max_tokens", "load"):
        of_a, of_b = canonical(a.manifest.get(key)), canonical(b.manifest.get(key))
        if of_a != of_b:
            lines.append(f"{key}: A has {of_a}, B has {of_b}")
    for run in (a, b):
        # A reply of a fixed length hides the tokens that a model saves, and has no answer of its own.
        if any(holder.get("ignore_eos") for holder in (run.manifest["sampling"], run.manifest["fields"])):
            lines.append(f"{run.path}, ignore_eos: found true, allowed: replies that end by themselves")
    lines += _question_mismatch(a, b) + _cache_mismatch(a, b)
    if a.facts.devices[1] != b.facts.devices[1]:
        lines.append(f"devices: A counts by {a.facts.devices[1]}, B by {b.facts.devices[1]}")
    return lines


def _question_mismatch(a: Run, b: Run) -> list[str]:
    of_a, of_b = (Counter(record.key for record in measured(run.records)) for run in (a, b))
    differing = sorted(key for key in of_a.keys() | of_b.keys() if of_a[key] != of_b[key])
    if not differing:
        return []
    task, question = differing[0]
    return [
        f"questions: {len(differing)} were not asked as often, first {task} {question}: "
        f"{of_a[differing[0]]} times of A, {of_b[differing[0]]} of B"
    ]


def _cache_mismatch(a: Run, b: Run) -> list[str]:
    of_a, of_b = (compute("cache_hit_share", run.records, run.facts) for run in (a, b))
    if of_a is None or of_b is None or abs(of_a - of_b) <= CACHE_TOLERANCE:
        return []
    return [f"prefix cache: {of_a:.0%} of A's prompt tokens came from it, {of_b:.0%} of B's"]


def question_table(runs: Sequence[Run]) -> Array:
    """Shape (questions, runs, 4): correct, issued, device-seconds and completed of each question in each run.

    Accuracy counts all measured requests; cost counts device-seconds within the windows and whole answers that ended
    there, those of the warm-up included, so that cost / completed is the run's device-seconds per request. Only
    questions that all runs were asked; their order is fixed. Raises ConfigError without any.
    """
    asked = [{record.key for record in measured(run.records)} for run in runs]
    warmed = [{record.key for record in run.records} - keys for run, keys in zip(runs, asked, strict=True)]
    common = set.intersection(*asked)
    if not common:
        raise ConfigError("compare: found no question that all runs were asked, allowed: runs over the same tasks")
    keys = sorted(common) + sorted(set().union(*warmed) - set().union(*asked))
    place = {key: number for number, key in enumerate(keys)}
    table = np.zeros((len(keys), len(runs), 4))
    for column, run in enumerate(runs):
        for record in measured(run.records):
            if record.key in place:
                table[place[record.key], column, CORRECT] += record.is_correct
                table[place[record.key], column, ISSUED] += 1
        seconds = window_seconds(run.records, run.facts) * run.facts.devices[0]
        for record, used in zip(run.records, seconds, strict=True):
            if record.key in place:
                table[place[record.key], column, COST] += used
                table[place[record.key], column, DONE] += is_completed(record) and run.facts.is_inside(record)
    return table


def block_table(run: Run) -> Array:
    """Shape (blocks, 2): device-seconds and whole answers inside the window of each block, in order of the blocks."""
    inside = [record for record in run.facts.ended_inside(run.records) if is_completed(record)]
    counts = Counter(record.block for record in inside)
    windows = sorted(run.facts.windows, key=lambda window: window.block)
    return np.array([[window.duration * run.facts.devices[0], counts[window.block]] for window in windows])
