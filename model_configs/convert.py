"""`vllm-puzzle convert SRC DST --to FORMAT`: the same model under another description, for tools that read only one.

Reads any format of `formats.py` and writes `per_layer_config` (Hugging Face), `anymodel` (the same, as ModelOpt's
export marks it) or `deci` (DeciLM `block_configs`, which TensorRT-LLM reads). All three use the same tensor names, so
weights are hard-linked (or copied) and never changed. What a format cannot express is refused, naming the layer.
Standard library only.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_puzzle.model_configs.decilm import ffn_mult_to_width
from vllm_puzzle.model_configs.formats import BASE_ARCHITECTURES, FAMILIES, read_model
from vllm_puzzle.model_configs.json_values import Json, read_object
from vllm_puzzle.model_configs.schema import Attention, ConfigError, GatedFFN, LayerRecord, LinearMap, ModelRecord, MoE

FORMATS = ("per_layer_config", "anymodel", "deci")
# Written anew in every format; all other keys of config.json are kept as they are.
REWRITTEN = (
    "architectures", "auto_map", "base_architecture", "block_configs", "head_dim", "intermediate_size", "layer_types",
    "max_window_layers", "model_type", "num_attention_heads", "num_key_value_heads", "per_layer_config",
    "sliding_window", "use_sliding_window",
)  # fmt: skip


def convert(argv: Sequence[str]) -> int:
    """Run the command. Raises ConfigError when source, target or format do not fit."""
    parser = argparse.ArgumentParser(prog="vllm-puzzle convert", allow_abbrev=False)
    parser.add_argument("source", type=Path, help="a model directory")
    parser.add_argument("target", type=Path, help="the directory to write; must not exist")
    parser.add_argument("--to", choices=FORMATS, required=True)
    options = parser.parse_args(argv)
    file = options.source / "config.json"
    if not file.is_file():
        raise ConfigError(f"model {options.source}: found no config.json, allowed: a model directory")
    if options.target.exists():
        raise ConfigError(f"target {options.target}: found something there, allowed: a new directory")
    config = convert_config(read_object(file), options.to)
    _link_files(options.source, options.target)
    (options.target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    print(f"{options.target}: {len(read_model(config).layers)} layers as {options.to}")
    return 0


def convert_config(config: Json, to: str) -> dict[str, Any]:
    """config.json of the same model in the format `to`."""
    record = read_model(config)
    if record.model_type not in FAMILIES:
        allowed = ", ".join(FAMILIES)
        raise ConfigError(f"model, key `model_type`: found {record.model_type!r}, allowed: {allowed}")
    for index, layer in enumerate(record.layers):
        if isinstance(layer.ffn, MoE):
            raise ConfigError(f"layer {index}, ffn: found experts, allowed: a gated FFN, a linear map or nothing")
    kept = {key: value for key, value in config.items() if key not in REWRITTEN}
    written = kept | (_deci(record, config) if to == "deci" else _per_layer(record, config, to))
    if read_model(written).layers != record.layers:
        raise AssertionError("a converted configuration must read back as the same layers")
    return written


def _link_files(source: Path, target: Path) -> None:
    """Everything but config.json and the source format's own code; into one level, as model directories are flat."""
    target.mkdir(parents=True)
    for file in sorted(source.iterdir()):
        if file.name == "config.json" or file.suffix == ".py" or not file.is_file():
            continue
        try:
            os.link(file.resolve(), target / file.name)
        except OSError:  # another file system
            shutil.copy2(file, target / file.name)


# --- per_layer_config, anymodel ----------------------------------------------------------------------------------


