"""Any one tensor of any fixture dropped, renamed, misshapen or doubled: refused before the engine starts, by name."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from random import Random

import checkpoints
import families
import published
import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm_puzzle.model_configs.formats import read_model
from vllm_puzzle.model_configs.schema import Shape
from vllm_puzzle.model_configs.tensors import model_tensors
from vllm_puzzle.serving.preflight import check, read_request
from vllm_puzzle.serving.weights import TensorAccount, WeightsError, place

FIXTURES = {"deci": checkpoints.deci_config(checkpoints.ALL_KINDS), **families.FAMILIES, **published.PUBLISHED}
# Of a deep fixture, all tensors of this many layers, and the trunk's.
NUM_LAYERS = 12
Pairs = list[tuple[str, Shape]]


def misshapen(shape: Shape) -> Shape:
    """The transposed shape. A vector or a square matrix looks the same then (no header can tell a transposed square
    matrix: the parity tests would), so it loses a row.
    """
    return shape[::-1] if shape[::-1] != shape else (shape[0] - 1, *shape[1:])


def edits(pairs: Pairs, name: str) -> dict[str, tuple[Pairs, str, str]]:
    """Per kind of fault: the checkpoint with it, the tensor that the complaint must name, and what it must say. The
    faulty tensor comes first: the order does not matter to the account, but it does to the time.
    """
    others, shape = [pair for pair in pairs if pair[0] != name], dict(pairs)[name]
    renamed = f"{name}_renamed"
    return {
        "dropped": (others, name, "found nothing in the checkpoint"),
        "renamed": ([(renamed, shape), *others], renamed, "found a tensor that the configuration has no place"),
        "misshapen": ([(name, misshapen(shape)), *others], name, f"found shape {misshapen(shape)}, allowed: {shape}"),
        "doubled": ([(name, shape), *pairs], name, "found twice"),
    }


def stored_dtype(name: str) -> str:
    return "U8" if name.endswith(("_blocks", "_scales")) else "BF16"


def chosen(names: Iterable[str], seed: str) -> list[str]:
    names, random = list(names), Random(seed)
    layers = sorted({name.split(".")[2] for name in names if ".layers." in name})
    some = set(random.sample(layers, min(NUM_LAYERS, len(layers))))
    return [name for name in names if ".layers." not in name or name.split(".")[2] in some]


@pytest.mark.parametrize("fixture", FIXTURES)
def test_any_one_faulty_tensor_is_refused_by_name(fixture: str) -> None:
    record = read_model(FIXTURES[fixture])
    pairs = list(model_tensors(record, as_stored=True).items())
    complete = TensorAccount(record)
    assert all(complete.see(*pair, stored_dtype(pair[0])) for pair in pairs)
    complete.close()
    for name in chosen(dict(pairs), fixture):
        for fault, (faulty, named, says) in edits(pairs, name).items():
            account = copy.copy(complete)
            account.missing = set(account.expected)
            with pytest.raises(WeightsError) as caught:
                for pair in faulty:
                    account.see(*pair, stored_dtype(pair[0]))
                account.close()
            assert f"{place(named)}: {says}" in str(caught.value), f"{fault} {name}"


@pytest.mark.parametrize("fixture", FIXTURES)
def test_serve_refuses_the_same_in_files(tmp_path: Path, fixture: str) -> None:
    checkpoints.write_checkpoint(tmp_path, FIXTURES[fixture])
    request = read_request([str(tmp_path), "--skip-tokenizer-init", "--port", "0"])
    assert check(request) is not None
    tensors = load_file(tmp_path / "model.safetensors")
    pairs = [(name, tuple(tensor.shape)) for name, tensor in tensors.items()]
    name = Random(fixture).choice(list(tensors))
    for fault, (faulty, named, says) in edits(pairs, name).items():
        # One file cannot hold a name twice; a second shard can.
        extra = {"extra": faulty.pop(0)} if fault == "doubled" else {}
        contents = {key: tensors.get(key, tensors[name]) for key, _ in faulty}
        if fault == "misshapen":
            contents[name] = torch.zeros(dict(faulty)[name], dtype=tensors[name].dtype)
        save_file({key: tensor.clone() for key, tensor in contents.items()}, tmp_path / "model.safetensors")
        for file, (key, _) in extra.items():
            save_file({key: tensors[key]}, tmp_path / f"{file}.safetensors")
        with pytest.raises(WeightsError) as caught:
            check(request)
        assert f"{place(named)}: {says}" in str(caught.value), f"{fault} {name}"
