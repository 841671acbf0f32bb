"""vLLM's log-probabilities equal the plain-PyTorch reference's, for every block kind and every way of serving."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm_puzzle.model_configs.inspect_model import load_record
from vllm_puzzle.serving.cpu_defaults import cpu_settings
from vllm_puzzle.serving.reference_model import ReferenceModel

pytestmark = pytest.mark.slow

RUNNER = Path(__file__).with_name("engine_run.py")
# Mixed lengths in one batch: 1 token, below and above the windows (7, 24), across the 128-token KV blocks.
PROMPTS = [[(7 * i + 3 * n) % 97 for i in range(n)] for n in (1, 5, 23, 40, 77, 150)]


def run(folder: Path, llm: dict[str, Any], prompts: list[list[int]] | None = None, **job: Any) -> list[dict[str, Any]]:
    """One engine run; `rounds` in `job` replaces the single round of prompts."""
    num_ranks = llm.get("pipeline_parallel_size", 1) * llm.get("tensor_parallel_size", 1)
    chosen = cpu_settings(load_record(folder), num_ranks)
    settings = {s.name: s.value for s in chosen if not s.is_environment} | {"max_model_len": 256, "max_num_seqs": 8}
    settings |= {"dtype": "float32", "enforce_eager": True} | llm
    file, out = folder / "job.json", folder / "out.pt"
    job = {
        "model": str(folder),
        "llm": settings,
        "max_tokens": 9,
        "rounds": [prompts or PROMPTS],
        "out": str(out),
    } | job
    file.write_text(json.dumps(job))
    environment = os.environ | {s.name: str(s.value) for s in chosen if s.is_environment}
    command = [sys.executable, "-P", str(RUNNER), str(file)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-30000:] + done.stderr[-30000:]
    results: list[dict[str, Any]] = torch.load(out)
    return results


@torch.no_grad()
def assert_equal_to(reference: ReferenceModel, results: list[dict[str, Any]]) -> None:
    for result in results:
        logits = reference(torch.tensor(result["ids"]))
        expected = logits.log_softmax(-1)[-1 - len(result["logprobs"]) : -1]
        # Float32 on both sides, other summation order: each of a layer's 8 matrix or norm steps rounds sums of up to
        # 128 terms (sqrt(128) · 2^-24 relative, errors independent); they add up over the layers at worst linearly.
        bound = 8 * len(reference.record.layers) * 128**0.5 * 2**-24 * logits.abs().max().item()
        error = (result["logprobs"] - expected).abs().max().item()
        assert error <= bound, f"prompt of {len(result['ids'])} tokens: error {error:.2e}, bound {bound:.2e}"


@pytest.fixture(scope="module")
def deci(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ReferenceModel]:
    folder = tmp_path_factory.mktemp("deci")
    return folder, checkpoints.write_checkpoint(folder, checkpoints.deci_config(checkpoints.ALL_KINDS))


def test_every_deci_block_kind_in_a_batch_of_mixed_lengths(deci: tuple[Path, ReferenceModel]) -> None:
    folder, reference = deci
    results = run(folder, {})
    assert [len(result["ids"]) for result in results] == [len(prompt) + 9 for prompt in PROMPTS]
    assert_equal_to(reference, results)


def test_chunked_prefill_and_a_prefix_cache_hit(deci: tuple[Path, ReferenceModel]) -> None:
    folder, reference = deci
    llm = {"max_num_batched_tokens": 32, "block_size": 32, "enable_prefix_caching": True}
    longest = PROMPTS[-1]
    # Prompt log-probabilities switch the prefix cache off, so only the generated positions are compared.
    results = run(folder, llm, rounds=[PROMPTS, [longest]], prompt_logprobs=None)
    assert results[-1]["num_cached"] >= 64, "the second round must reuse cached blocks, else this test shows nothing"
    assert_equal_to(reference, results)


def test_hugging_faces_per_layer_config_with_skips(tmp_path: Path) -> None:
    reference = checkpoints.write_checkpoint(tmp_path, checkpoints.per_layer_config())
    assert_equal_to(reference, run(tmp_path, {}))


def test_vllms_own_loader_stops_at_a_missing_tensor_with_layer_and_name(tmp_path: Path) -> None:
    config = checkpoints.deci_config(checkpoints.ALL_KINDS[:3])
    checkpoints.write_checkpoint(tmp_path, config)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.2.self_attn.o_proj.weight"]  # the one that vLLM 0.32's own check lets pass
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(AssertionError, match=r"layer 2, tensor `self_attn\.o_proj\.weight`: found nothing"):
        run(tmp_path, {})


def test_torch_compile_gives_the_same(deci: tuple[Path, ReferenceModel]) -> None:
    folder, reference = deci
    # The dynamo trace is what differs between block kinds; generating C++ from it takes minutes and is torch's own.
    assert_equal_to(reference, run(folder, {"enforce_eager": False, "compilation_config": {"backend": "eager"}}))


def test_a_lora_adapter_equals_the_merged_weights(deci: tuple[Path, ReferenceModel], tmp_path: Path) -> None:
    folder, base = deci
    merged = ReferenceModel(base.record)
    merged.load_tensors(base.named_tensors())
    adapter = checkpoints.write_adapter(tmp_path, merged, rank=4)
    # Without prompt log-probabilities: vLLM 0.32's LoRA logits on CPU fail on them, with any model.
    llm = {"enable_lora": True, "max_lora_rank": 8}
    results = run(folder, llm, adapter=str(adapter), prompt_logprobs=None)
    assert_equal_to(merged, results)
    with pytest.raises(AssertionError, match="error"):
        assert_equal_to(base, results)


def test_tensor_parallelism_over_two_processes(deci: tuple[Path, ReferenceModel]) -> None:
    folder, reference = deci
    assert_equal_to(reference, run(folder, {"tensor_parallel_size": 2}))


def test_pipeline_parallelism_with_an_attention_free_first_stage(tmp_path: Path) -> None:
    blocks = [checkpoints.deci_block(None, 48), checkpoints.deci_block(None, None), *checkpoints.ALL_KINDS[2:4]]
    reference = checkpoints.write_checkpoint(tmp_path, checkpoints.deci_config(blocks))
    assert_equal_to(reference, run(tmp_path, {"pipeline_parallel_size": 2}))


def test_a_first_stage_of_empty_layers_only(tmp_path: Path) -> None:
    empty = checkpoints.deci_block(None, None)
    reference = checkpoints.write_checkpoint(
        tmp_path, checkpoints.deci_config([empty, empty, *checkpoints.ALL_KINDS[2:4]])
    )
    assert_equal_to(reference, run(tmp_path, {"pipeline_parallel_size": 2}))


@torch.no_grad()
def test_bfloat16_is_as_accurate_as_plain_pytorch_in_bfloat16(deci: tuple[Path, ReferenceModel]) -> None:
    folder, reference = deci
    results = run(folder, {"dtype": "bfloat16"})
    rounded = ReferenceModel(reference.record, torch.bfloat16)
    rounded.load_tensors({name: tensor.bfloat16() for name, tensor in reference.named_tensors().items()})
    exact = ReferenceModel(reference.record)
    exact.load_tensors({name: tensor.float() for name, tensor in rounded.named_tensors().items()})
    theirs, plain = [], []
    for result in results:
        ids, count = torch.tensor(result["ids"]), len(result["logprobs"])
        truth = exact(ids).log_softmax(-1)[-1 - count : -1]
        theirs.append((result["logprobs"] - truth).flatten())
        plain.append((rounded(ids).float().log_softmax(-1)[-1 - count : -1] - truth).flatten())
    # Both are roundings of the same computation; their RMS errors over some 30,000 values agree within a factor.
    assert torch.cat(theirs).pow(2).mean().sqrt() <= 1.5 * torch.cat(plain).pow(2).mean().sqrt()
