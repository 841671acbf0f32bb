"""Metrics of the steady window: rates, what a request and a right answer cost, and the relative request rate.

Rates count what ended inside the windows (`RunFacts.ended_inside`), over the windows' length T.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vllm_puzzle.bench.efficiency.facts import RunFacts
from vllm_puzzle.bench.efficiency.metric import Metric
from vllm_puzzle.bench.efficiency.metrics_outcome import Records, is_completed, slo_met
from vllm_puzzle.bench.efficiency.metrics_request import has_output
from vllm_puzzle.bench.efficiency.record import RequestRecord, measured

SECONDS_PER_HOUR = 3600
Count = Callable[[Records, RunFacts], int | None]


def completed(records: Records, facts: RunFacts) -> int:
    """Whole answers that ended inside the windows."""
    return sum(is_completed(record) for record in facts.ended_inside(records))


def correct(records: Records, facts: RunFacts) -> int:
    """Right answers that ended inside the windows."""
    return sum(record.is_correct for record in facts.ended_inside(records))


def good(records: Records, facts: RunFacts) -> int | None:
    """Whole answers inside the windows that met the SLO."""
    flags = slo_met(facts.ended_inside(records), facts)
    return None if flags is None else sum(flags)


def good_and_correct(records: Records, facts: RunFacts) -> int | None:
    """Right answers inside the windows that met the SLO."""
    return good([record for record in records if record.is_correct], facts)


def total_tokens(records: Sequence[RequestRecord]) -> int | None:
    """Output tokens of all these, right or wrong; None when those of any are not known: a sum over the rest lies."""
    counts = [record.output_tokens for record in records if has_output(record)]
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None


def output_throughput(records: Records, facts: RunFacts) -> float | None:
    """Θ: output tokens/s. Never a headline: it falls when a model needs fewer tokens for the same answer."""
    tokens = total_tokens(facts.ended_inside(records))
    return None if tokens is None else tokens / facts.duration


def tokens_per_request(records: Records, facts: RunFacts) -> float | None:
    """The paper's T: mean output tokens, thought, answer and markers. Refused requests have none and do not count."""
    requests = [record for record in measured(records) if has_output(record)]
    tokens = total_tokens(requests)
    return None if tokens is None or not requests else tokens / len(requests)


def request_rate_quotient(records: Records, facts: RunFacts) -> float | None:
    """R = Θ / T, the paper's request rate."""
    throughput, tokens = output_throughput(records, facts), tokens_per_request(records, facts)
    return None if throughput is None or not tokens else throughput / tokens


def tokens_per_correct(records: Records, facts: RunFacts) -> float | None:
    """Output tokens of all that was issued for each right answer: the cost that no hardware enters."""
    requests = measured(records)
    return _per(total_tokens(requests), sum(record.is_correct for record in requests))


def _per(cost: float | None, count: int) -> float | None:
    """Cost per one; infinite when there was none."""
    if cost is None:
        return None
    return cost / count if count else math.inf


def _rate(count: Count) -> Callable[[Records, RunFacts], float | None]:
    def compute(records: Records, facts: RunFacts) -> float | None:
        number = count(records, facts)
        return None if number is None else number / facts.duration

    return compute


def _throughput_per_gpu(records: Records, facts: RunFacts) -> float | None:
    return None if facts.num_gpus is None else completed(records, facts) / facts.duration / facts.num_gpus


def _cost(
    spent: Callable[[RunFacts], float | None], count: Callable[[Records, RunFacts], int]
) -> Callable[[Records, RunFacts], float | None]:
    return lambda records, facts: _per(spent(facts), count(records, facts))


def gpu_seconds(facts: RunFacts) -> float | None:
    """n_gpu · T."""
    return None if facts.num_gpus is None else facts.num_gpus * facts.duration


def core_seconds(facts: RunFacts) -> float | None:
    """n_core · T, for a server on a CPU."""
    return None if facts.num_cores is None else facts.num_cores * facts.duration


def joules(facts: RunFacts) -> float | None:
    """The energy counter's difference over the windows."""
    return facts.energy_j


def joules_above_idle(facts: RunFacts) -> float | None:
    """The same without what the devices draw when idle."""
    if facts.energy_j is None or facts.idle_power_w is None:
        return None
    return facts.energy_j - facts.idle_power_w * facts.duration


