"""The decoder block: it builds what its record says, at final size, and nothing for a no-op.

The residual stream travels as vLLM's pair (hidden, residual): `hidden` is the last sub-block's output, not yet added.
A norm adds it (fused on GPU). `residual` is None until the first norm, so leading layers may be empty.
"""

from __future__ import annotations

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm_puzzle.model_configs.schema import (
    Attention,
    AttentionKind,
    FFNKind,
    GatedFFN,
    LayerRecord,
    LinearMap,
    ModelRecord,
    MoE,
)
from vllm_puzzle.serving.attention import PuzzleAttention
from vllm_puzzle.serving.ffn import PuzzleFFN, PuzzleLinear
from vllm_puzzle.serving.moe import PuzzleMoE


class PuzzleDecoderLayer(nn.Module):
    """One layer of the list, or one of its parallel blocks; sub-modules exist only for what the record holds."""

    def __init__(self, model: ModelRecord, record: LayerRecord, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.self_attn = _build_attention(model, record.attention, vllm_config, f"{prefix}.self_attn")
        self.mlp = _build_ffn(model, record.ffn, vllm_config, f"{prefix}.mlp")
        self.is_empty = self.self_attn is None and self.mlp is None
        self.needs_positions = isinstance(record.attention, Attention)
        if self.self_attn is not None:
            self.input_layernorm = RMSNorm(model.hidden_size, eps=model.rms_norm_eps)
        if self.mlp is not None:
            self.post_attention_layernorm = RMSNorm(model.hidden_size, eps=model.rms_norm_eps)

    def forward(
        self, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(hidden, residual) in, (hidden, residual) out; a wholly empty layer returns both untouched."""
        if self.self_attn is not None:
            hidden, residual = add_and_norm(self.input_layernorm, hidden, residual)
            hidden = self.self_attn(positions, hidden) if self.needs_positions else self.self_attn(hidden)
        if self.mlp is not None:
            hidden, residual = add_and_norm(self.post_attention_layernorm, hidden, residual)
            hidden = self.mlp(hidden)
        return hidden, residual


class PuzzleParallelLayer(nn.Module):
    """Blocks that read the same input: x + Σ (block(x) − x) (DeciLM `parallel_blocks`)."""

    is_empty = False

    def __init__(self, model: ModelRecord, record: LayerRecord, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        # vLLM finds a layer's number as the only number among the dotted parts of an attention's name.
        self.parallel_blocks = nn.ModuleList(
            PuzzleDecoderLayer(model, block, vllm_config, f"{prefix}.parallel_blocks_{index}")
            for index, block in enumerate(record.parallel)
        )

    def forward(
        self, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(hidden, residual) in, (hidden, residual) out, as PuzzleDecoderLayer."""
        x = hidden if residual is None else hidden + residual
        added = torch.zeros_like(x)
        for block in self.parallel_blocks:
            if not block.is_empty:
                output, base = block(positions, x, None)
                added = added + output + (base - x)
        return added, x


def add_and_norm(
    norm: RMSNorm, hidden: torch.Tensor, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`residual += hidden; hidden = norm(residual)`; without a residual yet, hidden becomes it."""
    if residual is None:
        return norm(hidden), hidden
    return norm(hidden, residual)


def build_layer(model: ModelRecord, index: int, vllm_config: VllmConfig, prefix: str) -> nn.Module:
    """Layer `index` of the model."""
    record = model.layers[index]
    layer_class = PuzzleParallelLayer if record.parallel else PuzzleDecoderLayer
    return layer_class(model, record, vllm_config, prefix)


def _build_attention(model: ModelRecord, spec: AttentionKind, config: VllmConfig, prefix: str) -> nn.Module | None:
    if spec is None:
        return None
    if isinstance(spec, LinearMap):
        return PuzzleLinear(model, "linear_attn", config, prefix)
    assert isinstance(spec, Attention), "check_servable refuses anything else"
    return PuzzleAttention(model, spec, config, prefix)


def _build_ffn(model: ModelRecord, spec: FFNKind, config: VllmConfig, prefix: str) -> nn.Module | None:
    if spec is None:
        return None
    if isinstance(spec, LinearMap):
        return PuzzleLinear(model, "linear_mlp", config, prefix)
    if isinstance(spec, MoE):
        return PuzzleMoE(model, spec, config, prefix)
    assert isinstance(spec, GatedFFN), "check_servable refuses anything else"
    return PuzzleFFN(model, spec, config, prefix)
