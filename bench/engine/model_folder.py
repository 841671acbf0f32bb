"""The folder that an engine is started from: config.json at its published or stated sizes, and a synthetic tokenizer.

Weights are random (`--load-format dummy`), so the folder holds none; the pocket models are shipped with theirs. What
the configuration says about precision decides how the dummy weights are shaped: FP8 is ModelOpt's scheme, one scale
per matrix, as NVIDIA publishes it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vllm_puzzle.bench.engine.case import EngineVariant
from vllm_puzzle.model_configs.catalogue import find
from vllm_puzzle.model_configs.convert import convert_config
from vllm_puzzle.model_configs.ffn_fusion import fuse, requested_plan
from vllm_puzzle.model_configs.formats import read_model
from vllm_puzzle.model_configs.schema import Attention, ConfigError, Mamba2, ModelRecord, MoE

POCKET = {"pocket-parent": "parent", "pocket-puzzle": "puzzle"}
ROPE_3_1 = {
    "factor": 8.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
# Homogeneous Llamas, for what our class costs: small ones as serving/cpu_measurement.py has them, and the 8B's shape
# (meta-llama/Llama-3.1-8B: its published sizes).
LLAMAS: dict[str, dict[str, Any]] = {
    "llama-h512": {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 8},
    "llama-h1024": {"hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 16},
    "llama-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072, "rope_theta": 500000.0,
        "rope_scaling": ROPE_3_1,
    },
}  # fmt: skip
OWN = (*POCKET, *LLAMAS)
# Of the reconstructed gpt-oss-puzzle these keys are not public. Speed does not depend on the values (the rotary table
# has the same size under any factor), so its parent's stand in.
PARENTS_KEYS = ("attention_bias", "rms_norm_eps", "rope_scaling", "rope_theta", "sliding_window", "swiglu_limit",
                "quantization_config")  # fmt: skip
FP8 = {"quant_method": "modelopt", "quant_algo": "FP8", "producer": {"name": "modelopt"}}
NEMOTRON = ("nemotron_h", "nemotron_h_puzzle")


def pocket_folder(model: str) -> Path | None:
    """The shipped folder of a pocket model; None for every other."""
    if model not in POCKET:
        return None
    return Path(__file__).resolve().parents[2] / "model_configs" / "pocket" / POCKET[model]


def configuration(variant: EngineVariant) -> dict[str, Any]:
    """The config.json of a variant. Raises ConfigError for an unknown model or a precision that it cannot have."""
    config = _stored(variant.model)
    if variant.as_decilm:
        config = convert_config(config, "deci")
    if variant.weights == "stored":
        return config
    stored = weights_of(variant.model)
    if variant.weights == "fp8" and stored == "bf16":
        return config | {"quantization_config": FP8 | {"ignore": unquantized(read_model(config))}}
    if variant.weights != stored:
        raise ConfigError(
            f"variant {variant.name}, key `weights`: found {variant.weights!r}, allowed: {stored!r} as published"
            + (", 'fp8'" if stored == "bf16" else "")
        )
    return config


def record_of(variant: EngineVariant) -> ModelRecord:
    """The layers that a variant serves, fused FFNs as one."""
    config = {**configuration(variant), **variant.flags.get("hf_overrides", {})}
    record = read_model(config)
    return fuse(record, requested_plan(record, config))


def weights_of(model: str) -> str:
    """How the weights of a model are published: a word of case.WEIGHTS but `stored`."""
    return "bf16" if model in OWN else find(model).served_as


def served_weights(variant: EngineVariant) -> str:
    """How a variant's weights are held."""
    return weights_of(variant.model) if variant.weights == "stored" else variant.weights


def is_reconstructed(model: str) -> bool:
    """Whether a model's configuration is not the published file."""
    return model not in OWN and find(model).is_reconstructed


def unquantized(record: ModelRecord) -> list[str]:
    """Modules that an FP8 checkpoint keeps in 16 bits: the output matrix and routers; of NemotronH also the attention
    layers, the Mamba layer before each, and every short convolution (Nemotron 3 Nano, arXiv 2512.20848).
    """
    kept = ["lm_head"]
    last_mamba: int | None = None
    for index, layer in enumerate(record.layers):
        mixer = f"backbone.layers.{index}.mixer"
        if isinstance(layer.attention, Mamba2):
            last_mamba = index
            kept.append(f"{mixer}.conv1d")
        elif isinstance(layer.attention, Attention) and last_mamba is not None:
            kept += [f"backbone.layers.{last_mamba}.mixer.{name}_proj" for name in ("in", "out")]
            kept += [f"{mixer}.{name}_proj" for name in "qkvo"]
        elif isinstance(layer.ffn, MoE):
            kept.append(f"{mixer}.gate" if record.model_type in NEMOTRON else f"model.layers.{index}.mlp.gate")
    return kept


def write_folder(variant: EngineVariant, folder: Path) -> Path:
    """Write a variant's configuration and tokenizer into `folder`; of a pocket model, return the shipped folder."""
    shipped = pocket_folder(variant.model)
    if shipped is not None:
        return shipped
    config = configuration(variant)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    write_tokenizer(folder, int(config["vocab_size"]), int(config["max_position_embeddings"]))
    return folder


def write_tokenizer(folder: Path, vocab_size: int, max_length: int) -> None:
    """A tokenizer of `vocab_size` words, `w0 w1 …`, parted by blanks; w0 stands for any other word, w1 ends a text."""
    vocab = {f"w{index}": index for index in range(vocab_size)}
    tokenizer: Mapping[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "w0"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, separators=(",", ":")) + "\n")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "w0",
        "eos_token": "w1",
        "pad_token": "w1",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")


def _stored(model: str) -> dict[str, Any]:
    shipped = pocket_folder(model)
    if shipped is not None:
        config: dict[str, Any] = json.loads((shipped / "config.json").read_text())
        return config
    if model in LLAMAS:
        return _llama(**LLAMAS[model])
    config = {key: value for key, value in find(model).config().items() if not key.startswith("_")}
    if config.get("model_type") == "gpt_oss_puzzle":
        parent = find("gpt-oss-120b").config()
        config = {key: parent[key] for key in PARENTS_KEYS} | config
    config.pop("auto_map", None)  # remote code: not run, and not in the folder
    return config


def _llama(**sizes: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 32000,
        "intermediate_size": 4 * sizes["hidden_size"],
        "num_hidden_layers": 8,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    } | sizes
