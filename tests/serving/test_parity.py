"""vLLM's log-probabilities equal the plain-PyTorch reference's: every block kind, family and published layer list.

One rank, all runs in one process; parallel ranks are in test_parity_ranks.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import checkpoints
import families
import published
import pytest
from parity import PROMPTS, Jobs, assert_as_accurate_in_bfloat16, assert_equal_to
from safetensors.torch import load_file, save_file
from vllm_puzzle.serving.reference_model import ReferenceModel

pytestmark = pytest.mark.slow

# vLLM computes MXFP4 in bfloat16 only.
MXFP4 = "gpt-oss-puzzle 88b mxfp4"
# Prompt log-probabilities switch the prefix cache off, so only the generated positions are compared.
CHUNKS = {"max_num_batched_tokens": 32, "block_size": 32, "enable_prefix_caching": True}
# DeciLM's windows, three cache groups (two windows and none) over experts, experts of other counts per layer.
CHUNKED = ("deci", "gpt-oss-puzzle 88b", "qwen3_moe")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parity")


@pytest.fixture(scope="module")
def deci(folder: Path) -> ReferenceModel:
    """A DeciLM checkpoint with every block kind, in `folder / "deci"`."""
    return checkpoints.write_checkpoint(folder / "deci", checkpoints.deci_config(checkpoints.ALL_KINDS))


@pytest.fixture(scope="module")
def references(folder: Path, deci: ReferenceModel) -> dict[str, ReferenceModel]:
    configs = families.FAMILIES | published.PUBLISHED
    return {"deci": deci} | {name: checkpoints.write_checkpoint(folder / name, c) for name, c in configs.items()}


@pytest.fixture(scope="module")
def merged(folder: Path, deci: ReferenceModel) -> ReferenceModel:
    """The DeciLM model with the LoRA adapter in `folder / "adapter"` merged in."""
    model = ReferenceModel(deci.record)
    model.load_tensors(deci.named_tensors())
    (folder / "adapter").mkdir()
    checkpoints.write_adapter(folder / "adapter", model, rank=4)
    return model


@pytest.fixture(scope="module")
def outcomes(folder: Path, references: dict[str, ReferenceModel], merged: ReferenceModel) -> dict[str, Any]:
    """All runs that need one rank, in one process."""
    jobs, model = Jobs(folder), folder / "deci"
    jobs.add("mixed", model)
    for name in CHUNKED:
        jobs.add(f"{name} chunked", folder / name, CHUNKS, rounds=[PROMPTS, [PROMPTS[-1]]], prompt_logprobs=None)
    # The dynamo trace is what differs between block kinds; generating C++ from it takes minutes and is torch's own.
    jobs.add("compiled", model, {"enforce_eager": False, "compilation_config": {"backend": "eager"}})
    jobs.add("bfloat16", model, {"dtype": "bfloat16"})
    # Without prompt log-probabilities: vLLM 0.32's LoRA logits on CPU fail on them, with any model.
    lora = {"enable_lora": True, "max_lora_rank": 8}
    jobs.add("lora", model, lora, adapter=str(folder / "adapter"), prompt_logprobs=None)
    for name in families.FAMILIES | published.PUBLISHED:
        jobs.add(name, folder / name, {"dtype": "bfloat16"} if name == MXFP4 else {})
    checkpoints.write_checkpoint(folder / "incomplete", checkpoints.deci_config(checkpoints.ALL_KINDS[:3]))
    tensors = load_file(folder / "incomplete" / "model.safetensors")
    del tensors["model.layers.2.self_attn.o_proj.weight"]  # the one that vLLM 0.32's own check lets pass
    save_file(tensors, folder / "incomplete" / "model.safetensors")
    jobs.add("incomplete", folder / "incomplete")
    return jobs.run()


def test_every_deci_block_kind_in_a_batch_of_mixed_lengths(deci: ReferenceModel, outcomes: dict[str, Any]) -> None:
    assert_equal_to(deci, outcomes["mixed"])
    assert [len(result["ids"]) for result in outcomes["mixed"]] == [len(prompt) + 9 for prompt in PROMPTS]


@pytest.mark.parametrize("name", CHUNKED)
def test_chunked_prefill_and_a_prefix_cache_hit(
    references: dict[str, ReferenceModel], outcomes: dict[str, Any], name: str
) -> None:
    results = outcomes[f"{name} chunked"]
    assert_equal_to(references[name], results)
    assert results[-1]["num_cached"] >= 64, "the second round must reuse blocks, else this shows nothing"


def test_torch_compile_gives_the_same(deci: ReferenceModel, outcomes: dict[str, Any]) -> None:
    assert_equal_to(deci, outcomes["compiled"])


def test_a_lora_adapter_equals_the_merged_weights(
    deci: ReferenceModel, merged: ReferenceModel, outcomes: dict[str, Any]
) -> None:
    assert_equal_to(merged, outcomes["lora"])
    with pytest.raises(AssertionError, match="error"):
        assert_equal_to(deci, outcomes["lora"])


@pytest.mark.parametrize("name", families.FAMILIES)
def test_each_family_and_spelling(references: dict[str, ReferenceModel], outcomes: dict[str, Any], name: str) -> None:
    assert_equal_to(references[name], outcomes[name])


@pytest.mark.parametrize("name", [name for name in published.PUBLISHED if name != MXFP4])
def test_each_published_layer_list(references: dict[str, ReferenceModel], outcomes: dict[str, Any], name: str) -> None:
    assert_equal_to(references[name], outcomes[name])


def test_mxfp4_experts_are_as_accurate_as_plain_pytorch_in_bfloat16(
    references: dict[str, ReferenceModel], outcomes: dict[str, Any]
) -> None:
    assert_as_accurate_in_bfloat16(references[MXFP4], outcomes[MXFP4])


def test_vllms_own_loader_stops_at_a_missing_tensor_with_layer_and_name(outcomes: dict[str, Any]) -> None:
    assert "layer 2, tensor `self_attn.o_proj.weight`: found nothing in the checkpoint" in outcomes["incomplete"]


def test_bfloat16_is_as_accurate_as_plain_pytorch_in_bfloat16(deci: ReferenceModel, outcomes: dict[str, Any]) -> None:
    assert_as_accurate_in_bfloat16(deci, outcomes["bfloat16"])
