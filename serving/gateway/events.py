"""Server-sent events: bytes as they come → whole events, and back."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

PREFIX = b"data:"
DONE = b"data: [DONE]\n\n"


async def batches(parts: AsyncIterator[bytes]) -> AsyncIterator[list[bytes]]:
    """The events that each received part completes, each with its blank line."""
    rest = b""
    async for part in parts:
        rest += part
        if b"\r" in rest:
            # A lone \r at the end may be half of a line end.
            held = b"\r" if rest.endswith(b"\r") else b""
            rest = rest.removesuffix(held).replace(b"\r\n", b"\n") + held
        *events, rest = rest.split(b"\n\n")
        if events:
            yield [event + b"\n\n" for event in events if event.strip()]
    if rest.strip():
        yield [rest.strip() + b"\n\n"]


def data_of(event: bytes) -> bytes | None:
    """The event's data when it is one line of JSON or `[DONE]`; None for a comment or another kind of event."""
    return event[len(PREFIX) :].strip() if event.startswith(PREFIX) else None


def parse(data: bytes) -> dict[str, Any] | None:
    """The chunk in it, or None."""
    try:
        value = json.loads(data)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def choices_of(chunk: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The choices of a chunk or reply; None where it has none of the right shape."""
    choices = chunk.get("choices")
    if not isinstance(choices, list):
        return None
    for choice in choices:
        parts = [choice.get(name) or {} for name in ("delta", "message")] if isinstance(choice, dict) else [None]
        if not all(isinstance(part, dict) for part in parts):
            return None
    return choices


def encode(chunk: Any) -> bytes:
    """One event with this data."""
    return b"data: " + json.dumps(chunk, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
