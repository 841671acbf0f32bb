"""A whole heterogeneous model in plain PyTorch, built from the same records as the vLLM class.

It is the definition that vLLM's logits are compared with, the model that the pocket recipe trains, and it needs
neither vLLM nor a GPU. It recomputes the whole sequence at every call: no KV cache, no batching of lengths.
Parameter names equal the checkpoint's (`model_configs/tensors.py`), so a state dict is a checkpoint.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from vllm_puzzle.kernels import reference as ops
from vllm_puzzle.model_configs.ffn_fusion import FusedFFN, FusionPlan
from vllm_puzzle.model_configs.schema import (
    Attention,
    ConfigError,
    GatedFFN,
    LayerRecord,
    LinearMap,
    ModelRecord,
    MoE,
)
from vllm_puzzle.model_configs.tensors import model_tensors


class ReferenceModel(nn.Module):
    """Logits of `record` for token ids of shape [..., T] → [..., T, vocab_size].

    Raises ConfigError for what it does not define: NemotronH's blocks, and rotary types other than default, llama3
    and yarn. MXFP4 experts are held as the matrices that they stand for. `plan`: layers that read one input together,
    each from its own tensors (FFN Fusion's formula, computed without fusing anything).
    """

    def __init__(self, record: ModelRecord, dtype: torch.dtype = torch.float32, plan: FusionPlan | None = None) -> None:
        super().__init__()
        self.record = record
        self.plan = FusionPlan() if plan is None else plan
        for index, layer in enumerate(record.layers):
            for block in layer.blocks:
                if not isinstance(block.attention, Attention | LinearMap | None) or not isinstance(
                    block.ffn, GatedFFN | MoE | LinearMap | None
                ):
                    raise ConfigError(
                        f"layer {index}: found {block}, allowed in the reference: attention, FFN, experts, linear map"
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
        layer, prefix = self.record.layers[index], f"model.layers.{index}"
        together = next((ffn for ffn in self.plan.ffns if index in ffn.layers), None)
        if together is not None:
            # Those before the last layer of a run are done there, on the same input.
            return self.parallel_ffns(together, hidden) if index == together.holder else hidden
        if not layer.parallel:
            return self.block(layer, prefix, hidden)
        blocks = enumerate(layer.parallel)
        outputs = [self.block(block, f"{prefix}.parallel_blocks.{i}", hidden) for i, block in blocks]
        # Each output holds the input once; together they may hold it once only.
        return torch.stack(outputs).sum(0) - (len(outputs) - 1) * hidden

    def parallel_ffns(self, ffn: FusedFFN, hidden: Tensor) -> Tensor:
        """X + Σ FFN_i(norm_i(X)), or with the last layer's norm for all. hidden: [..., T, hidden_size] → the same."""
        outputs = []
        for part in ffn.parts:
            owner = part if ffn.norm == "own" else ffn.parts[-1]
            x = self._norm(hidden, f"{owner.prefix}.post_attention_layernorm.weight")
            outputs.append(self._gated(f"{part.prefix}.mlp", x))
        return hidden + torch.stack(outputs).sum(0)

    def block(self, block: LayerRecord, prefix: str, hidden: Tensor) -> Tensor:
        """Attention and FFN of one block under `prefix`, with their residuals."""
        hidden = hidden + self.attention_block(prefix, block, hidden) if block.attention is not None else hidden
        return hidden + self.ffn_block(prefix, block, hidden) if block.ffn is not None else hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm and output matrix. hidden: [..., T, hidden_size] → [..., T, vocab_size]."""
        head = "model.embed_tokens.weight" if self.record.tie_word_embeddings else "lm_head.weight"
        return nn.functional.linear(self._norm(hidden, "model.norm.weight"), self._tensor(head))

    def attention_block(self, prefix: str, record: LayerRecord, hidden: Tensor) -> Tensor:
        """What the block's attention (or linear map) adds to the residual."""
        x = self._norm(hidden, f"{prefix}.input_layernorm.weight")
        spec, name = record.attention, f"{prefix}.self_attn"
        if isinstance(spec, LinearMap):
            return nn.functional.linear(x, self._tensor(f"{name}.linear_attn.weight"))
        assert isinstance(spec, Attention), "the caller leaves no-ops out"
        q = self._project(x, f"{name}.q_proj").unflatten(-1, (spec.num_heads, spec.head_dim))
        k = self._project(x, f"{name}.k_proj").unflatten(-1, (spec.num_kv_heads, spec.head_dim))
        v = self._project(x, f"{name}.v_proj").unflatten(-1, (spec.num_kv_heads, spec.head_dim))
        if self.record.qk_norm:
            q = self._norm(q, f"{name}.q_norm.weight")
            k = self._norm(k, f"{name}.k_norm.weight")
        positions = torch.arange(x.shape[-2], device=x.device)
        frequencies, scale = self._frequencies(spec.head_dim)
        q, k = (ops.apply_rope(t, positions, frequencies.to(x.device), scale) for t in (q, k))
        sinks = self._tensor(f"{name}.sinks") if spec.has_sinks else None
        output = ops.attention(q, k, v, spec.sliding_window, sinks, spec.num_sink_tokens)
        return self._project(output.flatten(-2), f"{name}.o_proj")

    def ffn_block(self, prefix: str, record: LayerRecord, hidden: Tensor) -> Tensor:
        """What the block's FFN (or experts, or linear map) adds to the residual."""
        x = self._norm(hidden, f"{prefix}.post_attention_layernorm.weight")
        if isinstance(record.ffn, LinearMap):
            return nn.functional.linear(x, self._tensor(f"{prefix}.mlp.linear_mlp.weight"))
        if isinstance(record.ffn, MoE):
            return self._experts(f"{prefix}.mlp", record.ffn, x.flatten(0, -2)).view_as(x)
        return self._gated(f"{prefix}.mlp", x)

    def _experts(self, prefix: str, spec: MoE, x: Tensor) -> Tensor:
        """Routed experts (and DeciLM's shared one) of [N, hidden_size] rows."""
        names = ("router", "gate")
        router = next(f"{prefix}.{name}" for name in names if _flat(f"{prefix}.{name}.weight") in self.tensors)
        weights, experts = ops.route(self._project(x, router), spec.num_experts_per_tok, spec.routing)
        is_stacked = _flat(f"{prefix}.experts.down_proj") in self.tensors

        def run(expert: int, rows: Tensor) -> Tensor:
            if is_stacked:
                return self._stacked_expert(f"{prefix}.experts", expert, rows)
            return self._gated(f"{prefix}.experts.{expert}", rows)

        output = ops.moe(x, weights, experts, run, on_input=spec.routing == "sigmoid_on_input")
        return output + self._gated(f"{prefix}.shared_expert", x) if spec.shared_intermediate_size else output

    def _stacked_expert(self, prefix: str, expert: int, rows: Tensor) -> Tensor:
        """gpt-oss: [in, out] matrices, biases, clamped activation."""
        gate_up, down = self._tensor(f"{prefix}.gate_up_proj")[expert], self._tensor(f"{prefix}.down_proj")[expert]
        inner = ops.swiglu_oai(rows @ gate_up + self._tensor(f"{prefix}.gate_up_proj_bias")[expert])
        return inner @ down + self._tensor(f"{prefix}.down_proj_bias")[expert]

    def _gated(self, prefix: str, x: Tensor) -> Tensor:
        names = [f"{prefix}.{name}_proj" for name in ("gate", "up", "down")]
        return ops.gated_ffn(x, *(self._tensor(f"{n}.weight") for n in names), *(self._bias(n) for n in names))

    def _tensor(self, name: str) -> Tensor:
        return self.tensors[_flat(name)]

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return ops.rms_norm(x, self._tensor(name), self.record.rms_norm_eps)

    def _project(self, x: Tensor, prefix: str) -> Tensor:
        return nn.functional.linear(x, self._tensor(f"{prefix}.weight"), self._bias(prefix))

    def _bias(self, prefix: str) -> Tensor | None:
        return self.tensors.get(_flat(f"{prefix}.bias"))

    def _frequencies(self, head_dim: int) -> tuple[Tensor, float]:
        """Rotary inverse frequencies, and the factor on cos and sin (YaRN's; 1 elsewhere)."""
        rope = self.record.rope
        if rope.rope_type == "default":
            return ops.rope_inverse_frequencies(head_dim, rope.rope_theta), 1.0
        if rope.rope_type == "llama3":
            low, high = rope.low_freq_factor, rope.high_freq_factor
            original = rope.original_max_position_embeddings
            return ops.rope_inverse_frequencies(head_dim, rope.rope_theta, rope.factor, low, high, original), 1.0
        if rope.rope_type != "yarn" or rope.factor is None or rope.original_max_position_embeddings is None:
            raise ConfigError(
                f"model, key `rope_type`: found {rope.rope_type!r}, allowed in the reference: default, llama3, yarn"
            )
        return ops.yarn_frequencies(
            head_dim,
            rope.rope_theta,
            rope.factor,
            rope.original_max_position_embeddings,
            rope.beta_fast or 32.0,
            rope.beta_slow or 1.0,
            rope.attention_factor,
            rope.truncate,
        )


def _flat(name: str) -> str:
    return name.replace(".", "/")
