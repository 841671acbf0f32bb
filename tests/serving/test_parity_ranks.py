"""vLLM over two ranks gives the reference's log-probabilities: tensor parallelism, stages without attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import checkpoints
import families
import published
import pytest
from parity import Jobs, assert_equal_to
from vllm_puzzle.model_configs.partition import split_layers
from vllm_puzzle.serving.reference_model import ReferenceModel

pytestmark = pytest.mark.slow

EMPTY = checkpoints.deci_block(None, None)
FIRST_STAGES = {"attention-free": [checkpoints.deci_block(None, 48), EMPTY], "empty": [EMPTY, EMPTY]}
CONFIGS: dict[str, dict[str, Any]] = {
    "deci": checkpoints.deci_config(checkpoints.ALL_KINDS),
    "qwen3_moe": families.FAMILIES["qwen3_moe"],
    "gpt-oss-puzzle 88b": published.PUBLISHED["gpt-oss-puzzle 88b"],
} | {
    kind: checkpoints.deci_config([*blocks, *checkpoints.ALL_KINDS[2:4]])
    for kind, blocks in FIRST_STAGES.items()
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def references(folder: Path) -> dict[str, ReferenceModel]:
    return {name: checkpoints.write_checkpoint(folder / name, config) for name, config in CONFIGS.items()}


@pytest.fixture(scope="module")
def outcomes(folder: Path, references: dict[str, ReferenceModel]) -> dict[str, Any]:
    """All runs whose ranks may be forked from one process; a spawned one is in the first test."""
    jobs = Jobs(folder)
    jobs.environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    for name in ("qwen3_moe", "gpt-oss-puzzle 88b"):
        jobs.add(f"{name} tensor", folder / name, {"tensor_parallel_size": 2}, fork=True)
    for kind in FIRST_STAGES:
        own = {"VLLM_PP_LAYER_PARTITION": "2,2"}
        jobs.add(kind, folder / kind, {"pipeline_parallel_size": 2}, fork=True, environment=own)
    jobs.add("by cost", folder / "deci", {"pipeline_parallel_size": 2}, fork=True)
    return jobs.run()


def test_tensor_parallelism_over_two_processes(folder: Path, references: dict[str, ReferenceModel]) -> None:
    """Spawned, as vLLM does on CPU: each worker imports vLLM and loads the plugins itself."""
    jobs = Jobs(folder)
    jobs.add("tensor", folder / "deci", {"tensor_parallel_size": 2})
    assert_equal_to(references["deci"], jobs.run()["tensor"])


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt-oss-puzzle 88b"])
def test_experts_of_every_count_split_over_two_ranks(
    references: dict[str, ReferenceModel], outcomes: dict[str, Any], name: str
) -> None:
    assert_equal_to(references[name], outcomes[f"{name} tensor"])


@pytest.mark.parametrize("kind", FIRST_STAGES)
def test_pipeline_parallelism_with_a_first_stage_without_attention(
    references: dict[str, ReferenceModel], outcomes: dict[str, Any], kind: str
) -> None:
    assert_equal_to(references[kind], outcomes[kind])


def test_pipeline_parallelism_cut_by_cost(references: dict[str, ReferenceModel], outcomes: dict[str, Any]) -> None:
    record = references["deci"].record
    assert split_layers(record, 2) != (5, 5), "by count the split would be the same, and this would show nothing"
    assert_equal_to(references["deci"], outcomes["by cost"])
