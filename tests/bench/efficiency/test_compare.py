"""`bench compare`: run folders in, tables, JSON and exit codes out."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hand_made import batches, lasting, window, write_run
from vllm_puzzle.bench.efficiency.compare import EXIT_CODES, compare
from vllm_puzzle.bench.efficiency.comparison import compare_runs
from vllm_puzzle.bench.efficiency.facts import RunFacts, Window
from vllm_puzzle.bench.efficiency.frontier import speed_up
from vllm_puzzle.bench.efficiency.metrics import compute
from vllm_puzzle.bench.efficiency.pairing import COST, DONE, block_table, question_table
from vllm_puzzle.bench.efficiency.record import CORRECT, WARM_UP, WRONG, RequestRecord
from vllm_puzzle.bench.efficiency.run_folder import read_run, read_runs
from vllm_puzzle.bench.efficiency.uncertainty import VERDICTS
from vllm_puzzle.model_configs.schema import ConfigError

QUESTIONS = 400


def outcomes(right: int, shift: int = 0) -> list[str]:
    """Which questions are right: `right` of QUESTIONS, beginning with number `shift`."""
    return [CORRECT if (place - shift) % QUESTIONS < right else WRONG for place in range(QUESTIONS)]


def write_arm(folder: Path, right: int, duration: float, shift: int = 0, **manifest: Any) -> Path:
    records = batches(outcomes(right, shift), 4, duration)
    return write_run(folder, records, window(0.0, duration * QUESTIONS / 4, num_gpus=1), **manifest)


@pytest.mark.parametrize(
    ("right", "shift", "margin", "word"),
    [
        (340, 0, "0.01", "better"),  # 300 of A, and 40 more
        (300, 0, "0.01", "non-inferior"),
        (300, 0, "0", "inconclusive"),
        (299, 0, "0.01", "inconclusive"),
        (299, 0, "0.03", "non-inferior"),
        (300, 20, "0.03", "inconclusive"),  # as many, but forty questions differ
        (260, 0, "0.01", "worse"),
    ],
)
def test_the_exit_code_is_the_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], right: int, shift: int, margin: str, word: str
) -> None:
    a, b = write_arm(tmp_path / "a", 300, 1.0), write_arm(tmp_path / "b", right, 1.0, shift)
    code = compare([str(a), str(b), "--margin", margin])
    printed = capsys.readouterr().out
    assert code == EXIT_CODES[word] == {"better": 0, "non-inferior": 0, "inconclusive": 3, "worse": 4}[word]
    assert printed.splitlines()[-1].startswith(f"accuracy: {word} at a margin of {100 * float(margin):.1f} points")
    assert set(EXIT_CODES) == set(VERDICTS)


def test_the_document_holds_what_the_tables_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write_arm(tmp_path / "a", 300, 1.0), write_arm(tmp_path / "b", 320, 0.5)
    assert compare([str(a), str(b), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    (pair,) = document["pairs"]
    assert document["verdict"] == pair["verdict"] == "better"
    assert document["accuracy_difference"]["estimate"] == pytest.approx(20 / 400)
    assert pair["a"]["metrics"]["gpu_s_per_request"] == 0.25 and pair["b"]["metrics"]["gpu_s_per_request"] == 0.125
    # Every question took half the machine: by question there is no doubt about the ratio.
    ratio = pair["cost_ratio"]["by_question"]
    assert [ratio[key] for key in ("estimate", "low", "high")] == pytest.approx([0.5] * 3, rel=1e-12)
    assert pair["cost_ratio"]["by_block"] is None and document["frontiers"] == []
    assert pair["relative_rate"]["direct"] == pytest.approx(2.0)
    assert compare([str(a), str(b)]) == 0
    text = capsys.readouterr().out
    assert "gpu_s_per_request" in text and "0.500x" in text and "fewer than three blocks" in text
    assert max(len(line) for line in text.splitlines()) <= 120


def test_cost_is_judged_when_asked_and_the_worse_verdict_decides(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = write_arm(tmp_path / "a", 300, 1.0), write_arm(tmp_path / "b", 340, 1.25)
    assert compare([str(a), str(b)]) == 0
    assert compare([str(a), str(b), "--cost-margin", "0.05"]) == EXIT_CODES["worse"]
    assert capsys.readouterr().out.splitlines()[-1] == "cost: worse at a margin of 5.0 %"
    assert compare([str(a), str(b), "--cost-margin", "0.3"]) == 0
    assert compare([str(b), str(a), "--cost-margin", "0"]) == EXIT_CODES["worse"], "cheaper, but less accurate"


def test_the_declared_margin_is_the_default_and_another_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    declared = {"config": {"margin": 0.03}}
    a = write_arm(tmp_path / "a", 300, 1.0, **declared)
    b = write_arm(tmp_path / "b", 299, 1.0, **declared)
    assert compare([str(a), str(b)]) == 0
    assert compare([str(a), str(b), "--margin", "0.005"]) == 3
    assert "margin of 0.5 points (declared beforehand: 3.0)" in capsys.readouterr().out


def test_a_mismatch_is_compared_only_on_demand_and_then_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = write_arm(tmp_path / "a", 300, 1.0)
    b = write_arm(tmp_path / "b", 300, 1.0, max_tokens=64, status="interrupted")
    with pytest.raises(ConfigError, match=r"status: found 'interrupted', allowed: complete \(and 1 more\)") as caught:
        compare([str(a), str(b)])
    assert "\n" not in str(caught.value)
    assert compare([str(a), str(b), "--allow-mismatch"]) == 0
    assert "mismatch allowed: max_tokens: A has 300, B has 64" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["a"], ["a", "b", "--margin", "2"], ["a", "b", "--margin", "x"], ["a", "b"],
                                       ["a", "b", "--nonsense"], ["a", "b", "--cost-margin", "-0.1"]])  # fmt: skip
def test_a_mistake_in_use_is_one_line(tmp_path: Path, arguments: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        compare([str(tmp_path / name) if name in "ab" else name for name in arguments])
    assert "\n" not in str(caught.value)


def broken(folder: Path, file: str, text: str) -> Path:
    write_arm(folder, 300, 1.0)
    (folder / file).write_text(text)
    return folder


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("manifest.json", "{", "no JSON"),
        ("manifest.json", "[]", "`schema_version`: found 'list', allowed: 1"),
        ("manifest.json", '{"schema_version": 2}', "`schema_version`: found 2, allowed: 1"),
        ("manifest.json", '{"schema_version": 1, "arm": 5}', "`arm`: found 5, allowed: str"),
        ("requests.jsonl", "", "found no record"),
        ("requests.jsonl", "nothing\n{}", "line 1: found no JSON"),
        ("requests.jsonl", '{"arm": "x"}', "missing"),
    ],
)
def test_a_folder_that_is_no_run_is_refused_in_one_line(tmp_path: Path, file: str, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read_run(broken(tmp_path / "a", file, text))
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_records_of_another_arm_do_not_belong_in_a_run(tmp_path: Path) -> None:
    folder = write_arm(tmp_path / "a", 300, 1.0, arm="other")
    with pytest.raises(ConfigError, match=r"records of the arms \['arm'\], allowed: other"):
        read_run(folder)


def test_a_crashed_run_is_read_up_to_its_last_whole_line(tmp_path: Path) -> None:
    folder = write_arm(tmp_path / "a", 300, 1.0)
    file = folder / "requests.jsonl"
    file.write_text(file.read_text()[:-40])
    assert len(read_run(folder).records) == QUESTIONS - 1


def test_the_cost_of_the_table_is_the_runs_cost_per_request(tmp_path: Path) -> None:
    # A warm-up before, stragglers after, questions of different length, two at once on average.
    random = np.random.default_rng(3)
    sent = np.sort(random.uniform(0, 40, 120))
    records = [
        lasting(float(at), float(random.uniform(0.5, 6)), question=f"q{place}", phase=WARM_UP if at < 8 else "steady")
        for place, at in enumerate(sent)
    ]
    run = read_run(write_run(tmp_path / "a", records, window(8.0, 40.0, num_gpus=2)))
    sums = question_table([run]).sum(axis=0)[0]
    assert sums[COST] / sums[DONE] == pytest.approx(compute("gpu_s_per_request", run.records, run.facts))
    assert block_table(run).tolist() == [[64.0, sums[DONE]]]


def in_blocks(records: list[RequestRecord], factors: list[float]) -> tuple[list[RequestRecord], RunFacts]:
    """The run once per block, each slower by its factor."""
    times = ("sent", "first", "first_answer", "last_answer", "last", "done")
    scaled = [
        replace(one, block=block, repeat=block, **{name: getattr(one, name) * factor for name in times})
        for block, factor in enumerate(factors)
        for one in records
    ]
    length = max(one.done for one in records)
    return scaled, RunFacts(tuple(Window(0.0, length * factor, at) for at, factor in enumerate(factors)), num_gpus=1)


def test_blocks_that_ran_side_by_side_bound_the_noise_in_time(tmp_path: Path) -> None:
    plain = batches(outcomes(300), 4, 1.0)
    drift = np.array([1.0, 1.4, 0.8])
    a, facts_a = in_blocks(plain, list(drift))
    b, facts_b = in_blocks(plain, list(0.5 * drift * [1.02, 0.98, 1.0]))
    runs = [read_run(write_run(tmp_path / name, *one)) for name, one in (("a", (a, facts_a)), ("b", (b, facts_b)))]
    cost = compare_runs(runs[:1], runs[1:], 0.01).pairs[0].cost
    assert cost.by_block is not None and cost.spread is not None
    assert 0.45 < cost.by_block.low < 0.5 < cost.by_block.high < 0.55, "the drift of 60 % cancels"
    assert cost.spread[0] == pytest.approx(0.6 / (3.2 / 3))
    assert cost.saving.low == pytest.approx(-math.log(cost.by_block.high)), "the wider interval judges"


SETTINGS = {"off": (160, 0.25), "low": (240, 1.0), "high": (320, 4.0)}


def write_sweep(folder: Path, gain: int, speed: float) -> Path:
    for name, (right, duration) in SETTINGS.items():
        write_arm(
            folder / name,
            right + gain,
            duration / speed,
            fields={"reasoning_effort": name},
            arm="arm",
            config={"margin": None, "reference": "high"},
            tasks=[{"name": "sums", "chance": 0.25, "questions": QUESTIONS}],
        )
    return folder


def test_sweeps_are_compared_setting_by_setting_and_at_equal_accuracy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = write_sweep(tmp_path / "a", 0, 1.0), write_sweep(tmp_path / "b", 8, 2.0)
    assert compare([str(a), str(b), "--json", "--margin", "0.1"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [pair["verdict"] for pair in document["pairs"]] == ["better"] * 3 and document["verdict"] == "better"
    assert document["accuracy_difference"]["estimate"] == pytest.approx(8 / 400)
    (found,) = document["frontiers"]
    cost, accuracy = np.array([0.0625, 0.25, 1.0]), np.array([0.4, 0.6, 0.8])
    expected = float(speed_up(cost, accuracy, cost / 2, accuracy + 0.02, 0.7))
    speed = found["equal_accuracy_speed_up"]
    assert speed["accuracy"] == pytest.approx(0.7) and speed["reached"] == 1.0
    assert speed["interval"]["estimate"] == pytest.approx(expected) == pytest.approx(2 * 4**0.1)
    assert found["mean_speed_up"] == pytest.approx(2 * 4**0.1)
    assert 0 < found["hypervolume"]["a"] < found["hypervolume"]["b"] < 1
    assert found["reference"]["accuracy"] == 0.25, "what guessing gets"
    assert compare([str(a), str(b), "--margin", "0.1"]) == 0
    text = capsys.readouterr().out
    assert "all 3 settings together" in text and "2.30x" in text and "interpolated in log cost" in text


def test_sweeps_without_a_common_setting_are_a_mismatch(tmp_path: Path) -> None:
    a, b = write_sweep(tmp_path / "a", 0, 1.0), write_sweep(tmp_path / "b", 8, 2.0)
    runs_a, runs_b = read_runs(a), read_runs(b)
    with pytest.raises(ConfigError, match="no reasoning fields and load in common"):
        compare_runs(runs_a[:1], runs_b[1:], 0.01)
    found = compare_runs(runs_a[:1], runs_b[1:], 0.01, allow_mismatch=True, draws=200)
    assert [(pair.a.setting, pair.b.setting) for pair in found.pairs] == [
        ('{"reasoning_effort":"high"}', '{"reasoning_effort":"low"}')
    ]
    with pytest.raises(ConfigError, match="two runs of one setting"):
        compare_runs([*runs_a, runs_a[0]], runs_b, 0.01)


def test_a_run_without_a_whole_answer_has_no_cost_to_compare(tmp_path: Path) -> None:
    a = write_arm(tmp_path / "a", 300, 1.0)
    facts = window(0.0, 100.0, num_gpus=1)
    b = write_run(tmp_path / "b", batches(["truncated"] * QUESTIONS, 4, 1.0), facts)
    with pytest.raises(ConfigError, match="without any whole answer"):
        compare([str(a), str(b)])


def test_the_benchmark_imports_nothing_that_serves() -> None:
    folder = Path(__file__).resolve().parents[3] / "bench" / "efficiency"
    files = [path.relative_to(folder).with_suffix("") for path in sorted(folder.rglob("*.py"))]
    modules = [".".join(("vllm_puzzle.bench.efficiency", *file.parts)) for file in files]
    assert "vllm_puzzle.bench.efficiency.compare" in modules
    code = (
        f"import sys, importlib\nfor name in {modules}: importlib.import_module(name)\n"
        "heavy = ('vllm_puzzle.serving', 'vllm_puzzle.kernels', 'vllm', 'torch', 'transformers', 'triton')\n"
        "print([name for name in sys.modules if name.startswith(tuple(f'{one}.' for one in heavy)) or name in heavy])"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
    for path in folder.rglob("*.py"):
        assert "vllm_puzzle.serving" not in path.read_text(), path  # imports within functions too
