"""Each request's plan and watch in the API process, where a running server does not show them one by one."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from vllm_puzzle.kernels.thinking import LoopRule, ThinkingLimits, ThinkingMarkers
from vllm_puzzle.serving.dial.resolve import Effective
from vllm_puzzle.serving.dial.turn import TURN, Turn
from vllm_puzzle.serving.thinking_engine import ThinkingServer, WatchedEngine
from vllm_puzzle.serving.thinking_plan import PLAN_KEY, limits_of
from vllm_puzzle.serving.thinking_v1 import CLOSED_KEY
from vllm_puzzle.serving.thinking_watch import RequestWatch, SequenceWatch, Watches

OPEN, SHUT = 1, 2
MARKERS = ThinkingMarkers((OPEN,), ((SHUT,),), (SHUT,))
PROMPT = [9, OPEN]


def params(**fields: Any) -> Any:
    """The fields of vLLM's SamplingParams that are read or written."""
    unset = {"extra_args": None, "thinking_token_budget": None, "max_tokens": None, "repetition_detection": None}
    return SimpleNamespace(**{**unset, **fields})


def server() -> ThinkingServer:
    return ThinkingServer(None, MARKERS)


def test_a_clients_own_plan_is_none() -> None:
    asked = params(extra_args={PLAN_KEY: {"budget": 10**9}, CLOSED_KEY: "now", "other": 1}, thinking_token_budget=5)
    watch = server().begin(asked, "r", Turn(""))
    assert watch is not None and watch.limits.budget == 5
    assert set(asked.extra_args) == {PLAN_KEY, "other"}
    assert limits_of(asked) == ThinkingLimits(5)
    assert asked.thinking_token_budget is None


def test_a_server_without_markers_leaves_requests_alone() -> None:
    asked = params(extra_args={"other": 1}, thinking_token_budget=5)
    turn = Turn("")
    assert ThinkingServer(None, None).begin(asked, "r", turn) is None
    assert (asked.extra_args, asked.thinking_token_budget, turn.is_counted) == ({"other": 1}, 5, False)


def test_a_clients_loop_rule_is_for_thoughts_and_one_copy_later_for_the_reply() -> None:
    from vllm.sampling_params import RepetitionDetectionParams

    rule = RepetitionDetectionParams(min_pattern_size=0, max_pattern_size=1000, min_count=3)
    asked = params(repetition_detection=rule)
    server().begin(asked, "r", Turn(""))
    assert limits_of(asked) == ThinkingLimits(None, 0, LoopRule(1, 64, 3))
    assert (asked.repetition_detection.min_count, rule.min_count) == (4, 3), "the request's own object stays"


def watched(tokens: list[int], reason: str | None = None, **facts: Any) -> SequenceWatch:
    watch = RequestWatch(MARKERS, ThinkingLimits(3), **facts)
    watch.observe(0, PROMPT, tokens, reason)
    return watch.sequences[0]


@pytest.mark.parametrize(
    ("tokens", "reason", "expected"),
    [
        ([5], None, None),
        ([5], "length", "length"),
        ([5], "stop", "natural"),
        ([5, SHUT, 7], "stop", "natural"),
        ([5, SHUT, 7], "length", "natural"),
        ([5, 6, 7, SHUT, 8], "stop", "budget"),
        ([5, 6, 7], "length", "budget"),  # cut where the end was due
    ],
)
def test_why_a_thought_ended(tokens: list[int], reason: str | None, expected: str | None) -> None:
    assert watched(tokens, reason).end_reason == expected


def test_a_thought_that_was_switched_off_or_ended_by_a_user_says_so() -> None:
    watch = RequestWatch(MARKERS, ThinkingLimits(), is_off=True)
    watch.observe(0, [OPEN, SHUT], [7], "stop")
    assert watch.sequences[0].end_reason == "off"
    watch = RequestWatch(MARKERS, ThinkingLimits())
    watch.observe(0, PROMPT, [5], None)
    watch.observe(1, PROMPT, [5, SHUT], None)
    watch.observe(2, PROMPT, [5], None)
    before = watch.without_thought()
    watch.observe(2, PROMPT, [SHUT], None)  # the end is here before the sampler's answer
    watch.end_by_user(before)
    for index in range(4):  # the last one begins only now
        watch.observe(index, PROMPT, [6, SHUT, 7], "stop")
    assert [watch.sequences[index].end_reason for index in range(4)] == ["user", "natural", "user", "user"]


def test_counts_along_the_way_are_those_of_the_tokens_so_far() -> None:
    sequence = watched([5, 6, SHUT, 7], keeps_counts=True)
    assert [sequence.thinking_tokens_at(n) for n in range(6)] == [0, 1, 2, 2, 2, 2]
    assert watched([5, 6, SHUT]).thinking_tokens_at(1) == 2  # not kept: the latest


