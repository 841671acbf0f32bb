"""One reasoning switch per request, read from any of the three places a client may put it.

- `chat_template_kwargs.enable_thinking` (Nemotron 3, Qwen 3)
- `reasoning_effort: "none"` (OpenAI); any other effort asks for reasoning
- a system line `detailed thinking on` / `detailed thinking off` (Llama-Nemotron)

The pure part: no vLLM, no HTTP. Budgets and other dialects are not here yet.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

ON_LINE, OFF_LINE = "detailed thinking on", "detailed thinking off"


class RequestError(ValueError):
    """A request whose reasoning fields are wrong; the message names them (HTTP 400)."""


@dataclass(frozen=True, slots=True)
class Switch:
    """Whether reasoning is asked for, and the field that said so; `is_on` None when nobody did."""

    is_on: bool | None
    field: str = ""


def read_switch(messages: Sequence[Any], template_kwargs: Mapping[str, Any] | None, effort: str | None) -> Switch:
    """The request's switch. Raises RequestError when two fields contradict each other."""
    found = [Switch(is_on, "a system line `detailed thinking`") for is_on in _system_lines(messages)]
    if effort is not None:
        found.append(Switch(effort != "none", f"`reasoning_effort` = {effort!r}"))
    explicit = (template_kwargs or {}).get("enable_thinking")
    if explicit is not None:
        if not isinstance(explicit, bool):
            raise RequestError(f"`chat_template_kwargs.enable_thinking`: found {explicit!r}, allowed: true, false")
        found.append(Switch(explicit, f"`chat_template_kwargs.enable_thinking` = {str(explicit).lower()}"))
    if not found:
        return Switch(None)
    first = found[0]
    for other in found[1:]:
        if other.is_on != first.is_on:
            raise RequestError(
                f"{first.field} asks for reasoning {_word(first.is_on)}, {other.field} for {_word(other.is_on)}; "
                "allowed: one answer"
            )
    return first


def needs_system_line(template: str, model_type: str) -> bool:
    """Whether the model's switch is the system line: its template cannot be told otherwise.

    Llama-Nemotron 49B v1, 253B and Nano 8B; v1.5 has `/no_think` instead, newer models `enable_thinking`.
    """
    if "enable_thinking" in template or "no_think" in template:
        return False
    return model_type == "nemotron-nas" or "detailed thinking" in template


def with_system_line(messages: Sequence[Any], is_on: bool) -> list[Any]:
    """`messages` with the switch as a line of the system message; unchanged if it is there already."""
    if next(_system_lines(messages), None) is not None:
        return list(messages)
    line = ON_LINE if is_on else OFF_LINE
    for index, message in enumerate(messages):
        if isinstance(message, MutableMapping) and message.get("role") == "system":
            text = "\n".join(_texts(message))
            return [*messages[:index], {**message, "content": f"{line}\n{text}"}, *messages[index + 1 :]]
    return [{"role": "system", "content": line}, *messages]


def _system_lines(messages: Sequence[Any]) -> Any:
    for message in messages:
        if isinstance(message, Mapping) and message.get("role") == "system":
            for text in _texts(message):
                for line in text.splitlines():
                    if line.strip().lower() in (ON_LINE, OFF_LINE):
                        yield line.strip().lower() == ON_LINE


def _texts(message: Mapping[str, Any]) -> list[str]:
    content = message.get("content")
    if isinstance(content, str):
        return [content]
    return [part.get("text", "") for part in content or [] if isinstance(part, Mapping) and part.get("type") == "text"]


def _word(is_on: bool | None) -> str:
    return "on" if is_on else "off"
