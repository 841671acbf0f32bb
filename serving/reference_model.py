"""A whole heterogeneous model in plain PyTorch, built from the same records as the vLLM class.

It is the definition that vLLM's logits are compared with, the model that the pocket recipe trains, and it needs
neither vLLM nor a GPU. It recomputes the whole sequence at every call: no KV cache, no batching of lengths.
Parameter names equal the checkpoint's (`model_configs/tensors.py`), so a state dict is a checkpoint.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from vllm_puzzle.kernels import reference as ops
from vllm_puzzle.model_configs.schema import Attention, ConfigError, GatedFFN, LayerRecord, LinearMap, ModelRecord
from vllm_puzzle.model_configs.tensors import model_tensors


class ReferenceModel(nn.Module):
    """Logits of `record` for token ids of shape [..., T] → [..., T, vocab_size].

    Raises ConfigError for what it does not define yet: MoE blocks, and rotary types other than default and llama3.
    """

    def __init__(self, record: ModelRecord, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.record = record
        for index, layer in enumerate(record.layers):
            if not isinstance(layer.ffn, GatedFFN | LinearMap | None):
                raise ConfigError(
                    f"layer {index}: found {layer.ffn}, allowed in the reference: gated FFN, linear map, none"
                )
        # One flat dictionary of tensors under their checkpoint names; torch wants names without dots.
        self.tensors = nn.ParameterDict(
            {
                _flat(name): nn.Parameter(torch.empty(shape, dtype=dtype))
                for name, shape in model_tensors(record).items()
            }
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """GPT-2's initialisation: normal(0, 0.02), norms at one, residual writers scaled by 1/sqrt(2 · layers)."""
        residual_scale = (2 * len(self.record.layers)) ** -0.5
        for name in model_tensors(self.record):
            tensor = self.tensors[_flat(name)].data
            if name.endswith("norm.weight"):
                tensor.fill_(1.0)
            elif name.endswith(".bias"):
                tensor.zero_()
            else:
                writes_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                tensor.normal_(std=0.02 * (residual_scale if writes_residual else 1.0))

    def named_tensors(self) -> dict[str, Tensor]:
        """The parameters under their checkpoint names."""
        return {name: self.tensors[_flat(name)] for name in model_tensors(self.record)}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Copy a checkpoint in; every tensor of the record must be there and nothing else."""
        own = self.named_tensors()
        if own.keys() != tensors.keys():
            raise ConfigError(
                f"tensors: missing {sorted(own.keys() - tensors.keys())}, surplus {sorted(tensors.keys() - own.keys())}"
            )
        for name, tensor in own.items():
            tensor.data.copy_(tensors[name])

    def forward(self, token_ids: Tensor) -> Tensor:
        """Logits of every position. token_ids: [..., T] int64 → [..., T, vocab_size]."""
        hidden = self.embed(token_ids)
        for index in range(len(self.record.layers)):
            hidden = self.layer(index, hidden)
        return self.logits(hidden)

    def embed(self, token_ids: Tensor) -> Tensor:
        """token_ids: [..., T] → [..., T, hidden_size]."""
        return nn.functional.embedding(token_ids, self._tensor("model.embed_tokens.weight"))

    def layer(self, index: int, hidden: Tensor) -> Tensor:
        """One decoder layer with its residuals. hidden: [..., T, hidden_size] → the same shape."""
        record = self.record.layers[index]
        hidden = hidden + self.attention_block(index, record, hidden) if record.attention is not None else hidden
        return hidden + self.ffn_block(index, record, hidden) if record.ffn is not None else hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm and output matrix. hidden: [..., T, hidden_size] → [..., T, vocab_size]."""
        head = "model.embed_tokens.weight" if self.record.tie_word_embeddings else "lm_head.weight"
        return nn.functional.linear(self._norm(hidden, "model.norm.weight"), self._tensor(head))

    def attention_block(self, index: int, record: LayerRecord, hidden: Tensor) -> Tensor:
        """What the layer's attention (or linear map) adds to the residual."""
        prefix = f"model.layers.{index}"
        x = self._norm(hidden, f"{prefix}.input_layernorm.weight")
        spec = record.attention
        if isinstance(spec, LinearMap):
            return nn.functional.linear(x, self._tensor(f"{prefix}.self_attn.linear_attn.weight"))
        assert isinstance(spec, Attention), "the caller leaves no-ops out"
        q = self._project(x, f"{prefix}.self_attn.q_proj").unflatten(-1, (spec.num_heads, spec.head_dim))
        k = self._project(x, f"{prefix}.self_attn.k_proj").unflatten(-1, (spec.num_kv_heads, spec.head_dim))
        v = self._project(x, f"{prefix}.self_attn.v_proj").unflatten(-1, (spec.num_kv_heads, spec.head_dim))
        if self.record.qk_norm:
            q = self._norm(q, f"{prefix}.self_attn.q_norm.weight")
            k = self._norm(k, f"{prefix}.self_attn.k_norm.weight")
        positions = torch.arange(x.shape[-2], device=x.device)
        frequencies = self._frequencies(spec.head_dim).to(x.device)
        q, k = ops.apply_rope(q, positions, frequencies), ops.apply_rope(k, positions, frequencies)
        return self._project(ops.attention(q, k, v, spec.sliding_window).flatten(-2), f"{prefix}.self_attn.o_proj")

    def ffn_block(self, index: int, record: LayerRecord, hidden: Tensor) -> Tensor:
        """What the layer's FFN (or linear map) adds to the residual."""
        prefix = f"model.layers.{index}"
        x = self._norm(hidden, f"{prefix}.post_attention_layernorm.weight")
        if isinstance(record.ffn, LinearMap):
            return nn.functional.linear(x, self._tensor(f"{prefix}.mlp.linear_mlp.weight"))
        projections = [f"{prefix}.mlp.{name}_proj" for name in ("gate", "up", "down")]
        weights = [self._tensor(f"{name}.weight") for name in projections]
        return ops.gated_ffn(x, *weights, *(self._bias(name) for name in projections))

    def _tensor(self, name: str) -> Tensor:
        return self.tensors[_flat(name)]

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return ops.rms_norm(x, self._tensor(name), self.record.rms_norm_eps)

    def _project(self, x: Tensor, prefix: str) -> Tensor:
        return nn.functional.linear(x, self._tensor(f"{prefix}.weight"), self._bias(prefix))

    def _bias(self, prefix: str) -> Tensor | None:
        return self.tensors.get(_flat(f"{prefix}.bias"))

    def _frequencies(self, head_dim: int) -> Tensor:
        rope = self.record.rope
        if rope.rope_type == "default":
            return ops.rope_inverse_frequencies(head_dim, rope.rope_theta)
        if rope.rope_type != "llama3":
            raise ConfigError(
                f"model, key `rope_type`: found {rope.rope_type!r}, allowed in the reference: default, llama3"
            )
        return ops.rope_inverse_frequencies(
            head_dim,
            rope.rope_theta,
            rope.factor,
            rope.low_freq_factor,
            rope.high_freq_factor,
            rope.original_max_position_embeddings,
        )


def _flat(name: str) -> str:
    return name.replace(".", "/")
