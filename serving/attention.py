"""The attention half of a block."""

from __future__ import annotations

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention as AttentionOp
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.model_loader.weight_utils import sharded_weight_loader
from vllm.model_executor.utils import set_weight_attrs
from vllm_puzzle.model_configs.schema import Attention, ModelRecord, check_heads
from vllm_puzzle.serving.kv_scales import kv_cache_quant_config
from vllm_puzzle.serving.window_attention import choose_backend


class PuzzleAttention(nn.Module):
    """Grouped-query attention with rotary positions, any KV-head count, optional window, optional q/k norm (Qwen3),
    optional learned sinks (gpt-oss). A layer with a window may attend by our backend (window_attention.py), which
    rotates q and k itself.

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
            rope_parameters=model.rope.parameters,
            dtype=torch.float32 if spec.has_sinks else None,  # as vLLM's gpt-oss class
        )
        self.has_qk_norm = model.qk_norm
        if model.qk_norm:
            self.q_norm = RMSNorm(spec.head_dim, eps=model.rms_norm_eps)
            self.k_norm = RMSNorm(spec.head_dim, eps=model.rms_norm_eps)
        backend, extra = choose_backend(spec, vllm_config, prefix, self.rotary_emb)
        self.rotates_itself = "rotary" in extra
        if spec.has_sinks:
            self.sinks = nn.Parameter(torch.empty(self.num_heads), requires_grad=False)
            set_weight_attrs(self.sinks, {"weight_loader": sharded_weight_loader(0)})
            extra["sinks"] = self.sinks
        self.attn = AttentionOp(
            self.num_heads,
            spec.head_dim,
            spec.head_dim**-0.5,
            num_kv_heads=self.num_kv_heads,
            cache_config=vllm_config.cache_config,
            quant_config=kv_cache_quant_config(vllm_config),
            # Sink tokens stay in view for ever: vLLM's cache keeps every page where it knows of no window.
            per_layer_sliding_window=None if spec.num_sink_tokens else spec.sliding_window,
            prefix=f"{prefix}.attn",
            attn_backend=backend,
            **extra,
        )

    def forward(self, positions: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Project, rotate, attend through vLLM's KV cache, project back."""
        qkv, _ = self.qkv_proj(hidden)
        kv_size = self.num_kv_heads * self.head_dim
        q, k, v = qkv.split([self.num_heads * self.head_dim, kv_size, kv_size], dim=-1)
        if self.has_qk_norm:
            q = self.q_norm(q.unflatten(-1, (-1, self.head_dim))).flatten(-2)
            k = self.k_norm(k.unflatten(-1, (-1, self.head_dim))).flatten(-2)
        if not self.rotates_itself:
            q, k = self.rotary_emb(positions, q, k)
        output, _ = self.o_proj(self.attn(q, k, v))
        return output
