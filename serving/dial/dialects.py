"""Every ecosystem's reasoning fields → statements: OpenAI, OpenRouter, Anthropic, Gemini, DeepSeek, GLM, Kimi, Qwen,
Ollama, NVIDIA NIM and Nemotron, llama.cpp, SGLang, TensorRT-LLM, Dynamo, LiteLLM and vLLM itself.

`read_statements` takes the JSON body of a request to any of the three APIs. A field of a known name with a value that
it cannot have is an error; a field that looks like a reasoning control and is none that anybody documents is one too,
because silence there is the commonest failure of all.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from vllm_puzzle.model_configs.json_values import MAX_SHOWN, shown
from vllm_puzzle.serving.dial.json_body import repeated_keys
from vllm_puzzle.serving.dial.request import EFFORTS, UNLIMITED, RequestError, Statement

Body = Mapping[str, Any]
Reader = Callable[[str, Any], Iterator[Statement]]

# OpenRouter and others name levels that lie between these; `ultra` is DeepSeek's word for the top one.
EFFORT_WORDS = {**{effort: effort for effort in EFFORTS}, "ultra": "max"}
MAX_BUDGET = 2**31 - 1


def read_statements(body: Body) -> Iterator[Statement]:
    """What every reasoning field of a request body says. Raises RequestError naming field, found and allowed."""
    yield from _read(body, FIELDS, "")
    for key in body:
        if LOOKS_LIKE.search(key) and key not in FIELDS and key not in NOT_CONTROLS:
            raise _unknown(named(key), FIELDS)


def _read(body: Body, fields: Mapping[str, Any], prefix: str) -> Iterator[Statement]:
    is_ours = prefix in CLOSED
    for key in body if prefix else ():
        if key not in fields and (is_ours or LOOKS_LIKE.search(key)):
            raise _unknown(prefix + named(key), fields)
    repeated = repeated_keys(body)
    for key, reader in fields.items():
        name = f"{prefix}{key}"
        if key in repeated:
            raise RequestError(f"`{name}`: found more than once in one object, allowed: once", name)
        value = body.get(key)
        if value is None:
            continue
        if isinstance(reader, dict):
            yield from _read(_mapping(name, value), reader, f"{name}.")
        else:
            yield from reader(name, value)


# --- readers: (name of the field, its value) → statements --------------------------------------------------------


def _switch(name: str, value: Any) -> Iterator[Statement]:
    yield Statement("is_on", _boolean(name, value), name)


def _effort(name: str, value: Any) -> Iterator[Statement]:
    if value == "none":
        yield Statement("is_on", False, name)
    elif not isinstance(value, str) or value not in EFFORT_WORDS:
        raise _refuse(name, value, f"none, {', '.join(EFFORT_WORDS)}")
    else:
        yield Statement("effort", EFFORT_WORDS[value], name)


def _level(level: str) -> Reader:
    """A boolean that asks for one level; false says nothing."""

    def read(name: str, value: Any) -> Iterator[Statement]:
        if _boolean(name, value):
            yield Statement("effort", level, name)

    return read


def _budget(name: str, value: Any) -> Iterator[Statement]:
    if type(value) is not int or not (value == UNLIMITED or 0 <= value <= MAX_BUDGET):
        raise _refuse(name, value, f"an integer from 0 to {MAX_BUDGET}, or -1 for no limit")
    yield Statement("budget", value, name)


def _visible(name: str, value: Any) -> Iterator[Statement]:
    yield Statement("is_visible", _boolean(name, value), name)


def _hidden(name: str, value: Any) -> Iterator[Statement]:
    yield Statement("is_visible", not _boolean(name, value), name)


def _drops_history(name: str, value: Any) -> Iterator[Statement]:
    yield Statement("keeps_history", not _boolean(name, value), name)


def _keeps_history(name: str, value: Any) -> Iterator[Statement]:
    yield Statement("keeps_history", _boolean(name, value), name)


def _choice(table: Mapping[str, tuple[str, Any] | None]) -> Reader:
    """A word that says something, or nothing (None)."""

    def read(name: str, value: Any) -> Iterator[Statement]:
        if not isinstance(value, str) or value not in table:
            raise _refuse(name, value, ", ".join(table))
        said = table[value]
        if said is not None:
            yield Statement(*said, name)

    return read


def _think(name: str, value: Any) -> Iterator[Statement]:
    """Ollama: a boolean or a level."""
    yield from (_effort if isinstance(value, str) else _switch)(name, value)


def _separate(name: str, value: Any) -> Iterator[Statement]:
    """SGLang: false leaves thoughts in the answer's text, which no API here does."""
    if not _boolean(name, value):
        raise _refuse(name, value, "true (thoughts are always separate)")
    yield from ()


