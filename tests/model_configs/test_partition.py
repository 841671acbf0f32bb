"""Pipeline stages by cost: the largest is as small as any split can make it, and far below an equal layer count's."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from random import Random

import pytest
from vllm_puzzle.model_configs.formats import read_model
from vllm_puzzle.model_configs.partition import layer_bytes, split_costs, split_layers
from vllm_puzzle.model_configs.schema import ConfigError, ModelRecord


def stage_sums(costs: list[int], sizes: tuple[int, ...]) -> list[int]:
    edges = [0, *itertools.accumulate(sizes)]
    return [sum(costs[a:b]) for a, b in itertools.pairwise(edges)]


@pytest.mark.parametrize("seed", range(20))
def test_no_other_split_has_a_smaller_largest_stage(seed: int) -> None:
    rng = Random(seed)
    costs = [rng.choice((0, 1, 5, rng.randint(1, 100))) for _ in range(rng.randint(3, 9))]
    stages = rng.randint(1, len(costs))
    sizes = split_costs(costs, stages)
    assert sum(sizes) == len(costs)
    assert min(sizes) >= 1
    every = [
        tuple(b - a for a, b in itertools.pairwise((0, *cuts, len(costs))))
        for cuts in itertools.combinations(range(1, len(costs)), stages - 1)
    ]
    assert max(stage_sums(costs, sizes)) == min(max(stage_sums(costs, split)) for split in every)


def published(root: Path, name: str) -> ModelRecord:
    return read_model(json.loads((root / "model_configs" / "published" / name).read_text()))


@pytest.mark.parametrize(
    ("name", "stages", "share"),
    [
        ("llama-3.3-nemotron-super-49b-v1.json", 4, 0.73),
        ("llama-3.1-nemotron-ultra-253b-v1.json", 4, 0.70),
        ("llama-3.1-nemotron-ultra-253b-v1.json", 8, 0.64),
    ],
)
def test_the_largest_stage_of_the_published_models_shrinks(root: Path, name: str, stages: int, share: float) -> None:
    record = published(root, name)
    tokens = record.max_position_embeddings
    costs = [layer_bytes(record, layer, tokens) for layer in record.layers]
    matrix = 2 * record.vocab_size * record.hidden_size
    costs[0] += matrix
    costs[-1] += matrix
    # vLLM's own rule (distributed/utils.py, get_pp_indices): equal counts, the rest to the stages before the last.
    by_count = [len(costs) // stages] * stages
    for stage in range(len(costs) % stages):
        by_count[-2 - stage] += 1
    largest = max(stage_sums(costs, split_layers(record, stages)))
    assert largest <= share * max(stage_sums(costs, tuple(by_count)))


def test_more_stages_than_layers_are_refused(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"found 81, allowed: 1 to 80"):
        split_layers(published(root, "llama-3.3-nemotron-super-49b-v1.json"), 81)
