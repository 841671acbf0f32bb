"""What each kind of server calls its reasoning knobs, as data. Sources: the servers' own documentation and code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# How a server takes a reply that we have begun: "template" renders it as the last message, "appended" writes it as it
# is after the generation prompt.
CONTINUES_IN_TEMPLATE, CONTINUES_APPENDED = "template", "appended"


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of upstream server.

    has_arguments: chat requests take `chat_template_kwargs`. has_effort: they take `reasoning_effort`. budget: path of
    the field for most thinking tokens, empty where there is none. budget_needs: key of the server's own description
    that must be true for the budget to hold. continues: see above, empty where a begun reply is not continued.
    messages_budget: the Messages route honours `thinking.budget_tokens`. health: path that answers 200 when it can
    serve. owner: `owned_by` of its models. answer_fields: what the second of two calls adds, so that all its text is
    the answer.
    """

    name: str
    has_arguments: bool = True
    has_effort: bool = True
    budget: tuple[str, ...] = ()
    budget_needs: str = ""
    continues: str = ""
    messages_budget: bool = False
    health: str = "/health"
    owner: str = ""
    answer_fields: Mapping[str, Any] = field(default_factory=dict)


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(
            "vllm",
            budget=("thinking_token_budget",),
            continues=CONTINUES_IN_TEMPLATE,
            messages_budget=True,
            owner="vllm",
        ),
        Kind("trtllm", has_effort=False, budget=("thinking_token_budget",), owner="tensorrt_llm"),
        Kind(
            "sglang",
            budget=("custom_params", "thinking_budget"),
            budget_needs="enable_strict_thinking",
            continues=CONTINUES_APPENDED,
            owner="sglang",
            answer_fields={"separate_reasoning": False},
        ),
        Kind("nim", has_effort=False, budget=("nvext", "max_thinking_tokens"), health="/v1/health/ready"),
        Kind("llamacpp", budget=("thinking_budget_tokens",), messages_budget=True, owner="llamacpp"),
        Kind("openai", has_arguments=False, health="/v1/models"),
    )
}
AUTO = "auto"


def with_budget(body: Mapping[str, Any], kind: Kind, budget: int) -> dict[str, Any]:
    """The body with the kind's own budget field in it; other keys of the same object stay."""
    if len(kind.budget) == 1:
        return {**body, kind.budget[0]: budget}
    outer, inner = kind.budget
    return {**body, outer: {**(body.get(outer) or {}), inner: budget}}
