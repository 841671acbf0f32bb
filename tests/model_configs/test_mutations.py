"""Random edits of valid configurations: each is read into a sound record or refused in one line; never a traceback."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from random import Random
from typing import Any

import pytest
from vllm_puzzle.model_configs.formats import read_model
from vllm_puzzle.model_configs.inspect_model import describe, format_table
from vllm_puzzle.model_configs.schema import (
    Attention,
    ConfigError,
    GatedFFN,
    LinearMap,
    Mamba2,
    ModelRecord,
    MoE,
    PlainFFN,
)
from vllm_puzzle.model_configs.tensors import model_tensors

NUM_EDITS = 1500  # per configuration; `python tests/model_configs/test_mutations.py 100000` runs more
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 3, 7, 2**40, 1.5, -0.5, float("nan"), float("inf"), "", "8", "linear", [], [1], [None],
    {}, {"no_op": True}, {"0": {"skip": ["mlp"]}}, {"x": 1},
]  # fmt: skip


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in a JSON document, the document itself left out."""
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    found = [path] if path else []
    for key, child in children:
        found += places(child, (*path, key))
    return found


def mutate(config: dict[str, Any], rng: Random) -> tuple[dict[str, Any], str]:
    """One to three edits: replace, remove, add or repeat a value somewhere."""
    config, notes = copy.deepcopy(config), []
    for _ in range(rng.randint(1, 3)):
        path = rng.choice(places(config))
        parent: Any = config
        for key in path[:-1]:
            parent = parent[key]
        edit = rng.choice(("replace", "remove", "add", "repeat"))
        if edit == "remove":
            del parent[path[-1]]
        elif edit == "add" and isinstance(parent, dict):
            parent[rng.choice(("surplus", "moe", "window_length", "skip"))] = rng.choice(VALUES)
        elif edit == "repeat" and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[path[-1]]))
        else:
            parent[path[-1]] = copy.deepcopy(rng.choice(VALUES))
        notes.append(f"{edit} {path}")
        if not config:
            break
    return config, "; ".join(notes)


def assert_sound(record: ModelRecord) -> None:
    """Every size is a positive integer that fits its neighbours, so that the record can be built."""
    for layer in record.layers:
        if isinstance(layer.attention, Attention):
            assert layer.attention.num_heads % layer.attention.num_kv_heads == 0
            assert layer.attention.head_dim % 2 == 0
            assert layer.attention.sliding_window is None or layer.attention.sliding_window > 0
        else:
            assert isinstance(layer.attention, Mamba2 | LinearMap | None)
        assert isinstance(layer.ffn, GatedFFN | PlainFFN | MoE | LinearMap | None)
    for name, shape in model_tensors(record).items():
        assert all(type(size) is int and size > 0 for size in shape), name
    assert record.rms_norm_eps > 0
    assert record.rope.rope_theta > 0
    assert format_table(record)
    json.dumps(describe(record))


def check(config: dict[str, Any], rng: Random, num_edits: int) -> tuple[int, int]:
    """(accepted, refused) of `num_edits` random edits; raises on a traceback or an unsound record."""
    assert_sound(read_model(config))
    accepted = refused = 0
    for _ in range(num_edits):
        edited, note = mutate(config, rng)
        try:
            record = read_model(edited)
        except ConfigError as error:
            message = str(error)
            assert "found" in message, note
            assert "allowed" in message, note
            assert "\n" not in message, note
            refused += 1
            continue
        except Exception as error:
            raise AssertionError(f"{note}: {type(error).__name__}: {error}") from error
        try:
            assert_sound(record)
        except Exception as error:
            raise AssertionError(f"{note}: accepted an unsound record: {error!r}") from error
        accepted += 1
    return accepted, refused


def small_configs() -> dict[str, dict[str, Any]]:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "serving"))
    import checkpoints
    import families

    moe = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    gpt_oss = {
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    }
    mamba = {"mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 32, "n_groups": 2, "conv_kernel": 4}
    hybrid = mamba | {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "norm_eps": 1e-5}
    qwen = {"intermediate_size": 96, "num_key_value_heads": 2, "num_hidden_layers": 3}
    return {
        "deci": checkpoints.deci_config(checkpoints.ALL_KINDS),
        "per_layer_config": checkpoints.per_layer_config(),
        "anymodel": families.FAMILIES["anymodel"],
        "puzzletron v1": families.FAMILIES["puzzletron v1"],
        "gpt_oss": families.config("gpt_oss", "GptOssForCausalLM", **gpt_oss, num_hidden_layers=4),
        "nemotron_h": families.config(
            "nemotron_h", "X", **hybrid, num_hidden_layers=4, layers_block_type=["mamba", "mlp", "moe", "attention"]
        ),
        "qwen3_moe": checkpoints.BASE
        | qwen
        | moe
        | {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]},
    }


@pytest.mark.parametrize(
    "name", ["deci", "per_layer_config", "anymodel", "puzzletron v1", "qwen3_moe", "gpt_oss", "nemotron_h"]
)
def test_random_edits_are_refused_in_one_line_or_read_into_a_sound_record(name: str) -> None:
    accepted, refused = check(small_configs()[name], Random(f"mutations/{name}"), NUM_EDITS)
    # Both outcomes must occur often, or the edits test nothing.
    assert min(accepted, refused) > NUM_EDITS / 10


if __name__ == "__main__":
    for config_name, configuration in small_configs().items():
        print(config_name, check(configuration, Random(f"long/{config_name}"), int(sys.argv[1])))
