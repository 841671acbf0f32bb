"""Recorded rows become a table, and its reader enables ours where it was measured to be no slower; the suite's step."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import triton
from vllm_puzzle.bench.kernel.attention_tuning import main
from vllm_puzzle.bench.kernel.cases import parse_case
from vllm_puzzle.bench.kernel.record import OURS, Row, write_csv
from vllm_puzzle.kernels.attention_table import Choice, choose, table_path

H100 = "NVIDIA H100 80GB HBM3"
SETTING = {
    "name": H100, "commit": "f00d", "torch": "2.11.0", "triton": triton.__version__, "cuda": "12.9", "vllm": "0.32.0",
    "memory_bytes": 85520809984, "l2_bytes": 52428800,
}  # fmt: skip
TRITON_ONLY = {"vllm_triton": 10.0}
Captured = pytest.CaptureFixture[str]


def name(batch: str = "16q1s8k", window: str = "w128", dim: int = 64, cache: str = "fp8", op: str = "decode") -> str:
    return f"{op}-{batch}-{window}-h64kv8d{dim}-{cache}"


def rows(case: str, ours: float | str, **stock: float | str) -> list[Row]:
    """Our row and vLLM's: a median, or the status of a row without one."""
    op = parse_case(case).op
    return [
        Row(case, op, implementation, "ok", p50_us=found)
        if isinstance(found, float)
        else Row(case, op, implementation, found, "a reason")
        for implementation, found in {OURS: ours, **stock}.items()
    ]


def record(path: Path, found: Sequence[Row], **changes: Any) -> Path:
    with path.open("w", newline="") as file:
        write_csv(file, found, SETTING | changes)
    return path


def write(folder: Path, *found: list[Row], status: int = 0) -> Path:
    path = record(folder / "rows.csv", list(chain.from_iterable(found)))
    assert main(["--out", str(folder / "tables"), str(path)]) == status
    return folder / "tables"


@pytest.mark.parametrize(
    ("ours", "stock", "choice"),
    [
        (9.0, TRITON_ONLY, Choice(False)),
        (10.0, TRITON_ONLY, Choice(False)),
        (10.1, TRITON_ONLY, None),
        # The best of vLLM's counts, whichever it is, of those that were timed.
        (9.0, {"vllm_triton": 12.0, "vllm_triton_bf16q": 8.9}, None),
        (9.0, {"vllm_triton": 12.0, "flash_attention_3": 8.9}, None),
        (9.0, {"vllm_triton": "absent", "flash_attention_3": 9.5}, Choice(False)),
        # Others than vLLM's do not.
        (9.0, {"vllm_triton": 12.0, "flashinfer": 3.0}, Choice(False)),
    ],
)
def test_a_row_enables_ours_where_it_is_no_slower_than_vllms_best(
    tmp_path: Path, ours: float, stock: dict[str, float | str], choice: Choice | None
) -> None:
    folder = write(tmp_path, rows(name(), ours, **stock))
    assert choose(H100, 64, "e4m3", 128, folder) == choice
    # Nothing was measured of these.
    others = [(64, "e4m3", 129), (128, "e4m3", 128), (64, "bfloat16", 128)]
    assert [choose(H100, *other, folder) for other in others] == [None] * 3


def test_a_slower_batch_of_any_kind_keeps_its_own_window_off(tmp_path: Path) -> None:
    faster = [rows(name(window=window, cache="bf16"), 9.0, **TRITON_ONLY) for window in ("w128", "w512", "w1k")]
    slower = rows(name("q4ks16k", "w1k", cache="bf16", op="prefill"), 10.1, **TRITON_ONLY)
    folder = write(tmp_path, *faster, slower)
    found = [choose(H100, 64, "bfloat16", window, folder) for window in (128, 300, 512, 600, 1024)]
    assert found == [Choice(False)] * 3 + [None] * 2


@pytest.mark.parametrize("status", ["wrong", "failed"])
@pytest.mark.parametrize("broken", [name(window="w512"), "rope_kv_write-q1-h64kv8d64-fp8"])
def test_an_op_that_is_wrong_keeps_its_head_size_and_cache_out(
    tmp_path: Path, capsys: Captured, broken: str, status: str
) -> None:
    around = [
        rows(name(window=window, cache=c), 9.0, **TRITON_ONLY) for window in ("w128", "w1k") for c in ("fp8", "bf16")
    ]
    folder = write(tmp_path, *around, rows(broken, 9.0, **TRITON_ONLY))
    assert choose(H100, 64, "e4m3", 512, folder) == Choice(False)
    write(tmp_path, *around, rows(broken, status, **TRITON_ONLY))
    assert f"{broken}: ours {status} (a reason): nothing of D 64, e4m3\n" in capsys.readouterr().out
    assert [choose(H100, 64, "e4m3", window, folder) for window in (128, 512, 1024)] == [None] * 3
    assert choose(H100, 64, "bfloat16", 512, folder) == Choice(False)
    # With nothing else measured, the older table is emptied all the same.
    write(tmp_path, rows(broken, status), status=1)
    assert choose(H100, 64, "bfloat16", 512, folder) is None


