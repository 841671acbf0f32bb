"""`vllm-puzzle convert SRC DST --to FORMAT`: the same model under another description, for tools that read only one.

Reads any format of `formats.py` but NemotronH's and writes `per_layer_config` (Hugging Face), `anymodel` (the same, as
ModelOpt's export marks it) or `deci` (DeciLM `block_configs`, which TensorRT-LLM reads). The tensors of one model have
the same names in all of them, so weights are hard-linked (or copied) and never changed. What a format cannot express is
refused, naming the layer. Standard library only.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm_puzzle.model_configs.decilm import ffn_mult_to_width
from vllm_puzzle.model_configs.formats import BASE_ARCHITECTURES, FAMILIES, read_model
from vllm_puzzle.model_configs.json_values import Json, read_object, refuse
from vllm_puzzle.model_configs.per_layer import global_window
from vllm_puzzle.model_configs.schema import (
    Attention,
    ConfigError,
    GatedFFN,
    LayerRecord,
    LinearMap,
    Mamba2,
    ModelRecord,
    MoE,
)
from vllm_puzzle.model_configs.tensors import model_tensors

FORMATS = ("per_layer_config", "anymodel", "deci")
# Written anew in every format; all other keys of config.json are kept as they are.
REWRITTEN = (
    "anymodel_arch_info", "architectures", "auto_map", "base_architecture", "block_configs", "head_dim",
    "intermediate_size", "layer_types", "max_window_layers", "model_type", "moe_intermediate_size",
    "num_attention_heads", "num_experts", "num_experts_per_tok", "num_key_value_heads", "num_local_experts",
    "per_layer_config", "sliding_window", "use_sliding_window",
)  # fmt: skip
# Families whose Hugging Face class says by `layer_types` which layers have the window.
TYPED_LAYERS = ("qwen2", "qwen3", "qwen3_moe", "gpt_oss")


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
    kept = {key: value for key, value in config.items() if key not in REWRITTEN}
    written = kept | (_deci(record, config) if to == "deci" else _per_layer(record, config, to))
    _check_same(record, read_model(written), config)
    return written


def _check_same(before: ModelRecord, after: ModelRecord, config: Json) -> None:
    """The written configuration must read back as the same model, down to its tensors."""
    if after.rope != before.rope:  # a silent gpt-oss would read as gpt-oss's own factor, which gpt-oss-puzzle changed
        key = "rope_theta" if config.get("rope_scaling") else "rope_scaling"
        raise refuse("model", key, config.get(key), "a value (gpt-oss would take its own default)")
    named = replace(after, model_type=before.model_type, architecture=before.architecture)
    if named != before or model_tensors(after, as_stored=True) != model_tensors(before, as_stored=True):
        raise AssertionError("a converted configuration must read back as the same model")


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
    family = {"nemotron-nas": "llama", "gpt_oss_puzzle": "gpt_oss"}.get(record.model_type, record.model_type)
    wanted = [_wanted(f"layer {index}", layer, family) for index, layer in enumerate(record.layers)]
    shared: dict[str, Any] = {"model_type": family} | _windows(family, record)
    for key in dict.fromkeys(key for values in wanted for key in values if key not in ("skip", "sliding_window")):
        shared[key] = Counter(values[key] for values in wanted if key in values).most_common(1)[0][0]
    # A model without any such block still needs the family's keys.
    for key in ("num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size", *_moe_names(family)):
        shared.setdefault(key, config.get(key))
    overrides = {}
    for index, values in enumerate(wanted):
        usual = shared | {"sliding_window": global_window(shared, index)}
        own = {key: value for key, value in values.items() if usual.get(key) != value}
        if own:
            overrides[str(index)] = own
    base = BASE_ARCHITECTURES[family]
    names = (
        {"architectures": ["AnyModel"], "base_architecture": base} if to == "anymodel" else {"architectures": [base]}
    )
    # A silent key has a default; null says none.
    present = {key: value for key, value in shared.items() if value is not None or key == "sliding_window"}
    return names | present | {"per_layer_config": overrides}


def _moe_names(family: str) -> dict[str, str]:
    """The family's key → the record's field, for one layer's experts."""
    if family == "gpt_oss":
        width, count = "intermediate_size", "num_local_experts"
    elif family == "qwen3_moe":
        width, count = "moe_intermediate_size", "num_experts"
    else:
        return {}
    return {width: "intermediate_size", count: "num_experts", "num_experts_per_tok": "num_experts_per_tok"}


def _windows(family: str, record: ModelRecord) -> dict[str, Any]:
    """The window most layers have, where the family keeps it; other layers override it."""
    windows = [x.attention.sliding_window if isinstance(x.attention, Attention) else None for x in record.layers]
    usual = Counter(window for window in windows if window is not None).most_common(1)
    shared: dict[str, Any] = {"sliding_window": usual[0][0] if usual else None}
    if family in TYPED_LAYERS:
        shared["layer_types"] = ["full_attention" if window is None else "sliding_attention" for window in windows]
        return shared | ({} if family == "gpt_oss" else {"use_sliding_window": bool(usual)})
    # Mistral's is on every layer; Llama has none.
    is_everywhere = family == "mistral" and all(a.sliding_window is not None for a in record.attentions)
    return shared if is_everywhere else {"sliding_window": None}


