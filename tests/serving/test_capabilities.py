"""What our class declares to vLLM works: EAGLE-3, prompt embeddings, pooling on request, adapters beside experts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import checkpoints
import drafts
import families
import pytest
import torch
from safetensors.torch import load_file
from vllm_puzzle.model_configs.inspect_model import load_record
from vllm_puzzle.serving.preflight import POCKET
from vllm_puzzle.serving.reference_model import ReferenceModel

pytestmark = pytest.mark.slow

RUNNER = Path(__file__).with_name("capability_run.py")
PROMPTS = [[(7 * i + 3 * n) % 97 for i in range(n)] for n in (40, 1, 5, 23, 77)]
LLM = {"max_model_len": 256, "max_num_seqs": 8, "dtype": "float32", "enforce_eager": True}
# Of checkpoints.ALL_KINDS: before and after the empty layer, after an attention-free one, after the second, the end.
DRAFT_LAYERS = [0, 1, 2, 7, 10]
WITH_EXPERTS = ("qwen3_moe", "gpt_oss", "deci wide")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("capabilities")


@pytest.fixture(scope="module")
def target(folder: Path) -> ReferenceModel:
    return checkpoints.write_checkpoint(folder / "target", checkpoints.deci_config(checkpoints.ALL_KINDS))


@pytest.fixture(scope="module")
def adapted(folder: Path) -> dict[str, ReferenceModel]:
    """The models with experts, with an adapter for everything but the experts merged in."""
    models = {}
    for name in WITH_EXPERTS:
        models[name] = checkpoints.write_checkpoint(folder / name, families.FAMILIES[name])
        (folder / f"{name} adapter").mkdir()
        checkpoints.write_adapter(folder / f"{name} adapter", models[name], rank=4, leave_out=".experts")
    (folder / "expert adapter").mkdir()
    checkpoints.write_adapter(folder / "expert adapter", checkpoints.reference(families.FAMILIES["qwen3_moe"]), rank=4)
    return models


@pytest.fixture(scope="module")
def outcomes(folder: Path, target: ReferenceModel, adapted: dict[str, ReferenceModel]) -> dict[str, Any]:
    """Every engine run of this file, in one process."""
    jobs: list[dict[str, Any]] = []

    def add(name: str, model: Path, do: str = "generate", llm: dict[str, Any] | None = None, **job: Any) -> None:
        settings = LLM | {"kv_cache_memory_bytes": 1 << 26, "max_logprobs": -1, "skip_tokenizer_init": True}
        shared = {
            "model": str(model),
            "do": do,
            "prompts": PROMPTS,
            "max_tokens": 24,
            "out": str(folder / f"{name}.pt"),
        }
        jobs.append(shared | {"llm": settings | (llm or {})} | job)

    model = folder / "target"
    add("plain", model)
    draft = drafts.write_draft(folder / "draft", target, DRAFT_LAYERS)
    eagle = {"method": "eagle3", "model": str(draft), "num_speculative_tokens": 3}
    add("eagle", model, llm={"speculative_config": eagle, "disable_log_stats": False}, hidden_states=True)
    torch.save(target.named_tensors()["model.embed_tokens.weight"].detach().clone(), folder / "table.pt")
    add("embeds", model, llm={"enable_prompt_embeds": True}, embeds=str(folder / "table.pt"))
    # vLLM's scoring task wants a tokenizer.
    add("pooling", POCKET / "puzzle", "embed", llm={"runner": "pooling", "skip_tokenizer_init": False})
    lora = {"enable_lora": True, "max_lora_rank": 8}
    for name in WITH_EXPERTS:
        refused = {"refused_adapter": str(folder / "expert adapter")} if name == "qwen3_moe" else {}
        add(name, folder / name, llm=lora, adapter=str(folder / f"{name} adapter"), **refused)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run(
        [sys.executable, "-P", str(RUNNER), str(folder / "jobs.json")],
        env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {Path(job["out"]).stem: torch.load(job["out"]) for job in jobs}


def result(outcomes: dict[str, Any], name: str) -> dict[str, Any]:
    assert isinstance(outcomes[name], dict), outcomes[name]
    found: dict[str, Any] = outcomes[name]
    return found


def bound(reference: ReferenceModel, magnitude: float) -> float:
    """As in test_parity: 8 roundings of sums of up to 128 terms per layer, at worst added up."""
    return 8 * len(reference.record.layers) * 128**0.5 * 2**-24 * magnitude


def test_eagle_3_speculation_changes_nothing_and_some_drafts_are_accepted(outcomes: dict[str, Any]) -> None:
    eagle = result(outcomes, "eagle")
    assert eagle["ids"] == result(outcomes, "plain")["ids"]
    accepted, drafted = (eagle[f"vllm:spec_decode_num_{kind}_tokens"] for kind in ("accepted", "draft"))
    assert 0 < accepted < drafted, "else acceptance or rejection was not exercised"


@torch.no_grad()
def test_an_eagle_3_draft_gets_the_input_of_the_layers_that_it_names(
    target: ReferenceModel, outcomes: dict[str, Any]
) -> None:
    hidden, tokens = [], torch.tensor(PROMPTS[0])
    x = target.named_tensors()["model.embed_tokens.weight"][tokens]
    for index, layer in enumerate(target.record.layers):
        hidden.append(x)
        x = target.block(layer, f"model.layers.{index}", x)
    hidden.append(x)
    found = result(outcomes, "eagle")["hidden_states"]
    assert len(found) == len(DRAFT_LAYERS)
    for index, tensor in zip(DRAFT_LAYERS, found, strict=True):
        error = (tensor - hidden[index]).abs().max().item()
        assert error <= bound(target, hidden[index].abs().max().item()), f"before layer {index}: {error:.2e}"
    assert torch.equal(found[0], found[1]), "the first layer is empty"


def test_prompt_embeddings_give_what_their_tokens_give(outcomes: dict[str, Any]) -> None:
    plain, embeds = result(outcomes, "plain"), result(outcomes, "embeds")
    assert embeds["ids"] == plain["ids"]
    # A looked-up row is the same row, and the batches are the same: so is every bit.
    assert all(torch.equal(*pair) for pair in zip(embeds["logprobs"], plain["logprobs"], strict=True))


def test_our_class_generates_and_embeds_only_when_the_runner_says_so(outcomes: dict[str, Any]) -> None:
    assert result(outcomes, "plain")["tasks"] == ["generate"]
    assert "only supported for pooling models" in result(outcomes, "plain")["embed"]


@torch.no_grad()
def test_with_the_pooling_runner_an_embedding_is_the_last_tokens_final_state(outcomes: dict[str, Any]) -> None:
    reference = ReferenceModel(load_record(POCKET / "puzzle"))
    stored = load_file(POCKET / "puzzle" / "model.safetensors")
    reference.load_tensors({name: tensor.float() for name, tensor in stored.items()})
    for prompt, embedding in zip(PROMPTS, result(outcomes, "pooling")["embeddings"], strict=True):
        x = reference.named_tensors()["model.embed_tokens.weight"][torch.tensor(prompt)]
        for index, layer in enumerate(reference.record.layers):
            x = reference.block(layer, f"model.layers.{index}", x)
        last = x[-1] / x[-1].pow(2).mean().sqrt() * reference.named_tensors()["model.norm.weight"]
        expected = last / last.norm()
        # A vector of length 1: the final state's relative error, at most.
        assert (embedding - expected).abs().max().item() <= bound(reference, 1.0)


@torch.no_grad()
@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_an_adapter_beside_experts_equals_the_merged_weights(
    adapted: dict[str, ReferenceModel], outcomes: dict[str, Any], name: str
) -> None:
    found, without = result(outcomes, name), checkpoints.reference(families.FAMILIES[name])
    differences = []
    for prompt, ids, logprobs in zip(PROMPTS, found["ids"], found["logprobs"], strict=True):
        tokens = torch.tensor(prompt + ids)
        logits = adapted[name](tokens)
        expected = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        assert (logprobs - expected).abs().max().item() <= bound(without, logits.abs().max().item())
        differences.append((without(tokens).log_softmax(-1)[len(prompt) - 1 : -1] - expected).abs().max().item())
    assert min(differences) > 1e-2, "the adapter must change the output, else this shows nothing"


def test_an_adapter_for_experts_is_refused_in_one_line(folder: Path, outcomes: dict[str, Any]) -> None:
    found = result(outcomes, "qwen3_moe")["refusal"]
    assert f"adapter {folder / 'expert adapter'}: found weights for experts, allowed: for any other matrix" in found
    assert "\n" not in found
    assert len(found) < 400


def test_vllm_finds_in_our_class_what_the_readme_declares() -> None:
    from vllm.model_executor.models.interfaces import supports_eagle3, supports_lora
    from vllm.model_executor.models.registry import _ModelInfo
    from vllm_puzzle.serving.model import PuzzleForCausalLM

    info = _ModelInfo.from_model_cls(PuzzleForCausalLM)
    assert (info.is_text_generation_model, info.is_pooling_model) == (True, False)
    assert info.supports_pp
    assert not (info.has_inner_state or info.is_attention_free or info.is_hybrid or info.supports_multimodal)
    assert supports_lora(PuzzleForCausalLM)
    assert supports_eagle3(PuzzleForCausalLM)
