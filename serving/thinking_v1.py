"""Thinking budgets in vLLM's V1 model runner: one thinking machine per request that has limits.

Takes the place of vLLM's ThinkingBudgetStateHolder, behind the same interface (`v1/sample/thinking_budget_state.py`):
the sampler calls it after grammar, penalties and processors, so that a forced token wins. Each step feeds each machine
the tokens that are new since the last one; nothing is scanned again. A token that completes no marker and comes before
any limit is near only adds one: the machine sleeps through such tokens and takes them at once when it wakes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm_puzzle.kernels.thinking import USER, ThinkingLimits, ThinkingMachine, ThinkingMarkers
from vllm_puzzle.serving.thinking_plan import limits_of, markers_of

# Above any logit that a model can give; vLLM's own number.
FORCED_LOGIT = 1e9
PLACEHOLDER = -1
# `extra_args` key: how many tokens a request had when a user ended its thought. vLLM takes a request out of the batch
# when it is preempted or left out of a step, and what is to happen must come back with it.
CLOSED_KEY = "puzzle_thinking_closed_at"


@dataclass(slots=True)
class Row:
    """One running request: its machine, and what it has been fed."""

    limits: ThinkingLimits
    prompt: Sequence[int] | None
    machine: ThinkingMachine
    num_fed: int = 0
    num_seen: int = 0  # of these, those after num_fed only count
    wake_at: float = -1  # up to this many tokens a quiet one needs no look
    closed_at: int | None = None  # how many tokens there were when a user ended the thought
    forced: list[int | None] = field(default_factory=lambda: [None])

    def follow(self, markers: ThinkingMarkers, output: Sequence[int], drafts: Sequence[int]) -> None:
        """Take in the response so far; `forced` is then the token at each draft's place and after the last."""
        if len(output) < self.num_fed:  # tokens were taken back (a failed step, a resumed request): start again
            self.machine = ThinkingMachine.after_prompt(markers, self.limits, self.prompt)
            self.num_fed = self.num_seen = 0
        if self.num_seen > self.num_fed:
            slept = output[self.num_fed : self.num_seen]
            self.machine.pass_over(slept)
            self.num_fed += len(slept)
        new = output[self.num_fed :]
        if PLACEHOLDER in new:  # not sampled yet, or taken back by the rejection of drafts
            new = new[: new.index(PLACEHOLDER)]
        if self.closed_at is not None and self.num_fed <= self.closed_at <= self.num_fed + len(new):
            before = self.closed_at - self.num_fed
            self.machine.feed(new[:before])
            self.machine.close(USER)  # nothing if it is closing already
            new, self.num_fed = new[before:], self.closed_at
        self.machine.feed(new)
        self.num_fed += len(new)
        self.num_seen = self.num_fed
        is_close_ahead = self.closed_at is not None and self.closed_at > self.num_fed
        self.wake_at = -1 if drafts or is_close_ahead else self.num_fed + self.machine.num_quiet
        self.forced = self.machine.forced_along(drafts) if drafts else [self.machine.forced]

    def close(self, markers: ThinkingMarkers, output: Sequence[int]) -> None:
        """End the open thought after the response so far; tokens under way (placeholders) belong to it."""
        self.closed_at = len(output)
        self.follow(markers, output, ())


