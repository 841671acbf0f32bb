"""`vllm-puzzle bench engine`: plans, mistakes in one line, reports; and the pocket models through real engines."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from engine_rows import row
from vllm_puzzle.bench.engine import command
from vllm_puzzle.bench.engine.case import Shape
from vllm_puzzle.bench.engine.rows import Results, load
from vllm_puzzle.serving.cli import main

Captured = pytest.CaptureFixture[str]


def test_the_command_lists_its_suites(capsys: Captured) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "engine", "--help"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("overhead", "super49", "fusion", "gptoss", "nano3", "cpu-smoke"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "found no suite, allowed: overhead, super49"),
        (("other",), "found suite 'other', allowed: overhead, super49"),
        (("super49", "--gpu", "H1", "--plan"), "`--gpu`: found 'H1', allowed: "),
        (("super49", "--only", "7b"), "`--only`: found '7b', allowed: 49b-fp8, 70b-fp8"),
        (("super49", "--shapes", "1x2"), "shape: found '1x2', allowed: input/output tokens"),
        (("super49", "--batches", "-1"), "`--batches`: found '-1', allowed: whole numbers from 1, or `fit`"),
        (("super49", "--blocks", "3"), "`--blocks`: found 3, allowed: 1 to 1000, in a suite that compares"),
        (("cpu-smoke", "--blocks", "0"), "`--blocks`: found 0, allowed: 1 to 1000"),
        (("super49",), "found no GPU that this vLLM computes on, allowed: one (--plan --gpu NAME without)"),
        (("--report",), "`--report`: found --out None, allowed: a folder of results"),
    ],
)
def test_mistakes_are_one_line(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main(["bench", "engine", *arguments]) == 1
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1 and message in shown.err


def test_a_plan_starts_nothing_and_its_status_says_whether_it_fits(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "run_suite", None)  # it would fail
    assert main(["bench", "engine", "fusion", "--plan", "--gpu", "H100-80", "--batches", "1,32"]) == 0
    shown = capsys.readouterr().out
    assert "49b-fp8-fused 128/128 b32: about" in shown and "b16" not in shown
    assert main(["bench", "engine", "fusion", "--plan", "--gpu", "L40S-48"]) == 1
    assert "does not fit L40S-48" in capsys.readouterr().out


def test_reports_are_of_what_was_measured(tmp_path: Path, capsys: Captured) -> None:
    rows = [row("49b-fp8", Shape(128, 128), 1, 4.0), row("70b-fp8", Shape(128, 128), 1, 2.0)]
    Results("super49", "NVIDIA H200", rows).save(tmp_path)
    (tmp_path / "engine-kv-capacity.json").write_text("{}")  # another benchmark's
    assert main(["bench", "engine", "--report", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert (
        "super49: 128/128, 51B TP1, 70B TP1" in shown and "2.00x" in shown and "2.07x" in shown and "differs" in shown
    )
    assert main(["bench", "engine", "super49", "--report", "--out", str(tmp_path)]) == 0
    assert "49b-fp8 128/128 b1: 4 tokens/s" in capsys.readouterr().out


@pytest.mark.slow
def test_both_pocket_models_run_through_real_engines(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-m", "vllm_puzzle.bench.command", "engine", "cpu-smoke", "--out", str(tmp_path),
         "--time-limit", "200"],
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (path,) = tmp_path.glob("engine-cpu-smoke-*.json")
    results = load(path)
    rows = {row.case: row for row in results.rows}
    assert set(rows) == {
        f"pocket-{name} {case}" for name in ("parent", "puzzle") for case in ("24/48 b1", "24/48 b16", "400/1 b2")
    }
    for found in results.rows:
        assert (found.status, found.num_preempted, found.weights) == ("ok", 0, "float32"), found
        assert found.output_tokens == (found.num_requests or 0) * found.output_len
        assert found.output_throughput is not None and found.duration_s is not None
        # The same tokens by the same clock.
        assert found.output_throughput * found.duration_s == pytest.approx(found.output_tokens, rel=1e-6)
        assert found.kv_capacity_tokens and found.max_concurrency and found.attention_backends
        assert found.model_class == ("PuzzleForCausalLM" if "puzzle" in found.variant else "LlamaForCausalLM")
    for name in ("parent", "puzzle"):
        alone, together = (rows[f"pocket-{name} 24/48 b{batch}"].output_throughput for batch in (1, 16))
        assert alone and together and together > 2 * alone  # one step of 16 requests costs less than two of one
    # The child keeps fewer KV bytes of a token, so that the same cache holds more.
    capacity = {name: rows[f"pocket-{name} 24/48 b1"].kv_capacity_tokens for name in ("parent", "puzzle")}
    assert (capacity["puzzle"] or 0) > (capacity["parent"] or 0)
    assert {pair["case"]: pair["blocks"] for pair in results.pairs} == dict.fromkeys(
        ("24/48 b1", "24/48 b16", "400/1 b2"), 4
    )
    for file in tmp_path.iterdir():
        assert str(Path.home()) not in file.read_text() and str(tmp_path) not in file.read_text()
    assert json.loads(path.read_text())["schema"] == 1
    assert "x the speed of pocket-parent" in done.stdout
