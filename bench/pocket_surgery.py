"""The pocket puzzle's first weights, cut out of the trained parent, sub-block by sub-block.

KV heads are averaged within their new groups, FFN channels kept by how much they write, a linear map is the least
squares fit of the attention that it replaces, no-ops are dropped. What this loses, distillation has to restore.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from vllm_puzzle.bench.pocket_data import Batch
from vllm_puzzle.bench.pocket_decode import PocketModel
from vllm_puzzle.bench.pocket_tokenizer import PAD
from vllm_puzzle.model_configs.schema import Attention, GatedFFN, LayerRecord, LinearMap, ModelRecord


def derive(parent: PocketModel, record: ModelRecord, sample: list[Batch]) -> PocketModel:
    """A model of `record` made from `parent`, layer i from layer i; `sample` is text to measure activations on."""
    child = PocketModel(record)
    source = parent.named_tensors()
    inputs = layer_inputs(parent, sample)
    tensors = {name: source[name].detach() for name in ("model.embed_tokens.weight", "model.norm.weight")}
    for index, layer in enumerate(record.layers):
        prefix = f"model.layers.{index}."
        own = {name.removeprefix(prefix): tensor.detach() for name, tensor in source.items() if name.startswith(prefix)}
        made = _attention_tensors(parent, index, layer, own, inputs[index])
        made |= _ffn_tensors(parent, index, layer, own, inputs[index])
        tensors |= {prefix + name: tensor for name, tensor in made.items()}
    child.load_tensors(tensors)
    return child


@torch.no_grad()
def layer_inputs(model: PocketModel, sample: list[Batch]) -> list[list[tuple[Tensor, Tensor]]]:
    """For each layer its residual input and which tokens are real, per batch: ([B, T, hidden_size], [B, T] bool)."""
    inputs: list[list[tuple[Tensor, Tensor]]] = [[] for _ in model.record.layers]
    for batch in sample:
        hidden = model.embed(batch.ids)
        for index in range(len(model.record.layers)):
            inputs[index].append((hidden, batch.ids != PAD))
            hidden = model.layer(index, hidden)
    return inputs


def _attention_tensors(
    parent: PocketModel, index: int, layer: LayerRecord, own: dict[str, Tensor], inputs: list[tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    if layer.attention is None:
        return {}
    tensors = {"input_layernorm.weight": own["input_layernorm.weight"]}
    if isinstance(layer.attention, LinearMap):
        return tensors | {"self_attn.linear_attn.weight": fit_linear(parent, index, inputs)}
    spec = layer.attention
    assert isinstance(spec, Attention), "the pocket models have no other kind"
    for name in "kv":
        weight = own[f"self_attn.{name}_proj.weight"]
        tensors[f"self_attn.{name}_proj.weight"] = pool_kv_heads(weight, spec)
    return tensors | {f"self_attn.{name}_proj.weight": own[f"self_attn.{name}_proj.weight"] for name in "qo"}


def pool_kv_heads(weight: Tensor, spec: Attention) -> Tensor:
    """Average neighbouring heads. weight: [old KV heads · head_dim, hidden] → [num_kv_heads · head_dim, hidden]."""
    return weight.view(spec.num_kv_heads, -1, spec.head_dim, weight.shape[1]).mean(1).flatten(0, 1)


@torch.no_grad()
def fit_linear(parent: PocketModel, index: int, inputs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The matrix [hidden, hidden] that best maps the layer's normed input to what its attention adds."""
    rows, wanted = [], []
    for hidden, is_real in inputs:
        block = parent.attention_block(f"model.layers.{index}", parent.record.layers[index], hidden)
        rows.append(normed(parent, f"model.layers.{index}.input_layernorm.weight", hidden)[is_real])
        wanted.append(block[is_real])
    x, y = torch.cat(rows), torch.cat(wanted)
    ridge = 1e-3 * x.shape[0] * torch.eye(x.shape[1])
    return torch.linalg.solve(x.T @ x + ridge, x.T @ y).T.contiguous()


def normed(model: PocketModel, name: str, hidden: Tensor) -> Tensor:
    """The RMS norm with the named weight. hidden: [..., hidden_size] → the same shape."""
    return nn.functional.rms_norm(hidden, hidden.shape[-1:], model.named_tensors()[name], model.record.rms_norm_eps)


def _ffn_tensors(
    parent: PocketModel, index: int, layer: LayerRecord, own: dict[str, Tensor], inputs: list[tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    if layer.ffn is None:
        return {}
    assert isinstance(layer.ffn, GatedFFN), "the pocket puzzle has no other kind"
    importance = channel_importance(parent, index, own, inputs)
    kept = importance.topk(layer.ffn.intermediate_size).indices.sort().values
    return {
        "post_attention_layernorm.weight": own["post_attention_layernorm.weight"],
        "mlp.gate_proj.weight": own["mlp.gate_proj.weight"][kept],
        "mlp.up_proj.weight": own["mlp.up_proj.weight"][kept],
        "mlp.down_proj.weight": own["mlp.down_proj.weight"][:, kept],
    }


@torch.no_grad()
def channel_importance(
    parent: PocketModel, index: int, own: dict[str, Tensor], inputs: list[tuple[Tensor, Tensor]]
) -> Tensor:
    """Root mean square of each FFN channel's activation times the length of its output column: [intermediate_size]."""
    squares, count = torch.zeros(own["mlp.gate_proj.weight"].shape[0]), 0
    for hidden, is_real in inputs:
        after_attention = hidden + parent.attention_block(f"model.layers.{index}", parent.record.layers[index], hidden)
        x = normed(parent, f"model.layers.{index}.post_attention_layernorm.weight", after_attention)[is_real]
        gate, up = x @ own["mlp.gate_proj.weight"].T, x @ own["mlp.up_proj.weight"].T
        squares += (nn.functional.silu(gate) * up).square().sum(0)
        count += x.shape[0]
    return (squares / count).sqrt() * own["mlp.down_proj.weight"].norm(dim=0)
