"""What FFN Fusion does to the pocket model's answers: `python -m vllm_puzzle.bench.ffn_fusion_effect [OUT]`.

Layers 5 to 7 of pocket-puzzle are attention-free FFNs. Each plan below is measured under both norm rules, untrained
(nothing is distilled after the fusion), in plain PyTorch and float32: held-out accuracy with thinking on and off,
decoded greedily, and the Kullback-Leibler divergence of the next-token distribution from the unfused model's, on the
tokens of the right replies to the same questions. Not a speed benchmark.

Floor: no plan can beat a divergence of 0, and a plan of no runs must have exactly that (it is measured as a check).
Prediction, written before the first run: the distances between layers 5, 6 and 7 are small (0.02 to 0.06), so 5-6 costs
little, and 5-7, which takes the last FFN too, costs more; with thinking on errors of single steps add up.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm_puzzle.bench.budget_curve import wilson
from vllm_puzzle.bench.pocket_decode import PocketModel, accuracy
from vllm_puzzle.bench.pocket_eval import SEED
from vllm_puzzle.bench.pocket_export import load
from vllm_puzzle.bench.pocket_tasks import Item, heldout
from vllm_puzzle.bench.pocket_tokenizer import END, END_THINK, PAD, decode, encode, render
from vllm_puzzle.model_configs.ffn_fusion import FusionPlan, plan_fusion, read_fusion
from vllm_puzzle.model_configs.schema import LayerRecord
from vllm_puzzle.serving.preflight import POCKET

PLANS = (("off", "own"), ("5-6", "own"), ("5-6", "last"), ("5-7", "own"), ("5-7", "last"))
BATCH = 64


@dataclass(frozen=True, slots=True)
class Divergence:
    """KL divergences over tokens, in nats, and the share of tokens whose likeliest next token stays."""

    mean: float
    p99: float
    same_choice: float


def fused_model(model: PocketModel, plan: FusionPlan) -> PocketModel:
    """The parallel formula x + Σ FFN_i(norm_i(x)) of each run, at the place of the run's last layer.

    With norm rule `last`, every norm_i has the weights of the run's last one.
    """
    layers = list(model.record.layers)
    names = {}  # of the new model's tensors, in the old one
    for ffn in plan.ffns:
        for layer in ffn.layers:
            layers[layer] = LayerRecord(None, None)
        parts = tuple(model.record.layers[part.layer] for part in ffn.parts)
        layers[ffn.holder] = LayerRecord(None, None, parallel=parts)
        for number, part in enumerate(ffn.parts):
            place = f"model.layers.{ffn.holder}.parallel_blocks.{number}"
            norm = ffn.parts[-1] if ffn.norm == "last" else part
            names[f"{place}.post_attention_layernorm.weight"] = f"{norm.prefix}.post_attention_layernorm.weight"
            for matrix in ("gate", "up", "down"):
                names[f"{place}.mlp.{matrix}_proj.weight"] = f"{part.prefix}.mlp.{matrix}_proj.weight"
    fused = PocketModel(replace(model.record, layers=tuple(layers)))
    old = model.named_tensors()
    fused.load_tensors({name: old[names.get(name, name)].detach() for name in fused.named_tensors()})
    return fused


def replies(items: list[Item], thinking: bool) -> list[tuple[list[int], int]]:
    """(token ids, length of the prompt) of each question with its right reply."""
    found = []
    for item in items:
        prompt = encode(render([("user", item.question)], thinking))
        thought = [*encode(item.thought), END_THINK] if thinking else []
        found.append(([*prompt, *thought, *encode(item.answer), END], len(prompt)))
    return sorted(found, key=lambda entry: len(entry[0]))


@torch.no_grad()
def divergence(model: PocketModel, fused: PocketModel, texts: list[tuple[list[int], int]]) -> Divergence:
    """KL(model ‖ fused) at every position that predicts a token of a reply."""
    found, same = [], []
    for start in range(0, len(texts), BATCH):
        part = texts[start : start + BATCH]
        width = max(len(ids) for ids, _ in part)
        batch = torch.tensor([ids + [PAD] * (width - len(ids)) for ids, _ in part])
        is_asked = torch.zeros(batch.shape, dtype=torch.bool)
        for row, (ids, prompt) in enumerate(part):
            is_asked[row, prompt - 1 : len(ids) - 1] = True
        before, after = (one(batch)[is_asked].double().log_softmax(-1) for one in (model, fused))
        found.append((before.exp() * (before - after)).sum(-1))
        same.append(before.argmax(-1) == after.argmax(-1))
    values: Tensor = torch.cat(found)
    return Divergence(values.mean().item(), values.quantile(0.99).item(), torch.cat(same).double().mean().item())


def measure(per_cell: int = 13) -> dict[str, Any]:
    """One row per plan of PLANS. `per_cell`: items of each task and level (41 of them)."""
    model, items = load(POCKET / "puzzle"), heldout(SEED, per_cell)
    where = _where()  # before the long part: the commit that is run
    texts = {mode: replies(items, mode == "on") for mode in ("on", "off")}
    rows = []
    for runs, norm in PLANS:
        fusion = read_fusion({"runs": runs, "norm": norm})
        plan = plan_fusion(model.record, fusion) if fusion is not None else FusionPlan()
        fused = fused_model(model, plan)
        row: dict[str, Any] = {"runs": runs, "norm": norm}
        for mode in ("on", "off"):
            scores = accuracy(fused, items, mode == "on")
            kl = divergence(model, fused, texts[mode])
            row[mode] = {
                "accuracy": scores["all"],
                "interval": wilson(round(scores["all"] * len(items)), len(items)),
                "tasks": {task: share for task, share in scores.items() if task != "all" and "/" not in task},
                "kl_mean": kl.mean, "kl_p99": kl.p99, "same_choice": kl.same_choice,
            }  # fmt: skip
        rows.append(row)
        print(format_rows([row]).splitlines()[-1], file=sys.stderr, flush=True)
    num_tokens = {mode: sum(len(ids) - prompt for ids, prompt in texts[mode]) for mode in texts}
    return {"model": "pocket-puzzle", "num_items": len(items), "num_reply_tokens": num_tokens, **where, "rows": rows}


def format_rows(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    head = "| fused | norm | thinking on | KL mean | KL p99 | thinking off | KL mean | KL p99 |"
    lines = [head, "|---" * 8 + "|"]
    for row in rows:
        cells = [row["runs"], row["norm"] if row["runs"] != "off" else ""]
        for mode in ("on", "off"):
            found = row[mode]
            low, high = found["interval"]
            cells.append(f"{found['accuracy']:.1%} ({low:.1%} … {high:.1%})")
            cells += [f"{found['kl_mean']:.4f}", f"{found['kl_p99']:.4f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _where() -> dict[str, Any]:
    """Versions, processor and commit; `git` may be absent from an installed package."""
    root = Path(__file__).resolve().parent
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True)
    cpu = [line.partition(": ")[2] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return {
        "vllm_puzzle": metadata.version("vllm-puzzle"),
        "torch": torch.__version__,
        "dtype": "float32",
        "cpu": f"{cpu[0] if cpu else 'unknown'}, {len(cpu)} cores",
        "commit": git.stdout.strip() or None,
    }


def write_text(file: Path, per_cell: int = 13) -> None:
    """The held-out questions with their right replies, thinking on, as data for `vllm-puzzle fuse plan --data`."""
    texts = (decode(ids) for ids, _ in replies(heldout(SEED, per_cell), thinking=True))
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def main() -> None:
    """Measure, print a table, write OUT (default: beside the other results); or write the text alone."""
    parser = argparse.ArgumentParser(description="what FFN Fusion does to the pocket model")
    parser.add_argument("out", nargs="?", type=Path, default=Path(__file__).parent / "results/ffn-fusion-pocket.json")
    parser.add_argument("--text", type=Path, metavar="JSONL", help="only write the held-out text, for `fuse plan`")
    options = parser.parse_args()
    if options.text is not None:
        write_text(options.text)
        return
    found = measure()
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    print(format_rows(found["rows"]))


if __name__ == "__main__":
    main()
