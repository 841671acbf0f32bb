"""The switch as text: a system line `detailed thinking on` or `off`, which Llama-Nemotron models were trained on."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

ON_LINE, OFF_LINE = "detailed thinking on", "detailed thinking off"


def read_lines(messages: Sequence[Any]) -> list[bool]:
    """What each such line in the system messages says, in order."""
    found = []
    for message in messages:
        if isinstance(message, Mapping) and message.get("role") == "system":
            lines = [line.strip().lower() for text in _texts(message) for line in text.splitlines()]
            found += [line == ON_LINE for line in lines if line in (ON_LINE, OFF_LINE)]
    return found


def needs_system_line(template: str, model_type: str) -> bool:
    """Whether the model's switch is the system line: its template cannot be told otherwise.

    Llama-Nemotron 49B v1, 253B and Nano 8B; v1.5 has `/no_think` instead, newer models `enable_thinking`.
    """
    if "enable_thinking" in template or "no_think" in template:
        return False
    return model_type == "nemotron-nas" or "detailed thinking" in template


def with_line(text: str, is_on: bool) -> str:
    """A system text with the switch as its first line."""
    line = ON_LINE if is_on else OFF_LINE
    return f"{line}\n{text}" if text else line


def with_system_line(messages: Sequence[Any], is_on: bool) -> list[Any]:
    """`messages` with the switch as a line of the system message; unchanged if it is there already."""
    if read_lines(messages):
        return list(messages)
    for index, message in enumerate(messages):
        if isinstance(message, MutableMapping) and message.get("role") == "system":
            text = "\n".join(_texts(message))
            return [*messages[:index], {**message, "content": with_line(text, is_on)}, *messages[index + 1 :]]
    return [{"role": "system", "content": with_line("", is_on)}, *messages]


def _texts(message: Mapping[str, Any]) -> list[str]:
    content = message.get("content")
    if isinstance(content, str):
        return [content]
    return [part.get("text", "") for part in content or [] if isinstance(part, Mapping) and part.get("type") == "text"]
