"""Quantized checkpoints: which module is stored how, and the tensors that follow from it. Standard library only.

A published list says what is quantized by names and patterns; here it becomes one scheme per matrix of the model, under
the checkpoint's own names. Weight loading, the header check and the check of vLLM's layers all hold to this one answer.
The lists themselves are read in `quantization_formats.py`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from vllm_puzzle.model_configs.schema import ConfigError, ModelRecord, Shape
from vllm_puzzle.model_configs.tensors import model_tensors

FLOATS = ("BF16", "F16", "F32")
SCALAR: tuple[Shape, ...] = ((), (1,))  # ModelOpt writes the first, llm-compressor the second
# Matrices that vLLM's linear layers hold as one, which therefore share one scheme.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
# Never quantized by the tools that write these checkpoints; vLLM's layers for them cannot be either.
UNQUANTIZED = ("embed_tokens", "embeddings", "gate", "router", "shared_expert_gate")
KV_SPELLINGS = ("{0}_scale", "attn.{0}_scale", "{0}_proj.{0}_scale")


@dataclass(frozen=True, slots=True)
class Stored:
    """What a checkpoint may hold under one name: shapes, and element types in safetensors' words."""

    shapes: tuple[Shape, ...]
    dtypes: tuple[str, ...] = FLOATS


@dataclass(frozen=True, slots=True)
class Scheme:
    """How one matrix is stored.

    `scale` is the layout of `weight_scale`: one per `tensor`, per row as [out, 1] (`channel`) or [out] (`row`), per
    `group` of columns, per square `block`, or per block with ModelOpt's two extra axes (`block4d`). `scalars` are the
    single numbers beside it. `packing` counts the values in one element of the weight.
    """

    name: str
    weight_dtype: str
    scale: str
    scalars: tuple[str, ...] = ()
    scale_dtypes: tuple[str, ...] = FLOATS
    group_size: int = 0
    packing: int = 1
    is_packed_int: bool = False
    has_zero_points: bool = False

    def tensors(self, size_out: int, size_in: int) -> dict[str, Stored]:
        """The tensors of an [out, in] matrix, by the last part of their names."""
        weight = "weight_packed" if self.is_packed_int else "weight"
        tensors = {
            weight: Stored(((size_out, _cover(size_in, self.packing)),), (self.weight_dtype,)),
            "weight_scale": Stored(self._scale_shapes(size_out, size_in), self.scale_dtypes),
        }
        for name in self.scalars:
            tensors[name] = Stored(SCALAR, ("I8",) if name.endswith("zero_point") else FLOATS)
        if self.is_packed_int:
            tensors["weight_shape"] = Stored(((2,),), ("I64", "I32"))
        if self.has_zero_points:
            groups = _cover(size_in, self.group_size) if self.group_size else 1
            tensors["weight_zero_point"] = Stored(((_cover(size_out, self.packing), groups),), ("I32",))
        return tensors

    def _scale_shapes(self, size_out: int, size_in: int) -> tuple[Shape, ...]:
        if self.scale == "tensor":
            return SCALAR
        if self.scale in ("channel", "row"):
            return ((size_out, 1),) if self.scale == "channel" else ((size_out,),)
        columns = _cover(size_in, self.group_size)
        if self.scale == "group":
            return ((size_out, columns),)
        rows = _cover(size_out, self.group_size)
        return ((rows, columns),) if self.scale == "block" else ((rows, 1, columns, 1),)


@dataclass(frozen=True, slots=True)
class Quantization:
    """What a model's quantization entry says about this model.

    `schemes` has every quantized matrix under its checkpoint name (`model.layers.0.mlp.up_proj`); matrices that are
    not in it are stored plain. `idle` are the entries of the published list that match nothing in the model.
    """

    method: str
    schemes: Mapping[str, Scheme]
    has_kv_scales: bool = False
    idle: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, scheme in self.schemes.items():
            if scheme.is_packed_int and name == "lm_head":
                raise ConfigError(
                    f"quantization, module `lm_head`: found {scheme.name}, allowed: unquantized or 8 bits"
                )