def _per_layer(record: ModelRecord, config: Json, to: str) -> dict[str, Any]:
    family = "llama" if record.model_type == "nemotron-nas" else record.model_type
    wanted = [_wanted(index, layer) for index, layer in enumerate(record.layers)]
    shared: dict[str, Any] = {"sliding_window": None}
    for key in ("num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size"):
        counts = Counter(values[key] for values in wanted if key in values)
        shared[key] = counts.most_common(1)[0][0] if counts else config.get(key)
    shared["num_attention_heads"] = shared["num_attention_heads"] or config["num_attention_heads"]
    overrides = {}
    for index, values in enumerate(wanted):
        own = {key: value for key, value in values.items() if shared.get(key) != value}
        if own:
            overrides[str(index)] = own
    base = BASE_ARCHITECTURES[family]
    names = (
        {"architectures": ["AnyModel"], "base_architecture": base} if to == "anymodel" else {"architectures": [base]}
    )
    # A silent key has a default; null says none.
    present = {key: value for key, value in shared.items() if value is not None or key == "sliding_window"}
    return {"model_type": family} | names | present | {"per_layer_config": overrides}


def _wanted(index: int, layer: LayerRecord) -> dict[str, Any]:
    """What Hugging Face's vocabulary says of one layer."""
    values: dict[str, Any] = {}
    skip = []
    if isinstance(layer.attention, Attention):
        values |= {
            "num_attention_heads": layer.attention.num_heads,
            "num_key_value_heads": layer.attention.num_kv_heads,
            "head_dim": layer.attention.head_dim,
            "sliding_window": layer.attention.sliding_window,
        }
    elif layer.attention is None:
        skip.append("attention")
    if isinstance(layer.ffn, GatedFFN):
        values["intermediate_size"] = layer.ffn.intermediate_size
    elif layer.ffn is None:
        skip.append("mlp")
    if LinearMap() in (layer.attention, layer.ffn):
        raise ConfigError(
            f"layer {index}: found a linear map, allowed: what per_layer_config has a word for (use deci)"
        )
    return values | ({"skip": skip} if skip else {})


# --- deci --------------------------------------------------------------------------------------------------------


def _deci(record: ModelRecord, config: Json) -> dict[str, Any]:
    if record.qk_norm or record.qkv_bias != record.o_bias:
        raise ConfigError(
            f"model, key `model_type`: found {record.model_type!r}, allowed: a family like Llama (DeciLM)"
        )
    shapes = {
        (layer.attention.num_heads, layer.attention.head_dim): index
        for index, layer in enumerate(record.layers)
        if isinstance(layer.attention, Attention)
    }
    if len(shapes) > 1:
        index = max(shapes.values())
        raise ConfigError(
            f"layer {index}, attention: found other heads than before, allowed: one count and size (DeciLM)"
        )
    heads, head_dim = next(iter(shapes), (config["num_attention_heads"], config.get("head_dim")))
    return {
        "architectures": ["DeciLMForCausalLM"],
        "model_type": "nemotron-nas",
        "num_attention_heads": heads,
        "head_dim": head_dim,
        "num_key_value_heads": None,
        "intermediate_size": None,
        "block_configs": [_deci_block(layer, record.hidden_size) for layer in record.layers],
    }


def _deci_block(layer: LayerRecord, hidden: int) -> dict[str, Any]:
    live = layer.attention if isinstance(layer.attention, Attention) else None
    attention = {
        "n_heads_in_group": live.num_heads // live.num_kv_heads if live else None,
        "no_op": layer.attention is None,
        "num_sink_tokens": None,
        "replace_with_linear": isinstance(layer.attention, LinearMap),
        "sparsify": None,
        "unshifted_sink": False,
        "use_prefill_window_in_sink_attention": False,
        "window_length": live.sliding_window if live else None,
    }
    ffn = {
        "no_op": layer.ffn is None,
        "replace_with_linear": isinstance(layer.ffn, LinearMap),
        "sparsify": None,
    }
    return {"attention": attention, "ffn": _deci_width(layer, hidden) | ffn}


def _deci_width(layer: LayerRecord, hidden: int) -> dict[str, Any]:
    """`ffn_mult`, which every reader of the format knows, where its rounding gives the width exactly."""
    if not isinstance(layer.ffn, GatedFFN):
        return {"ffn_mult": None}
    width = layer.ffn.intermediate_size
    mult = 3 * width / (2 * hidden)
    return {"ffn_mult": mult} if ffn_mult_to_width(mult, hidden) == width else {"intermediate_size": width}
