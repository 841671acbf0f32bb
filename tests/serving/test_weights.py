"""Weight accounting: every tensor of the table, each once, nothing else."""

from __future__ import annotations

import logging

import checkpoints
import pytest
import torch
from vllm_puzzle.model_configs.formats import read_model
from vllm_puzzle.model_configs.tensors import model_tensors
from vllm_puzzle.serving.weights import TensorAccount, WeightsError, place

RECORD = read_model(checkpoints.deci_config(checkpoints.ALL_KINDS))
TENSORS = {name: torch.empty(shape) for name, shape in model_tensors(RECORD).items()}


def load(tensors: dict[str, torch.Tensor]) -> list[str]:
    return [name for name, _ in TensorAccount(RECORD).watch(tensors.items())]


def test_a_complete_checkpoint_passes_through_whole() -> None:
    assert load(TENSORS) == list(TENSORS)


@pytest.mark.parametrize("name", TENSORS)
def test_each_missing_tensor_is_named_with_its_layer(name: str) -> None:
    with pytest.raises(WeightsError) as caught:
        load({key: value for key, value in TENSORS.items() if key != name})
    assert place(name) in str(caught.value)


def test_many_missing_tensors_are_counted_in_one_line() -> None:
    with pytest.raises(WeightsError, match=r"layer 1, .* and \d+ more: found nothing in the checkpoint") as caught:
        load({name: tensor for name, tensor in TENSORS.items() if not name.startswith("model.layers.")})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("model.layers.0.input_layernorm.weight", "layer 0, tensor `input_layernorm.weight`"),
        ("model.layers.6.self_attn.q_proj.weight", "layer 6, tensor `self_attn.q_proj.weight`"),
        ("model.layers.2.self_attn.q_scale", "layer 2, tensor `self_attn.q_scale`"),
        ("visual.patch.weight", "tensor `visual.patch.weight`"),
    ],
)
def test_a_surplus_tensor_is_refused(name: str, where: str) -> None:
    with pytest.raises(WeightsError, match="no place for") as caught:
        load({**TENSORS, name: torch.empty(1)})
    assert where in str(caught.value)


def test_a_wrong_shape_is_refused_with_both_shapes() -> None:
    wrong = {**TENSORS, "model.layers.1.mlp.up_proj.weight": torch.empty(47, 64)}
    with pytest.raises(WeightsError, match=r"layer 1, .*found shape \(47, 64\), allowed: \(48, 64\)"):
        load(wrong)


def test_a_tensor_that_comes_twice_is_refused() -> None:
    with pytest.raises(WeightsError, match="found twice"):
        list(TensorAccount(RECORD).watch([*TENSORS.items(), ("model.norm.weight", torch.empty(64))]))


def test_rotary_buffers_of_old_exports_are_left_out() -> None:
    assert "rotary" not in " ".join(load({**TENSORS, "model.layers.2.self_attn.rotary_emb.inv_freq": torch.empty(16)}))


def test_the_norm_of_a_skipped_sub_block_is_left_out_aloud_where_hugging_face_may_keep_it(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)  # vLLM switches it off, and caplog with it
    record = read_model(checkpoints.per_layer_config())
    tensors = {name: torch.empty(shape) for name, shape in model_tensors(record).items()}
    idle = "model.layers.0.input_layernorm.weight"
    with caplog.at_level("WARNING", logger="vllm.puzzle"):
        loaded = [name for name, _ in TensorAccount(record).watch([*tensors.items(), (idle, torch.ones(64))])]
    assert loaded == list(tensors)
    assert "layer 0, tensor `input_layernorm.weight`: left out" in caplog.text
    for surplus in ("model.layers.0.self_attn.q_proj.weight", "model.layers.9.input_layernorm.weight"):
        with pytest.raises(WeightsError, match="no place for"):
            list(TensorAccount(record).watch([*tensors.items(), (surplus, torch.ones(64))]))
