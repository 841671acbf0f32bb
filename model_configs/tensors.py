"""The checkpoint tensors that a model's records imply: name → shape.

One table for four users: weight loading accounts for every tensor against it, `serve` checks the safetensors
headers with it before the engine starts, `inspect` counts parameters, the reference model takes its names from it.
Names as published for DeciLM / Llama-type checkpoints (NVIDIA Megatron-Bridge, TensorRT-LLM). Standard library only.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

from vllm_puzzle.model_configs import gpt_oss, nemotron_h
from vllm_puzzle.model_configs.schema import GatedFFN, LayerRecord, LinearMap, Mamba2, ModelRecord, MoE, Shape

# Families whose checkpoints do not follow Llama's names.
TRUNK = dict.fromkeys(("nemotron_h", "nemotron_h_puzzle"), ("backbone", "embeddings", "norm_f"))
FAMILY_TENSORS: dict[str, Callable[[ModelRecord, LayerRecord], dict[str, Shape]]] = {
    "gpt_oss": gpt_oss.layer_tensors,
    "gpt_oss_puzzle": gpt_oss.layer_tensors,
    "nemotron_h": nemotron_h.layer_tensors,
    "nemotron_h_puzzle": nemotron_h.layer_tensors,
}


def model_tensors(model: ModelRecord, as_stored: bool = False) -> dict[str, Shape]:
    """All tensors of a checkpoint of `model`, by name, with their shapes (out × in for matrices).

    `as_stored` gives MXFP4 experts as the file holds them, otherwise as the matrices that they stand for.
    """
    hidden = model.hidden_size
    trunk, embedding, norm = TRUNK.get(model.model_type, ("model", "embed_tokens", "norm"))
    tensors: dict[str, Shape] = {f"{trunk}.{embedding}.weight": (model.vocab_size, hidden)}
    for index, layer in enumerate(model.layers):
        own = layer_tensors(model, layer)
        own = gpt_oss.mxfp4_tensors(own) if as_stored and model.is_mxfp4 else own
        tensors |= {f"{trunk}.layers.{index}.{name}": shape for name, shape in own.items()}
    tensors[f"{trunk}.{norm}.weight"] = (hidden,)
    if not model.tie_word_embeddings:
        tensors["lm_head.weight"] = (model.vocab_size, hidden)
    return tensors


def layer_tensors(model: ModelRecord, layer: LayerRecord) -> dict[str, Shape]:
    """The tensors of one layer, named relative to the layer. A no-op sub-block has none, its norm included."""
    if layer.parallel:
        return {
            f"parallel_blocks.{index}.{name}": shape
            for index, block in enumerate(layer.parallel)
            for name, shape in layer_tensors(model, block).items()
        }
    if model.model_type in FAMILY_TENSORS:
        return FAMILY_TENSORS[model.model_type](model, layer)
    return _attention_tensors(model, layer) | _ffn_tensors(model, layer)


def num_layer_parameters(model: ModelRecord, layer: LayerRecord) -> int:
    """Parameters of one layer."""
    return sum(prod(shape) for shape in layer_tensors(model, layer).values())


def num_parameters(model: ModelRecord) -> int:
    """Parameters of the whole model; tied embeddings count once."""
    return sum(prod(shape) for shape in model_tensors(model).values())


def kv_bytes_per_token(model: ModelRecord, bytes_per_element: int = 2) -> int:
    """KV-cache bytes that one token takes over all layers, before any window frees them."""
    return bytes_per_element * sum(2 * spec.kv_size for spec in model.attentions)


def _attention_tensors(model: ModelRecord, layer: LayerRecord) -> dict[str, Shape]:
    hidden, attention = model.hidden_size, layer.attention
    if attention is None:
        return {}
    tensors: dict[str, Shape] = {"input_layernorm.weight": (hidden,)}
    if isinstance(attention, LinearMap):
        return tensors | {"self_attn.linear_attn.weight": (hidden, hidden)}
    if isinstance(attention, Mamba2):
        mixer = nemotron_h.mamba_tensors(hidden, attention)
        return tensors | {f"self_attn.mamba_mixer.{name}": shape for name, shape in mixer.items()}
    for name, size in (("q", attention.q_size), ("k", attention.kv_size), ("v", attention.kv_size)):
        tensors[f"self_attn.{name}_proj.weight"] = (size, hidden)
        if model.qkv_bias:
            tensors[f"self_attn.{name}_proj.bias"] = (size,)
    tensors["self_attn.o_proj.weight"] = (hidden, attention.q_size)
    if model.o_bias:
        tensors["self_attn.o_proj.bias"] = (hidden,)
    if model.qk_norm:
        tensors |= {f"self_attn.{name}_norm.weight": (attention.head_dim,) for name in "qk"}
    return tensors


def _ffn_tensors(model: ModelRecord, layer: LayerRecord) -> dict[str, Shape]:
    hidden, ffn = model.hidden_size, layer.ffn
    if ffn is None:
        return {}
    tensors: dict[str, Shape] = {"post_attention_layernorm.weight": (hidden,)}
    if isinstance(ffn, LinearMap):
        return tensors | {"mlp.linear_mlp.weight": (hidden, hidden)}
    if isinstance(ffn, GatedFFN):
        return tensors | _gated_tensors("mlp", hidden, ffn.intermediate_size, model.mlp_bias)
    assert isinstance(ffn, MoE), "every FFN kind has its tensors here"
    is_deci = model.model_type == "nemotron-nas"
    tensors[f"mlp.{'router' if is_deci else 'gate'}.weight"] = (ffn.num_experts, hidden)
    for expert in range(ffn.num_experts):
        tensors |= _gated_tensors(f"mlp.experts.{expert}", hidden, ffn.intermediate_size, is_deci and model.mlp_bias)
    if ffn.shared_intermediate_size:
        tensors |= _gated_tensors("mlp.shared_expert", hidden, ffn.shared_intermediate_size, model.mlp_bias)
    return tensors


def _gated_tensors(prefix: str, hidden: int, width: int, bias: bool) -> dict[str, Shape]:
    tensors: dict[str, Shape] = {}
    for name, out_size, in_size in (("gate", width, hidden), ("up", width, hidden), ("down", hidden, width)):
        tensors[f"{prefix}.{name}_proj.weight"] = (out_size, in_size)
        if bias:
            tensors[f"{prefix}.{name}_proj.bias"] = (out_size,)
    return tensors
