"""What a served model can do about thinking, as `/v1/models` tells it."""

from __future__ import annotations

from typing import Any

from vllm_puzzle.serving.dial.policy import ReasoningPolicy
from vllm_puzzle.serving.dial.profile import ARGUMENT, CLOSED, HIDDEN, LEVEL, SYSTEM_LINE, TEXT, TRAINED, ModelProfile
from vllm_puzzle.serving.dial.request import EFFORTS
from vllm_puzzle.serving.dial.resolve import SHORT_BUDGET, effort_budget, nearest

OFF_WORDS = {
    TRAINED: "the off state that the model was trained on",
    CLOSED: "the thought is closed at once",
    HIDDEN: "short hidden reasoning, as the model always reasons",
}


def capabilities(
    profile: ModelProfile, policy: ReasoningPolicy, model_name: str, has_budget: bool = True
) -> dict[str, Any]:
    """JSON for one served model.

    profile: its name. modes: those a request can ask for. can_disable: whether off means no thinking at all. off: what
    off does. switch: how it is set. efforts: [{effort, budget}], budgets in tokens, null for no limit; empty where a
    level changes nothing. budget: {min, max} in tokens, max null for no limit; null where the server cannot count.
    default: {mode, effort, budget} of a request that says nothing.
    """
    can_disable = profile.has_off or (has_budget and profile.off_state != HIDDEN)
    has_off, is_never_on = can_disable or has_budget, policy.ceiling == 0
    return {
        "profile": profile.name,
        "modes": ([] if is_never_on else ["on"]) + (["off"] if has_off else []),
        "can_disable": can_disable,
        "off": OFF_WORDS[profile.off_state] if has_off else None,
        "switch": switch_words(profile),
        "efforts": [] if is_never_on else _efforts(profile, policy, model_name),
        "budget": {"min": profile.min_budget, "max": policy.ceiling} if has_budget else None,
        "default": _default(profile, policy, model_name),
    }


def switch_words(profile: ModelProfile) -> str | None:
    """How thinking is switched, in words; None where it is not."""
    if profile.switch == ARGUMENT:
        return f"template argument {', '.join(profile.arguments)}"
    if profile.switch == LEVEL:
        return "effort none"
    if profile.switch == TEXT:
        line = "system line `detailed thinking on|off`"
        where = "the system message" if profile.text == "system_tag" else "a system or user message"
        return line if profile.text == SYSTEM_LINE else f"`/think`, `/no_think` in {where}"
    return None


def _efforts(profile: ModelProfile, policy: ReasoningPolicy, model_name: str) -> list[dict[str, Any]]:
    known = [effort for effort in EFFORTS if effort in {**profile.levels, **policy.budgets_of(model_name)}]
    return [{"effort": effort, "budget": _budget(effort, policy, model_name)} for effort in known]


def _budget(effort: str | None, policy: ReasoningPolicy, model_name: str) -> int | None:
    return policy.limited(effort_budget(effort, policy, model_name)[1])


def _default(profile: ModelProfile, policy: ReasoningPolicy, model_name: str) -> dict[str, Any]:
    said = "off" if policy.ceiling == 0 else policy.default_of(model_name) or profile.default
    if said == "off":
        return {
            "mode": "off",
            "effort": None,
            "budget": 0 if profile.off_state != HIDDEN else policy.limited(SHORT_BUDGET),
        }
    asked = None if said == "on" else said
    level = profile.default_level if asked is None else nearest(asked, profile.levels or [asked])
    return {"mode": "on", "effort": level, "budget": _budget(asked, policy, model_name)}
