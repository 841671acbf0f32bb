"""The thinking machine: exact token sequences of a scripted model for every budget, opening and ending."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from vllm_puzzle.kernels import thinking
from vllm_puzzle.kernels.thinking import LoopRule, ThinkingLimits, ThinkingMachine, ThinkingMarkers

OPEN, SHUT, NEWLINE, TOOL, EOS = 1, 2, 3, 4, 5
SINGLE = ThinkingMarkers(start=(OPEN,), ends=((SHUT,),), closing=(SHUT,))
MULTI = ThinkingMarkers(start=(11, 12), ends=((21, 22, 23),), closing=(21, 22, 23))
MARKERS = {"single": SINGLE, "multi": MULTI}
ANSWER = (90, 91, EOS)


def decode(machine: ThinkingMachine, script: Sequence[int]) -> list[int]:
    """What comes out of a model that says `script` as far as it is let: a forced end skips to after its own end."""
    out: list[int] = []
    rest = list(script)
    for _ in range(200):
        if machine.forced is not None:
            token = machine.forced
            was_cut = True
        elif rest:
            token, was_cut = rest.pop(0), False
        else:
            break
        out.append(token)
        machine.feed((token,))
        if was_cut and machine.mode == thinking.OUTSIDE:
            rest = list(ANSWER)
    return out


def words(count: int) -> list[int]:
    return list(range(100, 100 + count))


@pytest.mark.parametrize("opened_by", ["prompt", "model", "nobody"])
@pytest.mark.parametrize("name", MARKERS)
@pytest.mark.parametrize("budget", [0, 1, 2, 4, 5, 6, 50, None])
def test_a_thought_of_five_tokens_is_cut_exactly_at_its_budget(name: str, budget: int | None, opened_by: str) -> None:
    markers, length = MARKERS[name], 5
    start, end = list(markers.start), list(markers.ends[0])
    prompt = {"prompt": [7, *start], "model": [7], "nobody": [7, *start, *end]}[opened_by]
    script = [*words(length), *end, *ANSWER]
    if opened_by == "model":
        script = start + script
    elif opened_by == "nobody":
        script = list(ANSWER)
    machine = ThinkingMachine.after_prompt(markers, ThinkingLimits(budget), prompt)
    out = decode(machine, script)
    kept = length if budget is None else min(length, budget)
    if opened_by == "nobody":
        assert out == list(ANSWER)
        assert (machine.num_thinking, machine.reason, machine.num_answer) == (0, None, len(ANSWER))
        return
    assert out == [*(start if opened_by == "model" else []), *words(kept), *end, *ANSWER]
    assert machine.num_thinking == kept
    assert machine.num_answer == len(ANSWER)
    assert machine.reason == ("budget" if budget is not None and budget <= length else "natural")


def test_a_second_block_gets_what_the_first_left() -> None:
    machine = ThinkingMachine.after_prompt(SINGLE, ThinkingLimits(6), [OPEN])
    out = decode(machine, [*words(4), SHUT, 80, OPEN, *words(4), SHUT, *ANSWER])
    assert out == [*words(4), SHUT, 80, OPEN, *words(2), SHUT, *ANSWER]
    assert (machine.num_thinking, machine.num_blocks, machine.reason) == (6, 2, "budget")


def test_a_block_after_an_exhausted_budget_is_closed_at_once() -> None:
    machine = ThinkingMachine.after_prompt(SINGLE, ThinkingLimits(2), [OPEN])
    machine.feed([*words(2), SHUT, 80, OPEN])
    assert machine.forced == SHUT


@pytest.mark.parametrize("budget", range(4, 12))
def test_the_phrase_is_part_of_the_budget(budget: int) -> None:
    markers = ThinkingMarkers((OPEN,), ((SHUT,),), (SHUT,), phrase=(70, 71))
    machine = ThinkingMachine.after_prompt(markers, ThinkingLimits(budget), [OPEN])
    out = decode(machine, [*words(20), SHUT, *ANSWER])
    assert out == [*words(budget - 2), 70, 71, SHUT, *ANSWER]
    assert machine.num_thinking == budget


def test_a_phrase_longer_than_half_the_budget_is_left_out() -> None:
    markers = ThinkingMarkers((OPEN,), ((SHUT,),), (SHUT,), phrase=(70, 71))
    machine = ThinkingMachine.after_prompt(markers, ThinkingLimits(3), [OPEN])
    assert decode(machine, [*words(20), SHUT]) == [*words(3), SHUT, *ANSWER]


def test_nothing_is_injected_after_a_natural_end() -> None:
    markers = ThinkingMarkers((OPEN,), ((SHUT,),), (SHUT,), phrase=(70, 71))
    machine = ThinkingMachine.after_prompt(markers, ThinkingLimits(8), [OPEN])
    script = [*words(2), SHUT, *range(200, 230)]
    assert decode(machine, script) == script


@pytest.mark.parametrize(("newline_at", "kept"), [(3, 10), (6, 7), (9, 10), (12, 10)])
def test_grace_takes_a_line_end_inside_the_limit(newline_at: int, kept: int) -> None:
    markers = ThinkingMarkers((OPEN,), ((SHUT,),), (SHUT,), boundaries=frozenset({NEWLINE}))
    script = words(20)
    script[newline_at] = NEWLINE
    machine = ThinkingMachine.after_prompt(markers, ThinkingLimits(10, grace=4), [OPEN])
    assert decode(machine, [*script, SHUT])[: kept + 1] == [*script[:kept], SHUT]


def test_an_end_begun_by_the_model_is_finished_and_not_repeated() -> None:
    machine = ThinkingMachine.after_prompt(MULTI, ThinkingLimits(5), [*MULTI.start])
    assert decode(machine, [*words(4), 21, 99]) == [*words(4), 21, 22, 23, *ANSWER]
    assert (machine.num_thinking, machine.reason) == (4, "natural")


def test_a_false_start_of_the_end_counts_as_thought() -> None:
    machine = ThinkingMachine.after_prompt(MULTI, ThinkingLimits(None), [*MULTI.start])
    machine.feed([100, 21, 22, 101, 21, 22, 23, 90])
    assert (machine.num_thinking, machine.num_answer, machine.reason) == (4, 1, "natural")


def test_a_tool_call_inside_a_thought_ends_it_and_its_arguments_are_left_alone() -> None:
    markers = ThinkingMarkers((OPEN,), ((SHUT,),), (SHUT,), tool_starts=((TOOL,),))
    machine = ThinkingMachine.after_prompt(markers, ThinkingLimits(4), [OPEN])
    script = [*words(2), TOOL, *range(200, 220), EOS]
    assert decode(machine, script) == script
    assert (machine.num_thinking, machine.reason, machine.num_answer) == (2, "tool_call", 22)


@pytest.mark.parametrize("pattern", [1, 2, 3, 7])
def test_a_loop_in_a_thought_is_ended_and_an_answer_follows(pattern: int) -> None:
    rule = LoopRule(min_pattern=1, max_pattern=8, count=4)
    machine = ThinkingMachine.after_prompt(SINGLE, ThinkingLimits(None, loop=rule), [OPEN])
    out = decode(machine, [*range(300, 310), *(words(pattern) * 50)])
    assert out == [*range(300, 310), *(words(pattern) * 4), SHUT, *ANSWER]
    assert machine.reason == "loop"


def test_repetition_shorter_than_the_rule_is_no_loop() -> None:
    rule = LoopRule(min_pattern=3, max_pattern=8, count=3)
    machine = ThinkingMachine.after_prompt(SINGLE, ThinkingLimits(None, loop=rule), [OPEN])
    script = [*([100] * 8), 50, 51, 52, 50, 51, 52, 50, 51, 60, SHUT, *ANSWER]
    assert decode(machine, script) == script


def test_a_user_ends_an_open_thought_only() -> None:
    machine = ThinkingMachine.after_prompt(SINGLE, ThinkingLimits(), [OPEN])
    machine.feed(words(3))
    machine.close(thinking.USER)
    assert machine.forced == SHUT
    machine.feed([SHUT, 90])
    machine.close(thinking.USER)
    assert (machine.forced, machine.reason) == (None, "user")


def test_markers_in_history_are_not_the_open_ones() -> None:
    for prompt, is_open in (([OPEN, 9, SHUT, 8], False), ([OPEN, SHUT, 8, OPEN], True), ([8], False), ([], False)):
        machine = ThinkingMachine.after_prompt(SINGLE, ThinkingLimits(), prompt)
        assert (machine.mode == thinking.THINKING) == is_open


def test_another_spelling_of_the_start_opens_a_thought_too() -> None:
    markers = ThinkingMarkers((1, 12), ((2,),), (2,), other_starts=((1, 13),))
    for start in markers.starts:
        machine = ThinkingMachine.after_prompt(markers, ThinkingLimits(2), [9])
        assert decode(machine, [*start, *words(5), 2]) == [*start, *words(2), 2, *ANSWER]
        assert (machine.num_thinking, machine.num_markers) == (2, 3)
        assert ThinkingMachine.after_prompt(markers, ThinkingLimits(), [9, 2, *start]).mode == thinking.THINKING


def test_a_header_is_no_answer_and_forces_nothing() -> None:
    """Harmony's: what opens a thought (5 6 8) and an answer (5 7 8) begins alike, and the model picks."""
    plain = ThinkingMarkers((5, 6, 8), ((2,),), (2, 3, 4))
    headed = ThinkingMarkers((5, 6, 8), ((2,),), (2, 3, 4), headers=((3, 4), (5, 7, 8), (8,)))
    for tokens, num_answer in (
        ([5, 6, 8, 90, 91, 2, 3, 4, 5, 7, 8, 92, 93], 2),  # thought, header, header, answer
        ([5, 6, 8, 90, 91, 92, 2, 3, 4, 8, 93], 1),  # the end is forced, and the model goes on with its last part
        ([5, 7, 8, 90], 1),
        ([5, 7, 90, 8, 91], 4),  # no header that is known: its last part alone
    ):
        machines = [ThinkingMachine.after_prompt(each, ThinkingLimits(3), [9]) for each in (plain, headed)]
        for token in tokens:
            for machine in machines:
                machine.feed_one(token)
            states = [(machine.mode, machine.forced, machine.num_thinking, machine.reason) for machine in machines]
            assert states[0] == states[1]
        machine = machines[1]
        assert machine.num_answer == num_answer
        assert machine.num_thinking + machine.num_answer + machine.num_markers == machine.num_tokens


