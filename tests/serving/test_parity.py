"""vLLM's log-probabilities equal the plain-PyTorch reference's, for every block kind and every way of serving."""

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
from safetensors.torch import load_file, save_file
from vllm_puzzle.model_configs.inspect_model import load_record
from vllm_puzzle.model_configs.partition import split_layers
from vllm_puzzle.serving.cpu_defaults import cpu_settings
from vllm_puzzle.serving.reference_model import ReferenceModel

pytestmark = pytest.mark.slow

RUNNER = Path(__file__).with_name("engine_run.py")
# Mixed lengths in one batch: 1 token, below and above the windows (7, 24), across the 128-token KV blocks.
PROMPTS = [[(7 * i + 3 * n) % 97 for i in range(n)] for n in (1, 5, 23, 40, 77, 150)]
Results = list[dict[str, Any]]


class Jobs:
    """Engine runs to be done in one process, and their outcomes: results, or the error as text."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.jobs, self.environment = folder, [], dict(os.environ)  # type: ignore[var-annotated]
        self.log = ""

    def add(self, name: str, model: Path, llm: dict[str, Any] | None = None, **job: Any) -> None:
        """Serve `model` with our CPU settings, changed by `llm`."""
        llm = llm or {}
        num_ranks = llm.get("pipeline_parallel_size", 1) * llm.get("tensor_parallel_size", 1)
        chosen = cpu_settings(load_record(model), num_ranks)
        self.environment |= {s.name: str(s.value) for s in chosen if s.is_environment}
        settings = {s.name: s.value for s in chosen if not s.is_environment} | {"max_model_len": 256, "max_num_seqs": 8}
        settings |= {"dtype": "float32"} | llm
        out = str(self.folder / f"{name}.pt")
        rest = {"max_tokens": 9, "rounds": [PROMPTS]} | job
        self.jobs.append({"model": str(model), "llm": settings, "out": out} | rest)

    def run(self) -> dict[str, Any]:
        file = self.folder / "jobs.json"
        file.write_text(json.dumps(self.jobs))
        command = [sys.executable, "-P", str(RUNNER), str(file)]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        self.log = done.stdout + done.stderr
        outcomes = {Path(job["out"]).stem: torch.load(job["out"]) for job in self.jobs}
        return {k: v if not isinstance(v, str) else v + self.log for k, v in outcomes.items()}


def bound(reference: ReferenceModel, logits: torch.Tensor) -> float:
    """Float32 on both sides, other summation order: each of a layer's 8 matrix or norm steps rounds sums of up to 128
    terms (sqrt(128) · 2^-24 relative, errors independent); over the layers they add up at worst linearly.
    """
    return 8 * len(reference.record.layers) * 128**0.5 * 2**-24 * logits.abs().max().item()


@torch.no_grad()
def assert_equal_to(reference: ReferenceModel, results: Results) -> None:
    assert isinstance(results, list), results
    for result in results:
        logits = reference(torch.tensor(result["ids"]))
        expected = logits.log_softmax(-1)[-1 - len(result["logprobs"]) : -1]
        error = (result["logprobs"] - expected).abs().max().item()
        limit = bound(reference, logits)
        assert error <= limit, f"prompt of {len(result['ids'])} tokens: error {error:.2e}, bound {limit:.2e}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parity")


@pytest.fixture(scope="module")
def deci(folder: Path) -> ReferenceModel:
    """A DeciLM checkpoint with every block kind, in `folder / "deci"`."""
    return checkpoints.write_checkpoint(folder / "deci", checkpoints.deci_config(checkpoints.ALL_KINDS))


@pytest.fixture(scope="module")
def family_references(folder: Path) -> dict[str, ReferenceModel]:
    return {name: checkpoints.write_checkpoint(folder / name, c) for name, c in families.FAMILIES.items()}


@pytest.fixture(scope="module")
def merged(folder: Path, deci: ReferenceModel) -> ReferenceModel:
    """The DeciLM model with the LoRA adapter in `folder / "adapter"` merged in."""
    model = ReferenceModel(deci.record)
    model.load_tensors(deci.named_tensors())
    (folder / "adapter").mkdir()
    checkpoints.write_adapter(folder / "adapter", model, rank=4)
    return model


@pytest.fixture(scope="module")
def outcomes(
    folder: Path, deci: ReferenceModel, family_references: dict[str, ReferenceModel], merged: ReferenceModel
) -> dict[str, Any]:
    """All runs that need one rank, in one process."""
    jobs, model = Jobs(folder), folder / "deci"
    jobs.add("mixed", model)
    # Prompt log-probabilities switch the prefix cache off, so only the generated positions are compared.
    chunks = {"max_num_batched_tokens": 32, "block_size": 32, "enable_prefix_caching": True}
    jobs.add("chunked", model, chunks, rounds=[PROMPTS, [PROMPTS[-1]]], prompt_logprobs=None)
    # The dynamo trace is what differs between block kinds; generating C++ from it takes minutes and is torch's own.
    jobs.add("compiled", model, {"enforce_eager": False, "compilation_config": {"backend": "eager"}})
    jobs.add("bfloat16", model, {"dtype": "bfloat16"})
    # Without prompt log-probabilities: vLLM 0.32's LoRA logits on CPU fail on them, with any model.
    lora = {"enable_lora": True, "max_lora_rank": 8}
    jobs.add("lora", model, lora, adapter=str(folder / "adapter"), prompt_logprobs=None)
    for name in family_references:
        jobs.add(name, folder / name)
    checkpoints.write_checkpoint(folder / "incomplete", checkpoints.deci_config(checkpoints.ALL_KINDS[:3]))
    tensors = load_file(folder / "incomplete" / "model.safetensors")
    del tensors["model.layers.2.self_attn.o_proj.weight"]  # the one that vLLM 0.32's own check lets pass
    save_file(tensors, folder / "incomplete" / "model.safetensors")
    jobs.add("incomplete", folder / "incomplete")
    return jobs.run()


def test_every_deci_block_kind_in_a_batch_of_mixed_lengths(deci: ReferenceModel, outcomes: dict[str, Any]) -> None:
    assert_equal_to(deci, outcomes["mixed"])
    assert [len(result["ids"]) for result in outcomes["mixed"]] == [len(prompt) + 9 for prompt in PROMPTS]


def test_chunked_prefill_and_a_prefix_cache_hit(deci: ReferenceModel, outcomes: dict[str, Any]) -> None:
    assert_equal_to(deci, outcomes["chunked"])
    assert outcomes["chunked"][-1]["num_cached"] >= 64, "the second round must reuse blocks, else this shows nothing"


def test_torch_compile_gives_the_same(deci: ReferenceModel, outcomes: dict[str, Any]) -> None:
    assert_equal_to(deci, outcomes["compiled"])


def test_a_lora_adapter_equals_the_merged_weights(
    deci: ReferenceModel, merged: ReferenceModel, outcomes: dict[str, Any]
) -> None:
    assert_equal_to(merged, outcomes["lora"])
    with pytest.raises(AssertionError, match="error"):
        assert_equal_to(deci, outcomes["lora"])


@pytest.mark.parametrize("name", families.FAMILIES)
def test_each_family_and_spelling(
    family_references: dict[str, ReferenceModel], outcomes: dict[str, Any], name: str
) -> None:
    assert_equal_to(family_references[name], outcomes[name])


def test_vllms_own_loader_stops_at_a_missing_tensor_with_layer_and_name(outcomes: dict[str, Any]) -> None:
    assert "layer 2, tensor `self_attn.o_proj.weight`: found nothing in the checkpoint" in outcomes["incomplete"]


@torch.no_grad()
def test_bfloat16_is_as_accurate_as_plain_pytorch_in_bfloat16(deci: ReferenceModel, outcomes: dict[str, Any]) -> None:
    assert isinstance(outcomes["bfloat16"], list), outcomes["bfloat16"]
    rounded = ReferenceModel(deci.record, torch.bfloat16)
    rounded.load_tensors({name: tensor.bfloat16() for name, tensor in deci.named_tensors().items()})
    exact = ReferenceModel(deci.record)
    exact.load_tensors({name: tensor.float() for name, tensor in rounded.named_tensors().items()})
    theirs, plain = [], []
    for result in outcomes["bfloat16"]:
        ids, count = torch.tensor(result["ids"]), len(result["logprobs"])
        truth = exact(ids).log_softmax(-1)[-1 - count : -1]
        theirs.append((result["logprobs"] - truth).flatten())
        plain.append((rounded(ids).float().log_softmax(-1)[-1 - count : -1] - truth).flatten())
    # Both are roundings of the same computation; their RMS errors over some 30,000 values agree within a factor.
    assert torch.cat(theirs).pow(2).mean().sqrt() <= 1.5 * torch.cat(plain).pow(2).mean().sqrt()


def test_tensor_parallelism_over_two_processes(folder: Path, deci: ReferenceModel) -> None:
    jobs = Jobs(folder)
    jobs.add("tensor", folder / "deci", {"tensor_parallel_size": 2})
    assert_equal_to(deci, jobs.run()["tensor"])


EMPTY = checkpoints.deci_block(None, None)
FIRST_STAGES = {"attention-free": [checkpoints.deci_block(None, 48), EMPTY], "empty": [EMPTY, EMPTY]}


@pytest.mark.parametrize("kind", FIRST_STAGES)
def test_pipeline_parallelism_with_a_first_stage_without_attention(tmp_path: Path, kind: str) -> None:
    config = checkpoints.deci_config([*FIRST_STAGES[kind], *checkpoints.ALL_KINDS[2:4]])
    reference = checkpoints.write_checkpoint(tmp_path / "model", config)
    jobs = Jobs(tmp_path)
    jobs.environment["VLLM_PP_LAYER_PARTITION"] = "2,2"
    jobs.add("pipeline", tmp_path / "model", {"pipeline_parallel_size": 2})
    assert_equal_to(reference, jobs.run()["pipeline"])


def test_pipeline_parallelism_cut_by_cost(folder: Path, deci: ReferenceModel) -> None:
    assert split_layers(deci.record, 2) != (5, 5), "by count the split would be the same, and this would show nothing"
    jobs = Jobs(folder)
    jobs.add("by cost", folder / "deci", {"pipeline_parallel_size": 2})
    assert_equal_to(deci, jobs.run()["by cost"])
