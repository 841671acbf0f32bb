"""A chat request in any ecosystem's words → the body in this upstream's words, and what that guarantees."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from vllm_puzzle.serving.dial.derive import LEVEL_ARGUMENTS, LEVEL_FLAGS, SWITCH_ARGUMENTS
from vllm_puzzle.serving.dial.dialects import FIELDS, read_statements
from vllm_puzzle.serving.dial.middleware import SHARED, without_fields
from vllm_puzzle.serving.dial.profile import ARGUMENT, TRAINED, ModelProfile, profile_of
from vllm_puzzle.serving.dial.request import EFFORTS, ReasoningRequest, RequestError, combine
from vllm_puzzle.serving.dial.resolve import Effective, ModelDial, resolve, settled_messages, text_state
from vllm_puzzle.serving.gateway.errors import GatewayError
from vllm_puzzle.serving.gateway.kinds import Kind, with_budget
from vllm_puzzle.serving.gateway.probe import Facts

BY_SERVER, BY_TWO_CALLS = "server", "two calls"
IN_TEMPLATE, SENT, NOT_HELD = "in the template", "sent, template unknown", "none"


@dataclass(frozen=True, slots=True)
class Plan:
    """body: for the upstream, in its words. budget_by: who holds the budget, None without one. guarantees: for mode and
    effort; None where nothing was asked.
    """

    kind: Kind
    body: dict[str, Any]
    wish: ReasoningRequest
    effective: Effective
    budget_by: str | None = None
    guarantees: dict[str, str | None] = field(default_factory=dict)


def make_plan(body: Mapping[str, Any], facts: Facts) -> Plan:
    """Raises GatewayError 400 for wrong fields and for what this upstream cannot honour."""
    try:
        wish = combine(read_statements(body))
        dial = model_dial(facts)
        _check(wish, facts)
        messages = body.get("messages")
        in_text = text_state(messages, dial) if isinstance(messages, list) else []
        effective = resolve(wish, dial, in_text)
    except RequestError as error:
        raise GatewayError(400, str(error), error.param) from error
    sent = _with_switch(without_reasoning(body), effective, facts.kind)
    if isinstance(messages, list):
        sent["messages"] = settled_messages(messages, effective, dial)
    budget_by = None
    if effective.budget is not None:
        budget_by = BY_SERVER if facts.has_budget else BY_TWO_CALLS
        if facts.has_budget:
            sent = with_budget(sent, facts.kind, effective.budget)
    return Plan(facts.kind, sent, wish, effective, budget_by, _guarantees(wish, dial, facts))


def model_dial(facts: Facts) -> ModelDial:
    """What the model can do: its family's profile, or what its template shows, where that is known."""
    return ModelDial(ASSUMED if facts.template is None else _profile(facts.model_type, facts.template))


@lru_cache(maxsize=16)
def _profile(model_type: str, template: str) -> ModelProfile:
    """Reading a template takes many renderings: once for each that the upstream shows."""
    return profile_of(model_type, "", template)


def _assumed_level(effort: str) -> dict[str, Any]:
    flags = {name: True for name, level in LEVEL_FLAGS.items() if effort == level}
    return {**dict.fromkeys(LEVEL_ARGUMENTS, effort), **flags}


# What a template that nobody has shown us is taken to read; one that does not ignores it.
ASSUMED = ModelProfile(
    name="assumed",
    source="every variable that a known template reads",
    switch=ARGUMENT,
    arguments=SWITCH_ARGUMENTS,
    off_state=TRAINED,
    levels={effort: _assumed_level(effort) for effort in EFFORTS},
)


def without_reasoning(body: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """The body without any reasoning field, those inside shared objects too: the upstream would read them."""
    kept = without_fields(body, path)
    for name in SHARED:
        if isinstance(kept.get(name), Mapping):
            kept[name] = {key: value for key, value in kept[name].items() if key not in FIELDS[name]}
            if not kept[name]:
                del kept[name]
    return kept


def _check(wish: ReasoningRequest, facts: Facts) -> None:
    """What this upstream has no word for."""
    name = facts.kind.name
    if wish.keeps_history is not None and (facts.template is None or not facts.kind.has_arguments):
        source = wish.sources["keeps_history"]
        raise RequestError(
            f"`{source}`: found with an upstream ({name}) whose template is not known, allowed with --tokenizer", source
        )
    if wish.is_on and not facts.kind.has_arguments and wish.effort is None and wish.budget is None:
        source = wish.sources["is_on"]
        raise RequestError(
            f"`{source}`: found reasoning on for an upstream ({name}) that knows levels only, allowed: a level", source
        )


def _with_switch(body: dict[str, Any], effective: Effective, kind: Kind) -> dict[str, Any]:
    if not kind.has_arguments:
        effort = "none" if effective.is_on is False else effective.effort
        return body if effort is None else {**body, "reasoning_effort": effort}
    arguments = dict(effective.template_arguments)
    if effective.effort is not None:
        if kind.has_effort:
            body = {**body, "reasoning_effort": effective.effort}
        elif effective.effort == "none":
            arguments["reasoning_effort"] = "none"
    if arguments:
        body = {**body, "chat_template_kwargs": {**(body.get("chat_template_kwargs") or {}), **arguments}}
    return body


def _guarantees(wish: ReasoningRequest, dial: ModelDial, facts: Facts) -> dict[str, str | None]:
    is_known = facts.template is not None and facts.kind.has_arguments
    mode = effort = None
    if wish.is_on is not None:
        # A budget of 0 stands in for an off state that the model does not have.
        mode = SENT if not is_known else IN_TEMPLATE if dial.profile.has_off else NOT_HELD
    if wish.effort is not None:
        effort = SENT if not is_known else IN_TEMPLATE if dial.profile.levels else NOT_HELD
    return {"mode": mode, "effort": effort}
