"""Tell vLLM to cut the pipeline by cost (`model_configs/partition.py`), through its own variable for the purpose."""

from __future__ import annotations

import logging
import os

from vllm_puzzle.model_configs.partition import split_layers
from vllm_puzzle.model_configs.schema import ModelRecord

PARTITION = "VLLM_PP_LAYER_PARTITION"
logger = logging.getLogger("vllm.puzzle")


def partition_by_cost(record: ModelRecord, num_stages: int) -> str | None:
    """The value for VLLM_PP_LAYER_PARTITION (`51,44,40,27`), or None when it is set already or there is one stage."""
    if num_stages == 1 or os.environ.get(PARTITION):
        return None
    return ",".join(map(str, split_layers(record, num_stages)))


def use_partition_by_cost(record: ModelRecord, num_stages: int) -> None:
    """Set it in a worker, before vLLM assigns the layers. Every worker computes the same."""
    partition = partition_by_cost(record, num_stages)
    if partition is not None:
        os.environ[PARTITION] = partition
        logger.info("pipeline stages by cost: %s layers (%s overrides)", partition, PARTITION)
