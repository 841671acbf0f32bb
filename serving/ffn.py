"""The FFN half of a block where it is no expert layer: the gated FFN, and the linear map (of either half)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.linear import ColumnParallelLinear, MergedColumnParallelLinear, RowParallelLinear
from vllm_puzzle.kernels.ffn_table import table_path
from vllm_puzzle.model_configs.schema import GatedFFN, ModelRecord, check_divides
from vllm_puzzle.serving import vllm_compat
from vllm_puzzle.serving.kernel_flags import FFN_KERNEL

if TYPE_CHECKING:
    from vllm_puzzle.serving.ffn_kernels import FusedFFN


class PuzzleFFN(nn.Module):
    """`down(silu(gate(x)) · up(x))`, [num_tokens, hidden_size] → the same shape."""

    def __init__(self, model: ModelRecord, spec: GatedFFN, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        width, tp_size = spec.intermediate_size, get_tensor_model_parallel_world_size()
        check_divides("intermediate_size", width, tp_size, prefix)
        self.prefix = prefix
        self.sizes = (width // tp_size, model.hidden_size)
        self.fused: FusedFFN | None = None  # our kernels, where the layer takes them
        self.gate_up_proj = MergedColumnParallelLinear(
            model.hidden_size,
            [width, width],
            bias=model.mlp_bias,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.gate_up_proj",
        )
        self.down_proj = RowParallelLinear(
            width,
            model.hidden_size,
            bias=model.mlp_bias,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.down_proj",
        )
        self.act_fn = SiluAndMul()
        device = vllm_config.device_config.device
        if device.type == "cpu" and wants_kernels(device):
            vllm_compat.keep_plain_weights_on_cpu(self.gate_up_proj, self.down_proj)

    def take_kernels(self, vllm_config: VllmConfig) -> str | None:
        """Compute with our kernels from now on, or say what keeps the layer on vLLM's path."""
        from vllm_puzzle.serving.ffn_kernels import FusedFFN

        fused = FusedFFN(self, self.prefix, *self.sizes, vllm_config.model_config.dtype)
        reason = fused.why_kept(vllm_config.device_config.device)
        self.fused = fused if reason is None else None
        if reason is None:
            vllm_config.compilation_config.static_forward_context[self.prefix] = self
        return reason

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """One gated FFN."""
        if self.fused is not None:
            return self.fused(hidden)
        gate_up, _ = self.gate_up_proj(hidden)
        output, _ = self.down_proj(self.act_fn(gate_up))
        return output


def wants_kernels(device: torch.device) -> bool:
    """Whether any FFN on this device may take our kernels: asked before those, and their part of vLLM, are imported."""
    choice = FFN_KERNEL.read()
    return choice == "on" or (choice == "auto" and table_path(device_name(device)).is_file())


def choose_ffn_paths(root: nn.Module, vllm_config: VllmConfig) -> None:
    """Give each PuzzleFFN of a model its path. Call when the weights have their final form; errors as choose_paths."""
    ffns = [module for module in root.modules() if isinstance(module, PuzzleFFN)]
    if ffns and wants_kernels(vllm_config.device_config.device):
        from vllm_puzzle.serving.ffn_kernels import choose_paths

        choose_paths(ffns, vllm_config)


def device_name(device: torch.device) -> str:
    """A tuning table's name for a device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


class PuzzleLinear(nn.Module):
    """One hidden × hidden matrix in place of a sub-block; `name` is the checkpoint's word for it.

    Under tensor parallelism each rank holds a share of the rows and the outputs are gathered: half the traffic of
    splitting the columns and reducing.
    """

    def __init__(self, model: ModelRecord, name: str, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        check_divides("hidden_size", model.hidden_size, get_tensor_model_parallel_world_size(), prefix)
        self.name = name
        linear = ColumnParallelLinear(
            model.hidden_size,
            model.hidden_size,
            bias=False,
            gather_output=True,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.{name}",
        )
        self.add_module(name, linear)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden · weightᵀ."""
        output, _ = getattr(self, self.name)(hidden)
        return output
