"""Switches that clients write into messages, for the families that were trained on them. Pure.

Three conventions: a line `detailed thinking on|off` of a system message; `/think` and `/no_think` in the system
message; the same two in any system or user message. Of several, the last one wins, and a switch that was decided
elsewhere is written over all of them, so that the prompt never says two things.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from vllm_puzzle.serving.dial.profile import MESSAGE_TAG, SYSTEM_LINE, SYSTEM_TAG
from vllm_puzzle.serving.dial.request import RequestError

ON_LINE, OFF_LINE = "detailed thinking on", "detailed thinking off"
ON_TAG, OFF_TAG = "/think", "/no_think"
# The templates look for these as substrings, so what counts for them counts here.
TAG = re.compile(f"{OFF_TAG}|{ON_TAG}")
ROLES = {SYSTEM_LINE: ("system",), SYSTEM_TAG: ("system",), MESSAGE_TAG: ("system", "user")}
TEXT_PARTS = ("text", "input_text")
WORDS = {SYSTEM_LINE: "a system line `detailed thinking`", SYSTEM_TAG: "`/think` in the system message",
         MESSAGE_TAG: "`/think` in a message"}  # fmt: skip


def plain_messages(messages: Sequence[Any], where: str) -> list[Any]:
    """The messages, each content that is a one-shot iterator as a list: whoever comes next must find it too.

    Parsers leave contents that they do not know well to be checked when they are read. Raises RequestError there.
    """
    plain = []
    for index, message in enumerate(messages):
        content = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(content, Iterator):
            name = f"{where}[{index}].content"
            try:
                message = {**message, "content": list(content)}
            except ValueError:
                raise RequestError(f"`{name}`: found a part of no known type, allowed: the API's own", name) from None
        plain.append(message)
    return plain


def read_switches(messages: Sequence[Any], convention: str) -> list[bool]:
    """What each switch in the messages says, in order; the last one counts."""
    found: list[bool] = []
    for index, message in enumerate(messages):
        if _counts(messages, index, convention):
            for text in _texts(message):
                found += _switches(text, convention)
    return found


def write_switch(messages: Sequence[Any], convention: str, is_on: bool) -> list[Any]:
    """The messages with exactly one switch, which says `is_on`; unchanged if they say it already."""
    if set(read_switches(messages, convention)) == {is_on}:
        return list(messages)
    kept = without_switches(messages, convention)
    if convention == MESSAGE_TAG:
        return _at_the_end(kept, ON_TAG if is_on else OFF_TAG)
    switch = (ON_LINE if is_on else OFF_LINE) if convention == SYSTEM_LINE else (ON_TAG if is_on else OFF_TAG)
    # Only the first message can be the one that every template takes for the system's.
    first = next((i for i, message in enumerate(kept) if _role(message) == "system"), None)
    if first is None or (convention == SYSTEM_TAG and first != 0):
        return [{"role": "system", "content": switch}, *kept]
    text = "\n".join(_texts(kept[first]))
    kept[first] = {**kept[first], "content": f"{switch}\n{text}" if text else switch}
    return kept


def without_switches(messages: Sequence[Any], convention: str) -> list[Any]:
    """The messages with no switch where one would count."""
    return [
        _edited(message, lambda text: _cleaned(text, convention)) if _counts(messages, index, convention) else message
        for index, message in enumerate(messages)
    ]


def _counts(messages: Sequence[Any], index: int, convention: str) -> bool:
    role = _role(messages[index])
    return role in ROLES[convention] and (convention != SYSTEM_TAG or index == 0)


def _role(message: Any) -> str | None:
    return message.get("role") if isinstance(message, Mapping) else None


def _switches(text: str, convention: str) -> list[bool]:
    if convention == SYSTEM_LINE:
        lines = [line.strip().lower() for line in text.splitlines()]
        return [line == ON_LINE for line in lines if line in (ON_LINE, OFF_LINE)]
    return [tag == ON_TAG for tag in TAG.findall(text)]


def _cleaned(text: str, convention: str) -> str:
    if not _switches(text, convention):
        return text
    if convention == SYSTEM_LINE:
        return "\n".join(line for line in text.splitlines() if not _switches(line, convention))
    return TAG.sub("", text).strip()


def _at_the_end(messages: list[Any], tag: str) -> list[Any]:
    """The tag after the last user text: the prompt before it stays what it was, and a prefix cache holds."""
    for role in ("user", "system"):
        for index in range(len(messages) - 1, -1, -1):
            if _role(messages[index]) == role and _texts(messages[index]):
                messages[index] = _with_last_text(messages[index], tag)
                return messages
    return [{"role": "system", "content": tag}, *messages]


def _with_last_text(message: Mapping[str, Any], tag: str) -> dict[str, Any]:
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": f"{content} {tag}"}
    last = max(index for index, part in enumerate(content) if _is_text(part))
    edited = {**content[last], "text": f"{content[last]['text']} {tag}"}
    return {**message, "content": [*content[:last], edited, *content[last + 1 :]]}


def _edited(message: Mapping[str, Any], edit: Callable[[str], str]) -> dict[str, Any]:
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": edit(content)}
    parts = [{**part, "text": edit(part["text"])} if _is_text(part) else part for part in content or []]
    return {**message, "content": parts}


def _texts(message: Mapping[str, Any]) -> list[str]:
    content = message.get("content")
    if isinstance(content, str):
        return [content]
    return [part["text"] for part in content or [] if _is_text(part)]


def _is_text(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") in TEXT_PARTS and isinstance(part.get("text"), str)
