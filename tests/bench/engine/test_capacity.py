"""The committed KV capacities are those that vLLM's planner gives now, and say where the papers' figures differ."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import pytest
from vllm_puzzle.bench.engine import capacity, capacity_papers

COMMITTED = json.loads(capacity.RESULTS.read_text())


@lru_cache(maxsize=1)
def paper_rows() -> list[dict[str, Any]]:
    return capacity_papers.paper_rows()


def test_the_committed_rows_are_what_the_planner_gives() -> None:
    assert COMMITTED["schema"] == capacity.SCHEMA
    assert COMMITTED["suites"] == capacity.capacity_rows(capacity.CASES)
    assert COMMITTED["papers"] == paper_rows()


def case_of(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[key] for key in ("model", "card", "max_model_len", "max_num_batched_tokens", "is_async"))


def test_a_committed_admission_is_counted_again() -> None:
    (row,) = (row for row in COMMITTED["admission"] if row["card"] == "H100" and row["model"] == capacity_papers.PUZZLE)
    assert capacity_papers.admission_row(*case_of(row)) == row


@pytest.mark.parametrize("row", COMMITTED["admission"], ids=lambda row: "-".join(map(str, case_of(row))))
@pytest.mark.parametrize("name", ["ours", "stock"])
def test_a_cache_holds_what_decodes_beside_one_request_at_its_largest(row: dict[str, Any], name: str) -> None:
    record = capacity.find(row["model"]).record()
    available = int(row["exact"] * capacity_papers.least_bytes(record, setup_of(row)))
    plan = capacity_papers._capacity(record, available, setup_of(row), is_stock=name == "stock")
    # `exact` is rounded to a hundredth of a request, which may be one request more or less.
    assert (available - plan.bytes_per_request) // plan.decoding_bytes <= row[f"{name}_held"]
    assert row[f"{name}_held"] <= available // plan.decoding_bytes + 1
    assert row[f"{name}_reported"] < row[f"{name}_held"] + 1


def setup_of(row: dict[str, Any]) -> Any:
    return capacity_papers.CacheSetup(
        row["max_model_len"], row["max_num_batched_tokens"], "fp8", is_async=row["is_async"]
    )


def half_a_digit(row: dict[str, Any]) -> float:
    """Half a unit of the last digit that the paper prints, and of the GiB that it starts from."""
    if row["unit"] == "tokens" and row["paper"] % 1000 == 0:
        return 500
    _, _, decimals = repr(row["paper"]).partition(".")
    of_bytes = row["exact"] * 0.05 / row["of_gib"] if "of_gib" in row else 0
    return 0.5 / 10 ** len(decimals) + of_bytes


@pytest.mark.parametrize("row", COMMITTED["papers"], ids=lambda row: row["figure"])
def test_a_figure_is_reproduced_as_printed_or_the_row_says_why_not(row: dict[str, Any]) -> None:
    is_reproduced = abs(row.get("exact", row["ours"]) - row["paper"]) <= half_a_digit(row)
    assert is_reproduced == (not row["paper_differs"])


@pytest.mark.parametrize("row", COMMITTED["papers"], ids=lambda row: row["figure"])
def test_where_the_planner_needs_a_percent_more_the_row_says_why(row: dict[str, Any]) -> None:
    exact = row.get("exact", row["ours"])
    assert abs(row["ours"] / exact - 1) < 0.01 or row["why"]


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
