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

from vllm_puzzle.model_configs.schema import ConfigError, ModelRecord, Shape
from vllm_puzzle.model_configs.tensors import model_tensors

logger = logging.getLogger("vllm.puzzle")
T = TypeVar("T")
# Recomputed from the config by every engine; old Llama exports carry it.
IGNORED = re.compile(r"\.rotary_emb\.inv_freq$")
MAX_NAMED = 5
# Scales of an FP8 KV cache, under the three names that published checkpoints use; canonical: self_attn.attn.k_scale.
KV_SCALE = re.compile(r"(?P<owner>model\.layers\.\d+\..*?self_attn)\.(?:attn\.|k_proj\.|v_proj\.)?(?P<of>[kv])_scale$")


class WeightsError(ConfigError):
    """A checkpoint whose tensors are not those the configuration implies."""


class TensorAccount:
    """Ticks tensors off against a model's table; `quantized` checkpoints are held to module names only,
    because each scheme stores its own tensors per module (scales, packed weights).
    """

    def __init__(self, record: ModelRecord, quantized: bool = False) -> None:
        self.record = record
        self.quantized = quantized and not record.is_mxfp4
        self.expected = model_tensors(record, as_stored=True)
        self.scales: set[str] = set()
        self.missing = set(self.expected)
        self.modules = {name.rpartition(".")[0] for name in self.expected}

    def see(self, name: str, shape: Shape) -> bool:
        """Tick one tensor off; False when it is to be ignored. Raises WeightsError for surplus or misshapen ones."""
        if IGNORED.search(name) or (name == "lm_head.weight" and self.record.tie_word_embeddings):
            return False
        if self._is_idle_norm(name):
            logger.warning("%s: left out, as the layer skips the sub-block that it would norm", place(name))
            return False
        if KV_SCALE.match(name):
            return self._see_scale(name, tuple(shape))
        if self.quantized:
            return self._see_quantized(name)
        if name not in self.expected:
            raise WeightsError(f"{place(name)}: found a tensor that the configuration has no place for, allowed: none")
        if tuple(shape) != self.expected[name]:
            raise WeightsError(f"{place(name)}: found shape {tuple(shape)}, allowed: {self.expected[name]}")
        if name not in self.missing:
            raise WeightsError(f"{place(name)}: found twice, allowed: once")
        self.missing.remove(name)
        return True

    def _is_idle_norm(self, name: str) -> bool:
        """Hugging Face's `skip` may leave the norm of a skipped sub-block in the file; DeciLM's no-op has none."""
        match = re.fullmatch(r"model\.layers\.(\d+)\.(input_layernorm|post_attention_layernorm)\.weight", name)
        if match is None or self.record.model_type == "nemotron-nas" or int(match[1]) >= len(self.record.layers):
            return False
        layer = self.record.layers[int(match[1])]
        return (layer.attention if match[2] == "input_layernorm" else layer.ffn) is None

    def _see_scale(self, name: str, shape: Shape) -> bool:
        canonical = canonical_name(name)
        owner = canonical.removesuffix(".attn.k_scale").removesuffix(".attn.v_scale")
        if f"{owner}.o_proj.weight" not in self.expected:
            raise WeightsError(f"{place(name)}: found a scale where the layer has no attention, allowed: none")
        if shape not in ((), (1,)):
            raise WeightsError(f"{place(name)}: found shape {shape}, allowed: () or (1,), one scale per attention")
        if canonical in self.scales:
            raise WeightsError(f"{place(name)}: found twice, allowed: once")
        self.scales.add(canonical)
        return True

    def close(self) -> None:
        """Raises WeightsError naming the tensors that never came."""
        if self.scales:  # all or none
            owners = [n.removesuffix(".o_proj.weight") for n in self.expected if n.endswith("self_attn.o_proj.weight")]
            self.missing |= {f"{owner}.attn.{of}_scale" for owner in owners for of in "kv"} - self.scales
        if self.missing:
            names = sorted(self.missing, key=_natural)
            more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
            listed = "; ".join(place(name) for name in names[:MAX_NAMED])
            raise WeightsError(f"{listed}{more}: found nothing in the checkpoint, allowed: every tensor exactly once")

    def watch(self, weights: Iterable[tuple[str, T]]) -> Iterator[tuple[str, T]]:
        """Pass (name, tensor) pairs through, ticking each off; complains at the end about what is missing."""
        for name, tensor in weights:
            if self.see(name, tuple(tensor.shape)):  # type: ignore[attr-defined]
                yield name, tensor
        self.close()

    def _see_quantized(self, name: str) -> bool:
        module = name.rpartition(".")[0]
        # KV-cache scales sit on the attention itself or on its k/v projections.
        owner = (
            module if module in self.modules else next((m for m in self.modules if m.startswith(f"{module}.")), None)
        )
        if owner is None:
            raise WeightsError(f"{place(name)}: found a tensor that the configuration has no place for, allowed: none")
        self.missing = {want for want in self.missing if want.rpartition(".")[0] != module}
        return True


def canonical_name(name: str) -> str:
    """vLLM's parameter for a KV-cache scale, whichever of its names the checkpoint uses; others are unchanged."""
    return KV_SCALE.sub(r"\g<owner>.attn.\g<of>_scale", name)


def place(name: str) -> str:
    """`model.layers.17.mlp.up_proj.weight` → `layer 17, tensor \\`mlp.up_proj.weight\\``."""
    match = re.match(r"model\.layers\.(\d+)\.(.+)", name)
    return f"layer {match[1]}, tensor `{match[2]}`" if match else f"tensor `{name}`"


def _natural(name: str) -> list[int | str]:
    return [f"{int(part):09d}" if part.isdigit() else part for part in re.split(r"(\d+)", name)]
