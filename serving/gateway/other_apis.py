"""Reasoning fields on /v1/responses and /v1/messages → the words that those APIs have themselves. The upstream that has
the route answers; its reply passes as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm_puzzle.serving.dial.dialects import read_statements
from vllm_puzzle.serving.dial.request import UNLIMITED, ReasoningRequest, RequestError, combine
from vllm_puzzle.serving.gateway.errors import MESSAGES_PATH, GatewayError
from vllm_puzzle.serving.gateway.plan import without_reasoning
from vllm_puzzle.serving.gateway.probe import Facts

RESPONSES_PATH = "/v1/responses"
# Keys of OpenAI's own object that ask for no more or less thinking.
OWN_KEYS = ("summary", "generate_summary", "mode")
ANTHROPIC_EFFORTS = ("low", "medium", "high", "xhigh", "max")


def translate(body: Mapping[str, Any], path: str, facts: Facts) -> dict[str, Any]:
    """The body for the upstream. Raises GatewayError 400 for wrong fields and for what this API cannot say there."""
    try:
        wish = combine(read_statements(body))
        kept = without_reasoning(body, path)
        if wish.keeps_history is not None:
            raise _refuse(wish, "keeps_history", "chat completions only")
        if wish.is_visible is False:
            raise _refuse(wish, "is_visible", "chat completions only")
        write = _write_messages if path == MESSAGES_PATH else _write_responses
        return write(kept, body, wish, facts)
    except RequestError as error:
        raise GatewayError(400, str(error), error.param) from error


def _write_responses(kept: dict[str, Any], body: Mapping[str, Any], wish: ReasoningRequest, facts: Facts) -> Any:
    if wish.budget not in (None, 0, UNLIMITED):
        raise _refuse(wish, "budget", "a level; this API has no budget")
    own = body.get("reasoning")
    reasoning = {key: own[key] for key in OWN_KEYS if key in own} if isinstance(own, Mapping) else {}
    if wish.is_on is False:
        reasoning["effort"] = "none"
    elif wish.effort is not None:
        reasoning["effort"] = wish.effort
    elif wish.is_on and wish.budget is None:
        kept = _switched_on(kept, wish, facts)
    return {**kept, "reasoning": reasoning} if reasoning else kept


def _write_messages(kept: dict[str, Any], body: Mapping[str, Any], wish: ReasoningRequest, facts: Facts) -> Any:
    if wish.effort is not None:
        if wish.effort not in ANTHROPIC_EFFORTS:
            raise _refuse(wish, "effort", ", ".join(ANTHROPIC_EFFORTS))
        kept = {**kept, "output_config": {**(kept.get("output_config") or {}), "effort": wish.effort}}
    if wish.is_on is False:
        return {**kept, "thinking": {"type": "disabled"}}
    if wish.budget not in (None, UNLIMITED):
        if not facts.kind.messages_budget or not facts.has_budget:
            raise _refuse(wish, "budget", f"a level; {facts.kind.name} has no budget on this API")
        return {**kept, "thinking": {"type": "enabled", "budget_tokens": wish.budget}}
    if wish.is_on and wish.effort is None and wish.budget is None:
        return _switched_on(kept, wish, facts)
    return kept


def _switched_on(kept: dict[str, Any], wish: ReasoningRequest, facts: Facts) -> dict[str, Any]:
    """Reasoning on without a level: vLLM takes template arguments on these routes too, nobody else is known to."""
    if facts.kind.name != "vllm":
        raise _refuse(wish, "is_on", f"a level; {facts.kind.name} cannot be told only to think on this API")
    arguments = {**(kept.get("chat_template_kwargs") or {}), "enable_thinking": True, "thinking": True}
    return {**kept, "chat_template_kwargs": arguments}


def _refuse(wish: ReasoningRequest, about: str, allowed: str) -> RequestError:
    source = wish.sources[about]
    value = getattr(wish, about)
    return RequestError(
        f"`{source}`: found {value!r} on an API of this upstream that has no such field, allowed: {allowed}", source
    )
