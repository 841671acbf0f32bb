"""Metrics of all requests that a run issued after its warm-up: outcomes, accuracy, budgets, limits, caches, counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vllm_puzzle.bench.efficiency.facts import RunFacts
from vllm_puzzle.bench.efficiency.metric import Metric
from vllm_puzzle.bench.efficiency.metrics_request import budget_excess, cut_by_budget, has_output, meets
from vllm_puzzle.bench.efficiency.percentile import maximum, percentile
from vllm_puzzle.bench.efficiency.record import CORRECT, NO_PARSE, OUTCOMES, WRONG, RequestRecord, measured

Records = Sequence[RequestRecord]

# An answer came and reached its own end. A reply that max_tokens or a loop ended is no completion, however long it is.
COMPLETED = (CORRECT, WRONG, NO_PARSE)


def is_completed(record: RequestRecord) -> bool:
    """Whether the request brought a whole answer, right or wrong."""
    return record.outcome in COMPLETED


def share(flags: Sequence[bool]) -> float | None:
    """Part that is true; None of nothing."""
    return sum(flags) / len(flags) if flags else None


def issued(records: Records, facts: RunFacts) -> float:
    """Requests issued after the warm-up."""
    return len(measured(records))


def accuracy(records: Records, facts: RunFacts) -> float | None:
    """All that were issued count; whatever is not correct is wrong."""
    return share([record.is_correct for record in measured(records)])


def completion(records: Records, facts: RunFacts) -> float | None:
    """Part of the issued that brought a whole answer."""
    return share([is_completed(record) for record in measured(records)])


def accuracy_given_completion(records: Records, facts: RunFacts) -> float | None:
    """Part of the whole answers that are right; flatters whoever breaks off, so never shown alone."""
    return share([record.is_correct for record in measured(records) if is_completed(record)])


def _outcome(outcome: str) -> Callable[[Records, RunFacts], float | None]:
    return lambda records, facts: share([record.outcome == outcome for record in measured(records)])


def _excesses(records: Records) -> list[int]:
    return [excess for record in measured(records) if (excess := budget_excess(record)) is not None]


def budget_over(records: Records, facts: RunFacts) -> float | None:
    """Part of the thoughts with a budget that exceed it."""
    return share([excess > 0 for excess in _excesses(records)])


def budget_excess_max(records: Records, facts: RunFacts) -> float | None:
    """The largest excess; negative when no thought came near its budget."""
    return maximum(_excesses(records))


def budget_excess_p99(records: Records, facts: RunFacts) -> float | None:
    """99th percentile of the excess."""
    return percentile(_excesses(records), 99)


def budget_cut(records: Records, facts: RunFacts) -> float | None:
    """Part of the thoughts with a budget that it ended."""
    return share([is_cut for record in measured(records) if (is_cut := cut_by_budget(record)) is not None])


def budget_cut_correct(records: Records, facts: RunFacts) -> float | None:
    """Part of the thoughts ended by their budget after which the answer was right all the same."""
    return share([record.is_correct for record in measured(records) if cut_by_budget(record)])


def tokens_known(records: Records, facts: RunFacts) -> float | None:
    """Part of the requests with output whose tokens somebody counted."""
    return share([record.output_tokens is not None for record in measured(records) if has_output(record)])


def cache_hit_share(records: Records, facts: RunFacts) -> float | None:
    """Part of the prompt tokens that came out of the server's prefix cache, of the requests for which it says so."""
    known = [
        (record.cached_tokens, record.prompt_tokens)
        for record in measured(records)
        if record.cached_tokens is not None and record.prompt_tokens is not None
    ]
    total = sum(prompt for _, prompt in known)
    return sum(cached for cached, _ in known) / total if total else None


def slo_met(records: Records, facts: RunFacts) -> list[bool] | None:
    """Per request whether it brought a whole answer within every limit; None without an SLO or where one is unknown."""
    flags = []
    for record in records:
        slo = facts.slo_of(record)
        if slo is None:
            return None
        met = meets(record, slo) if is_completed(record) else False
        if met is None:
            return None
        flags.append(met)
    return flags


def slo_attainment(records: Records, facts: RunFacts) -> float | None:
    """Part of the issued that met the SLO."""
    flags = slo_met(measured(records), facts)
    return None if flags is None else share(flags)


def drained(records: Records, facts: RunFacts) -> float | None:
    """Part of the issued that ended after their window, under a load that was falling."""
    return share([(window := facts.window_of(record)) is not None and record.done > window.end
                  for record in measured(records)])  # fmt: skip


def drain_time(records: Records, facts: RunFacts) -> float:
    """The longest time from a window's end to the end of its last request."""
    ends = [record.done - window.end for record in measured(records) if (window := facts.window_of(record))]
    return max(0.0, max(ends, default=0.0))


OUTCOME_METRICS = (
    Metric("issued", "requests after the warm-up, the drain's included", "requests", issued),
    Metric("accuracy", "correct / issued", "1", accuracy),
    Metric("completion", "(correct + wrong + no_parse) / issued", "1", completion),
    Metric("accuracy_given_completion", "correct / (correct + wrong + no_parse)", "1", accuracy_given_completion),
    *(Metric(f"outcome_{name}", f"{name} / issued", "1", _outcome(name)) for name in OUTCOMES),
    Metric("budget_over", "share of N_t - budget > 0", "1", budget_over),
    Metric("budget_excess_max", "max of N_t - budget", "tokens", budget_excess_max),
    Metric("budget_excess_p99", "99th percentile of N_t - budget", "tokens", budget_excess_p99),
    Metric("budget_cut", "share ended by the budget", "1", budget_cut),
    Metric("budget_cut_correct", "share correct of those ended by the budget", "1", budget_cut_correct),
    Metric("tokens_known", "share with a count of N_o, of those with output", "1", tokens_known),
    Metric("cache_hit_share", "Σ N_cached / Σ N_p", "1", cache_hit_share),
    Metric("slo_attainment", "whole answers within every limit / issued", "1", slo_attainment),
    Metric("drained", "share that ended after the window", "1", drained),
    Metric("drain_time", "last end - end of the window", "s", drain_time),
)
