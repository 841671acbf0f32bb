"""All metrics of a run by name, and their values as a summary holds them.

Rates and costs are of the steady windows; everything else is of all requests issued after the warm-up, those of the
drain included: leaving out what ended late would leave out what took long.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vllm_puzzle.bench.efficiency.facts import RunFacts
from vllm_puzzle.bench.efficiency.metric import Metric
from vllm_puzzle.bench.efficiency.metrics_outcome import OUTCOME_METRICS
from vllm_puzzle.bench.efficiency.metrics_rate import RATE_METRICS
from vllm_puzzle.bench.efficiency.metrics_request import REQUEST_METRICS, RequestMetric
from vllm_puzzle.bench.efficiency.percentile import AGGREGATES
from vllm_puzzle.bench.efficiency.record import RequestRecord, measured

INFINITE = "inf"  # JSON has no infinity


def values_of(metric: RequestMetric, records: Sequence[RequestRecord]) -> list[float]:
    """One per-request quantity of all measured requests that have it, in their order."""
    return [value for record in measured(records) if (value := metric.compute(record)) is not None]


def _aggregated(metric: RequestMetric, aggregate: str) -> Metric:
    def compute(records: Sequence[RequestRecord], facts: RunFacts) -> float | None:
        return AGGREGATES[aggregate](values_of(metric, records))

    return Metric(f"{metric.name}_{aggregate}", f"{aggregate} of {metric.formula}", metric.unit, compute)


DISTRIBUTIONS = tuple(_aggregated(metric, aggregate) for metric in REQUEST_METRICS for aggregate in AGGREGATES)
METRICS = OUTCOME_METRICS + RATE_METRICS + DISTRIBUTIONS
BY_NAME: Mapping[str, Metric] = {metric.name: metric for metric in METRICS}


def compute(name: str, records: Sequence[RequestRecord], facts: RunFacts) -> float | None:
    """One metric's value. Raises KeyError for an unknown name."""
    return BY_NAME[name].compute(records, facts)


def summarise(records: Sequence[RequestRecord], facts: RunFacts) -> dict[str, float | None]:
    """All metrics' values by name."""
    return {metric.name: metric.compute(records, facts) for metric in METRICS}


def summarise_by(
    records: Sequence[RequestRecord], facts: RunFacts, group: Callable[[RequestRecord], str]
) -> dict[str, dict[str, float | None]]:
    """All metrics' values of each group, such as a task, sorted by its name. Costs of a group are the whole run's time
    over the group's answers.
    """
    names = sorted({group(record) for record in records})
    return {name: summarise([record for record in records if group(record) == name], facts) for name in names}


def as_json(values: Mapping[str, float | None]) -> dict[str, Any]:
    """The same as JSON can hold it: infinity becomes a word, so that it is not taken for unknown (null)."""
    return {
        name: INFINITE if isinstance(value, float) and math.isinf(value) else value for name, value in values.items()
    }


def from_json(found: Mapping[str, Any]) -> dict[str, float | None]:
    """What `as_json` wrote."""
    return {name: math.inf if value == INFINITE else value for name, value in found.items()}