class ThinkingHolder:
    """All requests of a batch, by their row in it. `markers` None: no request has limits."""

    def __init__(self, markers: ThinkingMarkers | None, has_drafts: bool) -> None:
        self.markers = markers
        self.has_drafts = has_drafts
        self.rows: dict[int, Row] = {}

    def has_tracked_requests(self) -> bool:
        """Whether the sampler has to give us the output tokens."""
        return bool(self.rows)

    def sync_batch(self, batch_update: Any) -> None:
        """Requests that left, came or changed their row (vLLM's BatchUpdate)."""
        if not batch_update:
            return
        for index in batch_update.removed:
            self.rows.pop(index, None)
        for index, params, prompt, output in batch_update.added:
            self.rows.pop(index, None)
            limits, closed_at = limits_or_none(params), (params.extra_args or {}).get(CLOSED_KEY)
            if self.markers is not None and (limits is not None or closed_at is not None):
                self.track(index, limits or ThinkingLimits(), prompt, output, closed_at)
        for source, target, direction in batch_update.moved:
            moved, other = self.rows.pop(source, None), self.rows.pop(target, None)
            if moved is not None:
                self.rows[target] = moved
            if other is not None and direction.name == "SWAP":
                self.rows[source] = other

    def track(
        self,
        index: int,
        limits: ThinkingLimits,
        prompt: Sequence[int] | None,
        output: Sequence[int],
        closed_at: int | None = None,
    ) -> Row:
        """Follow the request in this row from now on, from its tokens so far. Needs markers."""
        assert self.markers is not None
        machine = ThinkingMachine.after_prompt(self.markers, limits, prompt)
        row = self.rows[index] = Row(limits, prompt, machine, closed_at=closed_at)
        row.follow(self.markers, output, ())
        return row

    def update_state(
        self, output_token_ids: list[list[int]], spec_token_ids: list[list[int]] | None, repeat_indices: Any = None
    ) -> None:
        """Take in the last step's tokens and this step's drafts. Rows of both lists are the batch's."""
        if self.markers is None:
            return
        alarms, num_rows = self.markers.alarms, len(output_token_ids)
        for index, row in self.rows.items():
            if index >= num_rows:
                continue
            output = output_token_ids[index]
            drafts = spec_token_ids[index] if spec_token_ids and index < len(spec_token_ids) else ()
            is_one_more = not drafts and row.num_seen + 1 == len(output) <= row.wake_at
            if is_one_more and output[-1] not in alarms and output[-1] != PLACEHOLDER:
                row.num_seen += 1  # nearly every step
                continue
            row.follow(self.markers, output, drafts)

    def apply_to_logits(
        self, logits: torch.Tensor, predict_bonus_token: bool, spec_token_ids: list[list[int]] | None
    ) -> torch.Tensor:
        """Raise the forced tokens' logits, in place.

        logits: [num_requests, vocab_size]; in the speculative pass over drafts (not `predict_bonus_token`)
        [num_drafts, vocab_size], one row per draft, requests in the batch's order.
        """
        over_drafts = self.has_drafts and not predict_bonus_token
        places: list[int] = []
        tokens: list[int] = []
        if not over_drafts:
            for index, row in self.rows.items():
                if row.forced[-1] is not None:
                    places.append(index)
                    tokens.append(row.forced[-1])
            return self._raise(logits, places, tokens)
        first_row = self._first_rows(spec_token_ids or [])
        for index, row in self.rows.items():
            for offset, token in enumerate(row.forced[:-1]):
                if token is not None:
                    places.append(first_row(index) + offset)
                    tokens.append(token)
        return self._raise(logits, places, tokens)

    @staticmethod
    def _raise(logits: torch.Tensor, places: list[int], tokens: list[int]) -> torch.Tensor:
        if places:
            where = torch.tensor([places, tokens], device=logits.device)
            logits[where[0], where[1]] = FORCED_LOGIT
        return logits

    @staticmethod
    def _first_rows(spec_token_ids: list[list[int]]) -> Callable[[int], int]:
        starts = [0]
        for drafts in spec_token_ids:
            starts.append(starts[-1] + len(drafts))
        return starts.__getitem__


def limits_or_none(params: Any) -> ThinkingLimits | None:
    """The request's limits. A malformed plan can only have come around the API; the engine serves on without it."""
    try:
        return limits_of(params)
    except ValueError as error:
        logging.getLogger("vllm.vllm_puzzle").warning("%s; the request runs without limits", error)
        return None


def make_holder(
    reasoning_config: Any, max_num_seqs: int, num_spec_tokens: int, device: Any, is_pin_memory: bool
) -> ThinkingHolder:
    """Has the signature of vLLM's `maybe_create_thinking_budget_state_holder`."""
    return ThinkingHolder(markers_of(reasoning_config), num_spec_tokens > 0)
