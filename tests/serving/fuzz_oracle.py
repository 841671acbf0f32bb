"""What must hold for the reply to any request body: an independent, simple reading of the body, and the checks."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fuzz_bodies import MESSAGES, REFUSED, UNREADABLE, Case

EFFORTS = {"minimal", "low", "medium", "high", "xhigh", "max"}
# What each field is about. Written by hand from the dialects' documentation; a field that is not here fails a test.
MEANS: dict[str, Any] = {
    "reasoning_effort": "effort",
    "reasoning.effort": "effort",
    "reasoning.max_tokens": "budget",
    "reasoning.enabled": "mode",
    "reasoning.exclude": "hidden",
    "reasoning.summary": {"auto": "visible", "concise": "visible", "detailed": "visible"},
    "reasoning.generate_summary": {"auto": "visible", "concise": "visible", "detailed": "visible"},
    "reasoning.mode": {"standard": ""},
    "reasoning.context": {"auto": "", "current_turn": "forgets", "all_turns": "keeps"},
    "thinking.type": {"enabled": "on", "disabled": "off", "adaptive": "", "between_tools": ""},
    "thinking.budget_tokens": "budget",
    "thinking.display": {"summarized": "visible", "omitted": "invisible"},
    "thinking.clear_thinking": "clears",
    "output_config.effort": "effort",
    "thinking_token_budget": "budget",
    "thinking_budget": "budget",
    "thinking_budget_tokens": "budget",
    "reasoning_budget": "budget",
    "nvext.max_thinking_tokens": "budget",
    "custom_params.thinking_budget": "budget",
    "vllm_xargs.thinking_budget": "budget",
    "google.thinking_config.thinking_budget": "budget",
    "google.thinking_config.thinking_level": "effort",
    "google.thinking_config.include_thoughts": "shows",
    "extra_body.google.thinking_config.thinking_budget": "budget",
    "extra_body.google.thinking_config.thinking_level": "effort",
    "extra_body.google.thinking_config.include_thoughts": "shows",
    "enable_thinking": "mode",
    "think": "mode or effort",
    "chat_template_kwargs.enable_thinking": "mode",
    "chat_template_kwargs.thinking": "mode",
    "chat_template_kwargs.reasoning_effort": "effort",
    "chat_template_kwargs.thinking_effort": "effort",
    "chat_template_kwargs.low_effort": "low",
    "chat_template_kwargs.medium_effort": "medium",
    "chat_template_kwargs.thinking_budget": "budget",
    "chat_template_kwargs.reasoning_budget": "budget",
    "chat_template_kwargs.truncate_history_thinking": "clears",
    "chat_template_kwargs.preserve_thinking": "preserves",
    "chat_template_kwargs.clear_thinking": "clears",
    "include_reasoning": "shows",
    "separate_reasoning": "must be true",
    "stream_reasoning": "shows",
    "reasoning_format": {
        "none": "", "auto": "", "parsed": "", "deepseek": "", "deepseek-legacy": "", "hidden": "invisible",
    },
}  # fmt: skip
# A word or a boolean → (what it is about, what it says of that).
FACTS = {
    "on": ("mode", True), "off": ("mode", False), "visible": ("shown", True), "invisible": ("shown", False),
    "keeps": ("history", True), "forgets": ("history", False),
}  # fmt: skip
BOOLEANS = {
    "mode": ("on", "off"), "shows": ("visible", "invisible"), "hidden": ("invisible", "visible"),
    "preserves": ("keeps", "forgets"), "clears": ("forgets", "keeps"),
}  # fmt: skip
CLOSED = ("reasoning", "thinking", "google.thinking_config", "extra_body.google.thinking_config")
OBJECTS = {path.rsplit(".", size)[0] for path in MEANS for size in range(1, path.count(".") + 1)}
NO_CONTROLS = {"reasoning_content", "reasoning_details", "reasoning_opaque"}


class BadField(Exception):
    """The body must be refused."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What `reasoning_info.requested` must say, and whether any field spoke of history or of anything."""

    mode: str | None = None
    effort: str | None = None
    budget: int | None = None
    has_history: bool = False
    is_silent: bool = True

    @property
    def requested(self) -> dict[str, Any]:
        return {"mode": self.mode, "effort": self.effort, "budget": self.budget}


def seen(case: Case) -> dict[str, Any] | None:
    """The body as a plain reader sees it."""
    if case.fault in UNREADABLE or case.fault in REFUSED:
        return None
    body: dict[str, Any] = json.loads(case.raw)
    return body


