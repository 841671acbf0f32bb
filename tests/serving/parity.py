"""Engine runs in one process, and the comparison of their log-probabilities with the plain-PyTorch reference."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from quantized_checkpoints import QuantizedReference
from vllm_puzzle.model_configs.ffn_fusion import fuse
from vllm_puzzle.model_configs.inspect_model import load_record
from vllm_puzzle.model_configs.tensors import model_tensors
from vllm_puzzle.serving.cpu_defaults import cpu_settings
from vllm_puzzle.serving.reference_model import ReferenceModel

RUNNER = Path(__file__).with_name("engine_run.py")
# Mixed lengths in one batch: 1 token, below and above the windows (7 to 48), across the 128-token KV blocks.
PROMPTS = [[(7 * i + 3 * n) % 97 for i in range(n)] for n in (1, 5, 23, 40, 77, 150)]
Results = list[dict[str, Any]]


class Jobs:
    """Engine runs to be done in one process, and their outcomes: results, or the error as text."""

    def __init__(self, folder: Path, runner: Path = RUNNER) -> None:
        self.folder, self.jobs, self.environment = folder, [], dict(os.environ)  # type: ignore[var-annotated]
        self.runner = runner
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
        command = [sys.executable, "-P", str(self.runner), str(file)]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        self.log = done.stdout + done.stderr
        outcomes = {Path(job["out"]).stem: torch.load(job["out"]) for job in self.jobs}
        return {k: v if not isinstance(v, str) else v + self.log for k, v in outcomes.items()}


def bound(reference: ReferenceModel, logits: torch.Tensor) -> float:
    """Float32 on both sides, other summation order: each of a layer's 8 matrix or norm steps rounds sums of up to n
    terms (sqrt(n) · 2^-24 relative, errors independent; n is the widest matrix); over the layers they add up at worst
    linearly.
    """
    fused = fuse(reference.record, reference.plan)
    terms = max(128, *(shape[-1] for shape in model_tensors(fused).values()))
    return 8 * len(reference.record.layers) * terms**0.5 * 2**-24 * logits.abs().max().item()


@torch.no_grad()
def assert_equal_to(reference: ReferenceModel, results: Results) -> None:
    assert isinstance(results, list), results
    for result in results:
        logits = reference(torch.tensor(result["ids"]))
        expected = logits.log_softmax(-1)[-1 - len(result["logprobs"]) : -1]
        error = (result["logprobs"] - expected).abs().max().item()
        limit = bound(reference, logits)
        assert error <= limit, f"prompt of {len(result['ids'])} tokens: error {error:.2e}, bound {limit:.2e}"


@torch.no_grad()
def assert_as_accurate_in_bfloat16(reference: ReferenceModel, results: Results) -> None:
    """Both are roundings of one computation: their RMS errors over some 30,000 values agree within a factor."""
    assert isinstance(results, list), results
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
    assert torch.cat(theirs).pow(2).mean().sqrt() <= 1.5 * torch.cat(plain).pow(2).mean().sqrt()


def errors(model: ReferenceModel, results: Results, other: ReferenceModel | None = None) -> torch.Tensor:
    """Log-probabilities of `other` (vLLM's, if None) minus those of `model`, all positions in one row."""
    differences = []
    for result in results:
        ids, count = torch.tensor(result["ids"]), len(result["logprobs"])
        expected = model(ids).float().log_softmax(-1)[-1 - count : -1]
        found = result["logprobs"] if other is None else other(ids).float().log_softmax(-1)[-1 - count : -1]
        differences.append((found - expected).flatten())
    return torch.cat(differences)


def rms(values: torch.Tensor) -> float:
    return values.pow(2).mean().sqrt().item()


def without_rounding(model: QuantizedReference) -> ReferenceModel:
    plain = ReferenceModel(model.record, plan=model.plan)
    plain.load_tensors(model.named_tensors())
    return plain


@torch.no_grad()
def assert_equal_up_to_flips(model: QuantizedReference, results: Results) -> None:
    assert isinstance(results, list), results
    # A float32 difference e, relative to a row's largest value, flips a rounding with probability e / step; steps are
    # 2^-7 of the largest in INT8, about 2^-8 for a typical value in FP8. A flip is a whole step, a rounding error
    # 1/sqrt(12) of one: the two sides differ by sqrt(12 e / 2^-8) of what the rounding changes, here 0.4 of it.
    # Without the rounding they would differ by all of it.
    logits = model(torch.tensor(results[-1]["ids"]))
    relative = bound(model, logits) / logits.abs().max().item()
    change = rms(errors(model, results, without_rounding(model)))
    assert rms(errors(model, results)) <= (12 * relative * 2**8) ** 0.5 * change
