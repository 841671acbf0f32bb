"""The FFN half of a block where it is no expert layer: the gated FFN, and the linear map (of either half)."""

from __future__ import annotations

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.linear import ColumnParallelLinear, MergedColumnParallelLinear, RowParallelLinear
from vllm_puzzle.model_configs.schema import GatedFFN, ModelRecord, check_divides
from vllm_puzzle.serving.ffn_kernels import FusedFFN, keep_weights_for_kernels, register_operators

register_operators()


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
        keep_weights_for_kernels(self.gate_up_proj, self.down_proj)

    def take_kernels(self, vllm_config: VllmConfig) -> str | None:
        """Compute with our kernels from now on, or say what keeps the layer on vLLM's path."""
        fused = FusedFFN(self, self.prefix, *self.sizes, vllm_config.model_config.dtype)
        reason = fused.why_kept()
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
