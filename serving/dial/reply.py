"""The reply's thinking text: under both names that clients read, or left out; streamed and whole. Pure."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

# vLLM writes the first; DeepSeek's API and everything modelled on it reads the second.
NAME, OTHER_NAME = "reasoning", "reasoning_content"
PREFIX = "data: "


def finish_message(message: Any, is_visible: bool) -> None:
    """Name the thought of a whole reply's message object twice, or take it out. In place."""
    thought = getattr(message, NAME, None)
    if not is_visible:
        setattr(message, NAME, None)
    elif thought is not None:
        setattr(message, OTHER_NAME, thought)


async def finish_stream(events: AsyncIterator[str], is_visible: bool) -> AsyncIterator[str]:
    """The same for server-sent events of chat completion chunks. Events without a thought pass as they are."""
    async for event in events:
        finished = finish_event(event, is_visible)
        if finished is not None:
            yield finished


def finish_event(event: str, is_visible: bool) -> str | None:
    """One event; None when nothing of it is left."""
    if f'"{NAME}"' not in event or not event.startswith(PREFIX):
        return event
    try:
        chunk = json.loads(event.removeprefix(PREFIX))
    except ValueError:
        return event
    is_changed = is_empty = False
    for choice in chunk.get("choices", []) if isinstance(chunk, dict) else []:
        delta = choice.get("delta") or {}
        thought = delta.get(NAME)
        if thought is None:
            continue
        is_changed = True
        if is_visible:
            delta[OTHER_NAME] = thought
        else:
            del delta[NAME]
            is_empty = not any(delta.values()) and not choice.get("finish_reason")
    if not is_changed:
        return event
    if is_empty and len(chunk["choices"]) == 1 and not chunk.get("usage"):
        return None
    return f"{PREFIX}{json.dumps(chunk, ensure_ascii=False)}\n\n"
