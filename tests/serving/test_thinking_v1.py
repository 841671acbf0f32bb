"""The V1 runner's holder alone: rows that come, go and move, drafts, tokens taken back, ends by a user."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.sample.logits_processor.interface import MoveDirectionality
from vllm_puzzle.kernels.thinking import ThinkingLimits, ThinkingMachine, ThinkingMarkers
from vllm_puzzle.serving import vllm_compat
from vllm_puzzle.serving.thinking_plan import PLAN_KEY, markers_to_wire
from vllm_puzzle.serving.thinking_v1 import CLOSED_KEY, FORCED_LOGIT, ThinkingHolder, make_holder
from vllm_puzzle.serving.thinking_worker import end_thinking, set_markers

OPEN, SHUT, VOCABULARY = 1, 2, 11
MARKERS = ThinkingMarkers((OPEN,), ((SHUT,),), (SHUT,))
LONG = ThinkingMarkers((OPEN,), ((2, 3, 4),), (2, 3, 4))
PROMPT = [9, OPEN]
SWAP, MOVE = MoveDirectionality.SWAP, MoveDirectionality.UNIDIRECTIONAL


@dataclass
class Params:
    """The fields of vLLM's SamplingParams that are read."""

    thinking_token_budget: int | None = None
    extra_args: dict[str, Any] | None = None


@dataclass
class Update:
    """vLLM's BatchUpdate."""

    added: list[Any] = field(default_factory=list)
    removed: list[int] = field(default_factory=list)
    moved: list[Any] = field(default_factory=list)


def added(index: int, budget: int | None, output: list[int] | None = None, **extra: Any) -> Any:
    return index, Params(budget, extra or None), PROMPT, [] if output is None else output


def holder_of(*requests: Any, has_drafts: bool = False, markers: ThinkingMarkers | None = MARKERS) -> ThinkingHolder:
    holder = ThinkingHolder(markers, has_drafts)
    holder.sync_batch(Update(added=list(requests)))
    return holder


def forced(holder: ThinkingHolder, outputs: list[list[int]], drafts: list[list[int]] | None = None) -> list[Any]:
    """Row by row of the logits that are sampled without drafts: the token forced there, or None."""
    holder.update_state(outputs, drafts)
    logits = torch.zeros(len(outputs), VOCABULARY)
    return read(holder.apply_to_logits(logits, True, drafts))


def read(logits: torch.Tensor) -> list[Any]:
    assert set(logits.unique().tolist()) <= {0.0, FORCED_LOGIT}
    return [row.argmax().item() if row.max() else None for row in logits]


def test_a_batch_without_limits_asks_the_sampler_for_nothing() -> None:
    holder = holder_of(added(0, None), added(1, -1))
    assert not holder.has_tracked_requests()
    holder.sync_batch(None)
    holder.sync_batch(Update(added=[added(1, 3)]))
    assert holder.has_tracked_requests()


def test_without_markers_no_request_is_followed() -> None:
    holder = holder_of(added(0, 1), markers=None)
    assert not holder.has_tracked_requests()
    assert forced(holder, [[5, 5, 5]]) == [None]


def test_each_row_has_its_own_budget() -> None:
    holder = holder_of(added(0, 0), added(1, None), added(2, 2), added(3, 3))
    assert forced(holder, [[], [], [], []]) == [SHUT, None, None, None]
    assert forced(holder, [[SHUT], [5], [5], [5]]) == [None, None, None, None]
    assert forced(holder, [[SHUT, 6], [5, 6], [5, 6], [5, 6]]) == [None, None, SHUT, None]
    assert forced(holder, [[SHUT, 6, 7], [5, 6, 7], [5, 6, SHUT], [5, 6, 7]]) == [None, None, None, SHUT]


def test_a_removed_request_leaves_its_row_and_a_new_one_takes_it() -> None:
    holder = holder_of(added(0, 1), added(1, 2))
    holder.sync_batch(Update(removed=[0]))
    assert forced(holder, [[5, 5], [5, 5]]) == [None, SHUT]
    holder.sync_batch(Update(added=[added(0, 2)]))
    assert forced(holder, [[5], [5, 5]]) == [None, SHUT]
    # A request without limits takes a followed one's row.
    holder.sync_batch(Update(added=[added(1, None)]))
    assert forced(holder, [[5, 5], [5, 5]]) == [SHUT, None]


@pytest.mark.parametrize(("direction", "left_behind"), [(SWAP, SHUT), (MOVE, None)])
def test_rows_move_with_their_requests(direction: Any, left_behind: int | None) -> None:
    holder = holder_of(added(0, 1), added(3, 2))
    holder.sync_batch(Update(moved=[(3, 0, direction)]))
    assert forced(holder, [[5, 5], [5], [5], [5, 5]]) == [SHUT, None, None, left_behind]


