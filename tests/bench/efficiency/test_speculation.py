"""Acceptance of speculative decoding: from the server's counters, over a run and by category, in closed form."""

from __future__ import annotations

import pytest
from virtual_runs import arm_of, finished, question, steps
from vllm_puzzle.bench.efficiency.arm import CLOSED, Load
from vllm_puzzle.bench.efficiency.mock import Mock
from vllm_puzzle.bench.efficiency.mock_behaviour import Behaviour
from vllm_puzzle.bench.efficiency.run import Setup
from vllm_puzzle.bench.efficiency.server_facts import samples
from vllm_puzzle.bench.efficiency.speculation import Acceptance, acceptance, difference

ACCEPT = (0.75, 0.5, 0.25)
FOUR = Load(CLOSED, concurrency=4)
# As vLLM 0.32 prints them, of two engines.
PAGE = """\
# HELP vllm:spec_decode_num_drafts_total Number of spec decoding drafts.
# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{engine="0",model_name="m"} 100.0
vllm:spec_decode_num_drafts_total{engine="1",model_name="m"} 60.0
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="m"} 200.0
vllm:spec_decode_num_draft_tokens_total{engine="1",model_name="m"} 120.0
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="m"} 90.0
vllm:spec_decode_num_accepted_tokens_total{engine="1",model_name="m"} 70.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="0"} 60.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="1",model_name="m",position="0"} 50.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="1"} 30.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="1",model_name="m",position="1"} 20.0
vllm:spec_decode_num_drafts_created{engine="0",model_name="m"} 1.7e+09
"""


def test_engines_are_summed_and_quotients_are_those_of_vllm() -> None:
    found = acceptance(samples(PAGE))
    assert found == Acceptance(160.0, 320.0, 160.0, (110.0, 50.0))
    assert (found.length, found.rate) == (2.0, 0.5)
    assert found.to_object()["rate_by_position"] == [110 / 160, 50 / 160]


def test_what_was_drafted_before_the_run_does_not_count() -> None:
    before = samples(PAGE)
    after = samples(PAGE.replace(" 100.0", " 300.0").replace(" 90.0", " 590.0").replace(" 60.0", " 160.0"))
    found = difference(before, after)
    assert found is not None
    # Drafts 100 and 60 became 300 and 160, accepted 90 became 590; the first position 60 became 160.
    assert (found.drafts, found.accepted, found.by_position) == (300.0, 500.0, (100.0, 0.0))


def test_a_server_without_speculation_or_that_started_anew_tells_nothing() -> None:
    assert acceptance(samples("vllm:num_requests_running 0\n")) is None
    assert difference(samples(PAGE), samples(PAGE.replace(" 100.0", " 1.0").replace(" 60.0", " 1.0"))) is None
    assert finished([question("1")], FOUR).summary["speculation"] is None


@pytest.mark.parametrize("earlier", [0, 3])
def test_a_run_tells_length_and_rate_by_position_and_by_category(earlier: int) -> None:
    mock = Mock(Behaviour(accept=ACCEPT))
    for _ in range(earlier):
        finished([question("before", steps(40))], FOUR, mock=mock)
    questions = [question(f"{task}{index}", steps(8), task=task) for task in ("code", "prose") for index in range(5)]
    run = finished(questions, FOUR, mock=mock, setup=Setup(per_task=2))
    found = run.summary["speculation"]
    # 12 tokens a reply: 8 of thought, the marker, two of the answer, the end.
    assert found["drafts"] == pytest.approx(10 * 12 / 2.5)
    assert (found["length"], found["rate"]) == (pytest.approx(2.5), pytest.approx(0.5))
    assert found["rate_by_position"] == pytest.approx(list(ACCEPT))
    # Two questions of each category once more, by themselves.
    assert set(found["by_task"]) == {"code", "prose"}
    for part in found["by_task"].values():
        assert part["drafts"] == pytest.approx(2 * 12 / 2.5) and part["length"] == pytest.approx(2.5)
    assert len(run.records) == 10, "they are no part of what is measured"
    assert arm_of().name == run.summary["arm"]
