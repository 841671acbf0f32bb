"""The pocket puzzle's first weights, cut out of the trained parent."""

from __future__ import annotations

from vllm_puzzle.bench.pocket_data import Batch
from vllm_puzzle.bench.pocket_decode import PocketModel
from vllm_puzzle.model_configs.schema import ModelRecord


def derive(parent: PocketModel, record: ModelRecord, sample: list[Batch]) -> PocketModel:
    """A model of `record` made from `parent`."""
    raise NotImplementedError
