"""The cost bench does the work it times, and its recorded numbers hold what the README says of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from vllm_puzzle.bench import thinking_cost

RECORDED = Path(thinking_cost.__file__).parent / "results" / "thinking-cost-cpu.json"


@pytest.mark.parametrize("name", thinking_cost.PLANS)
def test_half_of_the_requests_are_followed_and_every_token_is_counted(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    holders = []

    class Kept(thinking_cost.ThinkingHolder):
        def __init__(self, *args: object) -> None:
            super().__init__(*args)  # type: ignore[arg-type]
            holders.append(self)

    monkeypatch.setattr(thinking_cost, "ThinkingHolder", Kept)
    monkeypatch.setattr(thinking_cost, "REQUESTS", 6)
    monkeypatch.setattr(thinking_cost, "STEPS", 3)
    times = thinking_cost.v1_step_us(thinking_cost.PLANS[name], 70, is_stock=False)
    rows = list(holders[0].rows.values())
    assert len(times) == 3
    assert len(rows) == (0 if name == "none" else 3)
    # Neither a loop nor the budget ends these thoughts: all of them is work.
    assert {row.num_seen for row in rows} <= {70 + 3 + 5}
    assert all((row.machine.num_thinking, row.machine.forced) == (row.num_fed, None) for row in rows)


def test_vllms_own_holder_follows_the_same_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thinking_cost, "REQUESTS", 6)
    monkeypatch.setattr(thinking_cost, "STEPS", 3)
    assert len(thinking_cost.v1_step_us(thinking_cost.PLANS["half, budget"], 70, is_stock=True)) == 3


def test_the_recorded_run_has_every_row_and_the_cost_does_not_grow_with_length() -> None:
    rows = {
        (row["class"], row["limits"], row["output_tokens"]): row["median_us"]
        for row in json.loads(RECORDED.read_text())["rows"]
        if row["runner"] == "v1"
    }
    assert len(rows) == len(thinking_cost.LENGTHS) * (2 * len(thinking_cost.PLANS) - 1)
    first, *_, last = thinking_cost.LENGTHS
    for limits in thinking_cost.PLANS:
        assert rows["puzzle", limits, last] < 2 * rows["puzzle", limits, first]
    assert rows["vllm", "half, budget", last] > 100 * rows["puzzle", "half, budget", last]
