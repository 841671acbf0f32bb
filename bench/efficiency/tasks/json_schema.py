"""JSON as an answer: parsed strictly, and held to a schema. The subset of JSON Schema that our questions use.

Standard library only; a test holds it to the package jsonschema.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

Schema = Mapping[str, Any]
KEYWORDS = (
    "type", "enum", "properties", "required", "additionalProperties", "items", "minItems", "maxItems", "pattern",
    "minimum", "maximum",
)  # fmt: skip
_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "boolean": (bool,),
    "integer": (int, float),
    "number": (int, float),
}


def parse(text: str) -> Any:
    """The one JSON value that a text is, white space around it aside. Raises ValueError for anything else.

    A fence around it, a word before it, a key said twice, NaN and Infinity are no JSON.
    """
    return json.loads(text.strip(), object_pairs_hook=_once, parse_constant=_refuse)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key said twice")
    return found


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def fits(value: Any, schema: Schema) -> bool:
    """Whether a parsed value is valid under a schema made of KEYWORDS."""
    unknown = set(schema) - set(KEYWORDS)
    assert not unknown, f"schema of a question: {unknown}"
    if "enum" in schema and not any(equal(value, option) for option in schema["enum"]):
        return False
    if "type" in schema and not _is(value, schema["type"]):
        return False
    if isinstance(value, dict):
        return _fits_object(value, schema)
    if isinstance(value, list):
        length = schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value))
        return length and all(fits(item, schema.get("items", {})) for item in value)
    if isinstance(value, str):
        return re.search(schema.get("pattern", ""), value) is not None
    if isinstance(value, int | float) and not isinstance(value, bool):
        return bool(schema.get("minimum", value) <= value <= schema.get("maximum", value))
    return True


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, _TYPES[kind])


def _fits_object(value: dict[str, Any], schema: Schema) -> bool:
    known: Schema = schema.get("properties", {})
    if any(key not in value for key in schema.get("required", ())):
        return False
    if schema.get("additionalProperties") is False and set(value) - set(known):
        return False
    return all(fits(item, known[key]) for key, item in value.items() if key in known)


def equal(first: Any, second: Any) -> bool:
    """Equality of JSON values: 1 is 1.0, but true is not 1."""
    if isinstance(first, bool) or isinstance(second, bool):
        return first is second
    if isinstance(first, list) and isinstance(second, list):
        return len(first) == len(second) and all(map(equal, first, second))
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    return bool(first == second)