@pytest.mark.parametrize("direction", [SWAP, MOVE])
def test_a_move_from_an_unfollowed_row_frees_the_target(direction: Any) -> None:
    holder = holder_of(added(0, 1))
    holder.sync_batch(Update(moved=[(2, 0, direction)]))
    assert forced(holder, [[5], [5], [5]]) == [None, None, SHUT if direction is SWAP else None]


def test_a_request_that_comes_back_goes_on_from_its_tokens() -> None:
    holder = holder_of(added(0, 3, [5, 6]))
    assert forced(holder, [[5, 6]]) == [None]
    assert forced(holder, [[5, 6, 7]]) == [SHUT]


def test_tokens_taken_back_and_placeholders_are_not_counted() -> None:
    holder = holder_of(added(0, 3))
    assert forced(holder, [[5, 6, 7]]) == [SHUT]
    assert forced(holder, [[5, 6]]) == [None]
    assert forced(holder, [[5, 6, -1]]) == [None]
    assert forced(holder, [[5, 6, 7, -1]]) == [SHUT]


def over_drafts(holder: ThinkingHolder, drafts: list[list[int]]) -> list[Any]:
    """The tokens forced at each draft's row."""
    logits = torch.zeros(sum(map(len, drafts)), VOCABULARY)
    return read(holder.apply_to_logits(logits, False, drafts))


def test_the_end_is_forced_at_the_right_draft() -> None:
    holder = holder_of(added(0, None), added(1, 3), added(2, 2), added(3, 9), has_drafts=True)
    outputs, drafts = [[5], [5], [5, 6], [5]], [[6, 7], [6, 7, 8], [7], []]
    # Row 1 has room for two drafts of three, row 2 for none. Their last rows follow a draft that cannot be taken: a
    # thought beyond its budget.
    assert forced(holder, outputs, drafts) == [None, SHUT, SHUT, None]
    assert over_drafts(holder, drafts) == [None, None, None, None, SHUT, SHUT]


def test_drafts_that_are_right_leave_the_forced_token_to_the_last_row() -> None:
    holder = holder_of(added(0, 2), added(1, 2), has_drafts=True)
    outputs, drafts = [[5], [5]], [[6], [6, SHUT]]
    assert forced(holder, outputs, drafts) == [SHUT, None]
    assert over_drafts(holder, drafts) == [None, None, SHUT]


def test_a_step_without_any_draft_forces_in_the_last_rows_alone() -> None:
    holder = holder_of(added(0, 1), added(1, 2), has_drafts=True)
    assert forced(holder, [[5], [5]], [[], []]) == [SHUT, None]
    assert over_drafts(holder, [[], []]) == []


def test_a_long_end_goes_on_over_drafts_and_steps() -> None:
    holder = holder_of(added(0, 1), has_drafts=True, markers=LONG)
    assert forced(holder, [[5]], [[2, 3]]) == [4]
    assert over_drafts(holder, [[2, 3]]) == [2, 3]
    forced(holder, [[5, 2]], [[3, 4, 8]])
    assert over_drafts(holder, [[3, 4, 8]]) == [3, 4, None]


def test_a_malformed_plan_runs_without_limits_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    holder = holder_of(added(0, None, **{PLAN_KEY: {"budget": "x"}}))
    assert not holder.has_tracked_requests()
    assert "key extra_args.puzzle_thinking.budget: found 'x'" in caplog.text


def test_it_stands_where_vllm_makes_its_own() -> None:
    config = SimpleNamespace(
        reasoning_start_token_ids=[OPEN], reasoning_end_token_ids=[7, SHUT], natural_reasoning_end_token_ids=[SHUT]
    )
    holder = make_holder(config, 4, 3, torch.device("cpu"), False)
    assert holder.has_drafts
    assert holder.markers == ThinkingMarkers((OPEN,), ((SHUT,),), (SHUT,), phrase=(7,))


