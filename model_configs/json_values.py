"""Typed reading of parsed JSON: each function returns a checked value or says what, where, found and allowed.

`where` names the place in the words of the file (`layer 17, attention`). Standard library only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_puzzle.model_configs.schema import MAX_SIZE, ConfigError

Json = Mapping[str, Any]
MAX_SHOWN = 60


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file; ConfigError when it cannot be read or is something else."""
    try:
        found = json.loads(file.read_text())
    except OSError as error:
        raise ConfigError(f"{file}: found {error.strerror}, allowed: a model directory or a config.json") from None
    except ValueError as error:
        raise ConfigError(f"{file}: found {error}, allowed: a JSON object") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{file}: found a JSON {type(found).__name__}, allowed: an object")
    return found


def refuse(where: str, key: str, found: object, allowed: str) -> ConfigError:
    """The error for one bad value."""
    return ConfigError(f"{where}, key `{key}`: found {shown(found)}, allowed: {allowed}")


def shown(found: object) -> str:
    """A value for a message; long ones are cut so that it stays one line."""
    text = repr(found) if found is not None else "nothing"
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"


def integer(where: str, block: Json, key: str, maximum: int = MAX_SIZE) -> int:
    """A required integer from 1 to `maximum`."""
    value = optional_integer(where, block, key, maximum)
    if value is None:
        raise refuse(where, key, None, f"an integer from 1 to {maximum}")
    return value


def optional_integer(where: str, block: Json, key: str, maximum: int = MAX_SIZE) -> int | None:
    """An integer from 1 to `maximum`, or None when the key is absent or null."""
    value = block.get(key)
    if value is None:
        return None
    if type(value) is not int or not 1 <= value <= maximum:
        raise refuse(where, key, value, f"an integer from 1 to {maximum}")
    return value


def optional_number(where: str, block: Json, key: str) -> float | None:
    """A finite number above 0, or None when the key is absent or null."""
    value = block.get(key)
    if value is None:
        return None
    if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
        raise refuse(where, key, value, "a number above 0")
    return float(value)


def flag(where: str, block: Json, key: str) -> bool:
    """A boolean; absent or null is false."""
    value = block.get(key)
    if value is not None and type(value) is not bool:
        raise refuse(where, key, value, "true, false")
    return bool(value)


def text(where: str, block: Json, key: str, default: str) -> str:
    """A string; absent or null is `default`."""
    value = block.get(key)
    if value is None:
        return default
    if not isinstance(value, str) or not value:
        raise refuse(where, key, value, "a string")
    return value


def mapping(where: str, block: Json, key: str) -> Json:
    """An object; absent or null is an empty one."""
    value = block.get(key)
    if value is not None and not isinstance(value, Mapping):
        raise refuse(where, key, value, "an object")
    return value or {}


def strings(where: str, block: Json, key: str) -> list[str]:
    """A list of strings; absent or null is empty."""
    value = block.get(key)
    if value is None:
        return []
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise refuse(where, key, value, "a list of strings")
    return list(value)


def known_keys(where: str, block: Json, allowed: Sequence[str]) -> None:
    """Refuse any key outside `allowed`."""
    for key in block:
        if key not in allowed:
            raise ConfigError(f"{where}, key `{key}`: found an unknown key, allowed: {', '.join(allowed)}")