def test_what_may_become_a_marker_or_a_header_is_no_answer_yet() -> None:
    markers = ThinkingMarkers((5, 6, 8), ((2,),), (2, 3, 4), headers=((3, 4), (5, 7, 8)))
    machine, found = ThinkingMachine(markers), []
    for token in (5, 6, 8, 90, 2, 3, 4, 5, 7, 8, 91):
        machine.feed_one(token)
        found.append(machine.has_answer)
    assert found == [False] * 10 + [True]
    machine = ThinkingMachine(markers)
    machine.feed([5, 7])
    assert not machine.has_answer
    machine.feed_one(90)
    assert machine.has_answer, "it became none"


def test_a_forced_end_that_is_cut_is_known_apart_from_the_thought() -> None:
    machine = ThinkingMachine(ThinkingMarkers((1,), ((2,),), (2, 3, 4), (70,)), ThinkingLimits(4))
    machine.feed([1, 90, 91, 92])
    assert (machine.num_closing, machine.reason_so_far, machine.forced) == (0, "budget", 70)
    for num_closing, token in enumerate((70, 2, 3)):
        machine.feed_one(token)
        assert (machine.num_thinking - machine.num_closing, machine.num_closing) == (4, num_closing)
    assert machine.reason is None
    machine.feed_one(4)
    assert (machine.num_thinking, machine.num_closing, machine.reason) == (4, 0, "budget")


