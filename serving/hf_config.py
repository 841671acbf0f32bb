"""Hugging Face configuration classes for heterogeneous checkpoints, so that no remote code is needed.

`nemotron-nas`, `gpt_oss_puzzle` and `nemotron_h_puzzle` have no class in transformers; Llama, Mistral, Qwen and gpt-oss
have one, but vLLM's model classes fail on them once the layers differ. A homogeneous checkpoint passes through
unchanged and keeps vLLM's class and speed.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import fields, replace
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import (
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    NemotronHConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)
from vllm_puzzle.model_configs.formats import BASE_ARCHITECTURES, read_model
from vllm_puzzle.model_configs.json_values import Json, refuse
from vllm_puzzle.model_configs.nemotron_h import block_types, check_same_kinds, shared_state_size
from vllm_puzzle.model_configs.per_layer import GPT_OSS, global_window
from vllm_puzzle.model_configs.schema import ConfigError, ModelRecord
from vllm_puzzle.serving.overrides import DISABLE_OVERRIDES, keeps_stock, say_once
from vllm_puzzle.serving.servable import OUR_ARCHITECTURES, is_ours

PUZZLE_ARCHITECTURE = "PuzzleForCausalLM"
# A name of its own: vLLM sets gpt-oss's defaults (parser, quantization, graph sizes) by architecture.
GPT_OSS_ARCHITECTURE = "GptOssPuzzleForCausalLM"
STOCK_ARCHITECTURES = frozenset(BASE_ARCHITECTURES.values())


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
        if not (per_layer_config or block_configs is not None or self.architectures == ["AnyModel"]):
            return
        if per_layer_config:
            # vLLM reads some of these globally; our classes read them from the records only.
            self.allow_global_per_layer_attribute_access = True
        self._take_over(is_described=True)

    def _take_over(self, is_described: bool = False) -> None:
        """Name our class where the records need it: also for a window that only the layers' descriptions hold."""
        try:
            record = model_record(self)
        except ConfigError:
            if is_described:
                raise
            return  # a homogeneous model with something of its own: vLLM's class knows
        has_windows = any(attention.sliding_window is not None for attention in record.attentions)
        if not (is_ours(record) or (is_described and has_windows)):
            return
        ours = GPT_OSS_ARCHITECTURE if self.model_type in GPT_OSS else PUZZLE_ARCHITECTURE
        stated = next(iter(self.architectures or []), None)
        if stated in STOCK_ARCHITECTURES:
            if keeps_stock():
                say_once(logging.WARNING, f"layers differ, but {DISABLE_OVERRIDES} keeps vLLM's {stated}")
                return
            say_once(logging.INFO, f"layers differ: {ours} serves them in place of vLLM's {stated}")
        self.architectures = [ours]

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
    """Qwen3-MoE, possibly heterogeneous."""

    model_type = "qwen3_moe"


@strict
class PuzzleGptOssConfig(MaybeHeterogeneous, GptOssConfig):
    """gpt-oss, possibly heterogeneous; ours too where `layer_types` is not every other layer, which vLLM assumes."""

    model_type = "gpt_oss"

    def __post_init__(self, **kwargs: Any) -> None:
        """Read what transformers reads, then see whose class fits."""
        given = {**(_rope(self) or {}), **(kwargs.get("rope_scaling") or {})}
        super().__post_init__(**kwargs)
        if given:  # transformers lets its default win over an older file's `rope_scaling`
            self.rope_parameters = {**(_rope(self) or {}), **given}
        if self.model_type == "gpt_oss" and not hasattr(self, "block_configs"):
            self._take_over()  # for `layer_types`; what describes its layers was taken over already


@strict
class GptOssPuzzleConfig(PuzzleGptOssConfig):
    """gpt-oss-puzzle: a gpt-oss whose `block_configs` give each layer its window and its expert count.

    To vLLM it is a `gpt_oss`: that name switches its Harmony rendering, its parsers and its MXFP4 experts on.
    """

    model_type = "gpt_oss_puzzle"

    def __post_init__(self, block_configs: Any = None, **kwargs: Any) -> None:
        """Refuse a missing rope scaling, which transformers would fill with gpt-oss's own."""
        if block_configs is not None and not (_rope(self) or kwargs.get("rope_scaling")):
            raise ConfigError(
                "model, key `rope_scaling`: found nothing, allowed: the YaRN parameters (gpt-oss-puzzle changed the "
                "factor, so gpt-oss's is no default)"
            )
        super().__post_init__(block_configs=block_configs, **kwargs)
        object.__setattr__(self, "model_type", "gpt_oss")


