"""FFN Fusion's tensors: where each tensor of the checkpoint goes, and which quantized ones cannot go there exactly.

Gate and up projections are joined along their rows, down projections along their columns. Quantized parts are joined as
they are stored, or refused: no weight is rounded a second time. (Inputs that a scheme quantizes as they come, with one
scale per token, get one for the whole width.) Standard library only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import lcm

from vllm_puzzle.model_configs.ffn_fusion import FusedFFN, FusionPlan, Part
from vllm_puzzle.model_configs.quantization import Quantization, Scheme
from vllm_puzzle.model_configs.schema import ConfigError, ModelRecord

NORM = "post_attention_layernorm.weight"
# The matrices, and the axis of [out, in] along which their parts are joined.
AXES = {"gate_proj": 0, "up_proj": 0, "down_proj": 1}
# What becomes of parts that are not joined along an axis: added up; one and the same number, or refused; the [out, in]
# that a packed weight stands for; a norm's weights.
SUM, SAME, SHAPE, NORMS = "sum", "same", "shape", "norms"


@dataclass(frozen=True, slots=True)
class Place:
    """Where one tensor of the checkpoint goes: it is part `index` of `target`; `join` is an axis, or a word above."""

    ffn: FusedFFN
    index: int
    target: str
    join: int | str
    is_folded: bool = False  # its columns are multiplied by the weights of its part's norm


def places(record: ModelRecord, plan: FusionPlan, quantization: Quantization | None = None) -> dict[str, Place]:
    """The place of every tensor that the fused FFNs hold, by its name in the checkpoint."""
    found: dict[str, Place] = {}
    for ffn in plan.ffns:
        for index, part in enumerate(ffn.parts):
            for name, join, is_folded in _tensors(record, ffn, part, quantization):
                found[f"{part.prefix}.{name}"] = Place(ffn, index, f"{_prefix(ffn)}.{name}", join, is_folded)
    return found


def fuse_quantization(plan: FusionPlan, quantization: Quantization) -> Quantization:
    """The schemes of the fused record. Raises ConfigError, naming the layers, where parts cannot be joined exactly."""
    schemes = dict(quantization.schemes)
    for ffn in plan.ffns:
        for matrix in AXES:
            own = {part: schemes.pop(f"{part.prefix}.mlp.{matrix}", None) for part in ffn.parts}
            scheme = own[ffn.parts[0]]
            _check_scheme(ffn, matrix, own)
            if scheme is not None:
                schemes[f"{_prefix(ffn)}.mlp.{matrix}"] = scheme
    return replace(quantization, schemes=schemes)


def unequal(place: Place) -> ConfigError:
    """The error for a number that the checkpoint holds once per part, and a fused FFN once for the whole."""
    name = place.target.partition(".mlp.")[2]
    return ConfigError(
        f"{_where(place.ffn)}, `{name}`: found different numbers in its parts, allowed: one and the same (or an "
        "unquantized checkpoint, which `--quantization fp8` quantizes after the fusion)"
    )


def _where(ffn: FusedFFN) -> str:
    return f"FFN Fusion of layers {ffn.layers[0]}-{ffn.layers[-1]}"


def _prefix(ffn: FusedFFN) -> str:
    return f"model.layers.{ffn.holder}"


def _tensors(
    record: ModelRecord, ffn: FusedFFN, part: Part, quantization: Quantization | None
) -> Iterator[tuple[str, int | str, bool]]:
    """(name, join, whether the norm is folded in) of every tensor of one part."""
    yield NORM, NORMS, False
    schemes = {} if quantization is None else quantization.schemes
    for matrix, axis in AXES.items():
        scheme = schemes.get(f"{part.prefix}.mlp.{matrix}")
        names = ("weight",) if scheme is None else tuple(scheme.tensors(1, 1))
        for name in names:
            yield f"mlp.{matrix}.{name}", _join(scheme, name, axis), ffn.norm == "own" and axis == 0
        if record.mlp_bias:
            yield f"mlp.{matrix}.bias", SUM if axis else 0, False


def _join(scheme: Scheme | None, name: str, axis: int) -> int | str:
    if scheme is None or name in ("weight", "weight_packed", "weight_zero_point"):
        return axis
    if name == "weight_shape":
        return SHAPE
    if name != "weight_scale" or scheme.scale == "tensor":
        return SAME
    return 2 * axis if scheme.scale == "block4d" else axis


def _check_scheme(ffn: FusedFFN, matrix: str, schemes: dict[Part, Scheme | None]) -> None:
    place, axis = f"{_where(ffn)}, `{matrix}`", AXES[matrix]
    first = schemes[ffn.parts[0]]
    for part, scheme in schemes.items():
        if scheme != first:
            found, other = ("unquantized" if s is None else s.name for s in (scheme, first))
            raise ConfigError(f"{place}: found {found} in {part.prefix} beside {other}, allowed: one scheme")
    if first is None:
        return
    if ffn.norm == "own" and axis == 0:
        raise ConfigError(
            f"{place}: found {first.name} with norm `own`, allowed: norm `last`, or an unquantized checkpoint (a norm "
            "cannot be folded into quantized columns exactly; `--quantization fp8` quantizes after the fusion)"
        )
    if axis == 1 and first.scale in ("channel", "row"):
        raise ConfigError(
            f"{place}: found {first.name}, one scale per output for the columns of each FFN, allowed: blocks, groups, "
            "or an unquantized checkpoint"
        )
    unit = _unit(first, axis)
    for part in ffn.parts[:-1]:
        if part.width % unit:
            raise ConfigError(
                f"{place}: found the width {part.width} in {part.prefix}, allowed with {first.name}: multiples of "
                f"{unit}, so that its blocks keep their borders"
            )


def _unit(scheme: Scheme, axis: int) -> int:
    """What a part's width must be a multiple of for the next one to begin at a border of `scheme`."""
    if axis == 1:
        return lcm(scheme.group_size or 1, scheme.packing)
    is_block = scheme.scale in ("block", "block4d")
    return lcm(scheme.group_size if is_block else 1, scheme.packing if scheme.has_zero_points else 1)
