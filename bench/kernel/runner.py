"""Runs one case: our op is checked first, timed only if it is right, checked again as it was timed; then baselines."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from vllm_puzzle.bench.kernel.card import Ceilings
from vllm_puzzle.bench.kernel.problem import Absent, Check, Prepare, Problem
from vllm_puzzle.bench.kernel.record import OURS, Row
from vllm_puzzle.bench.kernel.timing import Call, Spoil, Timer, number_of_sets, summarize


@dataclass(frozen=True, slots=True)
class Runner:
    """How cases are run: the clock, the measured ceilings, the L2 to exceed, and a counter of launches (or none)."""

    timer: Timer
    ceilings: Ceilings
    l2_bytes: int
    count_launches: Callable[[Call], int | None] | None = None
    max_sets: int | None = None

    def run(self, problem: Problem, goals: str = "", baselines: Collection[str] | None = None) -> list[Row]:
        """Rows of one case, ours first. `baselines`: which of the problem's, None for all. Nothing is raised but
        KeyboardInterrupt: what goes wrong is a row.
        """
        case = problem.case
        plain = Row(case.name, case.op, OURS, "failed", goals=goals)
        try:
            num_sets = number_of_sets(case.cost.num_bytes, self.l2_bytes)
            problem.make(min(num_sets, self.max_sets or num_sets))
            rows = [self._run_ours(problem, plain)]
        except Exception as error:
            rows = [replace(plain, reason=one_line(error))]
        own = rows[0]
        for name, prepare in problem.baselines().items():
            if baselines is None or name in baselines:
                rows.append(self._run_baseline(problem, prepare, replace(plain, implementation=name), own.p50_us))
        return rows

    def _run_ours(self, problem: Problem, row: Row) -> Row:
        calls = problem.ours()
        row = replace(row, config=problem.config)
        problem.poison(None)
        row = _checked(row, problem.check(calls[0]()))
        if row.status != "ok":
            return row
        timed, output = self._timed(row, problem, calls, problem.poison)
        # What was timed must be right too: the last replay's result, written over poison.
        again = _checked(row, problem.check(output))
        return timed if again.status == "ok" else replace(again, reason=f"as it was timed: {again.reason}")

    def _run_baseline(self, problem: Problem, prepare: Prepare, row: Row, ours: float | None) -> Row:
        try:
            calls = prepare()
            row = _checked(row, problem.check_baseline(calls[0]()))
            if row.status != "ok":
                return row
            timed, _ = self._timed(row, problem, calls)
        except Absent as absence:
            return replace(row, status="absent", reason=str(absence))
        except Exception as error:
            return replace(row, status="failed", reason=one_line(error))
        return replace(timed, ratio=timed.p50_us / ours if ours and timed.p50_us else None)

    def _timed(self, row: Row, problem: Problem, calls: Sequence[Call], spoil: Spoil | None = None) -> tuple[Row, Any]:
        cost, case = problem.case.cost, problem.case
        samples, output = self.timer(calls, spoil)
        time = summarize(samples)
        rates = self.ceilings.copy, self.ceilings.flops(case.matmul)
        floor = 1e6 * cost.seconds(*rates)
        return replace(
            row,
            p20_us=time.p20,
            p50_us=time.p50,
            p80_us=time.p80,
            num_samples=time.num_samples,
            num_sets=len(calls),
            floor_us=floor,
            limit="copy" if cost.is_memory_bound(*rates) else f"{case.matmul} matmul",
            percent_of_limit=100 * floor / time.p50,
            tflops=cost.flops / time.p50 / 1e6,
            gbytes_per_second=cost.num_bytes / time.p50 / 1e3,
            launches=self.count_launches(calls[0]) if self.count_launches else None,
        ), output


def _checked(row: Row, check: Check) -> Row:
    """The row with the check's numbers; "wrong" where it failed."""
    row = replace(row, status="ok", error=check.error, bound=check.bound)
    if check.is_passed:
        return row
    return replace(row, status="wrong", reason=f"error {check.error:.3g}, allowed {check.bound:.3g}")


def one_line(error: Exception) -> str:
    """The kind and first line of an error, short enough for a table; the GPU's memory is given back after an
    out-of-memory.
    """
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]
