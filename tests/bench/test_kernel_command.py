"""`vllm-puzzle bench`, its kernels benchmark and the GPU suite on a machine without a GPU; on one with, a quick run."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm_puzzle.bench import command
from vllm_puzzle.bench.kernel import card, plan, timing
from vllm_puzzle.bench.kernel import command as kernels_command
from vllm_puzzle.bench.kernel.cases import parse_case
from vllm_puzzle.bench.kernel.record import OURS, read_csv
from vllm_puzzle.model_configs.schema import ConfigError
from vllm_puzzle.serving.cli import main

Captured = pytest.CaptureFixture[str]


def options(*arguments: str) -> argparse.Namespace:
    return kernels_command.make_parser().parse_args(arguments)


def test_the_command_finds_bench_by_its_entry_point_and_serving_does_not_import_it(capsys: Captured) -> None:
    assert entry_points(group="vllm_puzzle.commands")["bench"].load() is command.bench
    assert main(["bench"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in command.BENCHMARKS)
    code = "import sys, vllm_puzzle.serving.cli; print([m for m in sys.modules if 'bench' in m or m == 'torch'])"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_unknown_names_are_one_line_with_what_is_allowed(capsys: Captured) -> None:
    assert main(["bench", "nothing"]) == 1
    assert capsys.readouterr().err == f"vllm-puzzle: bench: found 'nothing', allowed: {', '.join(command.BENCHMARKS)}\n"
    assert main(["benchmark"]) == 2
    assert (
        "found subcommand 'benchmark', allowed: serve, inspect, models, convert, gateway, fuse, bench"
        in capsys.readouterr().err
    )


def test_cases_are_listed_with_floors_and_goals_without_a_gpu(capsys: Captured) -> None:
    assert main(["bench", "kernels", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(plan.cases()) + 1
    (line,) = (line for line in lines if line.startswith("down-m1-d8192-i17920-bf16 "))
    # 8192 · 17920 · 2 weights, 17920 · 2 in, 8192 · 2 out; 2 · 8192 · 17920 operations.
    assert line.split() == ["down-m1-d8192-i17920-bf16", "293.654", "0.294", "A3.1", "A3.2"]


def test_without_a_gpu_one_line_says_so(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "kernels", "--quick"]) == 1
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1
    assert "device: found no CUDA device, allowed: an NVIDIA GPU" in shown.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--case", "decode-64q1"), "`--case`: found 'decode-64q1', allowed: a name as"),
        (
            ("--case", "nothing-*"),
            "found no case for --op None --case ['nothing-*'] --goal None, allowed:",
        ),
        (("--goal", "C1"), "`--goal`: found 'C1', allowed: A, B, A1 to A8, B1 to B11, one as A1.1, P1 to P7"),
        (("--op", "down", "--case", "gate_up-m1-d256-i384-bf16"), "found no case for --op ['down']"),
    ],
)
def test_wrong_cases_are_one_line(capsys: Captured, arguments: tuple[str, ...], message: str) -> None:
    assert main(["bench", "kernels", *arguments]) == 1
    shown = capsys.readouterr().err
    assert message in shown and shown.count("\n") == 1


@pytest.fixture
def pretended_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but the card: a wall clock, small ceilings, and torch's write (or SDPA) in the place of our kernel."""
    found = card.Card("NVIDIA Pretended 1", 4096, 1 << 30, "abc", "2", "3", "13", "none")
    plain, ceilings = kernels_command.make_problem, card.measure_ceilings

    def on_cpu(case: Any, source: str | None) -> Any:
        problem = plain(case, source, "cpu")
        problem.ours = problem.baselines()["torch" if case.op == "kv_write" else "sdpa"]
        return problem

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(card, "find_card", lambda: found)
    monkeypatch.setattr(card, "measure_ceilings", lambda *_: ceilings(timing.wall_clock_timer, "cpu", 1 << 16, 64))
    monkeypatch.setattr(timing, "cuda_graph_timer", timing.wall_clock_timer)
    monkeypatch.setattr(kernels_command, "make_problem", on_cpu)


WRITE = "kv_write-2q21s50-h4kv2d16-fp8"


