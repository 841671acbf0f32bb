"""What we touch of vLLM's linear layers, below its surface: `vllm_compat.py` goes on here, in the same ledger.

After loading, vLLM 0.32 holds an FP8 weight as the transpose [K, N] of the checkpoint's matrix, a view without a copy,
with one scale (the largest of fused matrices, requantized) or one per row; a weight with a scale for each 128 × 128
block stays [N, K].
"""

from __future__ import annotations

from typing import Any

import torch
from vllm import _custom_ops as ops
from vllm import envs
from vllm.model_executor.kernels.linear.scaled_mm.BlockScaledMMLinearKernel import Fp8BlockScaledMMLinearKernel
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.utils.torch_utils import LayerNameType, _encode_layer_name, _resolve_layer_name

# A layer's name as an operator's argument: the compiler does not compile each layer anew for it.
LayerName = LayerNameType
encode_layer_name, decode_layer_name = _encode_layer_name, _resolve_layer_name

# FP8 kernels of vLLM that leave weight and scales in a layout that ours reads in place; others repack them.
PLAIN_FP8_KERNELS = frozenset(
    {
        "CutlassFP8ScaledMMLinearKernel", "PerTensorTorchFP8ScaledMMLinearKernel",
        "ChannelWiseTorchFP8ScaledMMLinearKernel", "CutlassFp8BlockScaledMMKernel", "DeepGemmFp8BlockScaledMMKernel",
        "TritonFp8BlockScaledMMKernel", "BlockWiseTorchFP8ScaledMMLinearKernel",
    }
)  # fmt: skip


def fp8_kernel(layer: Any) -> Any:
    """vLLM's FP8 kernel behind a linear layer of any of its three checkpoint formats, if ours can take its place."""
    method = layer.quant_method
    places = ((method, "fp8_linear"), (getattr(layer, "scheme", None), "fp8_linear"), (method, "kernel"))
    kernels = [getattr(owner, name, None) for owner, name in places]
    return next((kernel for kernel in kernels if type(kernel).__name__ in PLAIN_FP8_KERNELS), None)


def is_block_scaled(kernel: Any) -> bool:
    """Whether an FP8 kernel of vLLM has a scale for each 128 × 128 weights; it then keeps the weight untransposed."""
    return isinstance(kernel, Fp8BlockScaledMMLinearKernel)


def block_scale(layer: Any) -> torch.Tensor:
    """The scales of a block-scaled layer, under the name that its checkpoint format has."""
    scale = getattr(layer, "weight_scale_inv", None)
    return layer.weight_scale if scale is None else scale


def quantize_input(kernel: Any, layer: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(e4m3 values, scale) of a layer's input, as its FP8 kernel quantizes it."""
    quantize, scale = kernel.quant_fp8, getattr(layer, "input_scale", None)
    more = {"use_triton": kernel.use_triton} if is_block_scaled(kernel) else {}
    values, scale = quantize(x, scale, None, **more)
    # Few rows may have been padded. Cut always: a compiler knows their number as a symbol only.
    if not quantize.static and (quantize.is_group_quant or quantize.use_per_token_if_dynamic):
        scale = scale.narrow(0, 0, x.shape[0])
    return values.narrow(0, 0, x.shape[0]), scale


def scaled_product(
    kernel: Any, layer: Any, x: torch.Tensor, x_scale: torch.Tensor | None, num_outputs: int, dtype: torch.dtype
) -> torch.Tensor:
    """A quantized input times a layer's weight by vLLM's FP8 kernel. x: [M, K] → [M, num_outputs]."""
    if is_block_scaled(kernel):
        return kernel.apply_block_scaled_mm(A=x, B=layer.weight, As=x_scale, Bs=block_scale(layer))
    return kernel.apply_scaled_mm(
        A=x, B=layer.weight, out_dtype=dtype, As=x_scale, Bs=layer.weight_scale, bias=None,
        output_shape=[x.shape[0], num_outputs],
    )  # fmt: skip


def cutlass_product(x: torch.Tensor, weight: torch.Tensor, x_scale: Any, weight_scale: Any) -> torch.Tensor:
    """vLLM's CUTLASS product of e4m3 x [M, K] and weight [N, K] in bfloat16, for measuring."""
    return ops.cutlass_scaled_mm(x, weight.t(), scale_a=x_scale, scale_b=weight_scale, out_dtype=torch.bfloat16)


def silu_and_mul(act_fn: Any, gate_up: torch.Tensor, out_scale: torch.Tensor | None) -> torch.Tensor:
    """vLLM's activation, [M, 2I] → [M, I], on a GPU by its own kernel even where it is compiled; e4m3 with a scale."""
    if gate_up.device.type != "cuda":
        hidden = act_fn.forward_native(gate_up)
        return hidden if out_scale is None else ops.scaled_fp8_quant(hidden, out_scale)[0]
    if out_scale is None:
        return act_fn.forward_cuda(gate_up)
    shape = (gate_up.shape[0], gate_up.shape[1] // 2)
    hidden = torch.empty(shape, dtype=torch.float8_e4m3fn, device=gate_up.device)
    torch.ops._C.silu_and_mul_quant(hidden, gate_up, out_scale)
    return hidden


def is_unquantized(layer: Any) -> bool:
    """Whether a linear layer has a plain weight."""
    return type(layer.quant_method) is UnquantizedLinearMethod


def is_batch_invariant() -> bool:
    """Whether the user wants results that do not depend on the batch; our kernels split K by its size."""
    return bool(envs.VLLM_BATCH_INVARIANT)
