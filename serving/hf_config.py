"""Hugging Face configuration classes for heterogeneous checkpoints, so that no remote code is needed.

`nemotron-nas` has no class in transformers; Llama, Mistral, Qwen2 and Qwen3 have one, but vLLM's model classes fail on
them once the layers differ. A homogeneous checkpoint passes through unchanged and keeps vLLM's class and speed.
"""

from __future__ import annotations

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig
from vllm_puzzle.model_configs.formats import global_window, read_model
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


class MaybeHeterogeneous:
    """Mixin for a family that transformers has: per-layer descriptions are kept, and then the architecture is ours."""

    model_type: ClassVar[str]
    architectures: Any
    num_hidden_layers: int

    def __post_init__(self, per_layer_config: Any = None, block_configs: Any = None, **kwargs: Any) -> None:
        """Set our fields around the family's own initialisation."""
        if block_configs is not None:
            self.block_configs = block_configs
        if per_layer_config:
            per_layer_config = self._spread_window(per_layer_config, kwargs)
        super().__post_init__(per_layer_config=per_layer_config, **kwargs)  # type: ignore[misc]
        is_any_model = self.architectures == ["AnyModel"]
        if not (per_layer_config or block_configs is not None or is_any_model):
            return
        if per_layer_config:
            # vLLM reads some of these globally; our classes read them from the records only.
            self.allow_global_per_layer_attribute_access = True
        if model_record(self).is_heterogeneous or is_any_model:
            self.architectures = [PUZZLE_ARCHITECTURE]

    def _spread_window(self, per_layer_config: Any, kwargs: dict[str, Any]) -> dict[int, Any]:
        """Give every layer its window by name: vLLM would put a global value on every layer (CacheConfig)."""
        fields = {**self.__dict__, **kwargs, "model_type": self.model_type}
        spread = {int(index): dict(override) for index, override in per_layer_config.items()}
        for index in range(self.num_hidden_layers):
            window = global_window(fields, index)
            if window is not None:
                spread.setdefault(index, {}).setdefault("sliding_window", window)
        self.sliding_window = None
        kwargs.pop("sliding_window", None)
        return spread


@strict
class PuzzleLlamaConfig(MaybeHeterogeneous, LlamaConfig):
    """Llama, possibly heterogeneous."""

    model_type = "llama"


@strict
class PuzzleMistralConfig(MaybeHeterogeneous, MistralConfig):
    """Mistral, possibly heterogeneous."""

    model_type = "mistral"


@strict
class PuzzleQwen2Config(MaybeHeterogeneous, Qwen2Config):
    """Qwen2, possibly heterogeneous."""

    model_type = "qwen2"


@strict
class PuzzleQwen3Config(MaybeHeterogeneous, Qwen3Config):
    """Qwen3, possibly heterogeneous."""

    model_type = "qwen3"


@strict
class PuzzleQwen3MoeConfig(MaybeHeterogeneous, Qwen3MoeConfig):
    """Qwen3-MoE: a heterogeneous one is refused by our class, where vLLM's would run skipped layers on no weights."""

    model_type = "qwen3_moe"


CONFIGS = (
    NemotronNasConfig,
    PuzzleLlamaConfig,
    PuzzleMistralConfig,
    PuzzleQwen2Config,
    PuzzleQwen3Config,
    PuzzleQwen3MoeConfig,
)


def model_record(config: PreTrainedConfig) -> ModelRecord:
    """The per-layer records of a configuration that one of these classes holds."""
    return read_model(config.to_dict())
