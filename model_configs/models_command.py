"""`vllm-puzzle models`: the published models that are known here, as a table or as JSON. Standard library only."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any, NoReturn

from vllm_puzzle.model_configs.catalogue import PUBLISHED, Published
from vllm_puzzle.model_configs.memory_plan import smallest_gpu
from vllm_puzzle.model_configs.request_memory import state_bytes_of_request
from vllm_puzzle.model_configs.schema import ConfigError, ModelRecord
from vllm_puzzle.model_configs.tensors import kv_bytes_per_token, num_parameters

# (heading, under it): one column each.
COLUMNS = (
    ("", "model"),
    ("", "parameters"),
    ("attention", "of layers"),
    ("KV B/token", "bf16"),
    ("", "fp8"),
    ("state MB", "per request"),
    ("smallest", "GPU"),
    ("", "reasoning"),
)
LEGEND = (
    "KV: bytes that one token takes over all layers, before a window frees them ((n): layers with a window).",
    "state: what the Mamba layers keep for each running request, however long (float32, convolution bf16).",
    "smallest GPU: by memory, for one request of 32,768 tokens; where the published weights are bf16, also in FP8.",
    "`vllm-puzzle inspect NAME` shows a model's layers. Multi-token-prediction layers are not counted.",
)


class _Parser(argparse.ArgumentParser):
    """A mistake is one line, as everywhere in vllm-puzzle."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"models: found a command line where {message}, allowed: vllm-puzzle models [--json]")


def models(argv: Sequence[str]) -> int:
    """Print the table (or JSON) of all published models. Raises ConfigError for a bad command line."""
    parser = _Parser(prog="vllm-puzzle models", allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the table")
    options = parser.parse_args(argv)
    described = [describe_published(published) for published in PUBLISHED]
    print(json.dumps(described) if options.json else format_models(described))
    return 0


def describe_published(published: Published) -> dict[str, Any]:
    """One model as JSON-ready data; sizes in parameters and bytes."""
    record = published.record()
    return {
        "name": published.name,
        "hub": published.hub,
        "source": published.source,
        "is_reconstructed": published.is_reconstructed,
        "note": published.note,
        "served_as": published.served_as,
        "kv": published.kv,
        "num_parameters": num_parameters(record),
        "num_layers": len(record.layers),
        "num_attention_layers": len(record.attentions),
        "num_window_layers": sum(attention.sliding_window is not None for attention in record.attentions),
        "kv_bytes_per_token": {"bf16": kv_bytes_per_token(record, 2), "fp8": kv_bytes_per_token(record, 1)},
        "state_bytes_per_request": state_bytes_of_request(record),
        "reasoning": published.reasoning,
        "smallest_gpu": smallest_gpus(published, record),
    }


def smallest_gpus(published: Published, record: ModelRecord) -> dict[str, str]:
    """Weights → the smallest GPU: as published, and bf16 weights also in FP8 with an FP8 KV cache."""
    found = {published.served_as: smallest_gpu(record, published.served_as, published.kv)}
    if published.served_as == "bf16":
        found["fp8"] = smallest_gpu(record, "fp8", "fp8")
    return found


def format_models(described: Sequence[dict[str, Any]]) -> str:
    """The models as text: two lines of headings, a row per model, the reconstructions, the legend."""
    rows = [tuple(column[line] for column in COLUMNS) for line in (0, 1)] + [_cells(model) for model in described]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    marked = [f"* {model['name']}: {model['note']}." for model in described if model["is_reconstructed"]]
    return "\n".join([*lines, "", *marked, *LEGEND])


def _cells(model: dict[str, Any]) -> tuple[str, ...]:
    windows, state = model["num_window_layers"], model["state_bytes_per_request"]
    attention = f"{model['num_attention_layers']} of {model['num_layers']}"
    return (
        model["name"] + ("*" if model["is_reconstructed"] else ""),
        f"{model['num_parameters'] / 1e9:.2f} B",
        f"{attention} ({windows})" if windows else attention,
        f"{model['kv_bytes_per_token']['bf16']:,}",
        f"{model['kv_bytes_per_token']['fp8']:,}",
        f"{state / 1e6:.1f}" if state else "-",
        ", ".join(f"{weights}: {gpu}" for weights, gpu in model["smallest_gpu"].items()),
        model["reasoning"],
    )
