"""Tiny quantized DeciLM checkpoints in published layouts, and the reference model that computes what they mean.

The quantization is a few plain lines of torch per layout. The reference holds the dequantized weights and rounds the
inputs of each quantized matrix as the layout asks.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import checkpoints
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode
from vllm_puzzle.model_configs.formats import read_model
from vllm_puzzle.model_configs.quantization import fused_name, matrices
from vllm_puzzle.model_configs.quantization_formats import LEGACY_FILE
from vllm_puzzle.serving.reference_model import ReferenceModel

FP8 = torch.float8_e4m3fn
KV_SCALES = {"k": 0.05, "v": 0.03}  # of the first attention; the second has twice these, and so on
Rounding = Callable[[Tensor], Tensor]
# Sizes that every kernel takes: multiples of 32. Layers 0 to 9 as in checkpoints.ALL_KINDS, and one whose number begins
# like layer 1's.
BLOCKS = [*copy.deepcopy(checkpoints.ALL_KINDS), checkpoints.deci_block(2, 64)]
for _block in BLOCKS:
    _width = _block["ffn"]["intermediate_size"]
    _block["ffn"]["intermediate_size"] = {48: 64, 40: 32}.get(_width, _width)


@dataclass
class Layout:
    """A matrix as stored (`tensors` by the last part of their names), as meant, and how its input is rounded."""

    tensors: dict[str, Tensor]
    meant: Tensor
    rounding: Rounding | None = None


class QuantizedReference(ReferenceModel):
    """The reference with rounded inputs: `layouts` has the quantized matrices by module name."""

    layouts: dict[str, Layout]

    def forward(self, token_ids: Tensor) -> Tensor:
        parameters = self.named_tensors()
        rounded = {id(parameters[f"{name}.weight"]): layout for name, layout in self.layouts.items()}
        with RoundedInputs(rounded):
            return super().forward(token_ids)


class RoundedInputs(TorchFunctionMode):
    """Inside it, a linear map with one of these weights rounds its input and multiplies in float32."""

    def __init__(self, layouts: dict[int, Layout]) -> None:
        super().__init__()
        self.layouts = layouts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        layout = self.layouts.get(id(args[1])) if func is torch.nn.functional.linear else None
        if layout is None:
            return func(*args, **(kwargs or {}))
        x = args[0].float()
        x = layout.rounding(x) if layout.rounding is not None else x
        return func(x, layout.meant).to(args[0].dtype)


def _round_fp8(scale: float | None) -> Rounding:
    """To e4m3 (largest value 448) with this scale, or with one per token."""

    def rounding(x: Tensor) -> Tensor:
        step = torch.tensor(scale) if scale is not None else x.abs().amax(-1, keepdim=True) / 448
        return (x / step).clamp(-448, 448).to(FP8).float() * step

    return rounding


def _round_int8(scale: float | None) -> Rounding:
    def rounding(x: Tensor) -> Tensor:
        step = torch.tensor(scale) if scale is not None else x.abs().amax(-1, keepdim=True) / 127
        return (x / step).round().clamp(-128, 127) * step

    return rounding


def fp8_per_tensor(weight: Tensor, input_scale: float, shape: tuple[int, ...] = (), step: Any = None) -> Layout:
    """ModelOpt's FP8 (scalars of shape ()) and compressed-tensors' static FP8 (shape (1,))."""
    step = weight.abs().max() / 448 if step is None else step
    stored = (weight / step).to(FP8)
    tensors = {"weight": stored, "weight_scale": step.reshape(shape).clone()}
    tensors["input_scale"] = torch.full(shape, input_scale)
    return Layout(tensors, stored.float() * step, _round_fp8(input_scale))


def fp8_per_row(weight: Tensor, input_scale: float, keepdim: bool = True) -> Layout:
    """One scale per output, [out, 1] (compressed-tensors) or [out] (ModelOpt); inputs with one scale per token."""
    step = weight.abs().amax(1, keepdim=True) / 448
    stored = (weight / step).to(FP8)
    tensors = {"weight": stored, "weight_scale": step if keepdim else step.flatten()}
    return Layout(tensors, stored.float() * step, _round_fp8(None))


def fp8_weights_only(weight: Tensor, input_scale: float) -> Layout:
    layout = fp8_per_row(weight, input_scale)
    return Layout(layout.tensors, layout.meant)


def int8(weight: Tensor, input_scale: float, is_static: bool = False) -> Layout:
    step = weight.abs().amax(1, keepdim=True) / 127
    stored = (weight / step).round().to(torch.int8)
    scale = 3 * input_scale if is_static else None
    tensors = {"weight": stored, "weight_scale": step}
    if scale is not None:
        tensors["input_scale"] = torch.tensor([scale])
    return Layout(tensors, stored.float() * step, _round_int8(scale))


def int4_packed(weight: Tensor, input_scale: float, group: int = 32) -> Layout:
    """Eight values to an int32, lowest first, stored with 8 added; one scale per group of 32 inputs."""
    size_out, size_in = weight.shape
    grouped = weight.view(size_out, -1, group)
    step = grouped.abs().amax(-1, keepdim=True) / 7
    values = (grouped / step).round().clamp(-8, 7)
    nibbles = (values.view(size_out, -1, 8).to(torch.int32) + 8) << torch.arange(0, 32, 4, dtype=torch.int32)
    tensors = {
        "weight_packed": nibbles.sum(-1, dtype=torch.int32),
        "weight_scale": step.squeeze(-1).clone(),
        "weight_shape": torch.tensor([size_out, size_in]),
    }
    return Layout(tensors, (values * step).reshape(weight.shape))


def nvfp4(weight: Tensor, input_scale: float) -> Layout:
    """Shapes and types of ModelOpt's NVFP4; the values are not served on CPU and carry no meaning here."""
    size_out, size_in = weight.shape
    tensors = {"weight": torch.zeros(size_out, size_in // 2, dtype=torch.uint8)}
    tensors["weight_scale"] = torch.ones(size_out, size_in // 16).to(FP8)
    return Layout(tensors | {"weight_scale_2": torch.tensor(1.0), "input_scale": torch.tensor(1.0)}, weight)


def modelopt_entry(**body: Any) -> dict[str, Any]:
    return {"quant_method": "modelopt", "producer": {"name": "modelopt", "version": "0.39.0"}, **body}


def compressed_entry(format_: str, weights: str, inputs: str | None, ignore: list[str], **rest: Any) -> dict[str, Any]:
    """`weights`, `inputs`: "float 8 channel static" and the like, in llm-compressor's full spelling of the keys."""

    def arguments(words: str | None) -> dict[str, Any] | None:
        if words is None:
            return None
        kind, bits, strategy, when = words.split()
        group = 32 if strategy == "group" else None
        found = {"type": kind, "num_bits": int(bits), "strategy": strategy, "dynamic": when == "dynamic"}
        empty = {"actorder": None, "block_structure": None, "observer_kwargs": {}, "observer": "minmax"}
        return found | empty | {"symmetric": True, "group_size": group}

    scheme = {"targets": ["Linear"], "weights": arguments(weights), "input_activations": arguments(inputs)}
    entry = {"quant_method": "compressed-tensors", "quantization_status": "compressed", "format": format_}
    rest = {"global_compression_ratio": None, "kv_cache_scheme": None} | rest
    return entry | {"config_groups": {"group_0": scheme | {"output_activations": None}}, "ignore": ignore} | rest


def _modelopt_mixed(module: str) -> str | None:
    """FP8 for FFNs, per-channel FP8 for the linear maps in place of attention, attention itself plain."""
    if ".mlp." in module:
        return "FP8"
    return "FP8_PER_CHANNEL_PER_TOKEN" if module.endswith("linear_attn") else None


@dataclass(frozen=True)
class Kind:
    """A checkpoint: its entry in config.json (or ModelOpt's older file), and the layout of each matrix."""

    entry: dict[str, Any]
    layout: Callable[[str], Callable[..., Layout] | None]
    is_legacy: bool = False
    kv_spelling: str | None = None
    dtype: str = "float32"


_MODULES = [name for name in matrices(read_model(checkpoints.deci_config(BLOCKS))) if name != "lm_head"]
_LAYERS = sorted({fused_name(name) for name in _MODULES})
_MIXED_LAYERS = {name: {"quant_algo": _modelopt_mixed(name)} for name in _MODULES if _modelopt_mixed(name)}
_MIXED_NVFP4 = {
    n: {"quant_algo": "NVFP4", "group_size": 16} if ".mlp." in n else {"quant_algo": "FP8"} for n in _MODULES
}
_KV = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}


def _unless(*excluded: str, layout: Callable[..., Layout]) -> Callable[[str], Callable[..., Layout] | None]:
    return lambda module: None if any(part in module for part in excluded) else layout


# The exclusions take one attention, one linear map of either kind, one FFN and the output matrix.
KINDS = {
    "modelopt fp8": Kind(
        {
            "producer": {"name": "modelopt", "version": "0.29.0"},
            "quantization": {
                "quant_algo": "FP8",
                "kv_cache_quant_algo": "FP8",
                # The pair is what ModelOpt writes for layer 1 when layer 10 is quantized.
                "exclude_modules": [
                    "lm_head",
                    "model.layers.1",
                    "model.layers.1.*",
                    "model.layers.3.self_attn*",
                    "model.layers.4.self_attn.linear_attn",
                ],
            },
        },
        _unless("layers.1.", "layers.3.self_attn", "layers.4.self_attn", layout=fp8_per_tensor),
        is_legacy=True,
        kv_spelling="{0}_proj.{0}_scale",
        dtype="bfloat16",
    ),
    "modelopt mixed": Kind(
        modelopt_entry(quant_algo="MIXED_PRECISION", quantized_layers=_MIXED_LAYERS, ignore=["lm_head"]),
        lambda module: {
            "FP8": fp8_per_tensor,
            "FP8_PER_CHANNEL_PER_TOKEN": lambda weight, scale: fp8_per_row(weight, scale, keepdim=False),
            None: None,
        }[_modelopt_mixed(module)],
        dtype="bfloat16",
    ),
    "fp8 static": Kind(
        compressed_entry(
            "float-quantized", "float 8 tensor static", "float 8 tensor static", ["lm_head", r"re:.*layers\.7\..*"]
        ),
        _unless("layers.7.", layout=lambda weight, scale: fp8_per_tensor(weight, scale, (1,))),
    ),
    "fp8 dynamic": Kind(
        compressed_entry("float-quantized", "float 8 channel static", "float 8 token dynamic", ["lm_head"]),
        _unless(layout=fp8_per_row),
    ),
    "int8 dynamic": Kind(
        compressed_entry("int-quantized", "int 8 channel static", "int 8 token dynamic", ["lm_head"]),
        _unless(layout=int8),
    ),
    "int8 static": Kind(
        compressed_entry("int-quantized", "int 8 channel static", "int 8 tensor static", ["lm_head"]),
        _unless(layout=lambda weight, scale: int8(weight, scale, is_static=True)),
    ),
    "fp8 kv": Kind(
        {
            "quant_method": "compressed-tensors",
            "format": "dense",
            "config_groups": {},
            "ignore": [],
            "kv_cache_scheme": _KV,
        },
        lambda module: None,
        kv_spelling="{0}_scale",
        dtype="bfloat16",
    ),
    "int4 weights": Kind(
        compressed_entry("pack-quantized", "int 4 group static", None, ["lm_head"]),
        _unless(layout=int4_packed),
        dtype="bfloat16",  # vLLM's kernel has no float32
    ),
    "fp8 weights": Kind(
        compressed_entry("float-quantized", "float 8 channel static", None, ["lm_head"]),
        _unless(layout=fp8_weights_only),
    ),
    "modelopt mixed nvfp4": Kind(
        modelopt_entry(quant_algo="MIXED_PRECISION", quantized_layers=_MIXED_NVFP4, kv_cache_scheme=_KV),
        lambda module: nvfp4 if ".mlp." in module else fp8_per_tensor,
        kv_spelling="attn.{0}_scale",
        dtype="bfloat16",
    ),
}


def write(folder: Path, name: str) -> QuantizedReference:
    """Write the checkpoint `name` of KINDS; returns the model that it means."""
    kind = KINDS[name]
    config = checkpoints.deci_config(BLOCKS, torch_dtype=kind.dtype)
    weights = checkpoints.reference(config).named_tensors()
    model = QuantizedReference(read_model(config))
    model.layouts, tensors = {}, {}
    for tensor_name, parameter in weights.items():
        module, weight = tensor_name.removesuffix(".weight"), parameter.detach().to(getattr(torch, kind.dtype))
        make = kind.layout(module) if module in _MODULES else None
        if make is None:
            tensors[tensor_name] = weight
        else:
            # Inputs are calibrated per layer of vLLM: q, k and v share one number, as gate and up do.
            layout = make(parameter.detach(), 0.01 * (1 + _LAYERS.index(fused_name(module)) % 3))
            model.layouts[module], weight = layout, layout.meant
            tensors |= {f"{module}.{part}": value for part, value in layout.tensors.items()}
        model.named_tensors()[tensor_name].data.copy_(weight)
    _requantize_fused(model.layouts)
    tensors |= _kv_scales(kind)
    folder.mkdir(parents=True)
    if kind.is_legacy:
        (folder / LEGACY_FILE).write_text(json.dumps(kind.entry))
    else:
        config["quantization_config"] = kind.entry
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return model


def _requantize_fused(layouts: dict[str, Layout]) -> None:
    """vLLM holds one FP8 scale per layer: shards with a smaller one are rounded again, to the largest of them."""
    for layer in _LAYERS:
        shards = [layouts[name] for name in _MODULES if fused_name(name) == layer and name in layouts]
        if len(shards) > 1 and "input_scale" in shards[0].tensors and shards[0].tensors["weight"].dtype == FP8:
            step = max(shard.tensors["weight_scale"].max() for shard in shards)
            for shard in shards:
                shard.meant = (shard.meant / step).to(FP8).float() * step


def _kv_scales(kind: Kind) -> dict[str, Tensor]:
    if kind.kv_spelling is None:
        return {}
    owners = [name.removesuffix(".k_proj") for name in _MODULES if name.endswith(".k_proj")]
    return {
        f"{owner}.{kind.kv_spelling.format(which)}": torch.tensor(KV_SCALES[which] * (index + 1))
        for index, owner in enumerate(owners)
        for which in "kv"
    }
