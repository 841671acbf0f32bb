"""Published quantization entries → `Quantization`: ModelOpt and compressed-tensors. Standard library only.

Sources: NVIDIA ModelOpt's exported `hf_quant_config.json` and `quantization_config` (quant_algo, exclude_modules or
ignore, quantized_layers); compressed-tensors' `config_groups` and `ignore`. vLLM reads the same entries with looser
rules (substrings, regexes on its own fused names); `serving/quantized_layers.py` holds it to what is read here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from vllm_puzzle.model_configs.json_values import Json, mapping, read_object, refuse, strings, text
from vllm_puzzle.model_configs.quantization import FUSED, Quantization, Scheme, check_fused, fused_name, matrices
from vllm_puzzle.model_configs.schema import ConfigError, ModelRecord

WHERE = "quantization"
LEGACY_FILE = "hf_quant_config.json"
# gpt-oss's experts, whose blocks and scales are in the family's own table (`gpt_oss.py`).
FAMILY_METHODS = ("mxfp4", "gpt_oss_mxfp4")
FP8 = "F8_E4M3"
MODELOPT = {
    "FP8": Scheme("ModelOpt FP8", FP8, "tensor", ("input_scale",)),
    "FP8_PER_CHANNEL_PER_TOKEN": Scheme("ModelOpt FP8 per channel", FP8, "row"),
    "FP8_PB_WO": Scheme("ModelOpt FP8 blocks", FP8, "block4d", group_size=128),
    "NVFP4": Scheme("NVFP4", "U8", "group", ("weight_scale_2", "input_scale"), (FP8,), 16, 2),
    "W4A16_NVFP4": Scheme("NVFP4 weights", "U8", "group", ("weight_scale_2",), (FP8,), 16, 2),
    "MXFP8": Scheme("MXFP8", FP8, "group", (), ("U8",), 32),
}


def load_quantization(model: ModelRecord, folder: Path, config: Json) -> Quantization | None:
    """The quantization of a model directory: `config` is its config.json; ModelOpt's older file is read beside it."""
    entry = quantization_entry(config)
    file = folder / LEGACY_FILE
    legacy = read_object(file) if file.is_file() else {}
    if not entry and legacy:
        if text(WHERE, mapping(WHERE, legacy, "quantization"), "quant_algo", "").upper() == "MIXED_PRECISION":
            raise ConfigError(
                f"{file}: found MIXED_PRECISION and no `quantization_config` in config.json, allowed: both (vLLM "
                "takes this algorithm from config.json)"
            )
        entry = legacy
    layers = mapping(WHERE, mapping(WHERE, legacy, "quantization") or legacy, "quantized_layers")
    return read_quantization(model, entry, layers)


def quantization_entry(config: Json) -> Json:
    """The entry of a config.json, empty when the checkpoint is plain."""
    return mapping(WHERE, config, "quantization_config") or mapping(WHERE, config, "compression_config")


def read_quantization(model: ModelRecord, entry: Json, layers: Json | None = None) -> Quantization | None:
    """What `entry` means for `model`; `layers` stands in for a missing `quantized_layers`. None when plain.

    Raises ConfigError for a scheme that is not understood, and where matrices that vLLM fuses are stored differently.
    """
    method = text(WHERE, entry, "quant_method", "")
    if not entry or method in FAMILY_METHODS:
        return None
    producer = mapping(WHERE, entry, "producer").get("name")
    if method.startswith("modelopt") or producer == "modelopt":
        found = _modelopt(model, entry, layers or {})
    elif method == "compressed-tensors":
        found = _compressed_tensors(model, entry)
    else:
        raise refuse(WHERE, "quant_method", method or None, "modelopt, compressed-tensors")
    check_fused(model, found.schemes)
    return found


# --- ModelOpt ----------------------------------------------------------------------------------------------------


