"""From measured accuracy under budgets to a map effort → budget: the decision, without a server.

An effort allows so much accuracy to be lost against unlimited thinking (its margin). Budgets are tried from the largest
down, each held to unlimited thinking by question; the effort gets the last before the first that is not shown to stay
within the margin. Trying in a fixed order and stopping at the first failure keeps the chance of any wrong claim at that
of one test (2.5 %), however many budgets there are.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from vllm_puzzle.bench.efficiency.metrics_request import thinking_tokens
from vllm_puzzle.bench.efficiency.percentile import percentile
from vllm_puzzle.bench.efficiency.record import TRUNCATED, RequestRecord, measured
from vllm_puzzle.bench.efficiency.resampling import Array, Interval
from vllm_puzzle.bench.efficiency.uncertainty import BETTER, NON_INFERIOR, accuracy_difference, verdict
from vllm_puzzle.model_configs.schema import ConfigError

# As the server's policy has them, weakest first; its UNLIMITED.
EFFORTS = ("minimal", "low", "medium", "high", "xhigh", "max")
UNLIMITED = -1
QUANTILES = (5, 10, 25, 50, 75, 90, 95, 99, 100)
DEFAULT_LEVELS: Mapping[str, str] = {"low": "0.10", "medium": "0.03", "high": "0.01", "max": "unlimited"}


@dataclass(frozen=True, slots=True)
class Rule:
    """What an effort is to be: a margin of accuracy, a quantile of natural length in percent, or neither: no limit."""

    margin: float | None = None
    quantile: float | None = None


@dataclass(frozen=True, slots=True)
class Rung:
    """One budget that was measured. difference: of accuracy, against unlimited thinking, by question."""

    budget: int
    accuracy: float
    mean_thinking_tokens: float
    difference: Interval


@dataclass(frozen=True, slots=True)
class Natural:
    """Unlimited thinking. quantiles: percent → tokens of thought. truncated: share that max_tokens cut, whose natural
    length is longer than what was seen.
    """

    requests: int
    accuracy: float
    mean_thinking_tokens: float
    quantiles: Mapping[int, int]
    truncated: float


def read_rules(items: Sequence[str]) -> dict[str, Rule]:
    """`EFFORT=0.01` (margin), `EFFORT=p50` (quantile), `EFFORT=unlimited`. Raises ConfigError."""
    rules: dict[str, Rule] = {}
    for item in items or [f"{effort}={text}" for effort, text in DEFAULT_LEVELS.items()]:
        effort, _, text = item.partition("=")
        try:
            if effort not in EFFORTS or effort in rules:
                raise ValueError
            if text == "unlimited":
                rules[effort] = Rule()
            elif text.startswith("p"):
                rules[effort] = Rule(quantile=_within(float(text[1:]), 0, 100))
            else:
                rules[effort] = Rule(margin=_within(float(text), 0, 1))
        except ValueError:
            allowed = f"each of {', '.join(EFFORTS)} once, = a margin such as 0.01, p50 and the like, or unlimited"
            raise ConfigError(f"--level: found {item!r}, allowed: {allowed}") from None
    return {effort: rules[effort] for effort in EFFORTS if effort in rules}


def _within(value: float, low: float, high: float) -> float:
    if not low < value <= high:
        raise ValueError
    return value


def natural_of(records: Sequence[RequestRecord]) -> Natural:
    """What unlimited thinking did. Raises ConfigError where nobody counts the tokens of thoughts."""
    asked = measured(records)
    counts = [count for record in asked if (count := thinking_tokens(record)) is not None]
    if not asked or len(counts) < len(asked) / 2:
        raise ConfigError(
            f"calibrate: found a count of thinking tokens in {len(counts)} of {len(asked)} replies, allowed: a server "
            "that tells them, or --tokenizer"
        )
    return Natural(
        requests=len(asked),
        accuracy=sum(record.is_correct for record in asked) / len(asked),
        mean_thinking_tokens=math.fsum(counts) / len(counts),
        quantiles={part: int(percentile(counts, part) or 0) for part in QUANTILES},
        truncated=sum(record.outcome == TRUNCATED for record in asked) / len(asked),
    )


def ladder_of(natural: Natural) -> list[int]:
    """The budgets to measure where none are named: the quantiles of natural length. Raises ConfigError without any."""
    budgets = sorted({tokens for tokens in natural.quantiles.values() if tokens > 0})
    if not budgets:
        raise ConfigError("calibrate: found replies without thoughts, allowed: a model that thinks under --thinking")
    return budgets


def rung_of(budget: int, records: Sequence[RequestRecord], natural: Sequence[RequestRecord]) -> Rung:
    """A budget against unlimited thinking. Raises ConfigError where the server does not hold the budget."""
    asked = measured(records)
    counts = [count for record in asked if (count := thinking_tokens(record)) is not None]
    over = sum(count > budget for count in counts)
    if over:
        raise ConfigError(
            f"calibrate, budget {budget}: found {over} of {len(counts)} thoughts that are longer, up to {max(counts)}, "
            "allowed: a server that holds budgets"
        )
    columns = paired(natural, records)
    right, issued = columns[:, 2].sum(), columns[:, 3].sum()
    mean = math.fsum(counts) / len(counts) if counts else math.nan
    return Rung(budget, float(right / issued), mean, accuracy_difference(columns))


def paired(natural: Sequence[RequestRecord], limited: Sequence[RequestRecord]) -> Array:
    """Shape (questions, 4): correct and issued without and with the budget, of questions asked in both."""
    sides = []
    for records in (natural, limited):
        asked = Counter(record.key for record in measured(records))
        right = Counter(record.key for record in measured(records) if record.is_correct)
        sides.append((right, asked))
    common = sorted(sides[0][1].keys() & sides[1][1].keys())
    if not common:
        raise ConfigError(
            "calibrate: found no question that was asked with and without a budget, allowed: the same ones"
        )
    return np.array([[part[key] for right, asked in sides for part in (right, asked)] for key in common], np.float64)


def smallest_within(rungs: Sequence[Rung], margin: float) -> int | None:
    """The smallest budget that stays within the margin, and with it every larger one; None where the largest fails."""
    found = None
    for rung in sorted(rungs, key=lambda one: one.budget, reverse=True):
        if verdict(rung.difference, margin) not in (BETTER, NON_INFERIOR):
            break
        found = rung.budget
    return found


def choose(
    rules: Mapping[str, Rule], natural: Natural, lengths: Sequence[int], rungs: Sequence[Rung]
) -> dict[str, int]:
    """Effort → budget, UNLIMITED where no budget is shown to be enough. lengths: of natural thoughts, in tokens."""
    budgets: dict[str, int] = {}
    for effort, rule in rules.items():
        if rule.quantile is not None:
            budgets[effort] = max(1, int(percentile(lengths, rule.quantile) or 1))
        elif rule.margin is not None:
            found = smallest_within(rungs, rule.margin)
            budgets[effort] = UNLIMITED if found is None else found
        else:
            budgets[effort] = UNLIMITED
    return budgets


def provenance(rules: Mapping[str, Rule], natural: Natural, rungs: Sequence[Rung]) -> dict[str, Any]:
    """How the map came about, for the file."""
    return {
        "rules": {
            effort: f"p{rule.quantile:g} of natural length" if rule.quantile is not None
            else "no limit" if rule.margin is None
            else f"smallest budget shown to lose no more accuracy than {rule.margin:g}"
            for effort, rule in rules.items()
        },
        "confidence": 0.95,
        "unlimited": {
            "requests": natural.requests,
            "accuracy": round(natural.accuracy, 4),
            "mean_thinking_tokens": round(natural.mean_thinking_tokens, 1),
            "thinking_tokens": {f"p{part}": tokens for part, tokens in natural.quantiles.items()},
            "truncated": round(natural.truncated, 4),
        },
        "budgets": [
            {
                "budget": rung.budget,
                "accuracy": round(rung.accuracy, 4),
                "mean_thinking_tokens": round(rung.mean_thinking_tokens, 1),
                "difference": [round(bound, 4) for bound in (rung.difference.low, rung.difference.high)],
            }
            for rung in sorted(rungs, key=lambda one: one.budget)
        ],
    }  # fmt: skip
