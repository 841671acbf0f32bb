"""Where our attention was measured to be no slower: the tables, and what no table says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from vllm_puzzle.kernels.attention_table import FOLDER, Row, choose

H100 = "NVIDIA H100 80GB HBM3"
ROWS = [
    {"head_dim": 64, "cache": "e4m3", "max_window": 1024, "max_fused_window": 256},
    {"head_dim": 128, "cache": "bfloat16", "max_window": 512},
]


def write(folder: Path, **changes: object) -> Path:
    table = {"device": H100, "measured": {"commit": "abc"}, "rows": ROWS} | changes
    (folder / "window_attention_h100.json").write_text(json.dumps(table))
    return folder


@pytest.mark.parametrize(
    ("case", "row"),
    [
        ((H100, 64, "e4m3", 128), Row(64, "e4m3", 1024, 256)),
        ((H100, 64, "e4m3", 1024), Row(64, "e4m3", 1024, 256)),
        ((H100, 64, "e4m3", 1025), None),
        ((H100, 64, "bfloat16", 128), None),
        ((H100, 128, "bfloat16", 512), Row(128, "bfloat16", 512)),
        (("NVIDIA H200", 64, "e4m3", 128), None),
    ],
)
def test_a_row_holds_for_its_device_head_size_cache_and_smaller_windows(
    tmp_path: Path, case: tuple[str, int, str, int], row: Row | None
) -> None:
    assert choose(*case, folder=write(tmp_path)) == row


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": [ROWS[0] | {"cache": "fp4"}]},
        {"rows": [ROWS[0] | {"max_window": "1024"}]},
        {"rows": [ROWS[0] | {"warps": 4}]},
        {"rows": [{"head_dim": 64}]},
    ],
)
def test_a_table_that_cannot_be_read_is_named(tmp_path: Path, changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"^kernel table window_attention_h100\.json: "):
        choose(H100, 64, "e4m3", 128, folder=write(tmp_path, **changes))


def test_the_tables_that_ship_can_be_read() -> None:
    assert choose("no such device", 64, "e4m3", 128, folder=FOLDER) is None
