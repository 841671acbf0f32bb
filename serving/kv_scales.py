"""Calibrated scales of an FP8 KV cache that a checkpoint carries beside weights of any precision.

gpt-oss-puzzle stores one `k_scale` and one `v_scale` per attention, under one of three names; its `quantization_config`
(MXFP4 experts) says nothing of them, so vLLM makes no parameters to load them into.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod


class CheckpointKVScales(QuantizationConfig):
    """Gives each attention its scale parameters and leaves everything else to the model's own quantization."""

    def get_name(self) -> str:
        """vLLM's word for the scheme; none of its own, as only attention asks."""
        return "checkpoint_kv_scales"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Any."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """No GPU generation is too old; the attention backend decides."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Nothing to read."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> CheckpointKVScales:
        """Has no settings."""
        return cls()

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> BaseKVCacheMethod | None:
        """vLLM's own method for attention, which makes, loads and applies the scales."""
        return BaseKVCacheMethod(self) if isinstance(layer, Attention) else None


def kv_cache_quant_config(config: VllmConfig) -> QuantizationConfig | None:
    """What an attention layer gets as `quant_config`: our scales where the cache is FP8 and the scheme has none."""
    own: QuantizationConfig | None = config.quant_config
    has_own_scales = own is not None and "mxfp4" not in own.get_name()
    if has_own_scales or not loads_kv_scales(config):
        return own
    return CheckpointKVScales()


def loads_kv_scales(config: VllmConfig) -> bool:
    """Whether scales in the checkpoint are used: the cache is FP8, and there is a checkpoint."""
    return str(config.cache_config.cache_dtype).startswith("fp8") and config.load_config.load_format != "dummy"