def test_a_row_that_cannot_be_an_entry_is_told(tmp_path: Path, capsys: Captured) -> None:
    lonely, alone = name("2q1s4k"), name("q4ks16k", "w512", op="prefill")
    folder = write(
        tmp_path,
        rows(name(), 9.0, **TRITON_ONLY),
        rows(lonely, 9.0, vllm_triton="absent"),
        rows(alone, 9.0, **TRITON_ONLY),
        rows(name(window="full"), 9.0, **TRITON_ONLY),
        rows(name("128q1s8k"), "skipped"),
    )
    assert capsys.readouterr().out.splitlines() == [
        f"attention_tuning: {lonely}: left out, no median of vLLM's (vllm_triton absent: a reason)",
        f"attention_tuning: {alone}: left out, decode was not measured at this window",
        f"attention_tuning: {table_path(H100).name}: 1 entries; vLLM's measured: vllm_triton in 1, "
        "vllm_triton_bf16q in 0, flash_attention_3 in 0",
    ]
    table = json.loads(table_path(H100, folder).read_text())
    assert table == {
        "device": H100,
        "versions": {key: SETTING[key] for key in ("triton", "torch", "cuda", "vllm")},
        "commit": "f00d",
        "card": {"memory_bytes": 85520809984, "l2_bytes": 52428800},
        "baselines": {"vllm_triton": 1, "vllm_triton_bf16q": 0, "flash_attention_3": 0},
        "entries": [
            {"head_dim": 64, "cache": "e4m3", "window": 128, "batch": "16q1s8k", "ours_us": 9.0, "stock_us": 10.0,
             "fused_us": None},
        ],
    }  # fmt: skip


def test_without_a_baseline_or_a_window_no_table_is_written(tmp_path: Path, capsys: Captured) -> None:
    folder = write(tmp_path, rows(name(), 9.0), status=1)
    write(tmp_path, rows("gate_up-m1-d256-i384-bf16", 9.0), rows(name(), "skipped"))
    assert not folder.exists() and capsys.readouterr().out.count("no table written: found no ") == 2
    assert choose(H100, 64, "e4m3", 128, folder) is None


def test_parts_of_one_measurement_are_joined_and_others_left_out(tmp_path: Path, capsys: Captured) -> None:
    def run(*files: Path) -> tuple[Choice | None, Choice | None]:
        assert main(["--out", str(tmp_path), *map(str, files)]) == 0
        return choose(H100, 64, "e4m3", 128, tmp_path), choose(H100, 128, "e4m3", 128, tmp_path)

    first = record(tmp_path / "a.csv", rows(name(), 9.0, **TRITON_ONLY))
    second = record(tmp_path / "b.csv", rows(name(dim=128), 9.0, **TRITON_ONLY) + rows(name(), 11.0, **TRITON_ONLY))
    assert run(first, second) == (Choice(False), Choice(False))
    assert run(second, first) == (None, Choice(False))
    wrong = record(tmp_path / "c.csv", rows(name(), "wrong"))
    assert run(first, second, wrong) == (None, Choice(False))
    for number, changes in enumerate(({"commit": "beef"}, {"name": "NVIDIA H200"}, {"vllm": "none"})):
        other = record(tmp_path / f"{number}.csv", rows(name(dim=128), 9.0, **TRITON_ONLY), **changes)
        assert run(first, other) == (Choice(False), None)
        assert f"{number}.csv: left out, of another measurement (" in capsys.readouterr().out


def test_a_file_of_something_else_is_one_line(tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "other.csv").write_text("x,y\n1,2\n")
    record(tmp_path / "nameless.csv", rows(name(), 9.0), name="", commit="")
    for file, message in (
        ("none.csv", "found No such file or directory"),
        ("other.csv", "found a line that is no row ('case')"),
        ("nameless.csv", "found no name, commit"),
    ):
        assert main(["--out", str(tmp_path), str(tmp_path / file)]) == 1
        shown = capsys.readouterr().err
        assert shown == f"attention_tuning: {tmp_path / file}: {message}, allowed: a file of `bench kernels --csv`\n"


# A Python that notes what it is asked for, and writes the file that the step is for. Status 3 where FAILS is in it.
PYTHON = """#!/bin/bash
echo "$*" >>"$CALLS"
[[ $* == *"bench.command kernels"* ]] && touch "$OUT/kernels-card-b.csv"
[[ -n $FAILS && $* == *"$FAILS"* ]] && exit 3
[[ $* == *attention_tuning* ]] && mkdir -p "$5" && echo {} >"$5/window-attention-card.json"
exit 0
"""


@pytest.mark.parametrize("fails", ["", "bench.command kernels", "attention_tuning"])
def test_the_suite_writes_the_table_after_the_benchmark_and_copies_it(root: Path, tmp_path: Path, fails: str) -> None:
    calls, python, out = tmp_path / "calls", tmp_path / "python", tmp_path / "out"
    (tmp_path / "bench").mkdir()
    suite = shutil.copy(root / "bench" / "gpu_suite.sh", tmp_path / "bench")  # its tables are this folder's
    python.write_text(PYTHON)
    python.chmod(0o755)
    settings = {"PYTHON": python, "CALLS": calls, "OUT": out, "FAILS": fails, "LIMIT": 60, "COMMIT": "f00"}
    environment = os.environ | {key: str(value) for key, value in settings.items()}

    def run(steps: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", suite], env=environment | {"STEPS": steps}, capture_output=True, text=True, timeout=60
        )

    done = run("attention-table")
    assert done.returncode == 1 and f"attention-table: found no {out}/kernels-*.csv, allowed:" in done.stdout
    older = out / "kernels-card-a.csv"
    older.touch()
    os.utime(older, (0, 0))
    done = run("bench attention-table")
    assert done.returncode == (1 if fails else 0), done.stdout
    asked = [line for line in calls.read_text().splitlines() if "-m vllm_puzzle" in line]
    assert "bench.command kernels" in asked[0]
    files = f"{out}/kernels-card-b.csv {older}"  # the newest first
    assert asked[1:] == [
        f"-P -m vllm_puzzle.bench.kernel.attention_tuning --out {tmp_path}/kernels/tables {files}",
    ]
    assert (out / "window-attention-card.json").is_file() == (fails != "attention_tuning")
    assert ("attention-table: status 3" in done.stdout) == (fails == "attention_tuning")
