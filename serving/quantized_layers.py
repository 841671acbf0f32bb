"""Hold vLLM's quantized layers to what the checkpoint's quantization entry says.

vLLM matches the published lists by its own looser rules: substrings (`model.layers.1` fits layer 10), regexes on its
fused names, one shard of a fused layer for all. Here it gets exact names, and every layer that it builds is compared.
"""

from __future__ import annotations

import torch
from torch import nn
from vllm.config import CompilationMode, VllmConfig
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm_puzzle.model_configs.fused_tensors import fuse_quantization
from vllm_puzzle.model_configs.quantization import (
    Quantization,
    Scheme,
    check_cpu_kernels,
    fused_name,
    matrices,
    module_place,
)
from vllm_puzzle.model_configs.quantization_formats import quantization_entry, read_quantization
from vllm_puzzle.model_configs.schema import ConfigError, ModelRecord
from vllm_puzzle.serving import vllm_compat
from vllm_puzzle.serving.fused_model import ServedModel


def prepare_quantization(
    vllm_config: VllmConfig, served: ServedModel
) -> tuple[Quantization, Quantization] | tuple[None, None]:
    """Read the checkpoint's entry and hand vLLM its exclusions as exact module names. Call before building layers.

    Returns the checkpoint's quantization and that of the record that is built. None for plain checkpoints, those that
    vLLM itself is asked to quantize (`--quantization fp8`) included.
    """
    quant_config, model = vllm_config.quant_config, served.checkpoint
    if quant_config is None:
        return None, None
    entry = quantization_entry(vllm_config.model_config.hf_config.to_dict())
    # ModelOpt's older files have the per-layer list outside config.json, where vLLM has read it.
    quantization = read_quantization(model, entry, getattr(quant_config, "quantized_layers", None))
    if quantization is None:
        return None, None
    check_cpu_kernels(quantization, vllm_compat.has_exact_int8_kernel, vllm_compat.has_packed_int_kernel)
    _check_compiled(vllm_config, quantization)
    _check_packed_dtype(vllm_config, quantization)
    fused = fuse_quantization(served.plan, quantization)
    _use_exact_names(quant_config, served.record, fused)
    vllm_compat.round_to_fp8_on_cpu()
    return quantization, fused


def check_layers(root: nn.Module, quantization: Quantization | None) -> None:
    """Raise ConfigError, naming the layer, unless vLLM built each linear layer for the tensors the checkpoint has."""
    if quantization is None:
        return
    expected = {fused_name(name): scheme for name, scheme in quantization.schemes.items()}
    for name, module in root.named_modules():
        if isinstance(module, LinearBase | ParallelLMHead):
            _check_layer(name, module, expected.get(name))
        elif isinstance(module, RoutedExperts) and (name in expected) != hasattr(module, "w13_weight_scale"):
            found, allowed = ("unquantized", "quantized")[:: 1 if name in expected else -1]
            raise ConfigError(f"{module_place(name)}: found vLLM's experts {found}, allowed: {allowed}")


def _check_compiled(vllm_config: VllmConfig, quantization: Quantization) -> None:
    """FP8 with one input scale per token, compiled on CPU, answers NaN or crashes in vLLM 0.32 (its own Llama too)."""
    is_compiled = vllm_config.compilation_config.mode != CompilationMode.NONE
    if vllm_config.device_config.device_type != "cpu" or not is_compiled:
        return
    for name, scheme in quantization.schemes.items():
        if scheme.weight_dtype == "F8_E4M3" and "input_scale" not in scheme.scalars:
            raise ConfigError(f"{module_place(name)}: found {scheme.name} compiled, allowed on CPU: --enforce-eager")


def _check_packed_dtype(vllm_config: VllmConfig, quantization: Quantization) -> None:
    """vLLM's CPU kernel for packed weights has no float32 ('"cpu_gemm_wna16" not implemented for 'Float''): it would
    fail at the first token."""
    dtype = vllm_config.model_config.dtype
    if vllm_config.device_config.device_type != "cpu" or dtype != torch.float32:
        return
    for name, scheme in quantization.schemes.items():
        if scheme.is_packed_int:
            raise ConfigError(f"{module_place(name)}: found {scheme.name} in float32, allowed on CPU: --dtype bfloat16")


def _use_exact_names(quant_config: QuantizationConfig, model: ModelRecord, quantization: Quantization) -> None:
    plain = sorted({fused_name(name) for name in matrices(model) if name not in quantization.schemes})
    attribute = "ignore" if quantization.method == "compressed-tensors" else "exclude_modules"
    setattr(quant_config, attribute, plain)


def _check_layer(name: str, module: nn.Module, scheme: Scheme | None) -> None:
    """Compare the layer's own parameters with the parts that its scheme stores; each of them gets filled."""
    found = {key for key, _ in module.named_parameters(recurse=False)} - {"bias"}
    expected = {"weight"} if scheme is None else set(scheme.tensors(1, 1))
    if found != expected:
        stored = "unquantized" if scheme is None else scheme.name
        raise ConfigError(
            f"{module_place(name)}: found vLLM's layer with {', '.join(sorted(found))}, allowed: "
            f"{', '.join(sorted(expected))}, as the checkpoint has it {stored}"
        )
