"""Small random heterogeneous checkpoints in published formats, for the serving tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from vllm_puzzle.kernels.reference import mxfp4_dequantize
from vllm_puzzle.model_configs.formats import read_model
from vllm_puzzle.model_configs.gpt_oss import mxfp4_tensors
from vllm_puzzle.serving.reference_model import ReferenceModel

BASE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


def deci_block(group: int | str | None, width: int | str | None, window: int | None = None) -> dict[str, Any]:
    """One `block_configs` entry; "linear" stands for the linear map, None for the no-op."""
    attention = {
        "n_heads_in_group": group if isinstance(group, int) else None,
        "no_op": group is None,
        "num_sink_tokens": None,
        "replace_with_linear": group == "linear",
        "sparsify": None,
        "unshifted_sink": False,
        "use_prefill_window_in_sink_attention": False,
        "window_length": window,
    }
    ffn = {
        "intermediate_size": width if isinstance(width, int) else None,
        "no_op": width is None,
        "replace_with_linear": width == "linear",
        "sparsify": None,
    }
    return {"attention": attention, "ffn": ffn}


# Every block kind, a wholly empty first layer, a leading attention-free layer, three KV-head counts, two windows.
ALL_KINDS = [
    deci_block(None, None),
    deci_block(None, 48),
    deci_block(1, 96),
    deci_block(2, 40, window=24),
    deci_block("linear", 64),
    deci_block(4, None),
    deci_block(None, 32),
    deci_block(2, "linear"),
    deci_block(1, "linear", window=7),
    deci_block("linear", None),
]


def deci_config(blocks: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    return (
        BASE
        | {
            "architectures": ["DeciLMForCausalLM"],
            "model_type": "nemotron-nas",
            "auto_map": {"AutoConfig": "configuration_decilm.DeciLMConfig"},
            "num_key_value_heads": None,
            "intermediate_size": None,
            "num_hidden_layers": len(blocks),
            "block_configs": blocks,
        }
        | changes
    )


def per_layer_config(**changes: Any) -> dict[str, Any]:
    """Llama with Hugging Face's sparse overrides: skips, widths, KV heads and a window."""
    return (
        BASE
        | {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "num_key_value_heads": 4,
            "intermediate_size": 96,
            "num_hidden_layers": 6,
            "sliding_window": None,
            "per_layer_config": {
                "0": {"skip": ["attention"]},
                "1": {"num_key_value_heads": 1},
                "2": {"skip": ["mlp"], "num_key_value_heads": 2},
                "3": {"sliding_window": 16, "intermediate_size": 40},
                "4": {"skip": ["self_attn", "mlp"]},
            },
        }
        | changes
    )


def reference(config: dict[str, Any], scale: float = 0.15) -> ReferenceModel:
    """A reference model with random weights large enough that every block changes the logits."""
    generator = torch.Generator().manual_seed(1)
    model = ReferenceModel(read_model(config))
    for name, tensor in model.named_tensors().items():
        if name.endswith("norm.weight"):
            tensor.data.uniform_(0.5, 1.5, generator=generator)
        else:
            tensor.data.normal_(std=scale, generator=generator)
    return model


def write_checkpoint(folder: Path, config: dict[str, Any]) -> ReferenceModel:
    """Write config.json and model.safetensors in the configuration's own dtype (and MXFP4 experts where it says so);
    returns the model that they stand for, in float32.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = reference(config)
    tensors = {}
    for name, tensor in model.named_tensors().items():
        if model.record.is_mxfp4 and tensor.ndim == 3:
            tensors |= _as_mxfp4(name, tensor)
            continue
        tensors[name] = tensor.detach().to(getattr(torch, model.record.dtype)).clone()
        tensor.data.copy_(tensors[name])
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return model


def _as_mxfp4(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Random blocks and scales under their published names; `tensor`, [E, in, out], becomes what they stand for."""
    shapes = mxfp4_tensors({name: tuple(tensor.shape)})
    generator = torch.Generator().manual_seed(len(name) + int(name.split(".")[2]))
    blocks = torch.randint(0, 256, shapes[f"{name}_blocks"], generator=generator, dtype=torch.uint8)
    # Exponents of 2^-5 to 2^-3; the values have a mean square of about 2.5, as weights of about 0.15 should.
    scales = torch.randint(122, 125, shapes[f"{name}_scales"], generator=generator, dtype=torch.uint8)
    tensor.data.copy_(mxfp4_dequantize(blocks, scales, torch.float32).transpose(1, 2))
    return {f"{name}_blocks": blocks, f"{name}_scales": scales}


@torch.no_grad()
def write_adapter(folder: Path, model: ReferenceModel, rank: int, leave_out: str = "no such name") -> Path:
    """Write a random LoRA adapter in PEFT's format for every matrix of the layers whose name does not hold `leave_out`,
    and merge it into `model`.
    """
    generator = torch.Generator().manual_seed(2)
    tensors, targets = {}, set()
    for name, weight in model.named_tensors().items():
        if not name.startswith("model.layers.") or weight.ndim != 2 or leave_out in name:
            continue
        down = torch.randn(rank, weight.shape[1], generator=generator) * 0.1
        up = torch.randn(weight.shape[0], rank, generator=generator) * 0.1
        weight += 2.0 * up @ down
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        tensors |= {f"{prefix}.lora_A.weight": down, f"{prefix}.lora_B.weight": up}
        targets.add(name.split(".")[-2])
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": sorted(targets), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
