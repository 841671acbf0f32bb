"""The dependency matrix: equal to its definition, zero where nothing can depend, and the checkpoint under it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import checkpoints
import families
import pytest
import quantized_checkpoints
import torch
from safetensors.torch import save_file
from vllm_puzzle.model_configs.formats import read_model
from vllm_puzzle.model_configs.json_values import read_object
from vllm_puzzle.model_configs.quantization import Scheme
from vllm_puzzle.model_configs.schema import ConfigError
from vllm_puzzle.serving.fuse.checkpoint import CheckpointTensors, LayerwiseModel, dequantize
from vllm_puzzle.serving.fuse.dependency import cosine_distance, dependency_matrix
from vllm_puzzle.serving.reference_model import ReferenceModel

# Lengths that need padding, one of them a single token.
SEQUENCES = [[(7 * i + 3 * n) % 97 for i in range(n)] for n in (1, 5, 23, 40)]
MODELS: dict[str, dict[str, Any]] = {
    "deci, every block kind": checkpoints.deci_config(checkpoints.ALL_KINDS),
    "deci wide": families.FAMILIES["deci wide"],
    "llama, per_layer_config": checkpoints.per_layer_config(),
    "qwen3_moe": families.FAMILIES["qwen3_moe"],
    "gpt_oss, mxfp4": families.FAMILIES["gpt_oss"] | {"quantization_config": {"quant_method": "mxfp4"}},
    "sink tokens": families.UNSERVED["sink tokens"],
}


def open_model(folder: Path, dtype: torch.dtype = torch.float32) -> LayerwiseModel:
    config = read_object(folder / "config.json")
    record = read_model(config)
    return LayerwiseModel(record, CheckpointTensors(folder, record, config), dtype)


@torch.no_grad()
def slow_matrix(model: ReferenceModel) -> list[list[float | None]]:
    """The definition word for word: one whole forward pass per removed block and sequence."""
    count = len(model.record.layers)

    def contributions(ids: torch.Tensor, removed: int | None) -> list[torch.Tensor]:
        hidden, found = model.embed(ids), []
        for index in range(count):
            after = hidden if index == removed else model.layer(index, hidden)
            found.append(after - hidden)
            hidden = after
        return found

    totals = torch.zeros(count, count, dtype=torch.float64)
    for sequence in SEQUENCES:
        ids = torch.tensor(sequence)
        whole = contributions(ids, None)
        for i in range(count):
            without = contributions(ids, i)
            for j in range(i + 1, count):
                similarity = torch.cosine_similarity(whole[j].double(), without[j].double(), dim=-1)
                totals[i, j] += (1 - similarity).sum()
    means = (totals / sum(map(len, SEQUENCES))).tolist()
    live = [any(b.attention is not None or b.ffn is not None for b in layer.blocks) for layer in model.record.layers]
    return [[d if i < j and live[i] and live[j] else None for j, d in enumerate(row)] for i, row in enumerate(means)]


def greatest_difference(a: list[list[float | None]], b: list[list[float | None]]) -> float:
    assert [[d is None for d in row] for row in a] == [[d is None for d in row] for row in b]
    pairs = ((x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True))
    return max(abs(x - y) for x, y in pairs if x is not None and y is not None)


# Two summation orders of float32: after 10 layers of 8 steps over 128 terms a contribution is off by about
# 80 · sqrt(128) · 2^-24 = 5e-5 of its size, and a distance by at most twice that.
TOLERANCE = 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_the_matrix_equals_its_definition(tmp_path: Path, name: str) -> None:
    reference = checkpoints.write_checkpoint(tmp_path, MODELS[name])
    expected = slow_matrix(reference)
    found = dependency_matrix(open_model(tmp_path), SEQUENCES)
    assert greatest_difference(found, expected) < TOLERANCE
    distances = [d for row in found for d in row if d is not None]
    assert max(distances) > 0.05  # random blocks do depend on each other


def test_memory_bounds_change_nothing_but_the_batches(tmp_path: Path) -> None:
    checkpoints.write_checkpoint(tmp_path, MODELS["deci, every block kind"])
    model, calls = open_model(tmp_path), []
    whole = dependency_matrix(model, SEQUENCES, lambda done, total: calls.append((done, total)))
    assert calls == [(done, 9) for done in range(1, 10)]  # one batch, nine layers that are not empty
    calls.clear()
    tight = dependency_matrix(model, SEQUENCES, lambda done, total: calls.append((done, total)), 1, 1)
    assert calls == [(done, 36) for done in range(1, 37)]
    assert greatest_difference(whole, tight) < TOLERANCE


def test_bfloat16_gives_the_same_picture(tmp_path: Path) -> None:
    checkpoints.write_checkpoint(tmp_path, MODELS["deci, every block kind"])
    exact = dependency_matrix(open_model(tmp_path), SEQUENCES)
    rounded = dependency_matrix(open_model(tmp_path, torch.bfloat16), SEQUENCES)
    # 2^-8 in place of 2^-24 in the line above, of which the square root remains in sums of independent errors: < 0.1.
    assert 0 < greatest_difference(exact, rounded) < 0.1


def test_only_one_layer_is_in_memory(tmp_path: Path) -> None:
    checkpoints.write_checkpoint(tmp_path, MODELS["deci, every block kind"])
    model = open_model(tmp_path)
    names = model.layer_names()
    assert all(tensor.is_meta for tensor in model.named_tensors().values())
    with model.loaded(names[2]):
        assert [n for n, tensor in model.named_tensors().items() if not tensor.is_meta] == names[2]
    assert all(tensor.is_meta for tensor in model.named_tensors().values())


@pytest.fixture
def split_model(tmp_path: Path) -> Path:
    """Three linear maps: block 0 writes the upper half of the channels, which the embedding leaves zero; block 1 reads
    and writes the lower half; block 2 reads the upper half.
    """
    config = checkpoints.deci_config([checkpoints.deci_block("linear", None)] * 3)
    tensors = checkpoints.write_checkpoint(tmp_path, config).named_tensors()
    half = config["hidden_size"] // 2
    tensors["model.embed_tokens.weight"].data[:, half:] = 0
    for layer, (reads, writes) in enumerate([("lower", "upper"), ("lower", "lower"), ("upper", "upper")]):
        matrix = tensors[f"model.layers.{layer}.self_attn.linear_attn.weight"].data
        matrix[:, half:] = 0 if reads == "lower" else matrix[:, half:]
        matrix[:, :half] = 0 if reads == "upper" else matrix[:, :half]
        matrix[slice(0, half) if writes == "upper" else slice(half, None)] = 0
    save_file({name: tensor.detach().clone() for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    return tmp_path


def test_a_block_that_cannot_depend_on_another_has_distance_zero_and_one_that_lives_on_it_has_one(
    split_model: Path,
) -> None:
    matrix = dependency_matrix(open_model(split_model), SEQUENCES)
    # Removing block 0 only rescales what block 1 reads (the norm), which turns nothing: half the square of 2^-20.
    assert matrix[0][1] == pytest.approx(0, abs=1e-11)
    assert matrix[1][2] == pytest.approx(0, abs=1e-11)
    assert matrix[0][2] == 1.0


def test_cosine_distance_is_exact_near_zero_and_defined_at_zero() -> None:
    a = torch.tensor([[1.0, 0.0], [1.0, 0.0], [2.0, 0.0], [0.0, 0.0], [1.0, 0.0], [3.0, 0.0]])
    b = torch.tensor([[0.0, 5.0], [-2.0, 0.0], [1.0, 1e-4], [0.0, 0.0], [0.0, 0.0], [7.0, 0.0]])
    found = cosine_distance(a, b)
    # 1 − cos(1e-4) is 5e-9, which 1 − â·b̂ in float32 would give as 0 or 6e-8.
    assert found.tolist() == pytest.approx([1.0, 2.0, 5e-9, 0.0, 1.0, 0.0], rel=1e-4, abs=1e-15)


@pytest.mark.parametrize("kind", ["fp8 dynamic", "fp8 weights", "modelopt mixed", "modelopt fp8", "int8 dynamic"])
def test_quantized_weights_are_read_as_what_they_mean(tmp_path: Path, kind: str) -> None:
    model = quantized_checkpoints.write(tmp_path / "model", kind)
    config = read_object(tmp_path / "model" / "config.json")
    record = read_model(config)
    checkpoint = CheckpointTensors(tmp_path / "model", record, config)
    num_checked = 0
    for name, tensor in model.named_tensors().items():
        layout = model.layouts.get(name.removesuffix(".weight"))
        if layout is None:
            torch.testing.assert_close(checkpoint.read(name).float(), tensor.detach())
        elif not any(part in name for part in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")):
            # (vLLM holds those five with one scale where they are per tensor, which `meant` follows.)
            torch.testing.assert_close(checkpoint.read(name), layout.meant, rtol=2**-20, atol=0)
            num_checked += 1
    assert num_checked >= 3


@pytest.mark.parametrize("kind", ["int4 weights", "modelopt mixed nvfp4"])
def test_packed_weights_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    quantized_checkpoints.write(tmp_path / "model", kind)
    with pytest.raises(ConfigError, match=r"layer \d+, tensor `.*: found .*(INT4|NVFP4).*, allowed: unquantized, FP8"):
        open_model(tmp_path / "model")


@pytest.mark.parametrize("layout", ["block", "block4d"])
def test_block_scales_cover_sizes_that_are_no_multiple_of_the_block(layout: str) -> None:
    weight = torch.randint(-127, 128, (300, 130), dtype=torch.int8)
    scale = torch.rand(3, 2)
    stored = scale if layout == "block" else scale.reshape(3, 1, 2, 1)
    found = dequantize(weight, stored, Scheme("blocks", "I8", layout, group_size=128))
    expected = torch.tensor(
        [[float(weight[r, c]) * float(scale[r // 128, c // 128]) for c in range(130)] for r in range(300)]
    )
    torch.testing.assert_close(found, expected)