def test_a_reply_cut_within_a_forced_end_has_thought_no_more_than_its_budget() -> None:
    long = ThinkingMarkers((OPEN,), ((SHUT,),), (SHUT, 3, 4))
    watch = RequestWatch(long, ThinkingLimits(2), keeps_counts=True)
    watch.observe(0, PROMPT, [5, 6, SHUT, 3], "length")
    sequence = watch.sequences[0]
    assert (sequence.num_thinking, sequence.num_answer, sequence.end_reason) == (2, 0, "budget")
    assert [sequence.thinking_tokens_at(n) for n in range(1, 5)] == [1, 2, 2, 2]
    watch = RequestWatch(long, ThinkingLimits(0))
    watch.observe(0, PROMPT, [SHUT, 3], "length")
    assert (watch.sequences[0].first_thinking, watch.sequences[0].num_thinking) == (None, 0)


def test_the_first_answer_token_is_no_part_of_a_marker_or_header() -> None:
    harmony = ThinkingMarkers((5, 6, 8), ((SHUT,),), (SHUT, 3), headers=((3,), (5, 7, 8)))
    watch, times = RequestWatch(harmony, ThinkingLimits()), []
    for token in (5, 6, 8, 90, SHUT, 3, 5, 7, 8, 91):
        watch.observe(0, [9], [token], None)
        times.append((watch.sequences[0].first_thinking is not None, watch.sequences[0].first_answer is not None))
    assert times == [(False, False)] * 3 + [(True, False)] * 6 + [(True, True)]


def test_each_sequence_finishes_once() -> None:
    finished: list[SequenceWatch] = []
    watch = RequestWatch(MARKERS, ThinkingLimits(), on_finish=finished.append)
    for index, reason in ((0, None), (0, "stop"), (0, "stop"), (1, "abort")):
        watch.observe(index, PROMPT, [5], reason)
    assert [(one.finish_reason, one.num_thinking) for one in finished] == [("stop", 3), ("abort", 1)]


def test_a_request_that_cannot_be_watched_ends_no_other(caplog: pytest.LogCaptureFixture) -> None:
    watches = Watches()
    watches.running = {"bad": RequestWatch(MARKERS, ThinkingLimits()), "good": RequestWatch(MARKERS, ThinkingLimits())}
    watches.observe("bad", "", 0, PROMPT, 5, None)  # no list of tokens
    watches.observe("good", "", 0, PROMPT, [5], None)
    watches.observe("nobody's", "", 0, PROMPT, [5], None)
    assert set(watches.running) == {"good"} and watches.running["good"].sequences[0].num_thinking == 1
    assert "request bad is no longer watched" in caplog.text


class Engine:
    """An engine client whose requests yield two outputs, and whose workers answer as told."""

    def __init__(self, answers: list[list[str]]) -> None:
        self.answers, self.closed = answers, False
        self.asked: list[list[str]] = []
        self.output_processor = SimpleNamespace(external_req_ids={"r": ["r-1", "r-2"]})
        self.seen: dict[str, Any] = {}

    async def generate(self, prompt: Any, sampling_params: Any, request_id: str, **kwargs: Any) -> Any:
        self.seen = kwargs
        try:
            yield 1
            yield 2
        finally:
            self.closed = True

    async def collective_rpc(self, name: str, args: tuple[list[str]]) -> list[list[str]]:
        assert name == "puzzle_end_thinking"
        self.asked.append(args[0])
        return [self.answers.pop(0)]


def test_a_request_is_known_while_it_runs_and_a_caller_that_leaves_ends_it() -> None:
    async def leave() -> None:
        engine = Engine([])
        known = server()
        watched = WatchedEngine(engine, known)
        outputs = watched.generate("hi", params(), "r")
        assert await anext(outputs) == 1
        assert set(known.watches.running) == {"r"}
        await outputs.aclose()
        assert not known.watches.running and engine.closed
        assert watched.answers == []  # everything else is the client's own

    asyncio.run(leave())


def test_a_waiting_request_is_asked_for_until_it_runs_or_is_gone() -> None:
    async def ends(answers: list[list[str]], is_running: bool) -> tuple[bool, list[list[str]]]:
        engine = Engine(answers)
        known = ThinkingServer(engine, MARKERS)
        if is_running:
            known.begin(params(), "r", Turn(""))
        return await known.end_thinking("r"), engine.asked

    both = ["r-1", "r-2"]
    assert asyncio.run(ends([[], ["r-2"], [], ["r-1"]], True)) == (True, [both, both, ["r-1"], ["r-1"]])
    assert asyncio.run(ends([], False)) == (False, [])


@pytest.mark.parametrize(("given", "expected"), [({}, True), ({"reasoning_ended": False}, False)])
def test_where_a_grammar_starts_is_told_where_the_api_does_not(given: dict[str, Any], expected: bool) -> None:
    def parser(**kwargs: Any) -> Any:
        assert kwargs == {"chat_template_kwargs": {}}
        return SimpleNamespace(is_reasoning_end=lambda ids: ids == [OPEN, SHUT])

    async def run() -> dict[str, Any]:
        engine = Engine([])
        TURN.set(Turn("", effective=Effective()))
        known = {"reasoning_parser_kwargs": {"chat_template_kwargs": {}}, **given}
        async for _ in WatchedEngine(engine, server(), parser).generate(
            {"prompt_token_ids": [OPEN, SHUT]}, params(), "r", **known
        ):
            pass
        return engine.seen

    assert asyncio.run(run())["reasoning_ended"] is expected
