"""gpt-oss-puzzle as stored: MXFP4 experts, calibrated KV scales under three names, the end token its files forget."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import checkpoints
import families
import pytest
import torch
from parity import Jobs
from safetensors.torch import save_file
from vllm_puzzle.kernels.reference import mxfp4_dequantize
from vllm_puzzle.model_configs.formats import read_model
from vllm_puzzle.model_configs.tensors import model_tensors

# The published `quantization_config` of gpt-oss.
MXFP4 = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}
PLAIN = families.FAMILIES["gpt_oss_puzzle"] | {"torch_dtype": "bfloat16"}
PACKED = PLAIN | {"quantization_config": MXFP4}
SCALE_NAMES = {
    "beside the attention": "self_attn.{}_scale",
    "on the attention op": "self_attn.attn.{}_scale",
    "on the projections": "self_attn.{0}_proj.{0}_scale",
}
Tensors = dict[str, torch.Tensor]


def packed_tensors() -> Tensors:
    """A random checkpoint as published: bf16, but experts in MXFP4 blocks and scales."""
    generator = torch.Generator().manual_seed(5)
    named, tensors = checkpoints.reference(PLAIN).named_tensors(), {}
    for name, shape in model_tensors(read_model(PACKED), as_stored=True).items():
        low, high = (0, 256) if name.endswith("_blocks") else (120, 126)  # every code; scales of 2^-7 to 2^-2
        is_packed = name.endswith(("_blocks", "_scales"))
        random = torch.randint(low, high, shape, dtype=torch.uint8, generator=generator)
        tensors[name] = random if is_packed else named[name].detach().bfloat16()
    return tensors


def unpacked(tensors: Tensors) -> Tensors:
    """The same checkpoint in gpt-oss's bf16 layout."""
    plain = {name: t for name, t in tensors.items() if t.dtype != torch.uint8}
    for name in model_tensors(read_model(PLAIN)):
        if name not in plain:
            matrix = mxfp4_dequantize(tensors[f"{name}_blocks"], tensors[f"{name}_scales"], torch.bfloat16)
            plain[name] = matrix.transpose(1, 2).contiguous()
    return plain


def write(folder: Path, config: dict[str, Any], tensors: Tensors) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def scales(pattern: str) -> Tensors:
    """A different pair per layer, every number exact in binary."""
    return {
        f"model.layers.{layer}.{pattern.format(of)}": torch.tensor((layer + 1) / 8 + (of == "v") / 16)
        for layer in range(len(families.PUZZLE_BLOCKS))
        for of in "kv"
    }


@pytest.mark.slow
def test_mxfp4_experts_equal_the_matrices_they_stand_for_to_the_last_bit(tmp_path: Path) -> None:
    tensors = packed_tensors()
    jobs = Jobs(tmp_path)
    jobs.add("packed", write(tmp_path / "packed", PACKED, tensors), {"dtype": "bfloat16"})
    jobs.add("plain", write(tmp_path / "plain", PLAIN, unpacked(tensors)), {"dtype": "bfloat16"})
    # Scales of an FP8 cache change nothing where the cache is not FP8.
    scaled = tensors | scales(SCALE_NAMES["beside the attention"])
    jobs.add("scaled", write(tmp_path / "scaled", PACKED, scaled), {"dtype": "bfloat16"})
    outcomes = jobs.run()
    for name in ("packed", "scaled"):
        assert isinstance(outcomes[name], list), outcomes[name]
        for ours, plain in zip(outcomes[name], outcomes["plain"], strict=True):
            assert torch.equal(ours["logprobs"], plain["logprobs"])


@pytest.mark.slow
def test_kv_scales_are_loaded_under_each_of_their_names(tmp_path: Path) -> None:
    tensors, arguments = packed_tensors(), {"dtype": "bfloat16", "kv_cache_dtype": "fp8", "enforce_eager": True}
    jobs = []
    for index, pattern in enumerate(SCALE_NAMES.values()):
        folder = write(tmp_path / str(index), PACKED, tensors | scales(pattern))
        jobs.append({"model": str(folder), "llm": arguments | {"max_model_len": 64, "kv_cache_memory_bytes": 1 << 24}})
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run(
        [sys.executable, "-P", str(Path(__file__).with_name("load_model.py")), str(tmp_path / "jobs.json")],
        env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"model.')]
    wanted = {f"model.layers.{i}.self_attn.attn": [(i + 1) / 8, (i + 1) / 8 + 1 / 16] for i in range(5)}
    assert found == [wanted] * len(SCALE_NAMES)


@pytest.mark.gpu
def test_an_fp8_cache_with_calibrated_scales_answers_as_the_bf16_cache_does(tmp_path: Path) -> None:
    tensors = packed_tensors() | scales(SCALE_NAMES["beside the attention"])
    folder, jobs = write(tmp_path / "model", PACKED, tensors), Jobs(tmp_path)
    for cache in ("auto", "fp8"):
        jobs.add(cache, folder, {"dtype": "bfloat16", "kv_cache_dtype": cache})
    outcomes = jobs.run()
    assert isinstance(outcomes["fp8"], list), outcomes["fp8"]
    for fp8, plain in zip(outcomes["fp8"], outcomes["auto"], strict=True):
        # e4m3 keeps 3 bits: 6 % per cached element, averaged over the head; a wrong scale would be off by factors.
        assert (fp8["logprobs"][0] - plain["logprobs"][0]).abs().mean() < 0.5


@pytest.mark.parametrize(("vocabulary", "expected"), [(201088, [200002, 199999, 200012]), (97, [200002, 199999])])
def test_a_turn_ends_at_a_tool_call_too(tmp_path: Path, vocabulary: int, expected: list[int]) -> None:
    from vllm.engine.arg_utils import EngineArgs

    (tmp_path / "config.json").write_text(json.dumps(PLAIN | {"vocab_size": vocabulary}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [200002, 199999]}))
    model = EngineArgs(str(tmp_path), skip_tokenizer_init=True).create_model_config()
    assert model.try_get_generation_config()["eos_token_id"] == expected


def test_to_vllm_it_is_a_gpt_oss_with_its_quantization_and_parser(tmp_path: Path) -> None:
    from vllm.engine.arg_utils import EngineArgs

    (tmp_path / "config.json").write_text(json.dumps(PACKED))
    arguments = EngineArgs(str(tmp_path), skip_tokenizer_init=True, kv_cache_memory_bytes=1 << 24, enforce_eager=True)
    config = arguments.create_engine_config()
    # Harmony rendering and parsing hang on the model type, MXFP4 experts on the quantization's name.
    assert config.model_config.hf_config.model_type == "gpt_oss"
    assert config.model_config.quantization == "gpt_oss_mxfp4"
    assert config.structured_outputs_config.reasoning_parser == "openai_gptoss"
    assert config.model_config.get_num_experts() == 8
