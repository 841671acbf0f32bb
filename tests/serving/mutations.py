"""Random edits of valid configurations, and the way of `serve` to a record that vLLM would be started with."""

from __future__ import annotations

import copy
from random import Random
from typing import Any

import checkpoints
import families
from vllm_puzzle.model_configs.formats import read_model
from vllm_puzzle.model_configs.schema import ModelRecord
from vllm_puzzle.serving.hf_config import check_transformers_agrees
from vllm_puzzle.serving.servable import check_servable, is_ours

FORMATS: dict[str, dict[str, Any]] = {
    "deci": checkpoints.deci_config(checkpoints.ALL_KINDS),
    "per_layer_config": checkpoints.per_layer_config(),
    **families.FAMILIES,
}
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 256}
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 4, 7, 16, 64, 2**40, 0.5, 1.5, -0.5, 1e-5, float("nan"), float("inf"), "", "8",
    "linear", "silu", "gelu", "none", "bfloat16", [], [1], [None], ["sliding_attention"] * 5,
    ["full_attention", "sliding_attention"] * 5, ["attention"], {}, {"no_op": True}, {"0": {"skip": ["mlp"]}},
    {"0": {"num_key_value_heads": 2}}, {"x": 1}, YARN, {"rope_type": "linear", "factor": 2.0}, {"rope_type": "default"},
    {"quant_method": "fp8"}, families.DECI_MOE,
]  # fmt: skip
# Keys that mean something somewhere: on a model that lacks them, or beside what contradicts them.
MODEL_KEYS = (
    "attention_bias", "attention_multiplier", "block_configs", "decoder_sparse_step", "dtype",
    "final_logit_softcapping", "head_dim", "hidden_act", "layer_types", "logit_scale", "max_window_layers", "mlp_bias",
    "mlp_only_layers", "norm_topk_prob", "num_experts", "num_key_value_heads", "num_local_experts",
    "original_max_position_embeddings", "partial_rotary_factor", "per_layer_config", "position_embedding_type",
    "quantization_config", "rope_parameters", "rope_scaling", "sliding_window", "surplus", "swiglu_limit",
    "tie_word_embeddings", "use_sliding_window",
)  # fmt: skip
LAYER_KEYS = (
    "ffn_mult", "head_dim", "intermediate_size", "kind", "mamba", "moe", "moe_intermediate_size", "n_heads_in_group",
    "no_op", "num_attention_heads", "num_experts", "num_key_value_heads", "num_local_experts", "num_sink_tokens",
    "parallel_blocks", "partial_rotary_factor", "replace_with_linear", "skip", "sliding_window", "surplus", "top_k",
    "type", "unshifted_sink", "window_length",
)  # fmt: skip


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in a JSON document, the document itself left out."""
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    found = [path] if path else []
    for key, child in children:
        found += places(child, (*path, key))
    return found


def mutate(config: dict[str, Any], rng: Random) -> tuple[dict[str, Any], str]:
    """One to three edits: replace, remove, nudge, add or repeat a value somewhere."""
    config, notes = copy.deepcopy(config), []
    for _ in range(rng.randint(1, 3)):
        path = rng.choice(places(config))
        parent: Any = config
        for key in path[:-1]:
            parent = parent[key]
        edit = rng.choice(("replace", "remove", "nudge", "add", "repeat"))
        if edit == "remove":
            del parent[path[-1]]
        elif edit == "add" and isinstance(parent, dict):
            path = (*path[:-1], rng.choice(MODEL_KEYS if parent is config else LAYER_KEYS))
            parent[path[-1]] = copy.deepcopy(rng.choice(VALUES))
        elif edit == "repeat" and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[path[-1]]))
        elif edit == "nudge":
            parent[path[-1]] = nudge(parent[path[-1]], rng)
        else:
            parent[path[-1]] = copy.deepcopy(rng.choice(VALUES))
        notes.append(f"{edit} {path}")
        if not config:
            break
    return config, "; ".join(notes)


def nudge(value: Any, rng: Random) -> Any:
    """A neighbour of a value: another sign, half, double, one more, the other truth, the same as text."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice((-value, value // 2, value * 2, value + 1, float(value), str(value)))
    if isinstance(value, float):
        return rng.choice((-value, value / 2, value * 2, str(value)))
    return value[:-1] if isinstance(value, str | list) else value


def serve_record(config: dict[str, Any]) -> ModelRecord:
    """The record that `serve` would start vLLM with; raises ConfigError where it refuses, as preflight.check does."""
    record = read_model(config)
    if is_ours(record):
        check_servable(record)
    check_transformers_agrees(config, record)
    return record
