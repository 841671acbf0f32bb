"""What a model runner reads about thinking: one request's plan, and the server's markers, between processes.

Pure: the API process checks with it what it sends, both model runners read with it what arrives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm_puzzle.kernels.thinking import LoopRule, ThinkingLimits, ThinkingMarkers, Tokens

# A plan travels in `sampling_params.extra_args[PLAN_KEY]`.
PLAN_KEY = "puzzle_thinking"
# Longest pattern of a loop rule, in tokens: the V2 runner's kernel keeps one counter per distance and request.
MAX_PATTERN = 64
_FIELDS = ("budget", "grace", "loop")


def limits_of(sampling_params: Any) -> ThinkingLimits | None:
    """The limits one request runs under, or None when it has neither a plan nor a budget.

    The plan `{"budget": int | None, "grace": int, "loop": [min_pattern, max_pattern, count] | None}` wins over vLLM's
    own `thinking_token_budget` (-1 or None: no budget). ValueError, one line, when the plan is malformed.
    """
    plan = (sampling_params.extra_args or {}).get(PLAN_KEY)
    if plan is None:
        budget = sampling_params.thinking_token_budget
        return None if budget is None or budget < 0 else ThinkingLimits(budget)
    if not isinstance(plan, Mapping) or not set(plan) <= set(_FIELDS):
        raise _refusal("", plan, f"an object with the keys {', '.join(_FIELDS)}")
    budget, grace, loop = plan.get("budget"), plan.get("grace", 0), plan.get("loop")
    if budget is not None and not _is_count(budget):
        raise _refusal(".budget", budget, "null or a whole number >= 0")
    if not _is_count(grace):
        raise _refusal(".grace", grace, "a whole number >= 0")
    return ThinkingLimits(budget, grace, None if loop is None else _loop_rule(loop))


def plan_of(limits: ThinkingLimits) -> dict[str, Any]:
    """The plan that `limits_of` reads."""
    loop = limits.loop and [limits.loop.min_pattern, limits.loop.max_pattern, limits.loop.count]
    return {"budget": limits.budget, "grace": limits.grace, "loop": loop}


def _loop_rule(loop: Any) -> LoopRule:
    allowed = f"null or [min_pattern, max_pattern, count], 1 <= min_pattern <= max_pattern <= {MAX_PATTERN}, count >= 2"
    if not (isinstance(loop, Sequence) and not isinstance(loop, str) and len(loop) == 3 and all(map(_is_count, loop))):
        raise _refusal(".loop", loop, allowed)
    smallest, largest, count = loop
    if not (1 <= smallest <= largest <= MAX_PATTERN and count >= 2):
        raise _refusal(".loop", loop, allowed)
    return LoopRule(smallest, largest, count)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _refusal(key: str, found: Any, allowed: str) -> ValueError:
    return ValueError(f"sampling parameters, key extra_args.{PLAN_KEY}{key}: found {found!r}, allowed: {allowed}")


def markers_of(reasoning_config: Any) -> ThinkingMarkers | None:
    """The markers that vLLM's ReasoningConfig knows, None when it knows none (no reasoning parser).

    vLLM's forced end may hold a phrase before the end that the parser looks for; they are told apart here.
    """
    start = getattr(reasoning_config, "reasoning_start_token_ids", None)
    forced = getattr(reasoning_config, "reasoning_end_token_ids", None)
    natural = getattr(reasoning_config, "natural_reasoning_end_token_ids", None)
    if not (start and forced and natural):
        return None
    phrase, closing = tuple(forced[: -len(natural)]), tuple(forced[-len(natural) :])
    if closing != tuple(natural):
        phrase, closing = (), tuple(forced)
    return ThinkingMarkers(tuple(start), (tuple(natural),), closing, phrase)


def markers_to_wire(markers: ThinkingMarkers) -> dict[str, Any]:
    """The markers as plain lists, for JSON or msgpack; without headers, as a runner counts no answers."""
    return {
        "start": list(markers.start),
        "ends": [list(end) for end in markers.ends],
        "closing": list(markers.closing),
        "phrase": list(markers.phrase),
        "boundaries": sorted(markers.boundaries),
        "tool_starts": [list(start) for start in markers.tool_starts],
        "other_starts": [list(start) for start in markers.other_starts],
    }


def markers_from_wire(wire: Mapping[str, Any]) -> ThinkingMarkers:
    """The markers that `markers_to_wire` wrote; ValueError when a key is missing, unknown or holds no tokens."""
    wanted = {"start", "ends", "closing", "phrase", "boundaries", "tool_starts", "other_starts"}
    if set(wire) != wanted:
        raise ValueError(f"thinking markers: found the keys {sorted(wire)}, allowed: {sorted(wanted)}")
    return ThinkingMarkers(
        start=_tokens("start", wire["start"]),
        ends=tuple(_tokens("ends", end) for end in wire["ends"]),
        closing=_tokens("closing", wire["closing"]),
        phrase=_tokens("phrase", wire["phrase"]),
        boundaries=frozenset(_tokens("boundaries", wire["boundaries"])),
        tool_starts=tuple(_tokens("tool_starts", start) for start in wire["tool_starts"]),
        other_starts=tuple(_tokens("other_starts", start) for start in wire["other_starts"]),
    )


def _tokens(key: str, found: Any) -> Tokens:
    if not (isinstance(found, Sequence) and all(map(_is_count, found))):
        raise ValueError(f"thinking markers, key `{key}`: found {found!r}, allowed: a list of token ids")
    return tuple(found)
