"""A request's body as it arrives: read up to a limit, and parsed as JSON that means the same to every reader.

Python's parser takes more than JSON: NaN and Infinity, numbers that overflow to them, and any depth until it fails.
None of these reach the server. An object that repeats a key keeps its last value, as the server's own parser does, and
remembers which keys those were: a reasoning field said twice is an error (`dialects.py`). Pure.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from vllm_puzzle.model_configs.json_values import shown
from vllm_puzzle.serving.dial.request import TOO_LARGE, RequestError

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

# Deeper than any schema of a tool; far from where Python's own recursion ends.
MAX_DEPTH = 100


class Repeating(dict[str, Any]):
    """An object of which some keys were written more than once."""

    repeated: frozenset[str] = frozenset()


def declared_size(headers: Mapping[bytes, bytes]) -> int:
    """The size that the request's head tells, in bytes; 0 when it tells none."""
    told = headers.get(b"content-length", b"").strip()
    return int(told) if told.isdigit() and len(told) < 20 else 0


async def read_body(receive: Receive, max_bytes: int, declared: int = 0) -> bytes:
    """The whole body. Raises RequestError (HTTP 413) beyond the limit, without reading on."""
    parts: list[bytes] = []
    read, more = 0, declared <= max_bytes
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            break
        parts.append(message.get("body", b""))
        read += len(parts[-1])
        more = message.get("more_body", False) and read <= max_bytes
    if max(declared, read) > max_bytes:
        raise RequestError(f"body: found more than {max_bytes} bytes, allowed: at most that", "body", TOO_LARGE)
    return b"".join(parts)


def parse_body(raw: bytes) -> dict[str, Any] | None:
    """The JSON object, or None: the server itself says what is wrong with anything else.

    Raises RequestError for numbers that JSON does not have, and for nesting deeper than MAX_DEPTH.
    """
    try:
        body = json.loads(raw, parse_constant=_no_number, parse_float=_finite, object_pairs_hook=_object)
    except RecursionError:
        raise _too_deep() from None
    except RequestError:
        raise
    except ValueError:
        return None
    _check_depth(body)
    return body if isinstance(body, dict) else None


def repeated_keys(value: Mapping[str, Any]) -> frozenset[str]:
    """The keys that the client wrote more than once in this object."""
    return value.repeated if isinstance(value, Repeating) else frozenset()


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    repeating = Repeating(found)
    counts = Counter(key for key, _ in pairs)
    repeating.repeated = frozenset(key for key, count in counts.items() if count > 1)
    return repeating


def _no_number(text: str) -> Any:
    raise RequestError(f"body: found the number {text}, allowed: JSON's numbers, which are finite", "body")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _no_number(shown(text))


def _check_depth(body: Any) -> None:
    level = [body] if isinstance(body, dict | list) else []
    for _ in range(MAX_DEPTH):
        inner = [value for outer in level for value in (outer.values() if isinstance(outer, dict) else outer)]
        level = [value for value in inner if isinstance(value, dict | list)]
        if not level:
            return
    raise _too_deep()


def _too_deep() -> RequestError:
    return RequestError(f"body: found values nested deeper than {MAX_DEPTH}, allowed: at most that", "body")
