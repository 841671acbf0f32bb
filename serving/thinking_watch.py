"""What a running request's reasoning does, seen from the API process: counts by phase, times, and why a thought ended.

Every step's tokens pass here (`vllm_compat.observe_outputs`) and feed the same machine that the sampler obeys, so that
counts are exact for each parser and API, and a forced end is known as one. Nothing here touches the reply.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_puzzle.kernels.thinking import NATURAL, THINKING, USER, ThinkingLimits, ThinkingMachine, ThinkingMarkers

LENGTH, OFF = "length", "off"


@dataclass(slots=True)
class SequenceWatch:
    """One of a request's n sequences. Times are seconds since the request began, None while it has not happened."""

    machine: ThinkingMachine
    first_thinking: float | None = None
    first_answer: float | None = None
    finish_reason: str | None = None
    is_off: bool = False
    is_ended_by_user: bool = False
    # num_thinking after each token, kept only for usage that is reported along the way.
    counts: list[int] | None = None

    def feed(self, tokens: Sequence[int], now: float) -> None:
        """Take in one step's tokens."""
        machine = self.machine
        if self.counts is None:
            machine.feed(tokens)
        else:
            for token in tokens:
                machine.feed((token,))
                self.counts.append(self.num_thinking)
        if self.first_thinking is None and self.num_thinking:
            self.first_thinking = now
        if self.first_answer is None and machine.has_answer:
            self.first_answer = now

    @property
    def num_thinking(self) -> int:
        """Thinking tokens so far; those of a forced end are none, whole or cut."""
        return self.machine.num_thinking - self.machine.num_closing

    @property
    def num_answer(self) -> int:
        """Answer tokens so far."""
        return self.machine.num_answer

    @property
    def num_blocks(self) -> int:
        """Thoughts so far."""
        return self.machine.num_blocks

    def thinking_tokens_at(self, num_tokens: int) -> int:
        """Thinking tokens among the first `num_tokens`."""
        if self.counts is None or num_tokens >= len(self.counts):
            return self.num_thinking
        return self.counts[num_tokens - 1] if num_tokens else 0

    @property
    def end_reason(self) -> str | None:
        """Why thinking ended: one of off, natural, budget, loop, tool_call, user, length; None without a thought."""
        machine, reason = self.machine, self.machine.reason_so_far
        if machine.mode == THINKING and self.finish_reason == LENGTH:
            return LENGTH
        if self.is_ended_by_user and reason == NATURAL:
            return USER
        if reason is None and self.is_off:
            return OFF
        if reason is None and machine.num_blocks:
            return NATURAL if self.finish_reason is not None else None
        return reason


@dataclass(slots=True)
class RequestWatch:
    """One engine request: its sequences by index.

    is_off: thinking was switched off. authorization: the client's header, for the control route. keeps_counts: usage
    is reported along the way.
    """

    markers: ThinkingMarkers
    limits: ThinkingLimits
    is_off: bool = False
    authorization: str | None = None
    keeps_counts: bool = False
    on_finish: Callable[[SequenceWatch], None] | None = None
    sequences: dict[int, SequenceWatch] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)
    is_ended_by_user: bool = False  # before its first token

    def observe(self, index: int, prompt: Sequence[int] | None, tokens: Sequence[int], reason: str | None) -> None:
        """One step of one sequence."""
        sequence = self.sequences.get(index)
        if sequence is None:
            machine = ThinkingMachine.after_prompt(self.markers, self.limits, prompt)
            sequence = self.sequences[index] = SequenceWatch(
                machine,
                is_off=self.is_off,
                is_ended_by_user=self.is_ended_by_user,
                counts=[] if self.keeps_counts else None,
            )
        if tokens:
            sequence.feed(tokens, time.monotonic() - self.began)
        if reason is not None and sequence.finish_reason is None:
            sequence.finish_reason = reason
            if self.on_finish is not None:
                self.on_finish(sequence)

    def without_thought(self) -> set[int]:
        """The sequences that have begun and are not thinking."""
        return {index for index, sequence in self.sequences.items() if sequence.machine.mode != THINKING}

    def end_by_user(self, without_thought: Collection[int] = ()) -> None:
        """The sampler has ended the open thoughts; `without_thought` had none before it was told.

        Tokens of steps before may still be on their way here, or the end itself may have come before the sampler's
        answer, so the machine is not told: the end that comes, or came, is the one asked for.
        """
        self.is_ended_by_user = True
        for index, sequence in self.sequences.items():
            sequence.is_ended_by_user |= index not in without_thought or sequence.machine.mode == THINKING


class Watches:
    """The running requests of this process, by the id that the client sees."""

    def __init__(self) -> None:
        self.running: dict[str, RequestWatch] = {}

    def observe(
        self, request_id: str, _: str, index: int, prompt: Sequence[int] | None, tokens: Any, reason: str | None
    ) -> None:
        """Has the signature that vllm_compat.observe_outputs calls."""
        watch = self.running.get(request_id)
        if watch is None:
            return
        try:
            watch.observe(index, prompt, tokens, reason)
        except Exception:  # the caller is vLLM's one output loop: an error here would end every request
            logging.getLogger("vllm.vllm_puzzle").exception("request %s is no longer watched", request_id)
            del self.running[request_id]
