"""Hugging Face configuration classes for heterogeneous checkpoints, so that no remote code is needed.

`nemotron-nas` has no class in transformers; `llama` has one, which vLLM's own model classes cannot read once
`per_layer_config` is there. A homogeneous Llama passes through unchanged and keeps vLLM's class and speed.
"""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig, PreTrainedConfig
from vllm_puzzle.model_configs.formats import read_model
from vllm_puzzle.model_configs.schema import ModelRecord

PUZZLE_ARCHITECTURE = "PuzzleForCausalLM"


@strict
class NemotronNasConfig(LlamaConfig):
    """DeciLM / nemotron-nas: Llama's fields and one entry of `block_configs` per layer, kept as plain data."""

    model_type = "nemotron-nas"

    block_configs: list[Any] | None = None
    num_key_value_heads: int | None = None
    intermediate_size: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Check the blocks at once, so that a bad config stops before any engine starts."""
        super().__post_init__(**kwargs)
        if self.block_configs is not None:  # transformers builds one with no arguments to compare defaults
            model_record(self)


@strict
class PuzzleLlamaConfig(LlamaConfig):
    """Llama that may carry `per_layer_config`; only then is the architecture ours."""

    model_type = "llama"

    def __post_init__(self, per_layer_config: Any = None, sliding_window: int | None = None, **kwargs: Any) -> None:
        """Spread a global window over the layers: vLLM would put a global value on every layer (CacheConfig)."""
        if per_layer_config and sliding_window is not None:
            by_index = {int(index): override for index, override in per_layer_config.items()}
            per_layer_config = {
                index: {"sliding_window": sliding_window, **by_index.get(index, {})}
                for index in range(self.num_hidden_layers)
            }
            sliding_window = None
        self.sliding_window = sliding_window
        super().__post_init__(per_layer_config=per_layer_config, **kwargs)
        if per_layer_config:
            # vLLM reads some of these globally; our classes read them from the records only.
            self.allow_global_per_layer_attribute_access = True
            if model_record(self).is_heterogeneous:
                self.architectures = [PUZZLE_ARCHITECTURE]


def model_record(config: PreTrainedConfig) -> ModelRecord:
    """The per-layer records of a configuration that one of these classes holds."""
    return read_model(config.to_dict())
