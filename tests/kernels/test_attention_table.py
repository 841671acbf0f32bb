"""Where our attention was measured to be no slower: the tables, and what no table says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import triton
from vllm_puzzle.kernels.attention_table import Choice, choose, table_path

H100 = "NVIDIA H100 80GB HBM3"


def entry(window: int, ours: float, stock: float, fused: float | None = None, **changes: Any) -> dict[str, Any]:
    found = {"head_dim": 64, "cache": "e4m3", "window": window, "batch": "64q1s8k"}
    return found | {"ours_us": ours, "stock_us": stock, "fused_us": fused} | changes


def write(folder: Path, entries: list[dict[str, Any]], **changes: Any) -> Path:
    table = {"device": H100, "versions": {"triton": triton.__version__}, "entries": entries} | changes
    table_path(H100, folder).write_text(json.dumps(table))
    return folder


SMALL = [entry(128, 9, 10, 8), entry(128, 50, 50, batch="1q8k")]
LARGE = [entry(1024, 20, 30, 21), entry(1024, 60, 80, batch="1q8k")]


@pytest.mark.parametrize(
    ("window", "entries", "choice"),
    [
        (128, SMALL, Choice(True)),
        (1024, LARGE, Choice(False)),
        (512, SMALL + LARGE, Choice(False)),  # one launch is slower at one of the two windows around
        (127, SMALL + LARGE, None),
        (1025, SMALL + LARGE, None),
        (128, [*SMALL, entry(128, 11, 10.9)], None),
        (128, [entry(128, 11, 10, 9)], Choice(True)),
        (128, [entry(128, 9, 10, 9, head_dim=128)], None),
        (128, [entry(128, 9, 10, 9, cache="bfloat16")], None),
    ],
)
def test_ours_is_chosen_where_no_batch_at_the_windows_around_is_slower(
    tmp_path: Path, window: int, entries: list[dict[str, Any]], choice: Choice | None
) -> None:
    assert choose(H100, 64, "e4m3", window, folder=write(tmp_path, entries)) == choice


@pytest.mark.parametrize("changes", [{"versions": {"triton": "2.1.0"}}, {"device": "NVIDIA H200"}])
def test_a_table_of_another_device_or_triton_says_nothing(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert choose(H100, 64, "e4m3", 128, folder=write(tmp_path, SMALL, **changes)) is None
    assert choose("NVIDIA L4", 64, "e4m3", 128, folder=tmp_path) is None


@pytest.mark.parametrize(
    "broken",
    [entry(128, 9, 10, cache="fp4"), entry(128, 0, 10), entry(128, 9, 10, warps=4), {"head_dim": 64}],
)
def test_a_table_that_cannot_be_read_is_named(tmp_path: Path, broken: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^kernel table window-attention-nvidia-h100-80gb-hbm3\.json: "):
        choose(H100, 64, "e4m3", 128, folder=write(tmp_path, [broken]))
