"""Turn a checkpoint's tensors into those of its fused FFNs while vLLM loads them.

vLLM's own loaders then shard and quantize the wide matrices as they do any other. Each is joined, handed on and
forgotten once its last part has come; of other runs nothing is held but what the checkpoint's order brings early.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from vllm_puzzle.model_configs.ffn_fusion import FusedFFN
from vllm_puzzle.model_configs.fused_tensors import NORMS, SAME, SHAPE, SUM, Place, unequal


class FusedWeights:
    """One loading of one model. `places` says what goes where, `dtype` is the model's, `holds` whether this pipeline
    stage has a layer: parts of an FFN that it does not have are dropped as they come.
    """

    def __init__(self, places: Mapping[str, Place], dtype: torch.dtype, holds: Callable[[int], bool]) -> None:
        self.places, self.dtype, self.holds = places, dtype, holds
        self._parts: dict[str, dict[int, Tensor]] = {}
        self._norms: dict[FusedFFN, dict[int, Tensor]] = {}
        self._open: dict[FusedFFN, dict[str, Place]] = {}  # by target, what has begun to come

    def stream(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of the checkpoint → (name, tensor) of the fused record. Raises ConfigError naming the layers
        where numbers that must be one and the same differ.
        """
        for name, tensor in weights:
            place = self.places.get(name)
            if place is None:
                yield name, tensor
            elif self.holds(place.ffn.holder):
                self._take(place, tensor)
                yield from self._complete(place.ffn)
        assert not self._parts, f"the account lets no checkpoint end before {list(self._parts)} are whole"

    def _take(self, place: Place, tensor: Tensor) -> None:
        self._parts.setdefault(place.target, {})[place.index] = tensor
        self._open.setdefault(place.ffn, {})[place.target] = place
        if place.join == NORMS:
            self._norms.setdefault(place.ffn, {})[place.index] = tensor

    def _complete(self, ffn: FusedFFN) -> Iterator[tuple[str, Tensor]]:
        """What of one FFN is whole now."""
        norms = self._norms.get(ffn, {})
        for target, place in list(self._open[ffn].items()):
            needs_norms = place.is_folded and len(norms) < len(ffn.parts)
            if len(self._parts[target]) < len(ffn.parts) or needs_norms:
                continue
            del self._open[ffn][target]
            parts = self._parts.pop(target)
            ordered = [parts[index] for index in range(len(ffn.parts))]
            del parts
            if place.is_folded:
                yield target, self._fold(ordered, [norms[index] for index in range(len(ffn.parts))])
            else:
                yield target, _join(place, ordered, self.dtype)

    @torch.no_grad()
    def _fold(self, parts: list[Tensor], norms: Sequence[Tensor]) -> Tensor:
        """[sum of rows, columns]: each part's columns times its norm's weights, rounded once, to the model's dtype."""
        rows = [part.shape[0] for part in parts]
        whole = torch.empty(sum(rows), parts[0].shape[1], dtype=self.dtype, device=parts[0].device)
        for slot, part, norm in zip(whole.split(rows), parts, norms, strict=True):
            slot.copy_(part.float() * norm.to(part.device).float())
        return whole


def _join(place: Place, parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    if isinstance(place.join, int):
        return torch.cat(list(parts), dim=place.join)
    if place.join == NORMS:
        return torch.ones_like(parts[-1]) if place.ffn.norm == "own" else parts[-1]
    if place.join == SUM:
        return torch.stack([part.float() for part in parts]).sum(0).to(dtype)
    if place.join == SHAPE:
        shape = parts[0].clone()
        axis = 1 if ".down_proj." in place.target else 0
        shape[axis] = sum(part[axis] for part in parts)
        return shape
    assert place.join == SAME, place.join
    for part in parts[1:]:
        if not torch.equal(part, parts[0]):
            raise unequal(place)
    return parts[0]
