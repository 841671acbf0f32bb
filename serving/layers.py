"""The decoder block: it builds what its record says, at final size, and nothing for a no-op.

The residual stream travels as vLLM's pair (hidden, residual): `hidden` is the last sub-block's output, not yet added.
A norm adds it (fused on GPU). `residual` is None until the first norm, so leading layers may be empty.
"""

from __future__ import annotations

import torch
from torch import nn
from vllm.config import CacheConfig, VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.attention import Attention as AttentionOp
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm_puzzle.model_configs.schema import (
    Attention,
    AttentionKind,
    ConfigError,
    FFNKind,
    GatedFFN,
    LayerRecord,
    LinearMap,
    ModelRecord,
    check_divides,
    check_heads,
)


class PuzzleAttention(nn.Module):
    """Grouped-query attention with rotary positions, any KV-head count, optional window, optional q/k norm (Qwen3).

    hidden: [num_tokens, hidden_size], positions: [num_tokens] → [num_tokens, hidden_size].
    """

    def __init__(self, model: ModelRecord, spec: Attention, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        tp_size = get_tensor_model_parallel_world_size()
        check_heads(spec, tp_size, prefix)
        self.head_dim = spec.head_dim
        self.num_heads = spec.num_heads // tp_size
        self.num_kv_heads = max(1, spec.num_kv_heads // tp_size)
        quant_config: QuantizationConfig | None = vllm_config.quant_config
        self.qkv_proj = QKVParallelLinear(
            model.hidden_size,
            spec.head_dim,
            spec.num_heads,
            spec.num_kv_heads,
            bias=model.qkv_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            spec.num_heads * spec.head_dim,
            model.hidden_size,
            bias=model.o_bias,
            quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
        )
        self.rotary_emb = get_rope(
            spec.head_dim,
            max_position=model.max_position_embeddings,
            rope_parameters=vllm_config.model_config.hf_config.rope_parameters,
        )
        self.has_qk_norm = model.qk_norm
        if model.qk_norm:
            self.q_norm = RMSNorm(spec.head_dim, eps=model.rms_norm_eps)
            self.k_norm = RMSNorm(spec.head_dim, eps=model.rms_norm_eps)
        cache_config: CacheConfig | None = vllm_config.cache_config
        self.attn = AttentionOp(
            self.num_heads,
            spec.head_dim,
            spec.head_dim**-0.5,
            num_kv_heads=self.num_kv_heads,
            cache_config=cache_config,
            quant_config=quant_config,
            per_layer_sliding_window=spec.sliding_window,
            prefix=f"{prefix}.attn",
        )

    def forward(self, positions: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Project, rotate, attend through vLLM's KV cache, project back."""
        qkv, _ = self.qkv_proj(hidden)
        kv_size = self.num_kv_heads * self.head_dim
        q, k, v = qkv.split([self.num_heads * self.head_dim, kv_size, kv_size], dim=-1)
        if self.has_qk_norm:
            q = self.q_norm(q.unflatten(-1, (-1, self.head_dim))).flatten(-2)
            k = self.k_norm(k.unflatten(-1, (-1, self.head_dim))).flatten(-2)
        q, k = self.rotary_emb(positions, q, k)
        output, _ = self.o_proj(self.attn(q, k, v))
        return output


class PuzzleFFN(nn.Module):
    """`down(silu(gate(x)) · up(x))`, [num_tokens, hidden_size] → the same shape."""

    def __init__(self, model: ModelRecord, spec: GatedFFN, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        width = spec.intermediate_size
        check_divides("intermediate_size", width, get_tensor_model_parallel_world_size(), prefix)
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

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """One gated FFN."""
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


class PuzzleDecoderLayer(nn.Module):
    """One layer of the list; sub-modules exist only for what the record holds."""

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


def add_and_norm(
    norm: RMSNorm, hidden: torch.Tensor, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`residual += hidden; hidden = norm(residual)`; without a residual yet, hidden becomes it."""
    if residual is None:
        return norm(hidden), hidden
    return norm(hidden, residual)


def _build_attention(model: ModelRecord, spec: AttentionKind, config: VllmConfig, prefix: str) -> nn.Module | None:
    if spec is None:
        return None
    if isinstance(spec, LinearMap):
        return PuzzleLinear(model, "linear_attn", config, prefix)
    if isinstance(spec, Attention):
        return PuzzleAttention(model, spec, config, prefix)
    raise ConfigError(f"{prefix}: found {spec}, allowed: attention, linear map or nothing")


def _build_ffn(model: ModelRecord, spec: FFNKind, config: VllmConfig, prefix: str) -> nn.Module | None:
    if spec is None:
        return None
    if isinstance(spec, LinearMap):
        return PuzzleLinear(model, "linear_mlp", config, prefix)
    if isinstance(spec, GatedFFN):
        return PuzzleFFN(model, spec, config, prefix)
    raise ConfigError(f"{prefix}: found {spec}, allowed: gated FFN, linear map or nothing")
