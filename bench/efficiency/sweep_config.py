"""What a sweep is over: lists in a YAML file, whose other keys are flags, or lists in flags."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from vllm_puzzle.model_configs.schema import ConfigError


def configured(
    parser: argparse.ArgumentParser, argv: Sequence[str]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Arms and loads of the file that `--config` names; its other keys become the flags' defaults."""
    early = argparse.ArgumentParser(add_help=False)
    early.add_argument("--config", type=Path)
    path = early.parse_known_args(argv)[0].config
    if path is None:
        return [], []
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}, allowed: a YAML file") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: found {type(found).__name__}, allowed: a mapping of flags")
    lists = []
    for key in ("arms", "loads"):
        part = found.pop(key, [])
        if not isinstance(part, list) or not all(isinstance(item, dict) for item in part):
            raise ConfigError(f"{path}, key `{key}`: found {part!r}, allowed: a list of mappings")
        lists.append([_checked(parser, item, f"{path}, key `{key}`") for item in part])
    defaults = _checked(parser, found, str(path))
    for action in parser._actions:
        if action.dest in defaults:
            action.required = False
    parser.set_defaults(**defaults)
    return lists[0], lists[1]


def _checked(parser: argparse.ArgumentParser, found: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Values by the flags' names, each of the flag's type."""
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    checked = {}
    for key, value in found.items():
        action = actions.get(key)
        if action is None:
            raise ConfigError(f"{where}: found the key {key!r}, allowed: {', '.join(actions)}")
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        allowed = None
        if action.choices is not None:
            value = {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value
            allowed = None if value in action.choices else f"one of {', '.join(map(str, action.choices))}"
        elif action.type in (int, float):
            allowed = None if is_number else "a number"
        elif isinstance(action.const, bool):
            allowed = None if isinstance(value, bool) else "true or false"
        elif isinstance(action.default, list):
            allowed = None if isinstance(value, list) else "a list"
        elif action.type is Path:
            value = Path(str(value))
        if allowed is not None:
            raise ConfigError(f"{where}, key `{key}`: found {value!r}, allowed: {allowed}")
        checked[key] = value
    return checked


def listed_arms(options: argparse.Namespace) -> list[dict[str, Any]]:
    """An arm for each mode, effort and budget that the flags list; the flags' own where they list none."""
    arms: list[dict[str, Any]] = [{"thinking": word} for word in _split(options.thinkings)]
    arms += [{"effort": word} for word in _split(options.efforts)]
    arms += [{"budget": _number(word, "--budgets", int)} for word in _split(options.budgets)]
    return arms or [{}]


def listed_loads(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A load for each concurrency and rate that the flags list; the flags' own where they list none."""
    loads: list[dict[str, Any]] = [
        {"max_concurrency": _number(word, "--concurrencies", int), "request_rate": None}
        for word in _split(options.concurrencies)
    ]
    loads += [{"request_rate": _number(word, "--request-rates", float)} for word in _split(options.request_rates)]
    return loads or [{}]


def _split(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _number(word: str, where: str, kind: Callable[[str], float]) -> float:
    try:
        return kind(word)
    except ValueError:
        raise ConfigError(f"{where}: found {word!r}, allowed: numbers, comma-separated") from None
