"""What a served model can do about thinking, as `/v1/models` tells it."""

from __future__ import annotations

from typing import Any

from vllm_puzzle.serving.dial.dialects import MAX_BUDGET
from vllm_puzzle.serving.dial.policy import ReasoningPolicy
from vllm_puzzle.serving.dial.profile import ARGUMENT, HIDDEN, LEVEL, SYSTEM_LINE, TEXT, TRAINED, ModelProfile
from vllm_puzzle.serving.dial.request import EFFORTS, UNLIMITED

OFF_WORDS = {
    TRAINED: "the off state that the model was trained on",
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
    can_close = has_budget and profile.off_state != HIDDEN
    can_disable = profile.has_off or can_close
    off = OFF_WORDS.get(profile.off_state, "the thought is closed at once")
    has_off = can_disable or has_budget
    return {
        "profile": profile.name,
        "modes": ["on", "off"] if has_off else ["on"],
        "can_disable": can_disable,
        "off": off if has_off else None,
        "switch": switch_words(profile),
        "efforts": _efforts(profile, policy, model_name),
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
    budgets = policy.budgets_of(model_name)
    known = [effort for effort in EFFORTS if effort in profile.levels or effort in budgets]
    return [{"effort": effort, "budget": _budget(budgets.get(effort), policy)} for effort in known]


def _budget(budget: int | None, policy: ReasoningPolicy) -> int | None:
    free = budget is None or budget == UNLIMITED
    most = min(MAX_BUDGET if free or budget is None else budget, policy.ceiling or MAX_BUDGET)
    return None if most == MAX_BUDGET else most


def _default(profile: ModelProfile, policy: ReasoningPolicy, model_name: str) -> dict[str, Any]:
    said = policy.default_of(model_name) or profile.default
    is_level = said not in ("on", "off")
    effort = said if is_level else profile.default_level if said == "on" else None
    return {"mode": "off" if said == "off" else "on", "effort": effort}