def dollars(facts: RunFacts) -> float | None:
    """Device-hours times their price, per thousand."""
    if facts.price_per_device_hour is None:
        return None
    return facts.devices[0] * facts.duration / SECONDS_PER_HOUR * facts.price_per_device_hour * 1000


RATE_METRICS = (
    Metric("duration", "T, all windows", "s", lambda records, facts: facts.duration),
    Metric("request_throughput", "whole answers / T", "requests/s", _rate(completed)),
    Metric("request_throughput_per_gpu", "whole answers / (n_gpu · T)", "requests/s", _throughput_per_gpu),
    Metric("correct_throughput", "correct / T", "requests/s", _rate(correct)),
    Metric("goodput", "whole answers within every limit / T", "requests/s", _rate(good)),
    Metric("correct_goodput", "correct and within every limit / T", "requests/s", _rate(good_and_correct)),
    Metric("output_throughput", "Θ = Σ N_o / T", "tokens/s", output_throughput),
    Metric("tokens_per_request", "Σ N_o / requests with output", "tokens", tokens_per_request),
    Metric("request_rate_quotient", "Θ / mean N_o", "requests/s", request_rate_quotient),
    Metric("tokens_per_correct", "Σ N_o / correct, of all issued", "tokens", tokens_per_correct),
    Metric("gpu_s_per_request", "n_gpu · T / whole answers", "GPU·s", _cost(gpu_seconds, completed)),
    Metric("gpu_s_per_correct", "n_gpu · T / correct", "GPU·s", _cost(gpu_seconds, correct)),
    Metric("core_s_per_request", "n_core · T / whole answers", "core·s", _cost(core_seconds, completed)),
    Metric("core_s_per_correct", "n_core · T / correct", "core·s", _cost(core_seconds, correct)),
    Metric("joules_per_request", "E / whole answers", "J", _cost(joules, completed)),
    Metric("joules_per_correct", "E / correct", "J", _cost(joules, correct)),
    Metric(
        "joules_above_idle_per_request", "(E - P_idle · T) / whole answers", "J", _cost(joules_above_idle, completed)
    ),
    Metric("joules_above_idle_per_correct", "(E - P_idle · T) / correct", "J", _cost(joules_above_idle, correct)),
    Metric("usd_per_1k_correct", "device-s per correct · price per device-hour / 3.6", "$", _cost(dollars, correct)),
)


@dataclass(frozen=True, slots=True)
class RelativeRate:
    """An arm against a reference arm, as the paper on gpt-oss-puzzle (arXiv 2602.11937) asks.

    verbosity: ν = T / T_ref, a quotient of means; verbosity_by_task: the mean over tasks of each task's quotient
    (reports differ in which they mean). throughput: Θ / Θ_ref. quotient: ρ = (Θ / Θ_ref) / ν. direct: ρ as measured,
    whole answers per second and device over the reference's. The two differ where lengths vary, replies fail, or the
    drain is long. None where token counts are not known.
    """

    verbosity: float | None
    verbosity_by_task: float | None
    throughput: float | None
    quotient: float | None
    direct: float | None


def relative_rate(records: Records, facts: RunFacts, base_records: Records, base_facts: RunFacts) -> RelativeRate:
    """Both throughputs are taken per device, so that arms on different numbers of devices compare."""
    verbosity = _quotient(tokens_per_request(records, facts), tokens_per_request(base_records, base_facts))
    throughput = _quotient(
        _per_device(output_throughput(records, facts), facts),
        _per_device(output_throughput(base_records, base_facts), base_facts),
    )
    direct = _quotient(
        _per_device(completed(records, facts) / facts.duration, facts),
        _per_device(completed(base_records, base_facts) / base_facts.duration, base_facts),
    )
    by_task = [
        _quotient(tokens_per_request(_of(records, task), facts), tokens_per_request(_of(base_records, task), facts))
        for task in sorted({record.task for record in measured(base_records)})
    ]
    known = [value for value in by_task if value is not None]
    return RelativeRate(
        verbosity=verbosity,
        verbosity_by_task=math.fsum(known) / len(known) if known and len(known) == len(by_task) else None,
        throughput=throughput,
        quotient=_quotient(throughput, verbosity),
        direct=direct,
    )


def _of(records: Records, task: str) -> list[RequestRecord]:
    return [record for record in records if record.task == task]


def _per_device(value: float | None, facts: RunFacts) -> float | None:
    return None if value is None else value / facts.devices[0]


def _quotient(value: float | None, base: float | None) -> float | None:
    return None if value is None or not base else value / base
