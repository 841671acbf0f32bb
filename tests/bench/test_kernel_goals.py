"""Statistics, recorded rows, and verdicts: met, not met, not measured, and never a number that nobody measured."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from vllm_puzzle.bench.kernel import plan, report
from vllm_puzzle.bench.kernel.cases import FfnCase
from vllm_puzzle.bench.kernel.goals import Goal, against, between, latency, launches, launches_against, rate, share
from vllm_puzzle.bench.kernel.record import COLUMNS, OURS, Row, as_json, read_csv, write_csv
from vllm_puzzle.bench.kernel.timing import MAX_SETS, number_of_sets, summarize

ONE, TWO = FfnCase("down", 1, 256, 384), FfnCase("down", 2, 256, 384)
SETTING = {"name": "NVIDIA Test", "slug": "nvidia-test", "commit": "abc"}


def row(case: FfnCase, microseconds: float, implementation: str = OURS, **more: float | int) -> Row:
    return Row(case.name, case.op, implementation, "ok", p50_us=microseconds, **more)  # type: ignore[arg-type]


def test_percentiles_are_of_the_samples_in_microseconds() -> None:
    summary = summarize([5e-6, 1e-6, 4e-6, 2e-6, 3e-6, 100e-6])
    assert summary.p50 == pytest.approx(3.5)
    assert (summary.p20, summary.p80) == (pytest.approx(2), pytest.approx(5))
    assert summary.num_samples == 6 and summary.spread == pytest.approx(3 / 3.5)
    assert summarize([7e-6]).p20 == summarize([7e-6]).p80 == pytest.approx(7)
    with pytest.raises(ValueError, match="found no sample"):
        summarize([])


def test_input_sets_exceed_five_times_the_l2() -> None:
    l2 = 50 << 20
    for size in (1, 1000, 295_000, 50 << 20, 300 << 20, 4 << 30):
        count = number_of_sets(size, l2)
        assert 2 <= count <= MAX_SETS
        assert count * size > 5 * l2 or count == MAX_SETS


@pytest.mark.parametrize(
    ("first", "second", "status"),
    [(95.0, 91.0, "met"), (90.0, 90.0, "met"), (95.0, 89.9, "not met"), (95.0, None, "not measured"),
     (50.0, None, "not met"), (None, None, "not measured")],
)  # fmt: skip
def test_a_share_of_the_limit_is_the_worst_case(first: float | None, second: float | None, status: str) -> None:
    goal = Goal("X", "what", "≥ 90 %", share([ONE, TWO]), 90)
    values = [(ONE, first), (TWO, second)]
    rows = [row(case, 10.0, percent_of_limit=value) for case, value in values if value is not None]
    verdict = goal.judge(rows)
    assert verdict.status == status
    if first is not None and second is not None:
        assert verdict.text.startswith(f"{min(first, second):.3g} % (")
    if status == "not measured" and rows:
        assert "1 of 2 measured" in verdict.text and f"{TWO.name}: not run" in verdict.text


@pytest.mark.parametrize("status", ["wrong", "failed"])
def test_an_op_that_is_wrong_or_fails_does_not_meet_its_goals(status: str) -> None:
    rows = [row(ONE, 1.0, percent_of_limit=99), Row(TWO.name, "down", OURS, status, "error 0.5, allowed 0.003")]
    verdict = Goal("X", "", "", share([ONE, TWO]), 90).judge(rows)
    assert verdict.status == "not met" and "error 0.5" in verdict.text and TWO.name in verdict.text


@pytest.mark.parametrize("status", ["absent", "failed", "wrong"])
def test_a_baseline_without_a_number_leaves_a_ratio_unmeasured_and_says_why(status: str) -> None:
    rows = [row(ONE, 10.0), Row(ONE.name, "down", "cublas", status, "no library")]
    verdict = Goal("X", "", "", against([ONE], "cublas"), 1.0).judge(rows)
    assert verdict.status == "not measured" and "cublas" in verdict.text and "no library" in verdict.text


def test_a_ratio_is_taken_against_each_named_baseline() -> None:
    goal = Goal("X", "", "", against([ONE], "first", "second"), 1.3)
    fast, slow = row(ONE, 12.0, "first"), row(ONE, 20.0, "second")
    assert goal.judge([row(ONE, 10.0), fast, slow]).status == "not met"
    assert goal.judge([row(ONE, 9.0), fast, slow]).text.startswith("1.33 x")
    assert goal.judge([row(ONE, 9.0), fast, slow]).status == "met"
    assert goal.judge([row(ONE, 9.0), fast]).status == "not measured"


def test_the_other_quantities() -> None:
    rows = [row(ONE, 6.0, tflops=700.0, launches=1), row(TWO, 6.5, tflops=800.0, launches=1)]
    rows += [row(ONE, 1.0, "torch", launches=4)]
    assert Goal("X", "", "", latency([ONE, TWO]), 6.5, is_most=True).judge(rows).status == "met"
    assert Goal("X", "", "", latency([ONE, TWO]), 6.4, is_most=True).judge(rows).status == "not met"
    assert Goal("X", "", "", between([(TWO, ONE)]), 1.1, is_most=True).judge(rows).status == "met"
    assert Goal("X", "", "", between([(TWO, ONE)]), 1.1).judge(rows).status == "not met"
    assert Goal("X", "", "", rate([ONE, TWO]), 700).judge(rows).text.startswith("700 TFLOP/s")
    assert Goal("X", "", "", launches([ONE, TWO]), 1, is_most=True).judge(rows).status == "met"
    assert Goal("X", "", "", launches_against([ONE], "torch"), 3).judge(rows).text.startswith("4 x")
    assert Goal("X", "", "", launches_against([TWO], "torch"), 3).judge(rows).status == "not measured"


def test_a_row_without_a_good_result_cannot_hold_a_speed() -> None:
    with pytest.raises(ValueError, match="found a speed with status 'wrong'"):
        Row("case", "down", OURS, "wrong", p50_us=1.0)
    with pytest.raises(ValueError, match="found 'fine', allowed: ok"):
        Row("case", "down", OURS, "fine")


def test_rows_survive_csv_and_carry_card_commit_and_percentiles(tmp_path: Path) -> None:
    rows = [
        Row("a,b", "down", OURS, "ok", "", 1.25, 1.5, 1.75, 20, 3, 1.0, "copy", 66.6, None, 2.0, 3.0, 1, 1e-3, 3e-3),
        Row("a,b", "down", "cublas", "absent", 'not "there"'),
    ]  # fmt: skip
    path = tmp_path / "kernels-x.csv"
    with path.open("w", newline="") as file:
        write_csv(file, rows, SETTING)
    setting, found = read_csv(path)
    assert found == rows and setting == SETTING
    header = next(csv.reader(io.StringIO(path.read_text())))
    assert {"commit", "name", "p20_us", "p50_us", "p80_us", "status", "reason", *COLUMNS} <= set(header)
    document = json.loads(as_json(rows, SETTING, report.verdicts(rows)))
    assert document["rows"][0]["p50_us"] == 1.5 and len(document["goals"]) == len(plan.GOALS)


def test_goal_rows_are_all_there_and_each_names_its_cases() -> None:
    keys = [goal.key for goal in plan.GOALS]
    assert len(set(keys)) == len(keys)
    assert {key.split(".")[0] for key in keys} == {f"A{n}" for n in range(1, 9)} | {f"B{n}" for n in range(1, 12)}
    assert sorted(goal.promise for goal in plan.GOALS if goal.promise) == [f"P{n}" for n in range(1, 8)]
    listed = {case.name for case in plan.cases()}
    for goal in plan.GOALS:
        assert goal.quantity.cases and {case.name for case in goal.quantity.cases} <= listed
        assert set(goal.quantity.baselines) <= set(plan.BASELINES)


def test_every_goal_can_be_met_and_missed_by_measured_rows() -> None:
    """Perfect rows meet all goals; the same rows with our times multiplied miss every one that is about time."""
    rows = []
    for case in {case.name: case for goal in plan.GOALS for case in goal.quantity.cases}.values():
        floor = case.cost.seconds(3e12, 8e14 if case.matmul == "bf16" else 16e14) * 1e6
        rows.append(row(case, floor, percent_of_limit=100.0, tflops=case.cost.flops / floor / 1e6, launches=1))  # type: ignore[arg-type]
        rows += [replace(rows[-1], implementation=name, p50_us=4 * floor, launches=5) for name in plan.BASELINES]
    verdicts = {goal.key: goal.judge(rows) for goal in plan.GOALS}
    # At the floor itself FP8 beside bf16 activations, and one scale beside eight, are as far apart as their bytes.
    assert {key for key, verdict in verdicts.items() if verdict.status != "met"} == set(), verdicts
    slow = [
        replace(r, p50_us=100 * r.p50_us, percent_of_limit=1.0, tflops=1.0, launches=9)
        if r.implementation == OURS and r.p50_us
        else r
        for r in rows
    ]  # fmt: skip
    pairs = {goal.key for goal in plan.GOALS if not goal.quantity.baselines and goal.quantity.unit == "x"}
    missed = {goal.key for goal in plan.GOALS if goal.judge(slow).status == "not met"}
    assert missed == set(verdicts) - pairs


def test_the_readme_holds_the_goal_table_as_the_recorded_results_say(root: Path) -> None:
    table = "\n".join(report.readme_table(root / "bench" / "results"))
    assert table in (root / "README.md").read_text(), "python -m vllm_puzzle.bench.kernel.report prints it"


def test_without_results_every_goal_is_not_yet_measured_and_with_them_it_has_the_card(tmp_path: Path) -> None:
    bare = report.readme_table(tmp_path)
    assert len(bare) == len(plan.GOALS) + 2
    assert all(line.endswith("| not yet measured |") for line in bare[2:])
    case = plan.LATENCY[0]
    for name, time in (("NVIDIA A", 7.0), ("NVIDIA B", 9.0)):
        with (tmp_path / f"kernels-{name[-1]}.csv").open("w", newline="") as file:
            write_csv(file, [Row(case.name, "decode", OURS, "ok", p50_us=time)], SETTING | {"name": name})
    (line,) = (line for line in report.readme_table(tmp_path) if line.startswith("| B6.1"))
    assert "NVIDIA A, abc: not measured: 1 of 6 measured, so far 7 µs" in line
    assert "NVIDIA B, abc: not met: 9 µs" in line
    # Another part of the same card and commit completes the first.
    with (tmp_path / "kernels-A-2.csv").open("w", newline="") as file:
        rows = [Row(case.name, "decode", OURS, "ok", p50_us=7.5) for case in plan.LATENCY[1:]]
        write_csv(file, rows, SETTING | {"name": "NVIDIA A"})
    (line,) = (line for line in report.readme_table(tmp_path) if line.startswith("| B6.1"))
    assert "NVIDIA A, abc: met: 7.5 µs" in line
