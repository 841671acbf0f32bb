"""What the upstream is and can do, asked once from the server itself."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from vllm_puzzle.serving.gateway.kinds import KINDS, Kind
from vllm_puzzle.serving.gateway.upstream import Upstream

SGLANG_PATHS = ("/get_server_info", "/server_info", "/get_model_info")
BUDGET_BY = ("auto", "server", "two-calls")


@dataclass(frozen=True, slots=True)
class Facts:
    """kind: of the server. template: text of its chat template, None where nobody said. model_type: as in config.json.
    has_budget: the server itself holds a thinking budget.
    """

    kind: Kind
    template: str | None
    model_type: str
    has_budget: bool


async def detect(upstream: Upstream) -> str:
    """The name of the kind, by routes that only that kind has. Raises GatewayError 502 if nobody answers."""
    for path in ("/v1/metadata", "/v1/health/ready"):
        if isinstance(await upstream.get_json(path), dict):
            return "nim"
    for path in SGLANG_PATHS:
        if isinstance(await upstream.get_json(path), dict):
            return "sglang"
    if isinstance(await upstream.get_json("/props"), dict):
        return "llamacpp"
    version = await upstream.get_json("/version")
    if isinstance(version, dict) and "version" in version:
        owners = {model.get("owned_by") for model in _models(await upstream.get_json("/v1/models"))}
        return "trtllm" if KINDS["trtllm"].owner in owners else "vllm"
    return "openai"


async def read_facts(upstream: Upstream, kind: Kind, budget_by: str, template: str | None, model_type: str) -> Facts:
    """`template`: of --tokenizer, if given; else the server's own where it shows it."""
    if template is None and kind.name == "llamacpp":
        props = await upstream.get_json("/props")
        shown = props.get("chat_template") if isinstance(props, dict) else None
        template = shown if isinstance(shown, str) and shown else None
    has_budget = bool(kind.budget) and budget_by != "two-calls"
    if has_budget and budget_by == "auto" and kind.budget_needs:
        has_budget = await _says(upstream, kind.budget_needs)
    return Facts(kind, template, model_type, has_budget)


async def context_length(upstream: Upstream, model: Any, headers: Iterable[tuple[bytes, bytes]]) -> int | None:
    """`max_model_len` of a model, where the server tells it."""
    for card in _models(await upstream.get_json("/v1/models", headers)):
        if card.get("id") == model or model is None:
            length = card.get("max_model_len")
            return length if isinstance(length, int) else None
    return None


async def _says(upstream: Upstream, key: str) -> bool:
    """Whether the server's description of itself has this key set to true."""
    for path in SGLANG_PATHS[:2]:
        info = await upstream.get_json(path)
        if isinstance(info, dict):
            nested = info.get("server_args")
            return info.get(key) is True or (isinstance(nested, dict) and nested.get(key) is True)
    return False


def _models(listing: Any) -> list[dict[str, Any]]:
    data = listing.get("data") if isinstance(listing, dict) else None
    return [model for model in data if isinstance(model, dict)] if isinstance(data, list) else []