@pytest.mark.usefixtures("pretended_card")
def test_a_run_prints_ceilings_cases_and_goals_and_writes_both_files(tmp_path: Path, capsys: Captured) -> None:
    files = ["--csv", str(tmp_path / "kernels-{card}.csv"), "--json", "-"]
    assert main(["bench", "kernels", "--case", WRITE, "--baselines", "none", "--commit", "f00", *files]) == 0
    shown = capsys.readouterr()
    document = json.loads(shown.out)
    (row,) = document["rows"]
    assert (row["case"], row["status"], document["commit"]) == (WRITE, "ok", "f00")
    assert "measured ceilings: copy" in shown.err and WRITE in shown.err and "of copy" in shown.err
    assert f"0 met, 0 not met, {len(plan.GOALS)} not measured" in shown.err
    setting, rows = read_csv(tmp_path / "kernels-nvidia-pretended-1.csv")
    assert (setting["name"], setting["commit"], rows[0].case) == ("NVIDIA Pretended 1", "f00", WRITE)
    assert float(setting["copy_tbs"]) > 0 and rows[0].p20_us is not None


@pytest.mark.usefixtures("pretended_card")
def test_an_op_that_fails_ends_in_status_1_and_a_time_limit_skips_in_words(tmp_path: Path, capsys: Captured) -> None:
    # SDPA, which stands for our op here, refuses learned sinks.
    assert main(["bench", "kernels", "--case", "decode-2q1s9-w4-h4kv2d16-bf16-sinks", "--baselines", "none"]) == 1
    assert "failed: Absent: SDPA has no learned sinks" in capsys.readouterr().out
    path = tmp_path / "rows.json"
    assert main(["bench", "kernels", "--case", WRITE, "--time-limit", "-1", "--json", str(path)]) == 0
    assert "1 cases skipped: time limit of -1 s" in capsys.readouterr().out
    (row,) = json.loads(path.read_text())["rows"]
    assert (row["status"], row["p50_us"]) == ("skipped", None)


def test_a_vllm_source_without_its_files_is_one_line(tmp_path: Path) -> None:
    from vllm_puzzle.bench.kernel import stock

    with pytest.raises(ConfigError, match=r"found no v1/attention/ops/triton_attention_helpers.py, allowed: vLLM 0.32"):
        stock.from_source(tmp_path)


def test_flags_choose_cases() -> None:
    assert {case.op for case in kernels_command.choose(options("--op", "verify", "--op", "down"))} == {"verify", "down"}
    quick = kernels_command.choose(options("--quick"))
    assert [case.name for case in quick] == [case.name for case in plan.QUICK]
    goals = kernels_command.choose(options("--no-sweep"))
    assert set(quick) | set(plan.goal_cases()) == set(goals) < set(kernels_command.choose(options()))
    (own,) = kernels_command.choose(options("--case", "decode-3q1s5000-w777-h24kv3d96-fp8"))
    assert own == parse_case("decode-3q1s5000-w777-h24kv3d96-fp8")
    matched = kernels_command.choose(options("--case", "kv_write-*"))
    assert matched and all(case.op == "kv_write" for case in matched)


def test_goals_choose_their_cases() -> None:
    def names(*keys: str) -> set[str]:
        flags = [text for key in keys for text in ("--goal", key)]
        return {case.name for case in kernels_command.choose(options(*flags))}

    assert names("P6") == names("B6") == names("B6.1") == {case.name for case in plan.LATENCY}
    assert names("A") | names("B") == {case.name for case in plan.goal_cases()}
    assert names("A1", "A2") == {case.name for case in plan.DECODE_FFN + plan.DECODE_FFN_LARGER}


