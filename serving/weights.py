"""Account for every tensor of a checkpoint, both ways, while vLLM loads it.

vLLM 0.32 fills a layer whose tensors are missing with whatever memory holds (its check exempts unquantised linear
layers). Here a missing, surplus or wrongly shaped tensor stops the start, with layer and name.
The same check runs on the safetensors headers before the engine starts (`preflight.py`).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from typing import TypeVar

from vllm_puzzle.model_configs.quantization import (
    SCALAR,
    Quantization,
    Stored,
    fused_name,
    kv_scale_names,
    stored_tensors,
)
from vllm_puzzle.model_configs.schema import ConfigError, ModelRecord, Shape

logger = logging.getLogger("vllm.puzzle")
T = TypeVar("T")
# Recomputed from the config by every engine; old Llama exports carry it.
IGNORED = re.compile(r"\.rotary_emb\.inv_freq$")
MAX_NAMED = 5
DTYPE_NAMES = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3",
    "int8": "I8",
    "uint8": "U8",
    "int32": "I32",
    "int64": "I64",
}


class WeightsError(ConfigError):
    """A checkpoint whose tensors are not those the configuration implies."""


class TensorAccount:
    """Ticks tensors off against a model's table: each name once, with its shape and its element type.

    Of the FP8 KV-cache scales, in any published spelling, all must come or none: without them vLLM takes 1.0. They may
    come unannounced (gpt-oss-puzzle's quantization entry does not name them).
    """

    def __init__(self, record: ModelRecord, quantization: Quantization | None = None) -> None:
        self.record = record
        self.expected = stored_tensors(record, quantization)
        self.missing = set(self.expected)
        self.needs_scales = quantization is not None and quantization.has_kv_scales
        self.kv_scales = kv_scale_names(record)
        self.missing_scales = set(self.kv_scales.values())
        if quantization is not None and quantization.idle:
            logger.warning("%s", idle_entries(quantization))

    def see(self, name: str, shape: Shape, dtype: str) -> bool:
        """Tick one tensor off; False when it is to be ignored. `dtype` is in safetensors' words.

        Raises WeightsError for surplus, misshapen, repeated and wrongly typed ones.
        """
        if IGNORED.search(name) or (name == "lm_head.weight" and self.record.tie_word_embeddings):
            return False
        if self._is_idle_norm(name):
            logger.warning("%s: left out, as the layer skips the sub-block that it would norm", place(name))
            return False
        is_scale = name in self.kv_scales
        stored = Stored(SCALAR) if is_scale else self.expected.get(name)
        if stored is None:
            raise WeightsError(f"{place(name)}: found a tensor that the configuration has no place for, allowed: none")
        if tuple(shape) not in stored.shapes:
            allowed = " or ".join(str(allowed) for allowed in stored.shapes)
            raise WeightsError(f"{place(name)}: found shape {tuple(shape)}, allowed: {allowed}")
        if dtype not in stored.dtypes:
            raise WeightsError(f"{place(name)}: found dtype {dtype}, allowed: {', '.join(stored.dtypes)}")
        missing, key = (self.missing_scales, self.kv_scales[name]) if is_scale else (self.missing, name)
        if key not in missing:
            raise WeightsError(f"{place(name)}: found twice, allowed: once")
        missing.remove(key)
        return True

    def parameter_name(self, name: str) -> str:
        """vLLM's parameter for a KV-cache scale, whichever of its names the checkpoint uses; others are unchanged."""
        scale = self.kv_scales.get(name)
        return name if scale is None else scale.replace(".self_attn.", ".self_attn.attn.")

    def _is_idle_norm(self, name: str) -> bool:
        """Hugging Face's `skip` may leave the norm of a skipped sub-block in the file; DeciLM's no-op has none."""
        match = re.fullmatch(r"model\.layers\.(\d+)\.(input_layernorm|post_attention_layernorm)\.weight", name)
        if match is None or self.record.model_type == "nemotron-nas" or int(match[1]) >= len(self.record.layers):
            return False
        layer = self.record.layers[int(match[1])]
        return (layer.attention if match[2] == "input_layernorm" else layer.ffn) is None

    def close(self) -> None:
        """Raises WeightsError naming the tensors that never came."""
        if self.missing_scales != set(self.kv_scales.values()):
            self.missing |= self.missing_scales
        elif self.missing_scales and self.needs_scales:
            logger.warning("KV-cache scales: none in the checkpoint, 1.0 is used")
        if self.missing:
            names = sorted(self.missing, key=_natural)
            more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
            listed = "; ".join(place(name) for name in names[:MAX_NAMED])
            raise WeightsError(f"{listed}{more}: found nothing in the checkpoint, allowed: every tensor exactly once")

    def watch(self, weights: Iterable[tuple[str, T]]) -> Iterator[tuple[str, T]]:
        """Pass (name, tensor) pairs through, ticking each off; complains at the end about what is missing."""
        for name, tensor in weights:
            if self.see(name, tuple(tensor.shape), dtype_name(tensor.dtype)):  # type: ignore[attr-defined]
                yield name, tensor
        self.close()


def check_shared_scales(weights: Iterable[tuple[str, T]], quantization: Quantization | None) -> Iterator[tuple[str, T]]:
    """Pass (name, tensor) pairs through; WeightsError where an INT8 layer's shards have different static input scales.

    vLLM keeps one number for the fused layer, the one that comes last.
    """
    first: dict[str, tuple[str, float]] = {}
    for name, tensor in weights:
        module, _, part = name.rpartition(".")
        scheme = quantization.schemes.get(module) if quantization is not None else None
        if scheme is not None and scheme.weight_dtype == "I8" and part in scheme.scalars:
            value = float(tensor)  # type: ignore[arg-type]
            other, expected = first.setdefault(f"{fused_name(module)}.{part}", (name, value))
            if value != expected:
                raise WeightsError(f"{place(name)}: found {value:.6g}, allowed: {expected:.6g} as in {place(other)}")
        yield name, tensor


def idle_entries(quantization: Quantization) -> str:
    """One line about list entries without a module: normal where the parent's list came along with a no-op layer.

    It is safe to go on: every matrix of the checkpoint is held to what was decided for it, scales included.
    """
    listed = ", ".join(quantization.idle[:MAX_NAMED])
    return f"quantization: {len(quantization.idle)} list entries match no module of this model ({listed}, ...)"


def dtype_name(dtype: object) -> str:
    """safetensors' name of a torch dtype: torch.float8_e4m3fn → F8_E4M3."""
    name = str(dtype).removeprefix("torch.")
    return DTYPE_NAMES.get(name, name)


def place(name: str) -> str:
    """`model.layers.17.mlp.up_proj.weight` → `layer 17, tensor \\`mlp.up_proj.weight\\``."""
    match = re.match(r"model\.layers\.(\d+)\.(.+)", name)
    return f"layer {match[1]}, tensor `{match[2]}`" if match else f"tensor `{name}`"


def _natural(name: str) -> list[int | str]:
    return [f"{int(part):09d}" if part.isdigit() else part for part in re.split(r"(\d+)", name)]
