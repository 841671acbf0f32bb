"""The engine client as the API handlers see it: each request gets its thinking plan, and is watched while it runs.

Every API ends in `generate`, where max_tokens is known and sampling parameters exist; nothing else of the client is
changed. Without markers (a server without a reasoning parser) requests pass as they are.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import uuid4

from vllm_puzzle.kernels.thinking import LoopRule, ThinkingLimits, ThinkingMarkers
from vllm_puzzle.serving import vllm_compat
from vllm_puzzle.serving.dial.dialects import MAX_BUDGET
from vllm_puzzle.serving.dial.policy import ReasoningPolicy
from vllm_puzzle.serving.dial.request import RequestError
from vllm_puzzle.serving.dial.resolve import Effective, within
from vllm_puzzle.serving.dial.turn import TURN, Turn
from vllm_puzzle.serving.thinking_plan import MAX_PATTERN, PLAN_KEY, plan_of
from vllm_puzzle.serving.thinking_watch import RequestWatch, SequenceWatch, Watches

RETRY_S = 0.02


@dataclass
class ThinkingServer:
    """What this API process knows for all requests."""

    engine_client: Any
    markers: ThinkingMarkers | None
    policy: ReasoningPolicy = field(default_factory=ReasoningPolicy)
    on_finish: Callable[[SequenceWatch], None] | None = None
    watches: Watches = field(default_factory=Watches)

    def begin(self, params: Any, request_id: str, turn: Turn) -> RequestWatch | None:
        """Write the plan into the sampling parameters, in place, and start to watch. None without markers.

        Raises RequestError for a repetition rule that cannot be sent to the engine.
        """
        _check_repetition(params.repetition_detection)
        own = {key: value for key, value in (params.extra_args or {}).items() if not key.startswith(PLAN_KEY)}
        params.extra_args = own or None  # a client's own plan is none
        if self.markers is None or not turn.is_followed:
            return None
        limits = self._limits(params, turn)
        if not limits.is_free:
            params.extra_args = {**own, PLAN_KEY: plan_of(limits)}
        params.thinking_token_budget = None  # the plan says it, and vLLM has no budget where its parser has no markers
        is_off = turn.effective is not None and turn.effective.is_on is False
        watch = RequestWatch(
            self.markers, limits, is_off, turn.authorization, turn.wants_continuous_usage, self.on_finish
        )
        self.watches.running[request_id] = watch
        turn.sources.append(watch.sequences)
        turn.is_counted = True
        return watch

    def _limits(self, params: Any, turn: Turn) -> ThinkingLimits:
        assert self.markers is not None
        done = turn.effective or limits_alone(params.thinking_token_budget, self.policy)
        if params.max_tokens is not None:
            done = within(done, params.max_tokens, len(self.markers.closing))
        turn.effective = done
        return ThinkingLimits(done.budget, done.grace, _loop_rule(params, done.loop))

    async def end_thinking(self, request_id: str) -> bool:
        """End the open thoughts of a running request; False when it has ended before the engine could be told.

        A sequence that waits for its turn is asked for again, until each has been told.
        """
        told: set[str] = set()
        while (watch := self.watches.running.get(request_id)) is not None:
            internal = vllm_compat.internal_request_ids(self.engine_client, request_id)
            left = [name for name in internal if name not in told]
            if left:
                before = watch.without_thought()
                answers = await vllm_compat.ask_workers(self.engine_client, "puzzle_end_thinking", left)
                if found := {name for answer in answers for name in answer}:
                    watch.end_by_user(before)
                    told |= found
            if told and told >= set(internal):
                break
            await asyncio.sleep(RETRY_S)
        return bool(told)


def limits_alone(budget: int | None, policy: ReasoningPolicy) -> Effective:
    """What is done without a dial: vLLM's own budget field (-1 or None: no limit), under what the operator says."""
    budgets = [limit for limit in (budget, policy.ceiling) if limit is not None and limit >= 0]
    return Effective(budget=min(budgets, default=None), loop=policy.loop, answer_reserve=0)


def _check_repetition(asked: Any) -> None:
    """vLLM checks everything but this: a number that its messages to the engine cannot hold is a 500 there."""
    if asked is not None and max(asked.max_pattern_size, asked.min_count) > MAX_BUDGET:
        name = "repetition_detection"
        raise RequestError(f"`{name}`: found a number above {MAX_BUDGET}, allowed: at most that", name)


def _loop_rule(params: Any, rule: LoopRule | None) -> LoopRule | None:
    """vLLM's `repetition_detection` for thoughts, else the operator's rule.

    A loop ends the thought here, and one repetition later the request, which by then no longer repeats itself. Patterns
    that are all too long for us are vLLM's alone: they end the request.
    """
    asked = params.repetition_detection
    if asked is None or not asked.max_pattern_size or asked.min_pattern_size > MAX_PATTERN:
        return rule
    own = LoopRule(max(1, asked.min_pattern_size), min(asked.max_pattern_size, MAX_PATTERN), asked.min_count)
    # A copy: the object is the request's own, and one request can start several.
    params.repetition_detection = replace(asked, min_count=asked.min_count + 1)
    return own


def _token_ids(prompt: Any) -> list[int] | None:
    return prompt.get("prompt_token_ids") if isinstance(prompt, dict) else None


class WatchedEngine:
    """vLLM's engine client with another `generate`; every other attribute is the client's own.

    make_parser: makes the parser of one request, from what vLLM passes on for it (`reasoning_parser_kwargs`).
    """

    def __init__(
        self, engine_client: Any, server: ThinkingServer, make_parser: Callable[..., Any] | None = None
    ) -> None:
        self._puzzle_client = engine_client
        self._puzzle_server = server
        self._puzzle_parser = make_parser

    def __getattr__(self, name: str) -> Any:
        return getattr(self._puzzle_client, name)

    def generate(self, prompt: Any, sampling_params: Any, request_id: str, *args: Any, **kwargs: Any) -> Any:
        """The client's own stream of outputs."""
        turn = TURN.get() or Turn("")
        turn.names = self._puzzle_server.policy.names
        if request_id in self._puzzle_server.watches.running:
            # Clients can choose ids: an id that another request runs under must not reach that request.
            request_id = f"{request_id}-{uuid4().hex[:8]}"
        watch = self._puzzle_server.begin(sampling_params, request_id, turn)
        # Where a grammar starts: the Responses API leaves it to the engine, whose parser takes an earlier turn's end
        # for this turn's.
        parser_kwargs, ids = kwargs.get("reasoning_parser_kwargs"), _token_ids(prompt)
        if self._puzzle_parser is not None and kwargs.get("reasoning_ended") is None and parser_kwargs and ids:
            kwargs["reasoning_ended"] = self._puzzle_parser(**parser_kwargs).is_reasoning_end(ids)
        outputs = self._puzzle_client.generate(prompt, sampling_params, request_id, *args, **kwargs)
        return outputs if watch is None else self._watched(outputs, request_id)

    async def _watched(self, outputs: Any, request_id: str) -> AsyncIterator[Any]:
        try:
            async with aclosing(outputs):
                async for output in outputs:
                    yield output
        finally:
            self._puzzle_server.watches.running.pop(request_id, None)
