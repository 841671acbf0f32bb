"""What one start of vLLM serves: the checkpoint's record, what of it is fused, and the record that is built."""

from __future__ import annotations

from dataclasses import dataclass

from vllm.config import VllmConfig
from vllm_puzzle.model_configs.ffn_fusion import FusionPlan, fuse, parallel_ffns, requested_plan
from vllm_puzzle.model_configs.quantization_formats import quantization_entry
from vllm_puzzle.model_configs.schema import ModelRecord
from vllm_puzzle.serving.hf_config import model_record


@dataclass(frozen=True, slots=True)
class ServedModel:
    """`checkpoint` is what config.json describes and the tensors are held to; `record` is what is built of it.

    `requested` is the part of `plan` that was asked for, and changes what the model computes; the rest are parallel
    blocks that compute the same as one FFN.
    """

    checkpoint: ModelRecord
    requested: FusionPlan
    plan: FusionPlan

    @property
    def record(self) -> ModelRecord:
        """The fused record."""
        return fuse(self.checkpoint, self.plan)


def served_model(vllm_config: VllmConfig) -> ServedModel:
    """Read it off vLLM's configuration; every process of a server finds the same. Raises ConfigError.

    Parallel FFNs stay apart where one FFN would not be exact: norms cannot be folded into quantized weights, and an
    adapter names each block's own matrices.
    """
    config = vllm_config.model_config.hf_config.to_dict()
    checkpoint = model_record(vllm_config.model_config.hf_config)
    requested = requested_plan(checkpoint, config)
    is_apart = vllm_config.lora_config is not None or bool(quantization_entry(config))
    parallel = FusionPlan() if is_apart else parallel_ffns(checkpoint)
    ffns = sorted((*requested.ffns, *parallel.ffns), key=lambda ffn: ffn.holder)
    return ServedModel(checkpoint, requested, FusionPlan(tuple(ffns)))
