"""Two runs, or two sweeps, held against each other: B against the baseline A, by question."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from vllm_puzzle.bench.efficiency import frontier, pairing
from vllm_puzzle.bench.efficiency.manifest import chance
from vllm_puzzle.bench.efficiency.metrics import as_json, compute
from vllm_puzzle.bench.efficiency.metrics_rate import RelativeRate, relative_rate
from vllm_puzzle.bench.efficiency.resampling import DRAWS, Array, Interval, bootstrap, log_reach, resampled_sums
from vllm_puzzle.bench.efficiency.run_folder import Run
from vllm_puzzle.bench.efficiency.uncertainty import MIN_BLOCKS, accuracy_difference, block_spread, verdict
from vllm_puzzle.model_configs.schema import ConfigError

SCHEMA_VERSION = 1
# Told of both runs beside what is compared, so that no figure stands alone.
SHOWN = (
    "issued", "accuracy", "completion", "gpu_s_per_request", "gpu_s_per_correct", "core_s_per_request",
    "core_s_per_correct", "joules_per_correct", "usd_per_1k_correct", "request_throughput", "goodput",
    "correct_goodput", "ttft_p50", "ttfat_p50", "ttfat_p99", "e2e_p50", "tpot_answer_p50", "tokens_per_request",
    "thinking_tokens_mean", "tokens_per_correct", "cache_hit_share",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Cost:
    """Device-seconds per request, B over A; of several settings the geometric mean.

    by_question: resampled by question, which knows nothing of noise in time; by_block: by block of time, None with
    fewer than three blocks in any run; spread: the largest between-block spread in A and in B, None likewise.
    """

    by_question: Interval
    by_block: Interval | None
    spread: tuple[float, float] | None

    @property
    def saving(self) -> Interval:
        """−log of the ratio, so that more is better; bounds are the outer ones of both intervals."""
        found = [self.by_question] + ([self.by_block] if self.by_block is not None else [])
        highest, lowest = max(one.high for one in found), min(one.low for one in found)
        return Interval(-math.log(self.by_question.estimate), -math.log(highest), -_log(lowest))


@dataclass(frozen=True, slots=True)
class Pair:
    """One setting of A and one of B under one load."""

    a: Run
    b: Run
    accuracy: Interval
    cost: Cost
    rate: RelativeRate
    verdict: str

    def to_object(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "a": _shown(self.a),
            "b": _shown(self.b),
            "verdict": self.verdict,
            "accuracy_difference": _finite(asdict(self.accuracy)),
            "cost_ratio": _cost_object(self.cost),
            "relative_rate": asdict(self.rate),
        }


@dataclass(frozen=True, slots=True)
class Frontier:
    """All settings of A and of B under one load. a, b: name, cost and accuracy of each setting."""

    load: str
    a: tuple[tuple[str, float, float], ...]
    b: tuple[tuple[str, float, float], ...]
    speed_up: frontier.SpeedUp
    mean_speed_up: float | None
    reference: frontier.Reference
    hypervolume: tuple[float, float]

    def to_object(self) -> dict[str, Any]:
        """For JSON."""
        found = self.speed_up
        interval = None if found.interval is None else _finite(asdict(found.interval))
        return {
            "load": self.load,
            "a": [dict(zip(("name", "cost", "accuracy"), setting, strict=True)) for setting in self.a],
            "b": [dict(zip(("name", "cost", "accuracy"), setting, strict=True)) for setting in self.b],
            "equal_accuracy_speed_up": {"accuracy": found.level, "interval": interval, "reached": found.reached},
            "mean_speed_up": self.mean_speed_up,
            "reference": self.reference.to_object(),
            "hypervolume": {"a": self.hypervolume[0], "b": self.hypervolume[1]},
        }


@dataclass(frozen=True, slots=True)
class Comparison:
    """What `compare` tells. mismatches: what differs though it should not, and was allowed to. accuracy, cost: over
    all pairs together. cost_verdict: None where no margin was given for it.
    """

    margin: float
    cost_margin: float | None
    mismatches: tuple[str, ...]
    pairs: tuple[Pair, ...]
    frontiers: tuple[Frontier, ...]
    accuracy: Interval
    cost: Cost
    verdict: str
    cost_verdict: str | None

    def to_object(self) -> dict[str, Any]:
        """For JSON; infinite values become words."""
        return {
            "schema_version": SCHEMA_VERSION,
            "verdict": self.verdict,
            "margin": self.margin,
            "accuracy_difference": _finite(asdict(self.accuracy)),
            "cost_verdict": self.cost_verdict,
            "cost_margin": self.cost_margin,
            "cost_ratio": _cost_object(self.cost),
            "mismatches": list(self.mismatches),
            "pairs": [pair.to_object() for pair in self.pairs],
            "frontiers": [found.to_object() for found in self.frontiers],
        }


def compare_runs(
    a: Sequence[Run],
    b: Sequence[Run],
    margin: float,
    *,
    cost_margin: float | None = None,
    allow_mismatch: bool = False,
    draws: int = DRAWS,
) -> Comparison:
    """B against the baseline A. Raises ConfigError that says in one line what makes them incomparable."""
    matched, lines = match(a, b)
    for of_a, of_b in matched:
        lines += [line for line in pairing.mismatches(of_a, of_b) if line not in lines]
    if lines and not allow_mismatch:
        more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
        raise ConfigError(f"compare: {lines[0]}{more}; --allow-mismatch compares all the same")
    pairs = tuple(_pair(of_a, of_b, margin, draws) for of_a, of_b in matched)
    accuracy, cost = (pairs[0].accuracy, pairs[0].cost) if len(pairs) == 1 else _together(matched, draws)
    return Comparison(
        margin=margin,
        cost_margin=cost_margin,
        mismatches=tuple(lines),
        pairs=pairs,
        frontiers=tuple(_frontier(*group, margin, draws) for group in _sweeps(a, b)),
        accuracy=accuracy,
        cost=cost,
        verdict=verdict(accuracy, margin),
        cost_verdict=None if cost_margin is None else verdict(cost.saving, math.log1p(cost_margin)),
    )


def match(a: Sequence[Run], b: Sequence[Run]) -> tuple[list[tuple[Run, Run]], list[str]]:
    """Pairs of runs, and what is wrong with pairing them.

    One run against one: those. Sweeps: the same reasoning fields under the same load. Where they share none, the most
    accurate run of each, which is a mismatch.
    """
    if len(a) == len(b) == 1:
        return [(a[0], b[0])], []
    of_b = {(run.setting, run.load): run for run in b}
    for runs in (a, b):
        if len({(run.setting, run.load) for run in runs}) < len(runs):
            raise ConfigError(f"compare, {runs[0].path.parent}: found two runs of one setting and load, allowed: one")
    matched = [(run, of_b[run.setting, run.load]) for run in a if (run.setting, run.load) in of_b]
    if matched:
        return matched, []
    best = tuple(max(runs, key=lambda run: compute("accuracy", run.records, run.facts) or 0.0) for runs in (a, b))
    return [(best[0], best[1])], ["settings: A and B have no reasoning fields and load in common"]


def _pair(a: Run, b: Run, margin: float, draws: int) -> Pair:
    accuracy, cost = _together([(a, b)], draws)
    rate = relative_rate(b.records, b.facts, a.records, a.facts)
    return Pair(a, b, accuracy, cost, rate, verdict(accuracy, margin))


def _together(matched: Sequence[tuple[Run, Run]], draws: int) -> tuple[Interval, Cost]:
    """Accuracy difference and cost ratio over all pairs, with questions as units in which every pair has its part."""
    runs = [of_a for of_a, _ in matched] + [of_b for _, of_b in matched]
    table = pairing.question_table(runs)
    was_asked = table[:, :, pairing.ISSUED].all(axis=1)
    sides = table[was_asked].reshape(-1, 2, len(matched), 4).sum(axis=2)
    accuracy = accuracy_difference(sides[:, :, [pairing.CORRECT, pairing.ISSUED]].reshape(-1, 4), draws=draws)
    costs = table[:, :, [pairing.COST, pairing.DONE]]
    if not (costs.sum(axis=0)[:, 1] > 0).all():
        raise ConfigError("compare: found a run without any whole answer inside its window, allowed: one or more")
    estimate, low, high = bootstrap(costs, mean_ratio, draws=draws)
    by_block, spread = _by_block(runs, draws)
    return accuracy, Cost(Interval(float(estimate), float(low), float(high)), by_block, spread)


def mean_ratio(sums: Array) -> Array:
    """Sums (…, 2m, 2) of cost and count, of m settings of A and then of B → geometric mean of B's cost over A's."""
    logs = np.log(sums[..., 0] / sums[..., 1])
    settings = logs.shape[-1] // 2
    return np.exp((logs[..., settings:] - logs[..., :settings]).mean(axis=-1))


def _by_block(runs: Sequence[Run], draws: int) -> tuple[Interval | None, tuple[float, float] | None]:
    tables = [pairing.block_table(run) for run in runs]
    blocks = {tuple(sorted(window.block for window in run.facts.windows)) for run in runs}
    if len(blocks) > 1 or len(tables[0]) < MIN_BLOCKS or not all((found > 0).all() for found in tables):
        return None, None
    columns = np.stack(tables, axis=1)
    estimate = float(mean_ratio(columns.sum(axis=0)))
    reach = float(log_reach(np.log(mean_ratio(resampled_sums(columns, draws))), len(columns)))
    spreads = [block_spread(found) for found in tables]
    half = len(runs) // 2
    return (
        Interval(estimate, estimate * math.exp(-reach), estimate * math.exp(reach)),
        (max(spreads[:half]), max(spreads[half:])),
    )


def _sweeps(a: Sequence[Run], b: Sequence[Run]) -> list[tuple[list[Run], list[Run]]]:
    """By load, the settings of both, where there are several on one side at least."""
    loads = sorted({run.load for run in a} & {run.load for run in b})
    groups = [([run for run in a if run.load == load], [run for run in b if run.load == load]) for load in loads]
    return [group for group in groups if len(group[0]) + len(group[1]) > 2]


def _frontier(a: Sequence[Run], b: Sequence[Run], margin: float, draws: int) -> Frontier:
    table = pairing.question_table([*a, *b])
    of_a, of_b = table[:, : len(a)], table[:, len(a) :]
    with np.errstate(divide="ignore", invalid="ignore"):
        cost, accuracy = frontier.costs_and_accuracies(table.sum(axis=0))
    if not np.isfinite(cost).all():
        raise ConfigError("compare: found a run without any whole answer inside its window, allowed: one or more")
    reference = frontier.Reference.of(cost[: len(a)], cost, chance(a[0].manifest) or 0.0)
    sides = (cost[: len(a)], accuracy[: len(a)]), (cost[len(a) :], accuracy[len(a) :])
    return Frontier(
        load=a[0].load_name,
        a=_settings(a, *sides[0]),
        b=_settings(b, *sides[1]),
        speed_up=frontier.equal_accuracy_speed_up(of_a, of_b, margin, draws=draws),
        mean_speed_up=frontier.mean_speed_up(*sides[0], *sides[1]),
        reference=reference,
        hypervolume=(
            float(frontier.hypervolume(*sides[0], reference)),
            float(frontier.hypervolume(*sides[1], reference)),
        ),
    )


def _settings(runs: Sequence[Run], cost: Array, accuracy: Array) -> tuple[tuple[str, float, float], ...]:
    return tuple((run.name, float(cost[at]), float(accuracy[at])) for at, run in enumerate(runs))


def _shown(run: Run) -> dict[str, Any]:
    metrics = {name: compute(name, run.records, run.facts) for name in SHOWN}
    return {"folder": str(run.path), "arm": run.name, "metrics": as_json(metrics)}


def _cost_object(cost: Cost) -> dict[str, Any]:
    return {
        "by_question": _finite(asdict(cost.by_question)),
        "by_block": None if cost.by_block is None else _finite(asdict(cost.by_block)),
        "spread": cost.spread,
    }


def _finite(found: dict[str, float]) -> dict[str, Any]:
    """Bounds that bound nothing are null."""
    return {key: value if math.isfinite(value) else None for key, value in found.items()}


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf
