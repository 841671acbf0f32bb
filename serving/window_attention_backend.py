"""vLLM attention backend `CUSTOM`: our kernels over vLLM's paged cache.

Used per layer (`Attention(attn_backend=…)`, see window_attention.py) or for a whole model (`--attention-backend
CUSTOM`). Where the layer hands it the rotary embedding, q and k come unrotated: a decode step over a small window is
then one launch, any other batch two. Nothing waits for the device, and what is launched depends on shapes only, so that
every batch can be captured in a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm_puzzle.kernels.fused_decode import MAX_WINDOW, fused_decode
from vllm_puzzle.kernels.kv_write import rope_and_write_kv, write_kv
from vllm_puzzle.kernels.window_attention import Scratch, window_attention

MAX_HEAD_DIM = 256
MIN_FP8_CAPABILITY = (8, 9)  # e4m3 conversion instructions
MIN_CAPABILITY = (8, 0)
Scales = dict[str, Any]


@dataclass(slots=True)
class WindowAttentionMetadata(AttentionMetadata):
    """One batch as the kernels see it: vLLM's own device tensors, nothing computed from them."""

    num_actual_tokens: int
    max_query_len: int
    query_start_loc: Tensor
    seq_lens: Tensor
    block_table: Tensor
    slot_mapping: Tensor
    positions: Tensor | None
    scratch: Scratch


class WindowAttentionMetadataBuilder(AttentionMetadataBuilder[WindowAttentionMetadata]):
    """Metadata of one group of layers that share cache shape and block table."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.ALWAYS

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        layers = get_layers_from_vllm_config(vllm_config, Attention, layer_names)
        # The group's own sizes: a model-wide head count is another layer's here.
        self.scratch = Scratch.allocate(
            vllm_config.scheduler_config.max_num_seqs,
            max(layer.num_heads for layer in layers.values()),
            kv_cache_spec.head_size,
            max_query_len=1 + vllm_config.num_speculative_tokens,
            device=device,
        )

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> WindowAttentionMetadata:
        """vLLM calls this once per step and group, and once per captured graph."""
        if common_attn_metadata.causal is not True:
            raise NotImplementedError("attention backend CUSTOM: found a batch that is not causal, allowed: causal")
        return WindowAttentionMetadata(
            num_actual_tokens=common_attn_metadata.num_actual_tokens,
            max_query_len=common_attn_metadata.max_query_len,
            query_start_loc=common_attn_metadata.query_start_loc,
            seq_lens=common_attn_metadata.seq_lens,
            block_table=common_attn_metadata.block_table_tensor,
            slot_mapping=common_attn_metadata.slot_mapping,
            positions=common_attn_metadata.positions,
            scratch=self.scratch,
        )


class WindowAttentionImpl(AttentionImpl[WindowAttentionMetadata]):
    """Attention of one layer.

    Beyond vLLM's arguments: sinks, one learned logit per query head; `window`, which is also given where the cache must
    keep every token (`num_sink_tokens` of the first ones stay in view); `rotary`, where q and k come unrotated;
    `fuses_decode`, whether one token per sequence is one launch, up to MAX_WINDOW.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
        window: int | None = None,
        num_sink_tokens: int = 0,
        rotary: nn.Module | None = None,
        fuses_decode: bool = True,
    ) -> None:
        if alibi_slopes is not None or logits_soft_cap or attn_type != AttentionType.DECODER:
            found = f"ALiBi {alibi_slopes is not None}, soft cap {logits_soft_cap}, type {attn_type}"
            raise NotImplementedError(f"attention backend CUSTOM: found {found}, allowed: plain causal attention")
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.sliding_window = window if sliding_window is None else sliding_window
        self.kv_cache_dtype = kv_cache_dtype
        self.kv_sharing_target_layer_name = kv_sharing_target_layer_name
        self.sinks, self.num_sink_tokens = sinks, num_sink_tokens
        self.rotary = rotary
        self.is_quantized = kv_cache_dtype.startswith("fp8")
        view = num_sink_tokens + (self.sliding_window or 2**31)
        is_ours = rotary is not None and kv_sharing_target_layer_name is None
        self.decodes_in_one_launch = is_ours and fuses_decode and view <= MAX_WINDOW

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Once the sinks are loaded: the kernels read them in float32."""
        self.sinks = None if self.sinks is None else self.sinks.float()

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        kv_cache: Tensor,
        attn_metadata: WindowAttentionMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Store key and value, attend, fill `output`.

        query, output: [T, num_heads, head_size], key, value: [T, num_kv_heads, head_size]; kv_cache: [num_blocks,
        num_kv_heads, block_size, 2 · head_size], K before V.
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("attention backend CUSTOM: found a quantized output, allowed: none")
        if attn_metadata is None:  # vLLM measures memory
            return output.fill_(0)
        caches = self.split(kv_cache)
        scales: Scales = {"k_scale": None, "v_scale": None}
        if self.is_quantized:
            scales = {"k_scale": layer._k_scale.view(-1), "v_scale": layer._v_scale.view(-1)}
        if self.decodes_in_one_launch and attn_metadata.max_query_len == 1:
            self._decode(query, key, value, caches, attn_metadata, output, scales)
            return output
        num_tokens = attn_metadata.num_actual_tokens
        query = query[:num_tokens]
        if key is not None and value is not None and self.kv_sharing_target_layer_name is None:
            query = self._write(query, key[:num_tokens], value[:num_tokens], caches, attn_metadata, scales)
        window_attention(
            query,
            *caches,
            output[:num_tokens],
            block_table=attn_metadata.block_table,
            seq_lens=attn_metadata.seq_lens,
            query_start_loc=attn_metadata.query_start_loc,
            max_query_len=attn_metadata.max_query_len,
            softmax_scale=self.scale,
            sliding_window=self.sliding_window,
            sinks=self.sinks,
            num_sink_tokens=self.num_sink_tokens,
            scratch=attn_metadata.scratch,
            **scales,
        )
        return output

    def split(self, kv_cache: Tensor) -> tuple[Tensor, Tensor]:
        """vLLM's cache → K and V, [num_blocks, num_kv_heads, block_size, head_size] each."""
        if self.is_quantized and kv_cache.dtype == torch.uint8:
            kv_cache = kv_cache.view(torch.float8_e4m3fn)
        k_cache, v_cache = kv_cache.split(self.head_size, dim=-1)
        return k_cache, v_cache

    def _rotation(self, metadata: WindowAttentionMetadata) -> tuple[Tensor, Tensor]:
        """(positions, cosines and sines) where q and k come unrotated."""
        if metadata.positions is None:
            raise RuntimeError("attention backend CUSTOM: found a batch without positions, allowed: with positions")
        rotary: Any = self.rotary
        return metadata.positions, rotary.cos_sin_cache

    def _write(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        caches: tuple[Tensor, Tensor],
        metadata: WindowAttentionMetadata,
        scales: Scales,
    ) -> Tensor:
        """Store the new tokens; the rotated query."""
        slots = metadata.slot_mapping[: len(key)]
        if self.rotary is None:
            write_kv(key, value, *caches, slots, **scales)
            return query
        positions, cos_sin_cache = self._rotation(metadata)
        rotated = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        rope_and_write_kv(
            query, key, value, *caches, slots, positions[: len(key)], cos_sin_cache, q_out=rotated, **scales
        )
        return rotated

    def _decode(
        self,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        caches: tuple[Tensor, Tensor],
        metadata: WindowAttentionMetadata,
        output: Tensor,
        scales: Scales,
    ) -> None:
        """One new token per sequence; rows of padding sequences have slot −1."""
        assert key is not None and value is not None
        count = min(metadata.seq_lens.shape[0], metadata.num_actual_tokens)
        positions, cos_sin_cache = self._rotation(metadata)
        fused_decode(
            query[:count],
            key[:count],
            value[:count],
            *caches,
            output[:count],
            slot_mapping=metadata.slot_mapping,
            positions=positions,
            cos_sin_cache=cos_sin_cache,
            block_table=metadata.block_table,
            seq_lens=metadata.seq_lens,
            softmax_scale=self.scale,
            sliding_window=self.sliding_window,
            sinks=self.sinks,
            num_sink_tokens=self.num_sink_tokens,
            **scales,
        )


class WindowAttentionBackend(AttentionBackend):
    """What vLLM asks before it builds a layer."""

    # The implementation stores K and V itself: rotation, store and attention are one launch where that is possible.
    forward_includes_kv_cache_update: bool = True
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "float16", "bfloat16", "fp8", "fp8_e4m3"]

    @staticmethod
    def get_name() -> str:
        """The member of vLLM's enumeration that plugins may register."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[WindowAttentionImpl]:
        """Per layer."""
        return WindowAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[WindowAttentionMetadataBuilder]:
        """Per group of layers."""
        return WindowAttentionMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """A tile gathers rows from any pages; 16 keeps them aligned."""
        return [MultipleOf(16)]

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        """Multiples of 16, so that rows stay aligned."""
        return head_size % 16 == 0 and head_size <= MAX_HEAD_DIM

    @classmethod
    def supports_sink(cls) -> bool:
        """Learned sinks (gpt-oss)."""
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """What it is for."""
        return True

    @classmethod
    def supports_per_head_quant_scales(cls) -> bool:
        """One scale per KV head, or one for the layer."""
        return True

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        """None on a CPU, under Triton's interpreter."""
        return capability is None or (capability.major, capability.minor) >= MIN_CAPABILITY

    @classmethod
    def supports_combination(
        cls,
        head_size: int,
        dtype: torch.dtype,
        kv_cache_dtype: Any,
        block_size: int | None,
        use_mla: bool,
        has_sink: bool,
        use_sparse: bool,
        use_mm_prefix: bool,
        device_capability: Any,
    ) -> str | None:
        """FP8 needs its conversion instructions; a 16-bit cache the queries' type."""
        if str(kv_cache_dtype) in ("float16", "bfloat16") and dtype != getattr(torch, str(kv_cache_dtype)):
            return f"KV cache in {kv_cache_dtype} beside {dtype}"
        capability = device_capability
        is_old = capability is not None and (capability.major, capability.minor) < MIN_FP8_CAPABILITY
        if is_old and str(kv_cache_dtype).startswith("fp8"):
            return f"FP8 KV cache needs compute capability {MIN_FP8_CAPABILITY[0]}.{MIN_FP8_CAPABILITY[1]}"
        return None
