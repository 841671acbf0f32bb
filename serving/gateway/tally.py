"""What a reply was seen to hold, and `reasoning_info`, which says it. What nobody told us is null."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm_puzzle.serving.gateway.plan import BY_TWO_CALLS, NOT_HELD, Plan

EXACT_BY_SERVER, UNSEEN_BY_SERVER = "exact by server", "by server, not verified"
EXACT_TWO_CALLS = "exact, two calls"
OFF_STATE, UNSEEN_OFF = "exact, off state", "off state, not verified"
# vLLM and its likes write the first, DeepSeek's API, SGLang and llama.cpp the second.
NAMES = ("reasoning", "reasoning_content")


@dataclass(slots=True)
class Tally:
    """Filled while a reply passes. count: of a text's tokens, where a tokenizer is at hand. thinking_tokens: known from
    how the reply was made, which beats the server's count.
    """

    count: Callable[[str], int] | None = None
    thought: list[str] = field(default_factory=list)
    answer: list[str] = field(default_factory=list)
    has_tool_calls: bool = False
    num_choices: int = 0
    finish_reason: str | None = None
    usage: dict[str, Any] | None = None
    thinking_tokens: int | None = None
    calls: int = 1
    is_cut: bool = False
    is_held: bool = True
    second_prefill: dict[str, int | None] | None = None

    def see(self, choice: Mapping[str, Any]) -> None:
        """One choice of a chunk or of a whole reply."""
        part = choice.get("delta") or choice.get("message") or {}
        thought = thought_of(part)
        if thought:
            self.thought.append(thought)
        if isinstance(part.get("content"), str) and part["content"]:
            self.answer.append(part["content"])
        self.has_tool_calls |= bool(part.get("tool_calls"))
        self.finish_reason = choice.get("finish_reason") or self.finish_reason
        self.num_choices = max(self.num_choices, (choice.get("index") or 0) + 1)

    def count_thinking(self) -> int | None:
        """Thinking tokens, None if unknown: a server's 0 beside a thought is a known fault of some parsers."""
        if self.thinking_tokens is not None:
            return self.thinking_tokens
        count = reasoning_tokens(self.usage)
        if not self.thought or count:
            return count
        if self.count is None or self.num_choices > 1:
            return None
        return self.count("".join(self.thought))


def thought_of(part: Mapping[str, Any]) -> str | None:
    """The thinking text of a delta or message, under whichever name."""
    for name in NAMES:
        if isinstance(part.get(name), str):
            return str(part[name])
    return None


def finish_choice(choice: Mapping[str, Any], is_visible: bool) -> bool:
    """Write a choice's thought under both names, or take it out; in place. Whether anything changed."""
    part = choice.get("delta") or choice.get("message") or {}
    if not any(name in part for name in NAMES):
        return False
    thought = thought_of(part)
    for name in NAMES:
        if is_visible:
            part[name] = thought
        else:
            part.pop(name, None)
    return True


def reasoning_tokens(usage: Mapping[str, Any] | None) -> int | None:
    """The server's own count."""
    if not usage:
        return None
    details = usage.get("completion_tokens_details")
    count = details.get("reasoning_tokens") if isinstance(details, Mapping) else usage.get("reasoning_tokens")
    return count if isinstance(count, int) else None


def reasoning_info(plan: Plan, tally: Tally) -> dict[str, Any]:
    """The extension object of a reply. answer_tokens: all generated tokens that are not thinking (markers and the end
    token included). second_prefill: what the second of two calls read again.
    """
    thinking = tally.count_thinking()
    generated = (tally.usage or {}).get("completion_tokens")
    answer = generated - thinking if isinstance(generated, int) and thinking is not None else None
    info = {
        "requested": {"mode": _mode(plan.wish.is_on), "effort": plan.wish.effort, "budget": plan.wish.budget},
        "effective": {
            "mode": _effective_mode(plan, tally, thinking),
            "effort": plan.effective.effort if plan.guarantees["effort"] != NOT_HELD else None,
            "budget": plan.effective.budget,
        },
        "thinking_tokens": thinking,
        "answer_tokens": answer,
        "end_reason": _end_reason(plan, tally, thinking),
        "guarantees": {**plan.guarantees, "budget": _budget_guarantee(plan, tally, thinking)},
        "upstream_kind": plan.kind.name,
        "calls": tally.calls,
    }
    return info if tally.second_prefill is None else {**info, "second_prefill": tally.second_prefill}


def _mode(is_on: bool | None) -> str | None:
    return None if is_on is None else "on" if is_on else "off"


def _effective_mode(plan: Plan, tally: Tally, thinking: int | None) -> str | None:
    """What was seen beats what was asked."""
    if tally.thought or thinking:
        return "on"
    return "off" if plan.wish.is_on is False else None


def _end_reason(plan: Plan, tally: Tally, thinking: int | None) -> str | None:
    """off, natural, budget or length; None where the reply does not show it."""
    budget = plan.effective.budget
    if tally.num_choices > 1:
        return None
    if not tally.thought and not thinking:
        return "off" if plan.wish.is_on is False else None
    if tally.is_cut or (budget is not None and thinking is not None and thinking >= budget):
        return "budget"
    if tally.answer or tally.has_tool_calls:
        return None if budget is not None and thinking is None else "natural"
    return "length" if tally.finish_reason == "length" else None


def _budget_guarantee(plan: Plan, tally: Tally, thinking: int | None) -> str | None:
    budget = plan.effective.budget
    if plan.wish.budget == 0 and budget is None:
        return NOT_HELD if tally.thought or thinking else UNSEEN_OFF if thinking is None else OFF_STATE
    if budget is None:
        return None
    if plan.budget_by == BY_TWO_CALLS:
        return EXACT_TWO_CALLS if tally.is_held else NOT_HELD
    if thinking is not None and thinking <= budget:
        return EXACT_BY_SERVER
    # The count of several choices is their sum.
    return UNSEEN_BY_SERVER if thinking is None or tally.num_choices > 1 else NOT_HELD