class Batch:
    """The parts of a V1 runner that the worker's methods touch, with one request "r" in row 0."""

    def __init__(self, params: Params, output: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
        self.refreshed = 0
        monkeypatch.setattr(vllm_compat, "refresh_sampling", self._refresh)
        self.input_batch = SimpleNamespace(
            req_id_to_index={"r": 0}, thinking_budget_state_holder=holder_of((0, params, PROMPT, output))
        )
        self.requests = {"r": SimpleNamespace(sampling_params=params, prompt_token_ids=PROMPT, output_token_ids=output)}
        self.worker = SimpleNamespace(model_runner=self)

    def _refresh(self, _: Any) -> None:
        self.refreshed += 1

    @property
    def holder(self) -> Any:
        return self.input_batch.thinking_budget_state_holder

    def comes_back(self, output: Sequence[int]) -> None:
        """It left the batch, and is taken in again as the runner does."""
        self.holder.sync_batch(Update(removed=[0]))
        params = self.requests["r"].sampling_params
        self.holder.sync_batch(Update(added=[(0, params, PROMPT, list(output))]))


@pytest.mark.parametrize("budget", [None, 9])
def test_a_user_ends_a_thought_after_the_tokens_so_far(budget: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    output: list[int] = []
    batch = Batch(Params(budget), output, monkeypatch)
    output += [5, 6]  # sampled in the last step, and not yet seen by the holder
    assert end_thinking(batch.worker, ["r", "other"]) == ["r"]
    assert batch.refreshed == (budget is None)
    assert forced(batch.holder, [output]) == [SHUT]
    assert forced(batch.holder, [[5, 6, SHUT]]) == [None]


def test_tokens_under_way_belong_to_the_thought_that_a_user_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    output = [5, -1]
    batch = Batch(Params(9), output, monkeypatch)
    end_thinking(batch.worker, ["r"])
    output[1] = 6
    assert forced(batch.holder, [output]) == [SHUT]


@pytest.mark.parametrize("budget", [None, 9])
def test_an_end_by_a_user_comes_back_with_a_preempted_request(
    budget: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = Params(budget)
    batch = Batch(shared, [5, 6], monkeypatch)
    end_thinking(batch.worker, ["r"])
    batch.comes_back([5, 6])
    assert forced(batch.holder, [[5, 6]]) == [SHUT]
    batch.comes_back([5, 6, SHUT, 7])
    assert forced(batch.holder, [[5, 6, SHUT, 7]]) == [None]
    # Another sequence of the same request, with the same parameters, goes on thinking.
    assert shared.extra_args is None and batch.requests["r"].sampling_params.extra_args == {CLOSED_KEY: 2}


def test_an_end_by_a_user_without_an_open_thought_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = Batch(Params(9), [5, SHUT, 7], monkeypatch)
    assert end_thinking(batch.worker, ["r"]) == ["r"]
    assert forced(batch.holder, [[5, SHUT, 7]]) == [None]
    assert forced(batch.holder, [[5, SHUT, 7, OPEN, 5]]) == [None]


def test_workers_take_new_markers_for_requests_from_then_on(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = Batch(Params(0), [], monkeypatch)
    set_markers(batch.worker, markers_to_wire(LONG))
    batch.comes_back([])
    assert batch.holder.rows[0].limits == ThinkingLimits(0)
    assert batch.holder.rows[0].machine.markers == LONG


def test_a_worker_that_samples_nothing_ends_nothing() -> None:
    worker = SimpleNamespace(model_runner=SimpleNamespace())
    set_markers(worker, markers_to_wire(MARKERS))
    assert end_thinking(worker, ["r"]) == []


@pytest.mark.parametrize("seed", range(40))
def test_a_machine_that_sleeps_through_quiet_tokens_ends_as_one_that_is_fed_each(seed: int) -> None:
    random = Random(seed)
    markers = LONG if seed % 2 else MARKERS
    limits = ThinkingLimits(random.choice([0, 3, 9, 40]), random.choice([0, 2, 8]))
    plan = {"budget": limits.budget, "grace": limits.grace, "loop": None}
    markers = replace(markers, boundaries=frozenset({5}))
    output: list[int] = []
    holder = holder_of((0, Params(None, {PLAN_KEY: plan}), PROMPT, output), markers=markers)
    num_slept = 0
    for _ in range(120):
        output += random.choices(
            [OPEN, 2, 3, 4, 5, *range(6, 11)], [1, 1, 2, 2, 1, *[8] * 5], k=random.choice([1] * 9 + [2, 3])
        )
        if random.random() < 0.03:
            del output[random.randrange(len(output)) :]
        holder.update_state([output], None)
        machine = ThinkingMachine.after_prompt(markers, limits, PROMPT)
        machine.feed(output)
        assert holder.rows[0].forced == [machine.forced]
        num_slept += holder.rows[0].num_seen > holder.rows[0].num_fed
        if random.random() < 0.2:  # awake, it knows all that it slept through
            holder.rows[0].follow(markers, output, ())
            assert holder.rows[0].machine.num_thinking == machine.num_thinking
            assert holder.rows[0].machine.reason == machine.reason
    assert num_slept > 0 or limits.budget < 40, "or nothing was compared"
