"""bench/gpu_suite.sh's engine step: where vLLM is, within the time of the argument, resumable, with a table last."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

# Stands for Python on a GPU machine: notes what it is asked for, writes the entry points with the real one, and, asked
# for a suite, tells the plugins that an uninstalled package has.
PYTHON = """#!/bin/bash
echo "$*" >> {calls}
case "$*" in
    "-P - "*) exec {real} "$@" ;;
    *"import vllm"*) exit {no_vllm} ;;
    *"bench.command engine fusion"*) exit 1 ;;
    *"bench.command engine "*) exec {real} -S -P -c '
from importlib.metadata import entry_points
groups = "vllm.general_plugins", "vllm_puzzle.commands"
print([point.value for group in groups for point in entry_points(group=group)])
' ;;
esac
"""


@pytest.fixture
def suite(tmp_path: Path, root: Path) -> object:
    def run(*arguments: str, no_vllm: int = 0, **more: str) -> tuple[int, str, list[str]]:
        calls, python = tmp_path / "calls", tmp_path / "python"
        calls.write_text("")
        python.write_text(PYTHON.format(calls=calls, real=sys.executable, no_vllm=no_vllm))
        python.chmod(0o755)
        environment = {key: value for key, value in os.environ.items() if key not in ("LIMIT", "STEPS")}
        environment |= {"PYTHON": str(python), "OUT": str(tmp_path / "out"), "COMMIT": "f00"} | more
        done = subprocess.run(
            ["bash", str(root / "bench" / "gpu_suite.sh"), *arguments], env=environment, capture_output=True, text=True,
            timeout=60,
        )  # fmt: skip
        return done.returncode, done.stdout + done.stderr, calls.read_text().splitlines()

    return run


def test_the_engine_suites_run_in_order_within_the_time_of_the_argument(suite: object, tmp_path: Path) -> None:
    assert callable(suite)
    status, shown, calls = suite("500", STEPS="engine", ENGINE="overhead super49", ENGINE_FLAGS="--batches 1,8")
    assert status == 0
    asked = [call for call in calls if "bench.command engine" in call]
    assert [call.split()[4] for call in asked] == ["overhead", "super49"]
    for call in asked:
        assert call.endswith(f"--commit f00 --out {tmp_path}/out") and " --batches 1,8 --time-limit " in call
        limit = int(re.findall(r"--time-limit (\d+)", call)[0])
        assert 440 <= limit <= 475  # 500 less 25 s for its last case and the table, and what was taken before
    table = shown[shown.index("gpu_suite: steps:") :]
    assert re.search(r"engine overhead +passed +\d+ s", table) and re.search(r"engine super49 +passed", table)


def test_our_plugin_is_found_without_an_installation(suite: object) -> None:
    assert callable(suite)
    _, shown, _ = suite("500", STEPS="engine", ENGINE="overhead")
    assert "['vllm_puzzle.serving.plugin:register', 'vllm_puzzle.bench.command:bench']" in shown


def test_without_vllm_the_engines_are_left_out_and_nothing_fails(suite: object) -> None:
    assert callable(suite)
    status, shown, calls = suite("500", STEPS="engine", no_vllm=1)
    assert status == 0 and not [call for call in calls if "bench.command engine" in call]
    assert "engine: found no vLLM" in shown and re.search(r"engine +no vLLM here", shown)


def test_a_suite_that_fails_is_told_and_the_next_still_runs(suite: object) -> None:
    assert callable(suite)
    status, shown, calls = suite("500", STEPS="engine", ENGINE="fusion overhead")
    assert status == 1 and "1 steps failed after" in shown and "engine fusion: status 1" in shown
    assert len([call for call in calls if "bench.command engine" in call]) == 2


def test_what_is_too_late_is_left_for_another_call(suite: object) -> None:
    assert callable(suite)
    status, shown, calls = suite("40", STEPS="engine", ENGINE="overhead")
    assert status == 0 and not [call for call in calls if "bench.command engine" in call]
    assert "which is too little to begin with" in shown and "left for another call" in shown


def test_the_kernels_measurement_leaves_half_of_the_time_to_the_engines(suite: object) -> None:
    assert callable(suite)
    limits = {}
    for steps in ("bench", "bench engine"):
        _, _, calls = suite(LIMIT="1000", STEPS=steps, ENGINE="overhead")
        (call,) = (call for call in calls if "bench.command kernels" in call)
        limits[steps] = int(re.findall(r"--time-limit (\d+)", call)[0])
    assert 930 <= limits["bench"] <= 960 and 430 <= limits["bench engine"] <= 460


def test_a_time_limit_that_is_none_is_one_line(suite: object) -> None:
    assert callable(suite)
    for wrong in ("soon", "1.5", "-3"):
        status, shown, calls = suite(wrong)
        assert (status, shown) == (1, f"gpu_suite: time limit: found {wrong}, allowed: whole seconds\n") and not calls
