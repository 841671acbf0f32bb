"""A Responses request's instructions and input seen as one list of messages, and written back. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def as_messages(request: Any) -> list[Any]:
    """Instructions as the system message, a plain input as the user's; items of an input list as they are."""
    head = [{"role": "system", "content": request.instructions}] if request.instructions else []
    found = request.input
    return head + ([{"role": "user", "content": found}] if isinstance(found, str) else list(found))


def whole_output_messages(items: Sequence[Any]) -> list[Any]:
    """The items of an input, each earlier reply of one text part as it is, any other as a message of all its text.

    vLLM 0.32 reads the first part's text and no other (`responses/utils.py`): it drops a second part, and fails on a
    reply of no part and on a refusal.
    """
    return [_whole(item) if _is_reply(item) else item for item in items]


def _is_reply(item: Any) -> bool:
    return not isinstance(item, Mapping) and getattr(item, "type", None) == "message"


def _whole(item: Any) -> Any:
    parts = item.content
    if len(parts) == 1 and hasattr(parts[0], "text"):
        return item
    texts = [part.text if hasattr(part, "text") else part.refusal for part in parts]
    return {"role": item.role, "content": "".join(texts)}


def write_back(request: Any, messages: list[Any]) -> None:
    """Put edited messages where they came from, in place; a new first system message becomes the instructions."""
    size = 1 if isinstance(request.input, str) else len(request.input)
    head, rest = messages[: len(messages) - size], messages[len(messages) - size :]
    if head:
        request.instructions = "\n".join(message["content"] for message in head)
    request.input = rest[0]["content"] if isinstance(request.input, str) else rest
