"""The bench's fused model is the parallel formula, its divergence the definition, its results those of its plans."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from vllm_puzzle.bench import ffn_fusion_effect as effect
from vllm_puzzle.bench.pocket_decode import PocketModel
from vllm_puzzle.bench.pocket_export import load
from vllm_puzzle.bench.pocket_tasks import heldout
from vllm_puzzle.bench.pocket_tokenizer import decode
from vllm_puzzle.kernels.reference import gated_ffn, rms_norm
from vllm_puzzle.model_configs.ffn_fusion import FusionPlan, plan_fusion, read_fusion
from vllm_puzzle.serving.preflight import POCKET


@pytest.fixture(scope="module")
def model() -> PocketModel:
    return load(POCKET / "puzzle")


def fused(model: PocketModel, runs: str, norm: str) -> PocketModel:
    fusion = read_fusion({"runs": runs, "norm": norm})
    assert fusion is not None
    return effect.fused_model(model, plan_fusion(model.record, fusion))


@torch.no_grad()
@pytest.mark.parametrize(("runs", "norm"), effect.PLANS[1:])
def test_the_fused_model_is_the_parallel_formula(model: PocketModel, runs: str, norm: str) -> None:
    ids = torch.randint(0, 256, (3, 17))
    hidden = model.embed(ids)
    for index in range(5):
        hidden = model.layer(index, hidden)
    first, last = map(int, runs.split("-"))
    tensors, added = model.named_tensors(), torch.zeros_like(hidden)
    for index in range(first, last + 1):
        weight = tensors[f"model.layers.{last if norm == 'last' else index}.post_attention_layernorm.weight"]
        x = rms_norm(hidden, weight, model.record.rms_norm_eps)
        matrices = (tensors[f"model.layers.{index}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        added += gated_ffn(x, *matrices)
    hidden = hidden + added
    for index in range(last + 1, 8):
        hidden = model.layer(index, hidden)
    # Float32, the same products in the same order but for the sum of two or three outputs.
    torch.testing.assert_close(fused(model, runs, norm)(ids), model.logits(hidden), rtol=1e-4, atol=1e-4)
    assert (fused(model, runs, norm)(ids) - model(ids)).abs().max() > 0.01


@torch.no_grad()
def test_divergence_is_zero_for_the_model_itself_and_its_definition_for_another(model: PocketModel) -> None:
    texts = effect.replies(heldout(5, 1)[::9], thinking=True)
    same = effect.divergence(model, effect.fused_model(model, FusionPlan()), texts)
    assert same == effect.Divergence(0.0, 0.0, 1.0)
    other = fused(model, "5-7", "own")
    values = []
    for ids, prompt in texts:
        p, q = (one(torch.tensor([ids]))[0].double().softmax(-1) for one in (model, other))
        values += [(p[t] * (p[t] / q[t]).log()).sum().item() for t in range(prompt - 1, len(ids) - 1)]
    found = effect.divergence(model, other, texts)
    assert found.mean == pytest.approx(sum(values) / len(values), rel=1e-3)
    assert found.p99 == pytest.approx(torch.tensor(values).quantile(0.99).item(), rel=1e-3)
    assert 0 < found.mean < found.p99


def test_replies_are_whole_turns_of_both_modes() -> None:
    items = heldout(5, 1)[:1]
    for thinking, reply in (
        (True, f"{items[0].thought}</think>{items[0].answer}<|end|>"),
        (False, f"{items[0].answer}<|end|>"),
    ):
        ((ids, prompt),) = effect.replies(items, thinking)
        assert decode(ids[prompt:]) == reply
        assert decode(ids[:prompt]).endswith("<think>" if thinking else "</think>")


def test_the_text_for_the_planner_is_the_replies(tmp_path: Path) -> None:
    effect.write_text(tmp_path / "text.jsonl", per_cell=1)
    lines = [json.loads(line) for line in (tmp_path / "text.jsonl").read_text().splitlines()]
    assert len(lines) == 41
    assert all(line.keys() == {"text"} and line["text"].startswith("<|user|>") for line in lines)
    assert all(line["text"].count("</think>") == 1 and line["text"].endswith("<|end|>") for line in lines)


def test_the_committed_results_are_of_the_plans_and_make_a_table(root: Path) -> None:
    found = json.loads((root / "bench" / "results" / "ffn-fusion-pocket.json").read_text())
    assert [(row["runs"], row["norm"]) for row in found["rows"]] == list(effect.PLANS)
    assert found["num_items"] == 533
    assert found["rows"][0]["on"]["kl_p99"] == 0.0
    table = effect.format_rows(found["rows"]).splitlines()
    assert len({line.count("|") for line in table}) == 1
    assert len(table) == 2 + len(effect.PLANS)