def test_what_compiles_for_long_runs_only_beside_its_goals() -> None:
    wanted = kernels_command.wanted_baselines
    prefill, sweep = plan.PREFILL_WIDE[1], parse_case("decode-4q1s4k-w1k-h64kv8d64-fp8")
    assert "flex_attention" in (wanted(prefill, "auto") or ())
    assert wanted(sweep, "auto") == plan.VLLM_BASELINES
    assert wanted(plan.QUICK[-1], "auto") == set(plan.BASELINES) - plan.SLOW_TO_COMPILE
    assert wanted(plan.BIG[0], "auto") == set(plan.BASELINES)
    assert wanted(prefill, "goals") == {"vllm_triton", "vllm_triton_bf16q", "flex_attention"}
    assert wanted(prefill, "none") == wanted(sweep, "goals") == set()
    assert wanted(sweep, "all") is None


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    from importlib.util import find_spec

    spec = find_spec("vllm")
    assert spec is not None and spec.submodule_search_locations is not None
    script = Path(__file__).with_name("interpreted_ops.py")
    done = subprocess.run(
        [sys.executable, "-P", str(script), spec.submodule_search_locations[0]],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    outcome: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return outcome


def test_our_kernels_are_called_as_they_want_and_pass_their_check(interpreted: dict[str, Any]) -> None:
    assert {name.partition("-")[0] for name in interpreted["ours"]} == {case.op for case in plan.cases()}
    assert {name: pair for name, pair in interpreted["ours"].items() if not pair[0] <= pair[1]} == {}


def test_vllms_kernels_run_from_its_source_files_and_compute_what_the_reference_computes(
    interpreted: dict[str, Any],
) -> None:
    assert interpreted["origin"].startswith("vLLM source files, without vLLM")
    assert {name.partition(" ")[2] for name in interpreted["others"]} == {
        "vllm_triton", "vllm_triton_bf16q", "vllm_write", "vllm_block", "two_launches", "one_by_one"
    }  # fmt: skip
    for name, error in interpreted["others"].items():
        # A quantised query is off by 2⁻⁴ at most, about 2.6 % in the mean; a write is exact, a product rounds to bf16.
        is_quantized = "decode" in name and name.endswith("-fp8 vllm_triton")
        assert error <= (0.04 if is_quantized else 0.0 if "write" in name else 5e-3), name


def test_the_gpu_suite_is_valid_bash_and_stops_in_one_line_without_a_gpu(root: Path, tmp_path: Path) -> None:
    suite = root / "bench" / "gpu_suite.sh"
    subprocess.run(["bash", "-n", str(suite)], check=True)
    # No card is visible, also where there is one.
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OUT": str(tmp_path / "out")}
    for python, message in (
        (sys.executable, "gpu_suite: found no CUDA device, allowed: one NVIDIA GPU\n"),
        ("false", "gpu_suite: found no torch and triton in false, allowed: a Python with both\n"),
    ):
        done = subprocess.run(
            ["bash", str(suite)], env=environment | {"PYTHON": python}, cwd=root, capture_output=True, text=True,
            timeout=60,
        )  # fmt: skip
        assert (done.returncode, done.stdout, done.stderr) == (1, "", message)
    assert not (tmp_path / "out").exists()


def test_the_gpu_suite_runs_every_step_and_tells_which_failed(root: Path, tmp_path: Path) -> None:
    # A Python that only notes what it is asked for: the tests fail, the benchmark passes.
    calls, python, out = tmp_path / "calls", tmp_path / "python", tmp_path / "out"
    python.write_text(f'#!/bin/bash\necho "$*" >> {calls}\ncase "$*" in *"pytest -q"*) exit 3 ;; esac\n')
    python.chmod(0o755)
    environment = os.environ | {"PYTHON": str(python), "OUT": str(out), "LIMIT": "16", "COMMIT": "f00", "PART": "-a"}
    environment |= {"BENCH": "--goal A", "STEPS": "tests bench"}
    done = subprocess.run(
        ["bash", str(root / "bench" / "gpu_suite.sh")], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "1 steps failed after" in done.stdout and "kernels against their twins: status 3" in done.stdout
    assert (out / "gpu-suite.log").read_text() == done.stdout
    (bench,) = (line for line in calls.read_text().splitlines() if "bench.command kernels" in line)
    assert "--goal A --time-limit" in bench and f"--commit f00 --csv {out}/kernels-{{card}}-a.csv" in bench
    # Nothing starts in the last seconds, and that is told as well.
    late = subprocess.run(
        ["bash", str(root / "bench" / "gpu_suite.sh")], env=environment | {"LIMIT": "5"}, capture_output=True,
        text=True, timeout=60,
    )  # fmt: skip
    assert late.returncode == 1 and "kernel benchmark: no time left" in late.stdout


@pytest.mark.gpu
def test_a_quick_run_measures_every_kind_and_our_ops_are_right(tmp_path: Path) -> None:
    path = tmp_path / "kernels.json"
    done = subprocess.run(
        [sys.executable, "-P", "-m", "vllm_puzzle.bench.command", "kernels", "--quick", "--json", str(path)],
        capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert path.is_file(), done.stderr[-3000:]
    rows = json.loads(path.read_text())["rows"]
    ours = {row["case"]: row for row in rows if row["implementation"] == OURS}
    assert set(ours) == {case.name for case in plan.QUICK}
    assert {name: row["reason"] for name, row in ours.items() if row["status"] != "ok"} == {}
    for row in ours.values():
        # More than the limit would be a wrong floor, or reads from the L2 that the memory bus should carry.
        assert 0 < row["percent_of_limit"] < 115, row  # reading alone may beat a copy a little
    assert done.returncode == 0
