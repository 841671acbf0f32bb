"""What an operator decides about thinking, for every request: one YAML file, flags, or both; checked at the start.

A file's keys are the fields of ReasoningPolicy. `budgets` maps an effort to its most thinking tokens (-1: no limit),
for every model, or under a served model's name for that one. A measured map is such a file with nothing but `budgets`
and `provenance` (free key: value lines about how it was measured); a policy can name that file as its `budgets`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_puzzle.kernels.thinking import LoopRule
from vllm_puzzle.model_configs.json_values import refuse
from vllm_puzzle.model_configs.schema import ConfigError
from vllm_puzzle.serving.dial.dialects import EFFORT_WORDS, MAX_BUDGET
from vllm_puzzle.serving.dial.request import EFFORTS, UNLIMITED
from vllm_puzzle.serving.dial.yaml_file import load_yaml
from vllm_puzzle.serving.thinking_plan import MAX_PATTERN

VARIABLE = "VLLM_PUZZLE_REASONING"
NAMES = ("reasoning", "reasoning_content")
LOOP_KEYS = {"min_pattern_size": 1, "max_pattern_size": 1, "min_count": 2}
MAX_BODY_BYTES = 256 * 1024 * 1024
EVERY_MODEL = "*"
Budgets = Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Grace:
    """How long before its end a budget takes a sentence end: `share` of it, at most `cap` tokens."""

    share: float = 0.1
    cap: int = 128

    def tokens(self, budget: int | None) -> int:
        """The window of one budget, in tokens."""
        return 0 if budget is None else min(int(budget * self.share), self.cap)


@dataclass(frozen=True, slots=True)
class ReasoningPolicy:
    """An operator's decisions.

    default: on, off or a level for requests that say nothing, by served model name ("*": every other). budgets: effort
    → tokens, by served model name likewise. ceiling: most thinking tokens of any request. answer_reserve: tokens of
    max_tokens kept for the answer; None keeps min(1024, max_tokens // 4) under a budget, a number is kept for every
    thinking request, 0 keeps none. phrase: said before a forced end; None takes the profile's. strict: an effort that
    the model lacks is an error, instead of the nearest one. loop: ends a thought that repeats itself. names: under
    which a reply carries its thought. soft_switches: whether switches in the messages' text count. max_body_bytes: of
    a request.
    """

    default: Mapping[str, str] = field(default_factory=dict)
    budgets: Mapping[str, Budgets] = field(default_factory=dict)
    ceiling: int | None = None
    answer_reserve: int | None = None
    grace: Grace = Grace()
    phrase: str | None = None
    strict: bool = False
    loop: LoopRule | None = None
    names: tuple[str, ...] = NAMES
    soft_switches: bool = True
    max_body_bytes: int = MAX_BODY_BYTES
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def default_of(self, model: str) -> str | None:
        """on, off, a level, or None where the operator leaves it to the model."""
        return self.default.get(model, self.default.get(EVERY_MODEL))

    def budgets_of(self, model: str) -> Budgets:
        """The effort → budget map of one served model."""
        return self.budgets.get(model, self.budgets.get(EVERY_MODEL, {}))

    def limited(self, budget: int | None) -> int | None:
        """A budget under the ceiling; None for no limit."""
        if budget is None or self.ceiling is None:
            return self.ceiling if budget is None else budget
        return min(budget, self.ceiling)


def policy_from_environment(value: str | None = None) -> ReasoningPolicy:
    """The policy that VLLM_PUZZLE_REASONING names, as a file or as JSON; the default one where it is not set."""
    value = os.environ.get(VARIABLE, "") if value is None else value
    if not value.strip():
        return ReasoningPolicy()
    if value.lstrip().startswith("{"):
        where = f"variable {VARIABLE}"
        try:
            return read_policy(json.loads(value), where)
        except ValueError as error:
            raise (
                error
                if isinstance(error, ConfigError)
                else ConfigError(f"{where}: found {error}, allowed: a YAML file's name or a JSON object")
            ) from None
    return load_policy(Path(value))


def load_policy(file: Path) -> ReasoningPolicy:
    """Read and check a file. Raises ConfigError: file, key, found, allowed."""
    return read_policy(load_document(file), f"reasoning policy {file}")


def load_document(file: Path) -> dict[str, Any]:
    """A policy file as plain data, with the map file that its `budgets` may name put in their place."""
    where = f"reasoning policy {file}"
    document = _read_yaml(file, where)
    if isinstance(document.get("budgets"), str):
        document |= load_budgets(file.parent / document["budgets"])
    return document


def load_budgets(file: Path) -> dict[str, Any]:
    """A measured map: {"budgets": …, "provenance": …}."""
    where = f"budgets {file}"
    document = _read_yaml(file, where)
    for key in document:
        if key not in ("budgets", "provenance"):
            raise refuse(where, str(key), document[key], "no such key; one of budgets, provenance")
    if not isinstance(document.get("budgets"), dict):
        raise refuse(where, "budgets", document.get("budgets"), "effort: tokens lines")
    read_policy(document, where)
    return document


def _read_yaml(file: Path, where: str) -> dict[str, Any]:
    found = load_yaml(file, where)
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise ConfigError(f"{where}: found a YAML {type(found).__name__}, allowed: key: value lines")
    return found


def read_policy(document: Mapping[str, Any], where: str) -> ReasoningPolicy:
    """The policy that a parsed file says; `where` names the file in an error."""
    values = {}
    for key, value in document.items():
        if key not in READERS:
            raise refuse(where, str(key), value, f"no such key; one of {', '.join(READERS)}")
        if value is not None:
            values[key] = READERS[key](where, key, value)
    return ReasoningPolicy(**values)


# --- readers: (file, key, value) → the field's value ---------------------------------------------------------------


def _default(where: str, key: str, value: Any) -> Mapping[str, str]:
    if not isinstance(value, dict):
        return {EVERY_MODEL: _state(where, key, value)}
    return {_model(where, key, name): _state(where, f"{key}.{name}", state) for name, state in value.items()}


def _state(where: str, key: str, value: Any) -> str:
    if type(value) is bool:  # YAML reads a bare `on` as true
        return "on" if value else "off"
    words = {"on": "on", "off": "off", "none": "off", **EFFORT_WORDS}
    if not isinstance(value, str) or value not in words:
        raise refuse(where, key, value, f"on, off, {', '.join(EFFORTS)}")
    return words[value]


def _budgets(where: str, key: str, value: Any) -> Mapping[str, Budgets]:
    if not isinstance(value, dict):
        raise refuse(where, key, value, "effort: tokens lines, or a file of them")
    maps: dict[str, dict[str, int]] = {}
    for name, entry in value.items():
        if isinstance(entry, dict):
            place = f"{key}.{name}"
            maps[_model(where, key, name)] = {
                effort: _tokens(where, f"{place}.{effort}", effort, tokens) for effort, tokens in entry.items()
            }
    everywhere = {name: entry for name, entry in value.items() if not isinstance(entry, dict)}
    if everywhere:
        if EVERY_MODEL in maps:
            raise refuse(where, f"{key}.{EVERY_MODEL}", value[EVERY_MODEL], "nothing beside budgets for every model")
        maps[EVERY_MODEL] = {e: _tokens(where, f"{key}.{e}", e, tokens) for e, tokens in everywhere.items()}
    return maps


def _tokens(where: str, key: str, effort: Any, value: Any) -> int:
    if effort not in EFFORTS:
        raise refuse(where, key, value, f"tokens under one of {', '.join(EFFORTS)}")
    if type(value) is not int or not (value == UNLIMITED or 1 <= value <= MAX_BUDGET):
        raise refuse(where, key, value, f"an integer from 1 to {MAX_BUDGET}, or -1 for no limit")
    return value


def _model(where: str, key: str, name: Any) -> str:
    if not isinstance(name, str) or not name:
        raise refuse(where, key, name, "served model names as texts, or * for every other")
    return name


def _integer(minimum: int) -> Callable[[str, str, Any], int]:
    def read(where: str, key: str, value: Any) -> int:
        if type(value) is not int or not minimum <= value <= MAX_BUDGET:
            raise refuse(where, key, value, f"an integer from {minimum} to {MAX_BUDGET}")
        return value

    return read


def _grace(where: str, key: str, value: Any) -> Grace:
    """A share alone, or {share, cap}."""
    entry = value if isinstance(value, dict) else {"share": value}
    for name in entry:
        if name not in ("share", "cap"):
            raise refuse(where, f"{key}.{name}", entry[name], "no such key; one of share, cap")
    share = entry.get("share", Grace().share)
    if type(share) not in (int, float) or not 0 <= share <= 1:
        raise refuse(where, key if entry is not value else f"{key}.share", share, "a number from 0 to 1")
    return Grace(share, _integer(0)(where, f"{key}.cap", entry.get("cap", Grace().cap)))


def _loop(where: str, key: str, value: Any) -> LoopRule:
    if not isinstance(value, dict) or any(name not in LOOP_KEYS for name in value):
        raise refuse(where, key, value, f"null, or {', '.join(LOOP_KEYS)}")
    sizes = {"min_pattern_size": 1, **value}
    for name, minimum in LOOP_KEYS.items():
        found = sizes.get(name)
        if type(found) is not int or not minimum <= found <= MAX_PATTERN:
            raise refuse(where, f"{key}.{name}", found, f"an integer from {minimum} to {MAX_PATTERN}")
    if sizes["min_pattern_size"] > sizes["max_pattern_size"]:
        allowed = f"at most max_pattern_size {sizes['max_pattern_size']}"
        raise refuse(where, f"{key}.min_pattern_size", sizes["min_pattern_size"], allowed)
    return LoopRule(sizes["min_pattern_size"], sizes["max_pattern_size"], sizes["min_count"])


def _names(where: str, key: str, value: Any) -> tuple[str, ...]:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not names or any(name not in NAMES for name in names):
        raise refuse(where, key, value, f"a list of one or both of {', '.join(NAMES)}")
    return tuple(name for name in NAMES if name in names)


def _text(where: str, key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise refuse(where, key, value, "a text")
    return value


def _boolean(where: str, key: str, value: Any) -> bool:
    if type(value) is not bool:
        raise refuse(where, key, value, "true, false")
    return value


def _free(where: str, key: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise refuse(where, key, value, "key: value lines")
    return value


READERS: dict[str, Callable[[str, str, Any], Any]] = {
    "default": _default,
    "budgets": _budgets,
    "ceiling": _integer(0),
    "answer_reserve": _integer(0),
    "grace": _grace,
    "phrase": _text,
    "strict": _boolean,
    "loop": _loop,
    "names": _names,
    "soft_switches": _boolean,
    "max_body_bytes": _integer(1024),
    "provenance": _free,
}
