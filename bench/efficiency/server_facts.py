"""What the server says of itself: version, model, flags where it shows them, and its counters."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import httpx
from vllm_puzzle.bench.efficiency.arm import Arm
from vllm_puzzle.bench.efficiency.client import get

_SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
PREFIX_QUERIES, PREFIX_HITS = "vllm:prefix_cache_queries", "vllm:prefix_cache_hits"


class Sample(NamedTuple):
    """One line of Prometheus text; `_total` is taken off a counter's name."""

    name: str
    labels: Mapping[str, str]
    value: float


def samples(text: str) -> list[Sample]:
    """The samples of a /metrics page; what is none is passed over."""
    found = []
    for line in text.splitlines():
        match = _SAMPLE.match(line)
        if match is None:
            continue
        try:
            value = float(match[3])
        except ValueError:
            continue
        found.append(Sample(match[1].removesuffix("_total"), dict(_LABEL.findall(match[2] or "")), value))
    return found


def total(found: list[Sample], name: str) -> float | None:
    """Sum over engines; None where there is no such counter."""
    values = [sample.value for sample in found if sample.name == name]
    return sum(values) if values else None


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """version: as the server says, None where it does not. model: its own entry of /v1/models. cache: vLLM's cache
    configuration. is_vllm: whether its extensions, such as a cache salt, are understood.
    """

    version: str | None = None
    model: Mapping[str, Any] = field(default_factory=dict)
    cache: Mapping[str, str] = field(default_factory=dict)
    is_vllm: bool = False
    is_reachable: bool = False


async def read_server(transport: httpx.AsyncBaseTransport, arm: Arm) -> ServerFacts:
    """Ask the server; whatever it does not answer stays unknown."""
    version = _object(await get(transport, arm.root + "/version", arm.headers)).get("version")
    page = await get(transport, arm.root + "/v1/models", arm.headers)
    listed = _object(page).get("data")
    models = [model for model in listed if isinstance(model, dict)] if isinstance(listed, list) else []
    model = next((model for model in models if model.get("id") == arm.model), {})
    found = samples(await get(transport, arm.root + "/metrics", arm.headers))
    cache: Mapping[str, str] = next((s.labels for s in found if s.name == "vllm:cache_config_info"), {})
    is_vllm = model.get("owned_by") == "vllm" or any(sample.name.startswith("vllm:") for sample in found)
    return ServerFacts(version if isinstance(version, str) else None, model, cache, is_vllm, bool(page))


async def first_model(transport: httpx.AsyncBaseTransport, root: str, headers: Mapping[str, str]) -> str | None:
    """The name of the server's first model; None where it lists none."""
    listed = _object(await get(transport, root + "/v1/models", headers)).get("data")
    name = listed[0].get("id") if isinstance(listed, list) and listed and isinstance(listed[0], dict) else None
    return name if isinstance(name, str) else None


async def read_counters(transport: httpx.AsyncBaseTransport, arm: Arm) -> list[Sample]:
    """The server's counters now; none where it has no /metrics."""
    return samples(await get(transport, arm.root + "/metrics", arm.headers))


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