def _wanted(where: str, layer: LayerRecord, family: str) -> dict[str, Any]:
    """What Hugging Face's vocabulary says of one layer."""
    allowed = "allowed: what per_layer_config has a word for (use deci)"
    if layer.parallel:
        raise ConfigError(f"{where}, key `parallel_blocks`: found {len(layer.parallel)} blocks, {allowed}")
    if LinearMap() in (layer.attention, layer.ffn):
        raise ConfigError(f"{where}, key `replace_with_linear`: found a linear map, {allowed}")
    if isinstance(layer.attention, Mamba2):
        raise ConfigError(f"{where}, attention, key `mamba`: found a Mamba-2 mixer, {allowed}")
    values: dict[str, Any] = {}
    if isinstance(layer.attention, Attention):
        if layer.attention.num_sink_tokens:
            found = layer.attention.num_sink_tokens
            raise ConfigError(f"{where}, attention, key `num_sink_tokens`: found {found}, {allowed}")
        values |= {
            "num_attention_heads": layer.attention.num_heads,
            "num_key_value_heads": layer.attention.num_kv_heads,
            "head_dim": layer.attention.head_dim,
            "sliding_window": layer.attention.sliding_window,
        }
    if isinstance(layer.ffn, GatedFFN):
        values["intermediate_size"] = layer.ffn.intermediate_size
    elif isinstance(layer.ffn, MoE):
        if not _moe_names(family):
            raise ConfigError(f"{where}, ffn, key `moe`: found experts with DeciLM's routing, {allowed}")
        values |= {key: getattr(layer.ffn, field) for key, field in _moe_names(family).items()}
    skip = [name for name, part in (("attention", layer.attention), ("mlp", layer.ffn)) if part is None]
    return values | ({"skip": skip} if skip else {})


# --- deci --------------------------------------------------------------------------------------------------------


def _deci(record: ModelRecord, config: Json) -> dict[str, Any]:
    blocks = [_deci_layer(f"layer {i}", layer, record.hidden_size) for i, layer in enumerate(record.layers)]
    if record.qk_norm or record.qkv_bias != record.o_bias:
        raise ConfigError(
            f"model, key `model_type`: found {record.model_type!r}, allowed: a family like Llama (DeciLM)"
        )
    return {
        "architectures": ["DeciLMForCausalLM"],
        "model_type": "nemotron-nas",
        **_one_head_shape(record, config),
        "num_key_value_heads": None,
        "intermediate_size": None,
        "block_configs": blocks,
    }


def _one_head_shape(record: ModelRecord, config: Json) -> dict[str, Any]:
    """DeciLM states the query heads and their size once."""
    heads, head_dim = config["num_attention_heads"], config.get("head_dim")
    first = next(iter(record.attentions), None)
    for index, layer in enumerate(record.layers):
        for block in layer.blocks:
            if isinstance(block.attention, Attention) and first is not None:
                heads, head_dim = first.num_heads, first.head_dim
                if (block.attention.num_heads, block.attention.head_dim) != (heads, head_dim):
                    raise ConfigError(
                        f"layer {index}, attention: found {block.attention.num_heads} heads of "
                        f"{block.attention.head_dim}, allowed: {heads} of {head_dim}, as before (DeciLM)"
                    )
    return {"num_attention_heads": heads, "head_dim": head_dim}


def _deci_layer(where: str, layer: LayerRecord, hidden: int) -> dict[str, Any]:
    if layer.parallel:
        blocks = [_deci_layer(f"{where}, block {i}", block, hidden) for i, block in enumerate(layer.parallel)]
        return {"attention": None, "ffn": None, "parallel_blocks": blocks}
    return {
        "attention": _deci_attention(where, layer),
        "ffn": _deci_ffn(where, layer, hidden)
        | {
            "no_op": layer.ffn is None,
            "replace_with_linear": isinstance(layer.ffn, LinearMap),
            "sparsify": None,
        },
    }


def _deci_attention(where: str, layer: LayerRecord) -> dict[str, Any]:
    live = layer.attention if isinstance(layer.attention, Attention) else None
    if live and live.has_sinks:
        raise ConfigError(f"{where}, attention, tensor `sinks`: found learned sinks (gpt-oss), allowed: none (DeciLM)")
    sinks = live.num_sink_tokens if live else 0
    attention: dict[str, Any] = {
        "n_heads_in_group": live.num_heads // live.num_kv_heads if live else None,
        "no_op": layer.attention is None,
        "num_sink_tokens": sinks or None,
        "replace_with_linear": isinstance(layer.attention, LinearMap),
        "sparsify": None,
        "unshifted_sink": bool(sinks),
        "use_prefill_window_in_sink_attention": False,
        "window_length": live.sliding_window if live else None,
    }
    if isinstance(layer.attention, Mamba2):
        mamba = layer.attention
        attention["mamba"] = {
            "state_dim": mamba.state_size,
            "num_heads": mamba.num_heads,
            "head_dim": mamba.head_dim,
            "num_groups": mamba.num_groups,
        }
    return attention


def _deci_ffn(where: str, layer: LayerRecord, hidden: int) -> dict[str, Any]:
    """`ffn_mult`, which every reader of the format knows, where its rounding gives the width exactly."""
    if isinstance(layer.ffn, MoE):
        if layer.ffn.routing != "sigmoid_on_input":
            raise ConfigError(
                f"{where}, ffn, key `moe`: found experts with {layer.ffn.routing!r} routing, allowed: DeciLM's own "
                "(sigmoid on the input, a shared expert)"
            )
        moe = {
            "num_local_experts": layer.ffn.num_experts,
            "num_experts_per_tok": layer.ffn.num_experts_per_tok,
            "expert_intermediate_dim": layer.ffn.intermediate_size,
            "shared_expert_intermediate_dim": layer.ffn.shared_intermediate_size,
        }
        return {"ffn_mult": None, "moe": moe}
    if not isinstance(layer.ffn, GatedFFN):
        return {"ffn_mult": None}
    width = layer.ffn.intermediate_size
    mult = 3 * width / (2 * hidden)
    return {"ffn_mult": mult} if ffn_mult_to_width(mult, hidden) == width else {"intermediate_size": width}