def _modelopt(model: ModelRecord, entry: Json, layers: Json) -> Quantization:
    body = mapping(WHERE, entry, "quantization") or entry
    algo = text(WHERE, body, "quant_algo", "").upper()
    excluded = strings(WHERE, body, "exclude_modules") + strings(WHERE, body, "ignore")
    names = list(matrices(model))
    is_excluded, idle = _first_matches(excluded, names, _matches_wildcard)
    if algo == "MIXED_PRECISION":
        layers = mapping(WHERE, body, "quantized_layers") or layers
        if not layers:
            raise refuse(WHERE, "quantized_layers", None, "one algorithm per quantized module")
        algos = {name: _layer_scheme(layers, name) for name in layers}
        if len({s.group_size for s in algos.values() if "NVFP4" in s.name}) > 1:
            raise refuse(WHERE, "quantized_layers", "several NVFP4 group sizes", "one (vLLM takes the first)")
        found = {name: key for name in names for key in (fused_name(name), name) if key in layers}
        chosen = {name: algos[key] for name, key in found.items()}
        idle = (*idle, *sorted(set(layers) - set(found.values())))
    else:
        scheme = _scheme(algo, body, "quant_algo")
        chosen = dict.fromkeys(names, scheme)
    schemes = {name: scheme for name, scheme in chosen.items() if name not in is_excluded}
    return Quantization("modelopt", schemes, _has_kv_scales(body), idle)


def _layer_scheme(layers: Json, name: str) -> Scheme:
    block = mapping(f"{WHERE}, `quantized_layers`", layers, name)
    return _scheme(text(f"{WHERE}, `{name}`", block, "quant_algo", "").upper(), block, f"quantized_layers.{name}")


def _scheme(algo: str, body: Json, key: str) -> Scheme:
    if algo not in MODELOPT:
        raise refuse(WHERE, key, algo or None, ", ".join((*MODELOPT, "MIXED_PRECISION")))
    scheme, group_size = MODELOPT[algo], body.get("group_size")
    if group_size not in (None, scheme.group_size) and scheme.group_size:
        raise refuse(WHERE, f"{key}, group_size", group_size, f"{scheme.group_size} with {algo}")
    return scheme


def _has_kv_scales(body: Json) -> bool:
    algo = text(WHERE, body, "kv_cache_quant_algo", "").upper()
    if algo not in ("", "FP8"):
        raise refuse(WHERE, "kv_cache_quant_algo", algo, "'FP8', null")
    scheme = mapping(WHERE, body, "kv_cache_scheme")
    if not scheme:
        return algo == "FP8"
    found = (scheme.get("type"), scheme.get("num_bits"), scheme.get("strategy", "tensor"), bool(scheme.get("dynamic")))
    if found != ("float", 8, "tensor", False):
        raise refuse(WHERE, "kv_cache_scheme", dict(scheme), "8-bit float, static, one scale per tensor")
    return True


# --- compressed-tensors ------------------------------------------------------------------------------------------


def _compressed_tensors(model: ModelRecord, entry: Json) -> Quantization:
    for key in ("sparsity_config", "transform_config"):
        if mapping(WHERE, entry, key):
            raise refuse(WHERE, key, dict(mapping(WHERE, entry, key)), "null")
    targets: dict[str, Scheme] = {}
    for name in mapping(WHERE, entry, "config_groups"):
        group = mapping(f"{WHERE}, `config_groups`", mapping(WHERE, entry, "config_groups"), name)
        format_ = text(WHERE, group, "format", text(WHERE, entry, "format", ""))
        for target in strings(f"{WHERE}, {name}", group, "targets"):
            if target in targets:
                raise refuse(f"{WHERE}, {name}", "targets", target, "each target in one group")
            targets[target] = _group_scheme(f"{WHERE}, {name}", group, format_)
    names = list(matrices(model))
    ignored, idle = _first_matches(strings(WHERE, entry, "ignore"), names, _matches_regex)
    found, unused = _first_matches([target for target in targets if target != "Linear"], names, _matches_regex)
    if "Linear" in targets:  # vLLM's output matrix is no `Linear`; only its name quantizes it
        found = {name: "Linear" for name in names if name != "lm_head"} | found
    schemes = {name: targets[target] for name, target in found.items() if name not in ignored}
    return Quantization("compressed-tensors", schemes, _has_kv_scales(entry), (*idle, *unused))


