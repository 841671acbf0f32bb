"""`vllm bench serve` and we say the same of the same requests, and the comparison can tell when tools do not."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hand_made import made
from processes import served
from vllm_puzzle.bench.efficiency import cross_check
from vllm_puzzle.bench.efficiency.cross_check import OURS, QUANTITIES, THEIRS, by_their_definitions, compared, ratio

POCKET = Path(cross_check.__file__).resolve().parents[2] / "model_configs" / "pocket" / "puzzle"
# The mock's times in seconds, far above what a busy machine adds to a chunk; tokens of every reply.
PREFILL, THINKING, ANSWERING, THOUGHT = 0.3, 0.04, 0.02, 12
LATE = 0.2  # of a time: what two cores with other tests on them add at most


@pytest.mark.slow
def test_vllms_tool_and_ours_measure_a_server_of_known_behaviour_alike(tmp_path: Path) -> None:
    settings = (f"prefill={PREFILL}", f"thinking_tpot={THINKING}", f"answer_tpot={ANSWERING}")
    settings += (f"thinking_tokens=[{THOUGHT},{THOUGHT}]",)
    out = tmp_path / "cross-check.json"
    with served(*settings) as (url, _):
        command = [sys.executable, "-P", "-m", "vllm_puzzle.bench.efficiency.cross_check", "--base-url", url]
        command += ["--model", "mock", "--tokenizer", str(POCKET), "--task", "repeat", "--num-prompts", "24"]
        command += ["--max-concurrency", "4", "--rounds", "1", "--nice", "-10", "--out", str(out)]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=300, env=os.environ | {"HF_HUB_OFFLINE": "1"}
        )
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    (whole,) = found["rounds"]
    assert whole[THEIRS]["requests"] == whole["ours_by_their_definitions"]["requests"] == 24
    assert whole[THEIRS]["output_tokens"] == whole["ours_by_their_definitions"]["output_tokens"]
    assert [row["quantity"] for row in found["rows"]] == list(QUANTITIES)
    for row in found["rows"]:
        assert abs(row["ratio"] - 1) < LATE, row
    # The mock sends the role when the prefill ends, a token's time before the first text: theirs counts it as a token.
    for column, first in ((THEIRS, PREFILL), (OURS, PREFILL + THINKING)):
        assert 0 <= whole[column]["ttft_mean"] - first < LATE * PREFILL, column
        assert ANSWERING < whole[column]["tpot_mean"] < THINKING * (1 + LATE), column
    assert "| ttft mean |" in done.stdout


def test_our_records_by_their_definitions_are_the_closed_form() -> None:
    # Sent at 1 and 2; first text after 0.5, the end after 4.5; 29 tokens each, one of which is the first.
    records = [made(sent=start, done=start + 4.5, first=start + 0.5, output_tokens=29) for start in (1.0, 2.0)]
    found = by_their_definitions(records)
    assert (found.requests, found.output_tokens) == (2, 58)
    assert found.request_throughput == 2 / 5.5 and found.output_throughput == 58 / 5.5
    assert found.ttft_mean == found.ttft_median == 0.5
    assert found.tpot_mean == found.tpot_median == 4 / 28


def test_a_difference_beyond_the_noise_of_the_rounds_is_told() -> None:
    def one(factor: float) -> dict[str, dict[str, float]]:
        values = dict.fromkeys(QUANTITIES, 2.0)
        return {THEIRS: values | {"ttft_mean": 2.0 * factor}, "ours_by_their_definitions": values, OURS: values}

    rows = {row["quantity"]: row for row in compared([one(1.10), one(1.12), one(1.11)])}
    assert not rows["ttft_mean"]["is_within_noise"] and rows["tpot_mean"]["is_within_noise"]
    assert all(row["is_within_noise"] for row in compared([one(0.9), one(1.12), one(1.0)]))


def test_the_interval_of_a_ratio_is_students() -> None:
    middle, low, high = ratio([2.0, 2.0 * math.e**2], [2.0, 2.0])
    # Logarithms 0 and 2: mean 1, standard error 1, t(0.975, 1) = 12.706.
    assert math.log(middle) == pytest.approx(1)
    assert (math.log(low), math.log(high)) == pytest.approx((1 - 12.7062, 1 + 12.7062), abs=1e-3)
    assert ratio([3.0], [2.0]) == (1.5, 0.0, math.inf)
