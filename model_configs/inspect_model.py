"""`vllm-puzzle inspect`: a model's layers as a table or as JSON, from its config.json alone. Standard library only."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_puzzle.model_configs.catalogue import NAMES, Published, find
from vllm_puzzle.model_configs.formats import read_model
from vllm_puzzle.model_configs.json_values import read_object
from vllm_puzzle.model_configs.schema import (
    Attention,
    AttentionKind,
    ConfigError,
    GatedFFN,
    LayerRecord,
    LinearMap,
    Mamba2,
    ModelRecord,
    MoE,
    PlainFFN,
)
from vllm_puzzle.model_configs.tensors import kv_bytes_per_token, num_layer_parameters, num_parameters

COLUMNS = ("layers", "attention", "kv_heads", "window", "ffn", "ffn_width", "experts", "params_per_layer")
# What one cached element takes under vLLM's --kv-cache-dtype names.
KV_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "fp8": 1}


def inspect(argv: Sequence[str]) -> int:
    """Print the table (or JSON) of one model. Raises ConfigError when the configuration cannot be read."""
    parser = argparse.ArgumentParser(prog="vllm-puzzle inspect", allow_abbrev=False)
    parser.add_argument("model", help="a model directory, a config.json, or a name that `vllm-puzzle models` lists")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the table")
    options = parser.parse_args(argv)
    published = _published(options.model)
    record = published.record() if published else load_record(options.model)
    if options.json:
        origin = {"hub": published.hub, "source": published.source, "note": published.note} if published else {}
        print(json.dumps(describe(record) | origin))
    else:
        print(format_table(record))
        if published:
            print(f"source             {published.source}")
        if published and published.note:
            print(f"note               {published.note}")
    return 0


def _published(model: str) -> Published | None:
    """The published model of that name, unless there is a file or directory of that name."""
    if os.path.exists(model):
        return None
    if model.lower() in NAMES:
        return find(model)
    raise ConfigError(
        f"{model}: found No such file or directory, allowed: a model directory, a config.json, or a name that "
        "`vllm-puzzle models` lists"
    )


def load_record(model: str | Path) -> ModelRecord:
    """Read a model directory's config.json, or the file itself, into its record."""
    path = Path(model)
    file = path / "config.json" if path.is_dir() else path
    return read_model(read_object(file))


def describe(record: ModelRecord) -> dict[str, Any]:
    """The record as JSON-ready data: sizes of the whole and one entry per layer."""
    return {
        "architecture": record.architecture,
        "model_type": record.model_type,
        "is_heterogeneous": record.is_heterogeneous,
        "num_layers": len(record.layers),
        "num_attention_layers": len(record.attentions),
        "hidden_size": record.hidden_size,
        "vocab_size": record.vocab_size,
        "num_parameters": num_parameters(record),
        "kv_bytes_per_token": {dtype: kv_bytes_per_token(record, size) for dtype, size in KV_DTYPE_BYTES.items()},
        "layers": [{"layer": index, **_layer_row(record, layer)} for index, layer in enumerate(record.layers)],
    }


def format_table(record: ModelRecord) -> str:
    """The model as text: a title line, one row per run of equal layers, totals."""
    rows: list[tuple[str, ...]] = [COLUMNS]
    for first, last, layer in _runs(record.layers):
        row = _layer_row(record, layer)
        name = str(first) if first == last else f"{first}-{last}"
        cells = [row[key] for key in COLUMNS[1:-1]]
        rows.append(
            (name, *("-" if cell is None else str(cell) for cell in cells), format(row["params_per_layer"], ","))
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    kind = "heterogeneous" if record.is_heterogeneous else "homogeneous"
    title = (
        f"{record.architecture} ({record.model_type}), {kind}, {len(record.layers)} layers, hidden {record.hidden_size}"
    )
    attentions = len(record.attentions)
    kv = ", ".join(f"{kv_bytes_per_token(record, size):,} {dtype}" for dtype, size in KV_DTYPE_BYTES.items())
    totals = [
        f"attention layers   {attentions}",
        f"parameters         {num_parameters(record):,}",
        f"KV bytes per token {kv}",
    ]
    return "\n".join([title, "", *lines, "", *totals])


def _layer_row(record: ModelRecord, layer: LayerRecord) -> dict[str, Any]:
    attention, ffn = layer.attention, layer.ffn
    if layer.parallel:
        rows = [_layer_row(record, block) for block in layer.parallel]
        joined = {key: " + ".join("-" if row[key] is None else str(row[key]) for row in rows) for key in rows[0]}
        return joined | {"params_per_layer": num_layer_parameters(record, layer)}
    return {
        "attention": _attention_kind(attention),
        "kv_heads": attention.num_kv_heads if isinstance(attention, Attention) else None,
        "window": attention.sliding_window if isinstance(attention, Attention) else None,
        "ffn": {GatedFFN: "gated", PlainFFN: "relu2", MoE: "moe", LinearMap: "linear"}.get(type(ffn)),
        "ffn_width": ffn.intermediate_size if isinstance(ffn, GatedFFN | PlainFFN | MoE) else None,
        "experts": f"{ffn.num_experts_per_tok}/{ffn.num_experts}" if isinstance(ffn, MoE) else None,
        "params_per_layer": num_layer_parameters(record, layer),
    }


def _attention_kind(attention: AttentionKind) -> str | None:
    if isinstance(attention, Attention):
        kind = "full" if attention.sliding_window is None else "window"
        return f"{kind} + {attention.num_sink_tokens} sinks" if attention.num_sink_tokens else kind
    return {LinearMap: "linear", Mamba2: "mamba2"}.get(type(attention))


def _runs(layers: tuple[LayerRecord, ...]) -> list[tuple[int, int, LayerRecord]]:
    """(first, last, record) for each run of equal neighbours."""
    runs: list[tuple[int, int, LayerRecord]] = []
    for index, layer in enumerate(layers):
        if runs and runs[-1][2] == layer:
            runs[-1] = (runs[-1][0], index, layer)
        else:
            runs.append((index, index, layer))
    return runs
