"""The tuning tool measures, checks and writes a table that the launcher reads; under Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from vllm_puzzle.bench import ffn_tuning
from vllm_puzzle.kernels.ffn_table import Config, Entry, Table, read_table, write_table

START = """
import sys
sys.path.insert(0, sys.argv[1])
import interpreter
interpreter.install()
from vllm_puzzle.bench import ffn_tuning
from vllm_puzzle.kernels import ffn
if sys.argv[2] == "broken":  # a configuration that computes something else must not get into a table
    plain = ffn.gate_up_silu
    def gate_up_silu(x, weight, *, config=None, **arguments):
        result = plain(x, weight, config=config, **arguments)
        return result * 2 if config.tile == "skinny-16" else result
    ffn.gate_up_silu = gate_up_silu
sys.exit(ffn_tuning.main(sys.argv[3:]))
"""


def tune(folder: Path, state: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    kernels = Path(__file__).parents[1] / "kernels"
    command = [sys.executable, "-P", "-c", START, str(kernels), state, "--out", str(folder), *arguments]
    done = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done


@pytest.mark.slow
def test_a_table_grows_by_what_is_measured_and_leaves_out_what_is_wrong(tmp_path: Path) -> None:
    shape = ("--device", "cpu", "--shape", "96,64")
    tune(tmp_path, "right", *shape, "--tokens", "1", "--kind", "bf16", "--kind", "fp8", "--kind", "fp8-token")
    path = tmp_path / "ffn-cpu.json"
    table = read_table(path)
    assert table.device == "cpu" and {"torch", "triton", "cuda"} == set(table.versions)
    measured = {(entry.op, entry.kind, entry.m, entry.n, entry.k) for entry in table.entries}
    sizes = {"gate_up": (96, 64), "down": (64, 96)}
    assert measured == {(op, kind, 1, *size) for op, size in sizes.items() for kind in ("bf16", "fp8", "fp8-token")}
    assert all(min(entry.ours_us, entry.stock_us, entry.fallback_us) > 0 for entry in table.entries)
    broken = tune(tmp_path, "broken", *shape, "--tokens", "2", "--kind", "bf16", "--op", "gate_up")
    assert "Config(tile='skinny-16', splits=1): ValueError: found an error of" in broken.stderr
    (added,) = (entry for entry in read_table(path).entries if entry.m == 2)
    assert added.config == Config("skinny-64")
    assert len(read_table(path).entries) == len(table.entries) + 1


def test_entries_of_other_versions_are_not_mixed_in(tmp_path: Path) -> None:
    path = tmp_path / "ffn-cpu.json"
    old = Entry("down", "bf16", 1, 64, 96, Config("skinny-16"), 1, 2, 2)
    new = Entry("down", "bf16", 4, 64, 96, Config("skinny-16"), 1, 2, 2)
    write_table(path, Table("cpu", {"triton": "0.1"}, (old,)))
    assert ffn_tuning.merged(path, "cpu", [new]).entries == (new,)
    write_table(path, Table("cpu", ffn_tuning.merged(path, "cpu", []).versions, (old,)))
    assert ffn_tuning.merged(path, "cpu", [new]).entries == (old, new)


def test_the_fastest_run_that_works_wins(capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> float:
        raise RuntimeError("no\nsuch kernel")

    assert ffn_tuning.fastest("here", {"slow": lambda: 3.0, "bad": fails, "fast": lambda: 2.0}) == ("fast", 2.0)
    assert capsys.readouterr().err == "here, bad: RuntimeError: no such kernel\n"
    assert ffn_tuning.fastest("here", {"bad": fails}) is None


def test_without_a_gpu_it_says_so_and_measures_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ffn_tuning.main(["--out", str(tmp_path), "--device", "cpu"]) == 1
    assert "found a cpu device, allowed: an NVIDIA GPU of compute capability 9.x" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
