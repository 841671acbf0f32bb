"""The plain-PyTorch model equals Hugging Face's where that can run: every homogeneous family, from its own files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
import transformers
from safetensors.torch import load_file
from vllm_puzzle.model_configs.formats import read_model
from vllm_puzzle.model_configs.schema import ConfigError
from vllm_puzzle.serving.reference_model import ReferenceModel

SIZES: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 88, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 24, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 1.5e5, "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 32,
}  # fmt: skip
# Where Hugging Face can run the same model: every homogeneous family, and with it what a layer's own sizes vary.
# Chained with the tests of vLLM against this reference, a heterogeneous model whose layers are equal has their logits.
HOMOGENEOUS: dict[str, tuple[str, dict[str, Any]]] = {
    f"llama{', tied' * tied}{', biased' * bias}, {rope['rope_type']}": (
        "Llama",
        {"tie_word_embeddings": tied, "attention_bias": bias, "mlp_bias": bias, "rope_parameters": rope},
    )
    for tied in (False, True)
    for bias in (False, True)
    for rope in (SIZES["rope_parameters"], LLAMA3, YARN, YARN | {"truncate": True, "attention_factor": 1.3})
} | {
    "mistral, window": ("Mistral", {"sliding_window": 20}),
    # Qwen2's class has no head size of its own.
    "qwen2, window": (
        "Qwen2", {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1, "head_dim": 16}
    ),
    "qwen3, biased": ("Qwen3", {"attention_bias": True}),
    "qwen3, window": ("Qwen3", {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 2}),
    "gpt-oss": (
        "GptOss",
        {"intermediate_size": 32, "num_local_experts": 8, "num_experts_per_tok": 3, "sliding_window": 20,
         "rope_parameters": YARN},
    ),
} | {
    f"qwen3-moe, {'renormalized' if normed else 'plain'}": (
        "Qwen3Moe",
        {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": normed,
         "mlp_only_layers": [1], "use_sliding_window": True, "sliding_window": 20},
    )
    for normed in (False, True)
}  # fmt: skip


@pytest.mark.parametrize("name", HOMOGENEOUS)
@torch.no_grad()
def test_a_homogeneous_model_has_hugging_faces_logits(tmp_path: Path, name: str) -> None:
    family, changes = HOMOGENEOUS[name]
    theirs = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**SIZES | changes))
    for parameter in theirs.eval().parameters():
        parameter.normal_(std=0.15)
    theirs.save_pretrained(tmp_path)  # their tensor names and their config.json are what is read
    model = ReferenceModel(read_model(json.loads((tmp_path / "config.json").read_text())))
    model.load_tensors(load_file(tmp_path / "model.safetensors"))
    tokens = torch.randint(0, 97, (2, 61))
    expected, found = theirs(tokens).logits, model(tokens)
    # Both do the same float32 steps in another order: 3 layers · about 8 roundings of relative size 2^-24 each, on
    # sums of up to 96 terms.
    torch.testing.assert_close(found, expected, rtol=0, atol=3 * 8 * 96**0.5 * 2**-24 * expected.abs().max().item())


@torch.no_grad()
def test_the_clamp_of_gpt_oss_is_hugging_faces(tmp_path: Path) -> None:
    changes = HOMOGENEOUS["gpt-oss"][1]
    theirs = transformers.GptOssForCausalLM(transformers.GptOssConfig(**SIZES | changes | {"num_hidden_layers": 1}))
    for name, parameter in theirs.eval().named_parameters():
        # Large biases push gate and up projections beyond the limit of 7 on both sides.
        parameter.normal_(std=8.0 if name.endswith("gate_up_proj_bias") else 0.15)
    theirs.save_pretrained(tmp_path)
    model = ReferenceModel(read_model(json.loads((tmp_path / "config.json").read_text())))
    model.load_tensors(load_file(tmp_path / "model.safetensors"))
    tokens = torch.randint(0, 97, (61,))
    expected, found = theirs(tokens[None]).logits[0], model(tokens)
    # One layer of the bound above; the clamped values, up to 7 · 8, are its largest terms.
    torch.testing.assert_close(found, expected, rtol=0, atol=8 * 96**0.5 * 2**-24 * 56)


@torch.no_grad()
def test_an_empty_layer_changes_nothing_and_a_missing_sub_block_has_no_tensors() -> None:
    live = checkpoints.deci_block(2, 48)
    with_empty = checkpoints.reference(checkpoints.deci_config([live, checkpoints.deci_block(None, None)]))
    without = ReferenceModel(read_model(checkpoints.deci_config([live])))
    without.load_tensors(with_empty.named_tensors())
    tokens = torch.arange(20)
    assert torch.equal(with_empty(tokens), without(tokens))


@torch.no_grad()
def test_every_block_kind_changes_the_logits() -> None:
    tokens = torch.arange(40) % 97
    full = checkpoints.reference(checkpoints.deci_config(checkpoints.ALL_KINDS))
    expected = full(tokens)
    for name, tensor in full.named_tensors().items():
        saved = tensor.data.clone()
        tensor.data.mul_(0.5)
        assert (full(tokens) - expected).abs().max() > 1e-3, f"{name} has no effect"
        tensor.data.copy_(saved)


def test_a_checkpoint_with_other_tensors_is_refused() -> None:
    model = checkpoints.reference(checkpoints.deci_config([checkpoints.deci_block(2, 48)]))
    tensors = dict(model.named_tensors())
    del tensors["model.norm.weight"]
    with pytest.raises(ConfigError, match=r"missing \['model\.norm\.weight'\]"):
        model.load_tensors(tensors)
