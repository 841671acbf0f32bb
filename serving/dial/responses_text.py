"""A Responses request's instructions and input seen as one list of messages, and written back. Pure."""

from __future__ import annotations

from typing import Any


def as_messages(request: Any) -> list[Any]:
    """Instructions as the system message, a plain input as the user's; items of an input list as they are."""
    head = [{"role": "system", "content": request.instructions}] if request.instructions else []
    found = request.input
    return head + ([{"role": "user", "content": found}] if isinstance(found, str) else list(found))


def write_back(request: Any, messages: list[Any]) -> None:
    """Put edited messages where they came from, in place; a new first system message becomes the instructions."""
    size = 1 if isinstance(request.input, str) else len(request.input)
    head, rest = messages[: len(messages) - size], messages[len(messages) - size :]
    if head:
        request.instructions = "\n".join(message["content"] for message in head)
    request.input = rest[0]["content"] if isinstance(request.input, str) else rest