@strict
class NemotronHPuzzleConfig(NemotronHConfig):
    """Nemotron Puzzle (75B-A9B): a NemotronH whose `block_configs` hold each layer's sizes. vLLM's class serves it; it
    asks this class for the view of one layer, the multi-token-prediction layers counted on from the last.
    """

    model_type = "nemotron_h_puzzle"

    block_configs: list[Any] | None = None
    mtp_block_configs: list[Any] | None = None
    mtp_n_routed_experts: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Derive what the file leaves to its blocks: the layers' kinds, and the model's sizes (the largest)."""
        blocks, predicting, fields = self.block_configs, self.mtp_block_configs, vars(self)
        if blocks is not None:
            check_same_kinds({"layers_block_type": fields["layers_block_type"], **kwargs}, blocks)
            self.layers_block_type = block_types(blocks, "layer")
        if predicting:
            self.mtp_layers_block_type = block_types(predicting, "mtp layer")
            kwargs.pop("mtp_hybrid_override_pattern", None)
        super().__post_init__(**kwargs)
        if predicting and self.mtp_n_routed_experts is None:
            self.mtp_n_routed_experts = max((block.get("n_routed_experts") or 0 for block in predicting), default=0)
        if blocks is not None:
            model_record(self)  # a bad block stops here, before any engine starts
            for key in ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size"):
                found = [block[key] for block in blocks if block.get(key) is not None]
                setattr(self, key, max(found, default=getattr(self, key)))
            self.ssm_state_size = shared_state_size(blocks, fields["ssm_state_size"])

    def get_nemotron_h_config_for_layer(self, layer_idx: int) -> NemotronHPuzzleConfig:
        """This configuration with the sizes of layer `layer_idx` in place of the model's."""
        blocks, view = self.block_configs or [], copy.copy(self)
        if layer_idx >= len(blocks):
            blocks, layer_idx = self.mtp_block_configs or [], layer_idx - len(blocks)
            if not blocks:
                raise ConfigError(
                    "model, key `mtp_block_configs`: found nothing, allowed: a list of objects (multi-token prediction)"
                )
        for key, value in blocks[layer_idx % len(blocks)].items():
            if key != "block_type" and value is not None:
                setattr(view, key, value)
        return view


CONFIGS = (
    NemotronNasConfig,
    PuzzleLlamaConfig,
    PuzzleMistralConfig,
    PuzzleQwen2Config,
    PuzzleQwen3Config,
    PuzzleQwen3MoeConfig,
    PuzzleGptOssConfig,
    GptOssPuzzleConfig,
    NemotronHPuzzleConfig,
)


def _rope(config: PreTrainedConfig) -> dict[str, Any] | None:
    rope: dict[str, Any] | None = config.rope_parameters
    return rope


def model_record(config: PreTrainedConfig) -> ModelRecord:
    """The per-layer records of a configuration that one of these classes holds."""
    return read_model(config.to_dict())


def check_transformers_agrees(config: Json, record: ModelRecord) -> None:
    """Raise ConfigError when transformers, through which vLLM reads config.json, refuses it or reads another model.

    transformers checks types more strictly than `read_model`, fills defaults in and rewrites keys; vLLM would show its
    complaint as a traceback, and serve what it rewrote.
    """
    config_class = next(c for c in CONFIGS if c.model_type == record.model_type)
    try:
        held = config_class.from_dict(copy.deepcopy(dict(config)))
        found = model_record(held)
    except ConfigError:
        raise
    except Exception as error:  # whatever its validators raise
        text = " ".join(str(error).split())
        raise ConfigError(f"config.json: found {text!r}, allowed: what {config_class.__name__} accepts") from None
    ours, theirs = _computed(record), _computed(found)
    for field in fields(ours):
        mine, other = getattr(ours, field.name), getattr(theirs, field.name)
        if mine != other:
            place, mine, other = _first_difference(field.name, mine, other)
            raise ConfigError(f"config.json, {place}: found {mine!r}, allowed: as transformers reads it, {other!r}")
    architecture = next(iter(held.architectures or ()), None)
    if is_ours(record) and architecture not in OUR_ARCHITECTURES and not keeps_stock():
        raise refuse("model", "architectures", architecture, " or ".join(OUR_ARCHITECTURES))


def _first_difference(name: str, ours: Any, theirs: Any) -> tuple[str, Any, Any]:
    """Of the layers, the first that differs."""
    if name != "layers" or len(ours) != len(theirs):
        return name, ours, theirs
    return next((f"layer {i}", a, b) for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)


def _computed(record: ModelRecord) -> ModelRecord:
    """The record without the names, which a configuration class may change."""
    return replace(record, architecture="", model_type="")
