"""Random edits of valid configurations: each is read into a sound record or refused in one line; never a traceback."""

from __future__ import annotations

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

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "serving"))
import mutations

NUM_EDITS = 600  # per configuration; `python tests/model_configs/test_mutations.py 5000` runs more, and serves some


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


def outcome(config: dict[str, Any], is_served: bool) -> ModelRecord | None:
    """The record of an accepted configuration, None for one refused in a line; anything else raises."""
    try:
        record = mutations.serve_record(config) if is_served else read_model(config)
    except ConfigError as error:
        message = str(error)
        assert "found" in message
        assert "allowed" in message
        assert "\n" not in message
        return None
    assert_sound(record)
    return record


def check(config: dict[str, Any], rng: Random, num_edits: int, is_served: bool) -> tuple[int, int]:
    """(accepted, refused) of `num_edits` random edits; raises on a traceback or an unsound record.

    An accepted edit of a served format is one that transformers, through which vLLM reads it, reads as the same record.
    """
    assert outcome(config, is_served), "the unedited configuration is fine"
    accepted = 0
    for _ in range(num_edits):
        edited, note = mutations.mutate(config, rng)
        try:
            accepted += outcome(edited, is_served) is not None
        except Exception as error:
            raise AssertionError(f"{note}: {type(error).__name__}: {error}") from error
    return accepted, num_edits - accepted


def inspected() -> dict[str, dict[str, Any]]:
    """What is read for `inspect` only."""
    mamba = {"mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 32, "n_groups": 2, "conv_kernel": 4}
    hybrid = mamba | {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "norm_eps": 1e-5}
    kinds = ["mamba", "mlp", "moe", "attention"]
    config = mutations.families.config("nemotron_h", "X", **hybrid, num_hidden_layers=4, layers_block_type=kinds)
    return {"nemotron_h": config}


CONFIGS = mutations.FORMATS | inspected()


@pytest.mark.parametrize("name", CONFIGS)
def test_random_edits_are_refused_in_one_line_or_read_into_a_sound_record(name: str) -> None:
    accepted, refused = check(CONFIGS[name], Random(f"mutations/{name}"), NUM_EDITS, name in mutations.FORMATS)
    # Both outcomes must occur often, or the edits test nothing.
    assert min(accepted, refused) > NUM_EDITS / 20


if __name__ == "__main__":
    for config_name, configuration in CONFIGS.items():
        served = config_name in mutations.FORMATS
        counts = check(configuration, Random(f"long/{config_name}"), int(sys.argv[1]), served)
        print(f"{config_name}: {counts[0]} accepted, {counts[1]} refused", flush=True)
    import mutated_parity

    mutated_parity.main(1 + int(sys.argv[1]) // 150)
