"""One request's thinking plan and the server's markers, as they travel between processes."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from vllm.config.reasoning import ReasoningConfig
from vllm.sampling_params import SamplingParams
from vllm_puzzle.kernels.thinking import LoopRule, ThinkingLimits, ThinkingMarkers
from vllm_puzzle.serving.thinking_plan import limits_of, markers_from_wire, markers_of, markers_to_wire

MARKERS = ThinkingMarkers((1, 2), ((3,), (4, 5)), (3,), (70, 71), frozenset({13, 9}), ((8,), (8, 9)))


def params(plan: Any = None, budget: int | None = None) -> SamplingParams:
    return SamplingParams(
        thinking_token_budget=budget, extra_args=None if plan is None else {"puzzle_thinking": plan, "other": 1}
    )


@pytest.mark.parametrize(
    ("plan", "limits"),
    [
        ({"budget": 7, "grace": 3, "loop": [2, 64, 4]}, ThinkingLimits(7, 3, LoopRule(2, 64, 4))),
        ({"budget": None, "grace": 0, "loop": (1, 1, 2)}, ThinkingLimits(None, 0, LoopRule(1, 1, 2))),
        ({"budget": 0, "grace": 5, "loop": None}, ThinkingLimits(0, 5)),
        ({"budget": 11}, ThinkingLimits(11)),
        ({}, ThinkingLimits()),
    ],
)
def test_a_plan_becomes_limits_and_wins_over_vllms_own_budget(plan: dict[str, Any], limits: ThinkingLimits) -> None:
    assert limits_of(params(plan)) == limits
    assert limits_of(params(plan, budget=5)) == limits


@pytest.mark.parametrize(
    ("budget", "limits"), [(None, None), (-1, None), (0, ThinkingLimits(0)), (9, ThinkingLimits(9))]
)
def test_without_a_plan_vllms_own_budget_counts(budget: int | None, limits: ThinkingLimits | None) -> None:
    assert limits_of(params(budget=budget)) == limits
    assert limits_of(SamplingParams(thinking_token_budget=budget, extra_args={"other": 1})) == limits


@pytest.mark.parametrize(
    ("plan", "key"),
    [
        ("7", ""),
        ([7], ""),
        ({"budgets": 7}, ""),
        ({"budget": -1}, ".budget"),
        ({"budget": True}, ".budget"),
        ({"budget": 1.0}, ".budget"),
        ({"grace": None}, ".grace"),
        ({"grace": -2}, ".grace"),
        ({"loop": "abc"}, ".loop"),
        ({"loop": [1, 2]}, ".loop"),
        ({"loop": [0, 2, 3]}, ".loop"),
        ({"loop": [3, 2, 3]}, ".loop"),
        ({"loop": [1, 65, 3]}, ".loop"),
        ({"loop": [1, 2, 1]}, ".loop"),
        ({"loop": [1, 2, True]}, ".loop"),
    ],
)
def test_a_malformed_plan_is_one_line_that_names_the_key(plan: Any, key: str) -> None:
    with pytest.raises(ValueError, match=rf"^sampling parameters, key extra_args\.puzzle_thinking{key}: ") as caught:
        limits_of(params(plan))
    assert ", allowed: " in str(caught.value) and "\n" not in str(caught.value)


def config(start: list[int] | None, forced: list[int] | None, natural: list[int] | None) -> ReasoningConfig:
    found = ReasoningConfig()
    found._reasoning_start_token_ids = start
    found._reasoning_end_token_ids = forced
    found._natural_reasoning_end_token_ids = natural
    return found


def test_vllms_forced_end_is_split_into_phrase_and_closing() -> None:
    assert markers_of(config([1], [2], [2])) == ThinkingMarkers((1,), ((2,),), (2,))
    assert markers_of(config([1], [70, 71, 2, 3], [2, 3])) == ThinkingMarkers((1,), ((2, 3),), (2, 3), (70, 71))
    # Tokens that merged across the border: what is forced is forced as a whole.
    assert markers_of(config([1], [70, 9], [2])) == ThinkingMarkers((1,), ((2,),), (70, 9))
    assert markers_of(config([1], [3], [2, 3])) == ThinkingMarkers((1,), ((2, 3),), (3,))


@pytest.mark.parametrize("missing", range(3))
def test_a_server_without_a_reasoning_parser_has_no_markers(missing: int) -> None:
    ids: list[list[int] | None] = [[1], [2], [2]]
    ids[missing] = None
    assert markers_of(config(*ids)) is None
    assert markers_of(None) is None


def test_markers_survive_json_and_msgpack() -> None:
    wire = markers_to_wire(MARKERS)
    assert markers_from_wire(json.loads(json.dumps(wire))) == MARKERS
    assert markers_from_wire(msgspec.msgpack.decode(msgspec.msgpack.encode(wire))) == MARKERS


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"start": []}, "`start`: found no token"),
        ({"ends": []}, "`ends`: found none"),
        ({"phrase": [1, -2]}, r"`phrase`: found \[1, -2\], allowed: a list of token ids"),
        ({"boundaries": ["a"]}, "`boundaries`"),
        ({"tool_starts": [3]}, "`tool_starts`"),
        ({"end": [1]}, "found the keys"),
    ],
)
def test_broken_markers_on_the_wire_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        markers_from_wire(markers_to_wire(MARKERS) | change)
