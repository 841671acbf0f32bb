"""puzzletron v2 `block_configs`: per layer a list of typed `subblock_configs`, read into per-layer overrides.

ModelOpt branch feature/puzzletron_v2, block_config.py and utils/vllm_adapter.py: kinds attention, ffn, moe (and mamba,
mla, which no family here has). A key left out is the model's own. Standard library only.
"""

from __future__ import annotations

from typing import Any

from vllm_puzzle.model_configs.json_values import Json, flag, known_keys, optional_integer, refuse, text
from vllm_puzzle.model_configs.per_layer import GPT_OSS, MOE_KEYS, blocks_of
from vllm_puzzle.model_configs.schema import ConfigError

SHARED_KEYS = ("kind", "name", "no_op")
UNSUPPORTED = ("k_eq_v", "kv_source_layer", "llama4", "shared_expert_intermediate_size", "latent_dim")
ATTENTION_KEYS = {
    "num_kv_heads": "num_key_value_heads",
    "num_query_heads": "num_attention_heads",
    "qk_head_dim": "head_dim",
}
FFN_KEYS = {"intermediate_size": "intermediate_size"}
KINDS = ("attention", "ffn", "moe")


def is_v2(config: Json) -> bool:
    """Whether `block_configs` is puzzletron v2's."""
    blocks = config.get("block_configs")
    return isinstance(blocks, list | tuple) and any(isinstance(b, dict) and "subblock_configs" in b for b in blocks)


def read_overrides(config: Json) -> dict[int, dict[str, Any]]:
    """Per layer what differs from the model, in the words of the family's config.json."""
    return {index: _layer(config, block, f"layer {index}") for index, block in enumerate(blocks_of(config))}


def _layer(config: Json, block: Any, where: str) -> dict[str, Any]:
    subblocks = block.get("subblock_configs") if isinstance(block, dict) else None
    if not isinstance(subblocks, list | tuple) or not all(isinstance(entry, dict) for entry in subblocks):
        raise ConfigError(f"{where}: found {block!r}, allowed: an object with a list `subblock_configs`")
    known_keys(where, block, ("subblock_configs",))
    overrides: dict[str, Any] = {}
    skip = []
    seen = set()
    for entry in subblocks:
        kind = text(where, entry, "kind", "")
        part = "attention" if kind == "attention" else "mlp"
        if kind not in KINDS or part in seen:
            raise refuse(where, "kind", kind or None, f"one of {', '.join(KINDS)}, one for each half of the layer")
        seen.add(part)
        if flag(where, entry, "no_op"):
            _check_idle(entry, f"{where}, {kind}")
            skip.append(part)
        else:
            overrides |= _subblock(config, kind, entry, f"{where}, {kind}")
    if len(seen) != 2:
        missing = "attention" if "mlp" in seen else "ffn or moe"
        raise refuse(where, "subblock_configs", sorted(seen), f"a {missing} entry too (with `no_op` to leave it out)")
    return overrides | ({"skip": skip} if skip else {})


def _subblock(config: Json, kind: str, entry: Json, where: str) -> dict[str, Any]:
    for key in UNSUPPORTED:
        if entry.get(key) not in (None, False):
            raise refuse(where, key, entry[key], "null (no family here has it)")
    if kind == "attention":
        return _attention(entry, where)
    if kind == "moe":
        return _moe(config, entry, where)
    if config["model_type"] in GPT_OSS:
        raise refuse(where, "kind", kind, "moe")
    known_keys(where, entry, (*SHARED_KEYS, *FFN_KEYS))
    return _renamed(entry, FFN_KEYS, where)


def _attention(entry: Json, where: str) -> dict[str, Any]:
    known_keys(where, entry, (*SHARED_KEYS, *UNSUPPORTED, *ATTENTION_KEYS, "v_head_dim", "sliding_window_size"))
    overrides = _renamed(entry, ATTENTION_KEYS, where)
    value_size = optional_integer(where, entry, "v_head_dim")
    if value_size not in (None, entry.get("qk_head_dim")):
        raise refuse(where, "v_head_dim", value_size, "as `qk_head_dim`")
    window = entry.get("sliding_window_size")
    if window == "full":
        return overrides | {"sliding_window": None}
    size = optional_integer(where, entry, "sliding_window_size")
    return overrides | ({"sliding_window": size} if size is not None else {})


def _moe(config: Json, entry: Json, where: str) -> dict[str, Any]:
    model_type = config["model_type"]
    if model_type not in MOE_KEYS:
        raise refuse(where, "kind", "moe", "ffn, as the family has no experts")
    is_gpt_oss = model_type in GPT_OSS
    names = {
        "num_experts": "num_local_experts",
        "top_k": "num_experts_per_tok",
        "expert_intermediate_size": "intermediate_size" if is_gpt_oss else "moe_intermediate_size",
    }
    known_keys(where, entry, (*SHARED_KEYS, *UNSUPPORTED, *names))
    return _renamed(entry, names, where)


def _renamed(entry: Json, names: dict[str, str], where: str) -> dict[str, Any]:
    found = {theirs: optional_integer(where, entry, ours) for ours, theirs in names.items()}
    return {key: value for key, value in found.items() if value is not None}


def _check_idle(entry: Json, where: str) -> None:
    for key, value in entry.items():
        if key not in SHARED_KEYS and value is not None:
            raise refuse(where, key, value, "null, as `no_op` is true")