def read_simply(case: Case) -> Wanted | None:
    """What the body asks for; None when there is no body to read. Raises BadField when it must be refused."""
    if case.fault in REFUSED:
        raise BadField(case.fault)
    body = seen(case)
    if body is None:
        return None
    facts: list[tuple[str, Any]] = []
    _walk("", body, facts)
    members: list[Any] = json.loads(case.raw, object_pairs_hook=list)
    twice = [key for key, count in Counter(key for key, _ in members).items() if count > 1]
    if any(key in MEANS or key in OBJECTS for key in twice):
        raise BadField(f"{twice} twice")
    said: dict[str, Any] = {}
    for about, value in facts:
        if said.setdefault(about, value) != value:
            raise BadField(f"two values of {about}")
    modes = {said[about] for about in ("mode",) if about in said}
    modes |= {True for about in ("effort",) if about in said} | {said[b] != 0 for b in ("budget",) if b in said}
    if len(modes) > 1:
        raise BadField("on and off")
    mode = None if not modes else "on" if modes.pop() else "off"
    return Wanted(mode, said.get("effort"), said.get("budget"), "history" in said, not facts)


def _walk(prefix: str, value: Mapping[str, Any], facts: list[tuple[str, Any]]) -> None:
    for key, inner in value.items():
        path = f"{prefix}{key}"
        if "." in key:  # the table's names are written with dots here; a key that holds one is none of them
            path = f"{prefix}[{key}]"
        if path in OBJECTS and path not in MEANS:
            if inner is not None and not isinstance(inner, dict):
                raise BadField(f"{path} is no object")
            _walk(f"{path}.", inner or {}, facts)
        elif path in MEANS:
            if inner is not None:
                facts += _facts(MEANS[path], inner)
        elif prefix[:-1] in CLOSED or (path not in NO_CONTROLS and _looks_like(key)):
            raise BadField(f"{path} is unknown")


def _looks_like(key: str) -> bool:
    return any(word in key.lower() for word in ("reason", "think", "thought"))


def _facts(means: Any, value: Any) -> list[tuple[str, Any]]:
    if isinstance(means, dict):
        if not isinstance(value, str) or value not in means:
            raise BadField("no such word")
        return [FACTS[means[value]]] if means[value] else []
    if means == "budget":
        if type(value) is not int or not -1 <= value < 2**31:
            raise BadField("no budget")
        return [("budget", value)]
    if means == "effort" or (means == "mode or effort" and isinstance(value, str)):
        if value == "none":
            return [("mode", False)]
        value = "max" if value == "ultra" else value
        if not isinstance(value, str) or value not in EFFORTS:
            raise BadField("no effort")
        return [("effort", value)]
    if type(value) is not bool or (means == "must be true" and not value):
        raise BadField("no boolean")
    if means in ("low", "medium"):
        return [("effort", means)] if value else []
    if means == "must be true":
        return []
    return [FACTS[BOOLEANS["mode" if means == "mode or effort" else means][not value]]]


# --- checks ----------------------------------------------------------------------------------------------------------

MAX_MESSAGE = 1200


def check_error(case: Case, status: int, body: Any, is_ours: bool) -> None:
    """Any error's shape; our own is also one line, and echoes little of what the client wrote."""
    assert 400 <= status < 500, (status, body)
    error = body["error"]
    if case.path == MESSAGES:
        assert set(body) <= {"type", "error", "request_id"}, body
        assert body["type"] == "error", body
        assert set(error) == {"type", "message"}, body
    else:
        assert set(body) == {"error"}, body
        assert set(error) == {"message", "type", "param", "code"}, body
        assert error["code"] == status, body
    assert isinstance(error["message"], str) and error["message"], body
    assert isinstance(error["type"], str), body
    if is_ours:
        assert len(error["message"]) <= MAX_MESSAGE, error["message"]
        assert "\n" not in error["message"], error["message"]
        assert len(error.get("param") or "") <= 200, error


def check_info(info: Mapping[str, Any], wanted: Wanted, ceiling: int) -> None:
    """The reply's `reasoning_info` against what the body asked for and the server's ceiling."""
    assert info["requested"] == wanted.requested, (info, wanted)
    effective = info["effective"]
    limits = [limit for limit in (effective["budget"], ceiling) if limit is not None]
    if wanted.budget is not None and wanted.budget >= 0:
        limits.append(wanted.budget)
    for counted in info.get("choices") or [info]:
        tokens = counted["thinking_tokens"]
        if tokens is None:
            continue
        assert tokens <= min(limits), info
        if effective["mode"] == "off":
            assert tokens == 0, info
    if wanted.mode is not None:
        # The one change of mode: a ceiling of 0, which no server here has.
        assert effective["mode"] == wanted.mode, (info, wanted)
