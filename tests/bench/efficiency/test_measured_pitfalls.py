"""Pitfalls of benchmarks of reasoning models that are made while measuring. In each test a common tool's way is wrong,
shown beside the right one. Virtual time, exact. Those of computing alone are in test_pitfalls.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median

import pytest
from virtual_runs import TICK, Finished, arm_of, asks_of, finished, question, steps
from vllm_puzzle.bench.efficiency.arm import CLOSED, CONSTANT, Arm, Load
from vllm_puzzle.bench.efficiency.command import run as run_command
from vllm_puzzle.bench.efficiency.mock import Mock
from vllm_puzzle.bench.efficiency.mock_behaviour import ANSWER, DROP, FINISH, ROLE, THINKING, Behaviour, Step
from vllm_puzzle.bench.efficiency.question import warm_up_list, work_list
from vllm_puzzle.bench.efficiency.record import CORRECT, EMPTY, NO_PARSE, TRUNCATED, WRONG
from vllm_puzzle.bench.efficiency.run import SALTED, WARM, Setup
from vllm_puzzle.bench.efficiency.tasks.registry import find_task
from vllm_puzzle.model_configs.schema import ConfigError

ONE = Load(CLOSED, concurrency=1)


def test_2_a_fixed_output_length_is_refused_wherever_it_is_asked_for(tmp_path: Path) -> None:
    for fields in ({"ignore_eos": True}, {"min_tokens": 100}, {"nvext": {"ignore_eos": True}}):
        with pytest.raises(ConfigError, match=r"ignore_eos|min_tokens"):
            arm_of(fields=fields)
        with pytest.raises(ConfigError, match=r"ignore_eos|min_tokens"):
            run_command(["--model", "m", "--extra-body", json.dumps(fields), "--out", str(tmp_path)])
    with pytest.raises(ConfigError, match="ignore_eos: found true"):
        run_command(["--model", "m", "--ignore-eos", "--out", str(tmp_path)])


def test_2_tokens_that_are_not_generated_are_seen_as_requests_that_are_served() -> None:
    # Half the thought at the same speed. Tokens per second cannot tell, requests per second can.
    long, short = (
        finished([question(f"q{index}", steps(thought, prefill=0)) for index in range(8)], ONE) for thought in (97, 41)
    )
    rates = [run.metrics["output_throughput"] for run in (long, short)]
    assert rates[0] == pytest.approx(rates[1], rel=0.03)
    ratio = short.metrics["request_throughput"] / long.metrics["request_throughput"]
    assert ratio == pytest.approx((2 * 97 + 4) / (2 * 41 + 4), rel=1e-14)


def test_3_a_request_without_an_answer_waits_for_ever_and_counts_as_wrong() -> None:
    # One in two thinks until max_tokens, or is broken off. The other half is fast and right.
    cut = [*steps(40)[:41], Step(0.0, FINISH, "length")]
    broken = [*steps(3)[:4], Step(0.0, DROP)]
    scripts = [steps(1), cut, steps(1), broken, steps(1), steps(60, "")]
    run = finished([question(f"q{index}", script) for index, script in enumerate(scripts)], ONE)
    answered = [record for record in run.records if record.first_answer is not None]
    naive_wait = median(record.first_answer - record.start for record in answered if record.first_answer is not None)
    naive_accuracy = sum(record.is_correct for record in answered) / len(answered)
    assert (naive_wait, naive_accuracy) == (12 * TICK, 1.0)
    assert (run.metrics["ttfat_p50"], run.metrics["ttfat_p90"]) == (12 * TICK, "inf")
    assert run.metrics["accuracy"] == 0.5


def first_chunk(mock: Mock, script: list[Step]) -> float:
    """What a tool sees that takes the first event for the first token."""
    return sum(step.delay for step in script[:1])


def test_4_a_role_is_no_first_token_and_neither_are_empty_chunks_or_pings() -> None:
    script = [
        Step(1 * TICK, ROLE), Step(2 * TICK, "comment"), Step(2 * TICK, "empty"), Step(32 * TICK, THINKING, "t", 1),
        Step(TICK, ANSWER, "ok", 2), Step(TICK, FINISH, "stop", 1),
    ]  # fmt: skip
    run = finished([question("q", script)], ONE)
    assert first_chunk(run.mock, script) == TICK
    assert run.metrics["ttft_mean"] == 37 * TICK


def test_4_a_chunk_is_no_token() -> None:
    behaviour = Behaviour(
        prefill=TICK, thinking_tpot=TICK, answer_tpot=TICK, thinking_tokens=(40, 40), answer_tokens=(8, 8),
        bundle=4, first_bundle=10,
    )  # fmt: skip
    run = finished([question("7")], ONE, behaviour=behaviour)
    (record,) = run.records
    assert record.output_tokens == 50  # marker and end token included
    assert record.chunks == 1 + 8 + 1  # 10 + 30 in fours (the last of two), 8 at once
    # 16 % and more: per chunk instead of per token.
    naive = (record.last_thinking - record.first_thinking) / (9 - 1)  # type: ignore[operator]
    assert naive > 3 * run.metrics["tpot_thinking_mean"]
    assert run.metrics["tpot_thinking_mean"] == TICK


@pytest.mark.parametrize("field", ["reasoning", "reasoning_content", "both", "inline"])
def test_4_a_thought_is_timed_whatever_it_is_called(field: str) -> None:
    behaviour = Behaviour(
        prefill=8 * TICK, thinking_tpot=2 * TICK, answer_tpot=TICK, thinking_tokens=(16, 16), thought_field=field
    )
    run = finished([question("7")], ONE, behaviour=behaviour)
    # A tool that looks at `content` alone, or takes a thought for the answer, gives 42 or 10 for both.
    assert (run.metrics["ttft_mean"], run.metrics["ttfat_mean"]) == (10 * TICK, 42 * TICK)
    assert run.metrics["thinking_tokens_mean"] == 16


@pytest.mark.parametrize("told", [0, None, 6])
def test_4_a_server_that_counts_no_thinking_tokens_is_not_believed(told: int | None) -> None:
    # vLLM's deepseek_r1 parser says 0 for every thought whose opening tag stands in the prompt; others say nothing.
    script = [Step(TICK, THINKING, "t", 1)] * 6 + [Step(TICK, ANSWER, "ok", 1), Step(0.0, FINISH, "stop", 1)]
    mock = Mock(Behaviour(is_counted=told is not None, has_info=False, miscounts=told == 0))
    (record,) = finished([question("q", script)], ONE, mock=mock).records
    # Then the counts that come with every chunk tell.
    assert (record.thinking_tokens, record.answer_tokens, record.output_tokens) == (6, 2, 8)


def two_arms(cache: str) -> list[Finished]:
    """The same questions, asked of one server by one arm after the other."""
    mock = Mock(Behaviour(prefill=64 * TICK, has_cache=True))
    questions = [question(str(index)) for index in range(6)]
    return [finished(questions, ONE, arm=arm_of(name), mock=mock, setup=Setup(cache=cache)) for name in ("a", "b")]


def test_5_the_second_arm_does_not_live_on_the_prefix_cache_of_the_first() -> None:
    cold, warmed = two_arms(WARM)
    assert warmed.metrics["ttft_mean"] < cold.metrics["ttft_mean"] / 10  # the same server, the same prompts
    assert (cold.summary["cache"]["share"], warmed.summary["cache"]["share"]) == (0.0, 1.0)  # and it is said
    first, second = two_arms(SALTED)
    assert first.metrics["ttft_mean"] == second.metrics["ttft_mean"] == cold.metrics["ttft_mean"]
    assert second.summary["cache"] == {"source": "usage", "prompt_tokens": second.summary["cache"]["prompt_tokens"],
                                       "cached_tokens": 0.0, "share": 0.0}  # fmt: skip


def test_5_warm_up_prompts_are_never_measured_ones() -> None:
    for name in ("pocket", "repeat"):
        source = find_task(name).questions(60, seed=1)
        measured, spare = source[:40], source[40:]
        for count in (5, 20, 30):  # the last is more than there are: plain prompts make up for them
            warm = warm_up_list([*measured, *spare], measured, count, seed=2)
            assert len(warm) == len({found.digest for found in warm}) == count
            assert not {found.digest for found in warm} & {found.digest for found in measured}


def test_6_a_closed_load_lets_the_arm_that_thinks_less_send_more() -> None:
    # 64 and 32 ticks of service on four slots.
    long, short = ([question(f"q{index}", steps(thought, prefill=8)) for index in range(40)] for thought in (26, 10))
    behaviour = Behaviour(slots=4)
    closed = [finished(questions, Load(CLOSED, concurrency=4), behaviour=behaviour) for questions in (long, short)]
    assert [run.metrics["request_throughput"] * TICK for run in closed] == [4 / 64, 4 / 32]
    # The same rate for both: now the rates are equal and the waits differ.
    offered = Load(CONSTANT, rate=1 / (16 * TICK))
    opened = [finished(questions, offered, behaviour=behaviour) for questions in (long, short)]
    assert [run.metrics["e2e_mean"] / TICK for run in opened] == [63, 31]
    ends = [max(record.sent for record in run.records) for run in opened]
    assert ends[0] == ends[1] == 39 * 16 * TICK


def test_6_a_stall_of_the_server_hides_no_waiting() -> None:
    # Every 16 ticks one of 8 ticks; the third stalls for 1,000, and the client sends one at a time.
    scripts = [[Step(7 * TICK, ANSWER, "ok", 2), Step(TICK, FINISH, "stop", 1)] for _ in range(20)]
    scripts[2] = [Step(1007 * TICK, ANSWER, "ok", 2), Step(TICK, FINISH, "stop", 1)]
    questions = [question(f"q{index}", script) for index, script in enumerate(scripts)]
    run = finished(questions, Load(CONSTANT, concurrency=1, rate=1 / (16 * TICK)))
    since_sent = sorted((record.done - record.sent) / TICK for record in run.records)
    assert since_sent[-2:] == [8, 1008]  # the waits of all those behind it are gone
    # The k-th behind it was due 16·k later, and served 8·k after the stall.
    waits = {record.order: (record.done - record.start) / TICK for record in run.records}
    assert [waits[2 + behind] for behind in range(18)] == [1008 - 8 * behind for behind in range(18)]


def test_7_a_straggler_is_not_averaged_into_the_rate() -> None:
    scripts = [steps(16)] * 40 + [steps(1000)]
    run = finished([question(f"q{index}", script) for index, script in enumerate(scripts)], Load(CLOSED, concurrency=4))
    naive = len(run.records) / max(record.done for record in run.records)
    assert naive < run.metrics["request_throughput"] / 4
    assert run.metrics["request_throughput"] == 4 / (44 * TICK)
    assert run.metrics["drained"] == 1 / 41


def test_7_a_ladder_of_difficulties_does_not_look_like_a_server_that_slows_down() -> None:
    # Questions from easy to hard, as a data set lists them; the work list shuffles them by the seed alone.
    listed = [question(f"{index:03}", steps(index)) for index in range(1, 80)]
    shuffled = [ask.question for ask in work_list(listed, len(listed), seed=0)]
    load = Load(CLOSED, concurrency=2)
    assert finished(listed, load).summary["stationarity"]["label"] == "drifting"
    assert finished(shuffled, load).summary["stationarity"]["label"] == "stationary"
    assert [ask.question.id for ask in work_list(listed, 200, seed=0)] == [
        ask.question.id for ask in work_list(listed, 200, seed=0)
    ]
    assert asks_of(shuffled) != asks_of(listed)


def graded(text: str, finish: str = "stop", thought: str = "") -> str:
    """The outcome of a reply whose whole text is `content`."""
    script = [Step(TICK, THINKING, thought, 1)] if thought else []
    script += [Step(TICK, ANSWER, letter, 1) for letter in text]
    (record,) = finished([question("q", [*script, Step(TICK, FINISH, finish, 1)])], ONE).records
    return record.outcome


def test_9_only_the_answer_is_graded_never_the_thought() -> None:
    assert graded("no", thought="ok") == WRONG
    assert graded("ok", thought="no") == CORRECT
    assert graded("<think>ok</think>no") == WRONG
    assert graded("<think>no</think>\n\nok") == CORRECT
    assert graded("no, ok is not it</think>ok") == CORRECT  # the opening tag stood in the prompt


def test_9_a_thought_that_is_not_closed_is_no_answer() -> None:
    assert graded("<think>ok") == EMPTY
    assert graded("\n<think>ok", finish="length") == TRUNCATED
    assert graded("", thought="ok") == EMPTY


def test_9_tags_that_are_talked_about_are_none() -> None:
    assert graded("a tag is <think> and </think>") == NO_PARSE
    (record,) = finished(
        [question("q", [Step(TICK, THINKING, "t", 1), Step(TICK, ANSWER, "the end is </think> ok", 9),
                        Step(TICK, FINISH, "stop", 1)])], ONE).records  # fmt: skip
    # The server names the thought, so that tags in the answer are text.
    assert (record.first_answer, record.thinking_tokens) == (2 * TICK, 1)


def test_10_what_is_sampled_is_what_the_arm_says_and_nothing_else() -> None:
    plain, hot = arm_of("plain"), Arm("hot", "http://mock", "mock", sampling={"temperature": 0.6, "top_p": 0.95})
    for arm, sampling in ((plain, {}), (hot, {"temperature": 0.6, "top_p": 0.95})):
        run = finished([question("1")], ONE, arm=arm, setup=Setup(cache=WARM))
        (body,) = run.mock.requests
        known = {"model", "messages", "max_tokens", "stream", "stream_options"}
        assert {key: value for key, value in body.items() if key not in known} == sampling
        assert json.loads((run.folder / "manifest.json").read_text())["sampling"] == sampling