def matrices(model: ModelRecord) -> dict[str, Shape]:
    """The matrices of `model` that a quantization can name, with their [out, in] shapes."""
    return {
        name.removesuffix(".weight"): shape
        for name, shape in model_tensors(model).items()
        if name.endswith(".weight") and len(shape) == 2 and name.split(".")[-2] not in UNQUANTIZED
    }


def stored_tensors(model: ModelRecord, quantization: Quantization | None = None) -> dict[str, Stored]:
    """All tensors of a checkpoint of `model`, KV-cache scales aside."""
    stored: dict[str, Stored] = {}
    for name, shape in model_tensors(model, as_stored=True).items():
        module, _, last = name.rpartition(".")
        if model.is_mxfp4 and name.endswith(("_blocks", "_scales")):
            stored[name] = Stored((shape,), ("U8",))
            continue
        scheme = quantization.schemes.get(module) if quantization is not None and last == "weight" else None
        if scheme is None:
            stored[name] = Stored((shape,))
        else:
            stored |= {f"{module}.{part}": entry for part, entry in scheme.tensors(*shape).items()}
    return stored


def kv_scale_names(model: ModelRecord) -> dict[str, str]:
    """Every published name of an FP8 KV-cache scale → the first of its spellings."""
    names: dict[str, str] = {}
    for tensor in model_tensors(model):
        if not tensor.endswith(".k_proj.weight"):
            continue
        owner = tensor.removesuffix(".k_proj.weight")
        for which in "kv":
            spellings = [f"{owner}.{spelling.format(which)}" for spelling in KV_SPELLINGS]
            names |= dict.fromkeys(spellings, spellings[0])
    return names


def fused_name(module: str) -> str:
    """The vLLM layer that holds a checkpoint's matrix: `…self_attn.k_proj` → `…self_attn.qkv_proj`."""
    owner, _, last = module.rpartition(".")
    if ".experts." in module:
        return module.partition(".experts.")[0] + ".experts"
    for fused, parts in FUSED.items():
        if last in parts:
            return f"{owner}.{fused}"
    return module


def check_fused(model: ModelRecord, schemes: Mapping[str, Scheme]) -> None:
    """Raise ConfigError, naming the layer, unless the matrices that vLLM holds as one are stored alike."""
    first: dict[str, str] = {}
    for module in matrices(model):
        other = first.setdefault(fused_name(module), module)
        found, expected = (_describe(schemes.get(name)) for name in (module, other))
        if schemes.get(module) != schemes.get(other):
            raise ConfigError(
                f"{module_place(module)}: found {found} beside {other.rpartition('.')[2]} {expected}, allowed: one "
                f"scheme (vLLM holds them as one layer, {fused_name(module).rpartition('.')[2]})"
            )


def check_cpu_kernels(
    quantization: Quantization, has_exact_int8: Callable[[], bool], has_packed_int: Callable[[], bool]
) -> None:
    """Raise ConfigError for what vLLM's CPU build accepts and then computes wrongly (INT8) or fails at (packed)."""
    for scheme in sorted(set(quantization.schemes.values()), key=lambda scheme: scheme.name):
        reason = None
        if scheme.is_packed_int and not has_packed_int():
            reason = "packed weights need AVX-512"
        if scheme.weight_dtype == "I8" and not has_exact_int8():
            reason = "without VNNI its INT8 products saturate"
        if reason is not None:
            raise ConfigError(f"quantization: found {scheme.name}, allowed on this CPU: FP8 ({reason})")


def module_place(module: str) -> str:
    """`model.layers.17.mlp.up_proj` → `layer 17, module \\`mlp.up_proj\\``."""
    match = re.match(r"model\.layers\.(\d+)\.(.+)", module)
    return f"layer {match[1]}, module `{match[2]}`" if match else f"module `{module}`"


def _describe(scheme: Scheme | None) -> str:
    return "unquantized" if scheme is None else scheme.name


def _cover(size: int, part: int) -> int:
    return -(-size // part)