def _group_scheme(where: str, group: Json, format_: str) -> Scheme:
    weights, inputs = mapping(where, group, "weights"), mapping(where, group, "input_activations")
    if mapping(where, group, "output_activations"):
        raise refuse(where, "output_activations", dict(mapping(where, group, "output_activations")), "null")
    kind, bits, strategy = (weights.get(key) for key in ("type", "num_bits", "strategy"))
    is_symmetric, actorder = weights.get("symmetric", True), weights.get("actorder")
    if actorder not in (None, "static", "weight") or weights.get("dynamic"):
        raise refuse(where, "weights", dict(weights), "static weights without activation order")
    is_static = bool(inputs) and not inputs.get("dynamic")
    if is_static and inputs.get("strategy") != "tensor":
        raise refuse(where, "input_activations", dict(inputs), "static per tensor, or dynamic")
    scalars = ("input_scale",) if is_static else ()
    name = f"compressed-tensors {str(kind).upper()}{bits} per {strategy}"
    if format_ == "pack-quantized" and kind == "int" and bits in (4, 8) and not inputs:
        size = weights.get("group_size") or 0
        if strategy == "channel" or (strategy == "group" and size > 0):
            scale, size = ("channel", 0) if strategy == "channel" else ("group", size)
            has_zero_points = not is_symmetric
            return Scheme(name, "I32", scale, (), group_size=size, packing=32 // bits, is_packed_int=True,
                          has_zero_points=has_zero_points)  # fmt: skip
    elif format_ in ("float-quantized", "naive-quantized") and (kind, bits) == ("float", 8) and is_symmetric:
        if strategy in ("tensor", "channel"):
            return Scheme(name, FP8, strategy, scalars)
        if strategy == "block" and weights.get("block_structure") == [128, 128] and not scalars:
            return Scheme(name, FP8, "block", group_size=128)
    elif (
        format_ in ("int-quantized", "naive-quantized")
        and (kind, bits, strategy in ("tensor", "channel")) == ("int", 8, True)
        and is_symmetric
        and inputs
    ):
        zero_point = () if inputs.get("symmetric", True) or not is_static else ("input_zero_point",)
        return Scheme(name, "I8", str(strategy), scalars + zero_point)
    raise refuse(where, "weights", f"{name}, format {format_}", "FP8, INT8 W8A8, or packed INT4/INT8 weights")


# --- names -------------------------------------------------------------------------------------------------------


def _first_matches(
    entries: Iterable[str], names: Iterable[str], matches: Callable[[str, str], bool]
) -> tuple[dict[str, str], tuple[str, ...]]:
    """For each name that an entry matches, the first such entry; and the entries that match no name at all."""
    listed, names = list(entries), list(names)
    found: dict[str, str] = {}
    idle = []
    for entry in listed:
        matched = [name for name in names if matches(entry, name) or _names_fused(entry, name, matches)]
        for name in matched:
            found.setdefault(name, entry)
        if not matched:
            idle.append(entry)
    return found, tuple(idle)


def _names_fused(entry: str, name: str, matches: Callable[[str, str], bool]) -> bool:
    """Some lists use vLLM's fused names. A pattern that merely happens to fit one (`*v_proj`) does not count."""
    return any(fused in entry for fused in FUSED) and matches(entry, fused_name(name))


def _matches_wildcard(entry: str, name: str) -> bool:
    """ModelOpt's shell patterns; a plain entry stands for the module and all below it, wherever it is rooted."""
    return fnmatchcase(name, entry) or f".{entry}." in f".{name}."


def _matches_regex(entry: str, name: str) -> bool:
    if not entry.startswith("re:"):
        return entry == name
    try:
        return re.match(entry[3:], name) is not None
    except re.error as error:
        raise refuse(WHERE, "ignore or targets", entry, f"a regular expression ({error})") from None