def test_drafts_are_judged_as_if_they_came_one_by_one() -> None:
    random.seed(5)
    markers = ThinkingMarkers((1,), ((2, 3),), (2, 3), (4, 5), frozenset({6}), ((7,),))
    for _ in range(400):
        limits = ThinkingLimits(random.choice([None, 0, 3, 9]), random.choice([0, 2]), LoopRule(1, 3, 3))
        machine = ThinkingMachine.after_prompt(markers, limits, random.choice([[1], [9]]))
        machine.feed(random.choices(range(1, 10), k=random.randrange(12)))
        drafts = random.choices(range(1, 10), k=6)
        expected = [machine.forced]
        foretold = machine.forced_along(drafts)
        for draft in drafts:
            machine.feed([draft])
            expected.append(machine.forced)
        assert foretold == expected


def test_tokens_are_either_thought_marker_or_answer_and_the_budget_holds() -> None:
    random.seed(6)
    markers = ThinkingMarkers((1,), ((2, 3),), (2, 3), (4, 5), frozenset({6}), ((7,),))
    for _ in range(400):
        budget = random.randrange(12)
        machine = ThinkingMachine.after_prompt(markers, ThinkingLimits(budget, 2, LoopRule(1, 2, 3)), [1])
        for _ in range(60):
            machine.feed([machine.forced if machine.forced is not None else random.randrange(1, 10)])
            assert machine.num_thinking <= budget or machine.mode == thinking.CLOSING
        assert machine.num_thinking + machine.num_answer + machine.num_markers == machine.num_tokens == 60


@pytest.mark.parametrize(
    "broken",
    [{"start": ()}, {"ends": ()}, {"ends": ((),)}, {"closing": ()}, {"headers": ((),)}],
    ids=lambda broken: str(broken),
)
def test_markers_without_tokens_are_refused(broken: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match=next(iter(broken))):
        ThinkingMarkers(**({"start": (1,), "ends": ((2,),), "closing": (2,)} | broken))
