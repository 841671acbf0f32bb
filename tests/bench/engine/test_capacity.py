"""The committed KV capacities are those that vLLM's planner gives now, and say where the papers' figures differ."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import pytest
from vllm_puzzle.bench.engine import capacity, capacity_papers

COMMITTED = json.loads(capacity.RESULTS.read_text())
# Rounded as printed: half a unit of the last digit.
PRINTED = {"bytes": 0.5, "tokens": 500, "requests": 0.5, "MiB": 0.5, "MB": 0.05}


@lru_cache(maxsize=1)
def paper_rows() -> list[dict[str, Any]]:
    return capacity_papers.paper_rows()


def test_the_committed_rows_are_what_the_planner_gives() -> None:
    assert COMMITTED["schema"] == capacity.SCHEMA
    assert COMMITTED["suites"] == capacity.capacity_rows(capacity.CASES)
    assert COMMITTED["papers"] == paper_rows()


def test_one_committed_admission_is_counted_again() -> None:
    (row,) = (r for r in COMMITTED["admission"] if r["max_num_batched_tokens"] == 16_384 and not r["is_async"])
    record = capacity.find(capacity_papers.PUZZLE).record()
    setup = capacity_papers.CacheSetup(capacity_papers.RTX_LENGTH, 16_384, "fp8", is_async=False)
    assert capacity_papers.held_requests(record, setup, capacity_papers.RTX_BYTES) == row["ours_held"]


@pytest.mark.parametrize("row", COMMITTED["papers"], ids=lambda row: row["figure"])
def test_a_figure_is_reproduced_as_printed_or_the_row_says_why_not(row: dict[str, Any]) -> None:
    found = row.get("exact", row["ours"])
    assert abs(found - row["paper"]) <= PRINTED[row["unit"]] or row["why"], row


def test_every_table_has_a_line_per_row() -> None:
    tables = {
        "suites": capacity.suite_table,
        "papers": capacity_papers.paper_table,
        "admission": capacity_papers.admission_table,
    }
    for name, table in tables.items():
        assert len(table(COMMITTED[name]).splitlines()) == len(COMMITTED[name]) + 2


def test_a_model_that_does_not_fit_says_so_and_has_no_capacity() -> None:
    case = capacity.CapacityCase("x", "gpt-oss-120b", "mxfp4", "bf16", "H100-80", 131_072, available_gib=0.25)
    (row,) = capacity.capacity_rows([case])
    assert "allowed: at least" in row["does_not_fit"] and "ours" not in row
    assert "does not fit" in capacity.suite_table([row])
