"""A client's wishes and what the model can → what to do: template arguments, a system line, a budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jinja2 import Environment, TemplateSyntaxError, meta
from vllm_puzzle.serving.dial.request import UNLIMITED, ReasoningRequest, RequestError

# Template variables that take a level as a word.
LEVEL_ARGUMENTS = ("reasoning_effort", "thinking_effort")
# Template variables that ask for one level each.
LEVEL_FLAGS = {"low_effort": ("minimal", "low"), "medium_effort": ("medium",)}
SWITCH_ARGUMENTS = ("enable_thinking", "thinking")
# Template variable about earlier turns' thoughts → its value when they are kept.
HISTORY_ARGUMENTS = {"truncate_history_thinking": False, "clear_thinking": False, "preserve_thinking": True}


@dataclass(frozen=True, slots=True)
class ModelDial:
    """What the served model and server can do.

    arguments: the variables that the chat template reads. has_system_line: the switch is a line of the system message.
    has_budget: the server can count thinking tokens (it has a reasoning parser with known markers).
    """

    arguments: frozenset[str]
    has_system_line: bool = False
    has_budget: bool = True

    @property
    def has_switch(self) -> bool:
        """Whether the model has an off state of its own."""
        return self.has_system_line or self.is_switched_by_level or not self.arguments.isdisjoint(SWITCH_ARGUMENTS)

    @property
    def is_switched_by_level(self) -> bool:
        """Whether "none" as the level is the only switch (Mistral, GLM)."""
        return "reasoning_effort" in self.arguments and self.arguments.isdisjoint(SWITCH_ARGUMENTS)


def template_arguments(template: str) -> frozenset[str]:
    """The variables that a Jinja chat template reads; of one that uses tags unknown here, those of our interest that it
    names.
    """
    environment = Environment(extensions=["jinja2.ext.loopcontrols"], autoescape=False)
    try:
        return frozenset(meta.find_undeclared_variables(environment.parse(template)))
    except TemplateSyntaxError:
        known = ("enable_thinking", *LEVEL_ARGUMENTS, *LEVEL_FLAGS, *HISTORY_ARGUMENTS)
        return frozenset(name for name in known if name in template)


@dataclass(frozen=True, slots=True)
class Effective:
    """What is done: `is_on` None leaves the model's default, `effort` may be "none"; `budget` None sets no limit."""

    is_on: bool | None = None
    effort: str | None = None
    budget: int | None = None
    is_visible: bool = True
    template_arguments: Mapping[str, Any] = field(default_factory=dict)


def resolve(wish: ReasoningRequest, model: ModelDial) -> Effective:
    """Raises RequestError for a wish that the model or the server cannot honour, naming the field."""
    budget = None if wish.budget in (None, UNLIMITED) else wish.budget
    if budget == 0 and model.has_switch:
        budget = None  # the off state that the model was trained on, rather than a thought closed at once
    elif wish.is_on is False and not model.has_switch:
        budget = 0
    if budget is not None and not model.has_budget:
        about = "budget" if wish.budget is not None else "is_on"
        source = wish.sources[about]
        raise RequestError(
            f"`{source}`: found on a server that cannot count thinking tokens, allowed with --reasoning-parser", source
        )
    arguments = _switch_arguments(wish, model) | _level_arguments(wish, model) | _history_arguments(wish, model)
    effort = "none" if wish.is_on is False and model.is_switched_by_level else wish.effort
    return Effective(wish.is_on, effort, budget, wish.is_visible is not False, arguments)


def _switch_arguments(wish: ReasoningRequest, model: ModelDial) -> dict[str, Any]:
    """`enable_thinking` always: vLLM's reasoning parsers read it even where the template does not."""
    if wish.is_on is None:
        return {}
    return {name: wish.is_on for name in SWITCH_ARGUMENTS if name == "enable_thinking" or name in model.arguments}


def _level_arguments(wish: ReasoningRequest, model: ModelDial) -> dict[str, Any]:
    if wish.effort is None:
        return {}
    arguments: dict[str, Any] = {name: wish.effort for name in LEVEL_ARGUMENTS if name in model.arguments}
    return arguments | {
        name: True for name, levels in LEVEL_FLAGS.items() if name in model.arguments and wish.effort in levels
    }


def _history_arguments(wish: ReasoningRequest, model: ModelDial) -> dict[str, Any]:
    if wish.keeps_history is None:
        return {}
    known = {name: kept == wish.keeps_history for name, kept in HISTORY_ARGUMENTS.items() if name in model.arguments}
    if not known:
        source = wish.sources["keeps_history"]
        raise RequestError(f"`{source}`: found with a model whose template has no such rule, allowed: nothing", source)
    return known
