"""The plain-PyTorch model equals Hugging Face's where that can run: homogeneous Llama."""

from __future__ import annotations

from typing import Any

import checkpoints
import pytest
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM
from vllm_puzzle.model_configs.formats import read_model
from vllm_puzzle.model_configs.schema import ConfigError
from vllm_puzzle.serving.reference_model import ReferenceModel


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rope_type", ["default", "llama3"])
def test_a_homogeneous_llama_has_hugging_faces_logits(tied: bool, bias: bool, rope_type: str) -> None:
    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    rope = {"rope_type": rope_type, "rope_theta": 1e4} | (llama3 if rope_type == "llama3" else {})
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=88, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=24, tie_word_embeddings=tied, attention_bias=bias, mlp_bias=bias,
        rope_parameters=rope,
    )  # fmt: skip
    theirs = LlamaForCausalLM(config).eval()
    for parameter in theirs.parameters():
        parameter.data.normal_(std=0.15)
    ours = ReferenceModel(read_model(config.to_dict()))
    state = theirs.state_dict()
    if tied:
        state.pop("lm_head.weight")
    ours.load_tensors(state)
    tokens = torch.randint(0, 97, (2, 61))
    with torch.no_grad():
        expected, found = theirs(tokens).logits, ours(tokens)
    # Both do the same float32 steps in another order: 3 layers · about 8 roundings of relative size 2^-24 each, on
    # sums of up to 96 terms.
    torch.testing.assert_close(found, expected, rtol=0, atol=3 * 8 * 96**0.5 * 2**-24 * expected.abs().max().item())


@pytest.mark.parametrize(
    ("ours", "config_class", "model_class", "changes"),
    [
        ("mistral", "MistralConfig", "MistralForCausalLM", {"sliding_window": 20}),
        (
            "qwen2",
            "Qwen2Config",
            "Qwen2ForCausalLM",
            {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1},
        ),
        ("qwen3", "Qwen3Config", "Qwen3ForCausalLM", {"attention_bias": True}),
    ],
)
@torch.no_grad()
def test_the_other_families_have_hugging_faces_logits(
    ours: str, config_class: str, model_class: str, changes: dict[str, Any]
) -> None:
    config = getattr(transformers, config_class)(
        vocab_size=97, hidden_size=64, intermediate_size=88, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=24, rope_parameters={"rope_type": "default", "rope_theta": 1e4}, **changes,
    )  # fmt: skip
    if ours == "qwen2":
        config.head_dim = 16  # its class has no such field and computes hidden_size / heads
    theirs = getattr(transformers, model_class)(config).eval()
    for parameter in theirs.parameters():
        parameter.data.normal_(std=0.15)
    record = read_model(config.to_dict())
    assert record.model_type == ours
    model = ReferenceModel(record)
    model.load_tensors(theirs.state_dict())
    tokens = torch.randint(0, 97, (2, 61))
    expected, found = theirs(tokens).logits, model(tokens)
    # The bound of the Llama test above, for the same sizes.
    torch.testing.assert_close(found, expected, rtol=0, atol=3 * 8 * 96**0.5 * 2**-24 * expected.abs().max().item())


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