GOOGLE = {
    "thinking_config": {
        "thinking_budget": _budget,
        "thinking_level": _effort,
        "include_thoughts": _visible,
    },
}
ARGUMENTS = {
    "enable_thinking": _switch,
    "thinking": _switch,
    "reasoning_effort": _effort,
    "thinking_effort": _effort,
    "low_effort": _level("low"),
    "medium_effort": _level("medium"),
    "thinking_budget": _budget,
    "reasoning_budget": _budget,
    "truncate_history_thinking": _drops_history,
    "preserve_thinking": _keeps_history,
    "clear_thinking": _drops_history,
}
FIELDS: dict[str, Any] = {
    "reasoning_effort": _effort,
    "reasoning": {
        "effort": _effort,
        "max_tokens": _budget,
        "enabled": _switch,
        "exclude": _hidden,
        # OpenAI's summaries are the text here: nothing summarises, so asking for one asks to see it.
        "summary": _choice(dict.fromkeys(("auto", "concise", "detailed"), ("is_visible", True))),
        "generate_summary": _choice(dict.fromkeys(("auto", "concise", "detailed"), ("is_visible", True))),
        "mode": _choice({"standard": None}),
        "context": _choice(
            {"auto": None, "current_turn": ("keeps_history", False), "all_turns": ("keeps_history", True)}
        ),
    },
    "thinking": {
        "type": _choice(
            {"enabled": ("is_on", True), "disabled": ("is_on", False), "adaptive": None, "between_tools": None}
        ),
        "budget_tokens": _budget,
        "display": _choice({"summarized": ("is_visible", True), "omitted": ("is_visible", False)}),
        "clear_thinking": _drops_history,
    },
    "output_config": {"effort": _effort},
    "thinking_token_budget": _budget,
    "thinking_budget": _budget,
    "thinking_budget_tokens": _budget,
    "reasoning_budget": _budget,
    "nvext": {"max_thinking_tokens": _budget},
    "custom_params": {"thinking_budget": _budget},
    "vllm_xargs": {"thinking_budget": _budget},
    "google": GOOGLE,
    "extra_body": {"google": GOOGLE},
    "enable_thinking": _switch,
    "think": _think,
    "chat_template_kwargs": ARGUMENTS,
    "include_reasoning": _visible,
    "separate_reasoning": _separate,
    "stream_reasoning": _visible,
    "reasoning_format": _choice(
        {"none": None, "auto": None, "parsed": None, "deepseek": None, "deepseek-legacy": None}
        | {"hidden": ("is_visible", False)}
    ),
}


# Objects that hold nothing but reasoning controls: any other key in them is a mistake.
CLOSED = ("reasoning.", "thinking.", "google.thinking_config.", "extra_body.google.thinking_config.")
LOOKS_LIKE = re.compile(r"reason|think|thought", re.IGNORECASE)
NOT_CONTROLS = ("reasoning_content", "reasoning_details", "reasoning_opaque")


def named(key: str) -> str:
    """A client's key for a message: one line, and not longer than the longest known one needs."""
    return key if key.isprintable() and len(key) <= MAX_SHOWN else shown(key)


def _unknown(name: str, fields: Mapping[str, Any]) -> RequestError:
    return RequestError(f"`{name}`: found an unknown reasoning field, allowed: {', '.join(sorted(fields))}", name)


def _mapping(name: str, value: Any) -> Body:
    if not isinstance(value, Mapping):
        raise _refuse(name, value, "an object")
    return value


def _boolean(name: str, value: Any) -> bool:
    if type(value) is not bool:
        raise _refuse(name, value, "true, false")
    return value


def _refuse(name: str, value: Any, allowed: str) -> RequestError:
    return RequestError(f"`{name}`: found {shown(value)}, allowed: {allowed}", name)
