"""Goals as data: what must be reached, in which cases, and whether recorded rows reach it.

A verdict is "met" only when every case of a goal was measured and reaches it, "not met" as soon as one measured case
does not (or computes a wrong result), "not measured" otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from vllm_puzzle.bench.kernel.cases import Case
from vllm_puzzle.bench.kernel.record import OURS, Row

Table = Mapping[tuple[str, str], Row]  # (case name, implementation) → row


@dataclass(frozen=True, slots=True)
class Reading:
    """One number that a goal looks at; without a value, why there is none, and whether that already fails the goal."""

    label: str
    value: float | None
    reason: str = ""
    is_failure: bool = False


@dataclass(frozen=True, slots=True)
class Quantity:
    """A number read off the rows for each case (or pair of cases): `read` gives one Reading for each."""

    cases: tuple[Case, ...]
    unit: str
    read: Callable[[Table], list[Reading]]
    baselines: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Verdict:
    """The state of one goal: "met", "not met" or "not measured", and the worst number with its case."""

    status: str
    text: str


@dataclass(frozen=True, slots=True)
class Goal:
    """One promise. `key`: row of the goal table; `promise`: P1 to P7 where the issue names it so; `bound` is a least
    value, or a most where `is_most`.
    """

    key: str
    what: str
    required: str
    quantity: Quantity
    bound: float
    is_most: bool = False
    promise: str = ""

    @property
    def title(self) -> str:
        """Key and promise."""
        return f"{self.key} ({self.promise})" if self.promise else self.key

    def judge(self, rows: Sequence[Row]) -> Verdict:
        """The verdict over the rows of one card."""
        table = {(row.case, row.implementation): row for row in rows}
        readings = self.quantity.read(table)
        known = [(reading.value, reading) for reading in readings if reading.value is not None]
        failures = [reading for reading in readings if reading.is_failure]
        missing = [reading for reading in readings if reading.value is None and not reading.is_failure]
        if failures:
            return Verdict("not met", f"{failures[0].label}: {failures[0].reason}")
        if not known:
            return Verdict("not measured", missing[0].reason if rows else "")
        value, worst = (max if self.is_most else min)(known, key=lambda pair: pair[0])
        reaches = value <= self.bound if self.is_most else value >= self.bound
        text = f"{value:.3g} {self.quantity.unit}".rstrip() + f" ({worst.label})"
        if not reaches:
            return Verdict("not met", text)
        if missing:
            text = f"{len(known)} of {len(readings)} measured, so far {text}; {missing[0].label}: {missing[0].reason}"
            return Verdict("not measured", text)
        return Verdict("met", text)


def _median(table: Table, case: Case, implementation: str = OURS) -> Reading:
    """The median in µs."""
    row = table.get((case.name, implementation))
    if row is None:
        return Reading(case.name, None, "not run")
    if row.p50_us is None:
        is_wrong = implementation == OURS and row.status in ("wrong", "failed")
        return Reading(case.name, None, f"{implementation}: {row.status}, {row.reason}", is_wrong)
    return Reading(case.name, row.p50_us)


def _of_row(field: str, scale: float = 1.0) -> Callable[[Table, Case], Reading]:
    def read(table: Table, case: Case) -> Reading:
        median = _median(table, case)
        value = getattr(table[case.name, OURS], field) if median.value is not None else None
        if value is None:
            return median if median.value is None else Reading(case.name, None, f"{field} was not measured")
        return Reading(case.name, scale * value)

    return read


def _each(cases: Sequence[Case], unit: str, read: Callable[[Table, Case], Reading]) -> Quantity:
    return Quantity(tuple(cases), unit, lambda table: [read(table, case) for case in cases])


def share(cases: Sequence[Case]) -> Quantity:
    """Percent of the limit: floor by the measured copy or matrix rate, over the median."""
    return _each(cases, "%", _of_row("percent_of_limit"))


def rate(cases: Sequence[Case]) -> Quantity:
    """TFLOP/s."""
    return _each(cases, "TFLOP/s", _of_row("tflops"))


def latency(cases: Sequence[Case]) -> Quantity:
    """µs."""
    return _each(cases, "µs", _of_row("p50_us"))


def launches(cases: Sequence[Case]) -> Quantity:
    """Kernels of one call."""
    return _each(cases, "launches", _of_row("launches"))


def _ratio(label: str, above: Reading, below: Reading) -> Reading:
    for reading in (below, above):
        if reading.value is None:
            return Reading(label, None, reading.reason, reading.is_failure)
    assert above.value is not None and below.value is not None
    return Reading(label, above.value / below.value)


def against(cases: Sequence[Case], *baselines: str) -> Quantity:
    """Median of each baseline over ours: how many times faster ours is."""

    def read(table: Table) -> list[Reading]:
        return [
            _ratio(f"{case.name} / {baseline}", _median(table, case, baseline), _median(table, case))
            for case in cases
            for baseline in baselines
        ]

    return Quantity(tuple(cases), "x", read, baselines)


def launches_against(cases: Sequence[Case], baseline: str) -> Quantity:
    """Launches of a baseline over ours."""

    def count(table: Table, case: Case, implementation: str) -> Reading:
        row = table.get((case.name, implementation))
        if row is None or row.launches is None:
            reason = row.reason if row is not None and row.reason else "launches were not counted"
            return Reading(case.name, None, f"{implementation}: {reason}")
        return Reading(case.name, float(row.launches))

    def read(table: Table) -> list[Reading]:
        return [_ratio(case.name, count(table, case, baseline), count(table, case, OURS)) for case in cases]

    return Quantity(tuple(cases), "x", read, (baseline,))


def between(pairs: Sequence[tuple[Case, Case]]) -> Quantity:
    """Our median in the first case of each pair over that in the second."""

    def read(table: Table) -> list[Reading]:
        return [
            _ratio(f"{above.name} / {below.name}", _median(table, above), _median(table, below))
            for above, below in pairs
        ]

    cases = {case.name: case for pair in pairs for case in pair}
    return Quantity(tuple(cases.values()), "x", read)
