"""Train the pocket parent, or derive the pocket puzzle from it by surgery and distillation.

    python -m vllm_puzzle.bench.pocket_train parent
    python -m vllm_puzzle.bench.pocket_train puzzle

An interrupted run continues from its last checkpoint and ends with the same weights (same machine, same threads).
"""

from __future__ import annotations

import argparse
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from vllm_puzzle.bench import pocket_surgery
from vllm_puzzle.bench.pocket_data import Batch, step_batches
from vllm_puzzle.bench.pocket_decode import PocketModel, accuracy
from vllm_puzzle.bench.pocket_export import PARENT, PUZZLE, export, load
from vllm_puzzle.bench.pocket_optim import make_optimizers
from vllm_puzzle.bench.pocket_tasks import CELLS, Item, heldout
from vllm_puzzle.bench.pocket_tokenizer import PAD

POCKET = Path(__file__).parents[1] / "model_configs" / "pocket"
RUNS = Path(__file__).parent / "runs"
FINAL_SEED, PROBE_SEED = 2026, 1


@dataclass(frozen=True, slots=True)
class Plan:
    """What one run does; the schedule counts optimiser steps."""

    steps: int
    step_tokens: int
    lr: float
    seed: int
    probe_every: int
    checkpoint_seconds: float = 90.0
    warmup: int = 50
    decay_share: float = 0.5  # the last part of the run, in which the rate falls linearly to 0

    def lr_at(self, step: int) -> float:
        """Learning rate of a step counted from 0."""
        return self.lr * min(1.0, (step + 1) / self.warmup, (self.steps - step) / (self.decay_share * self.steps))


class Trainer:
    """Model, optimisers and the number of steps done; a teacher makes it distillation."""

    def __init__(self, model: PocketModel, plan: Plan, teacher: PocketModel | None = None) -> None:
        self.model, self.plan, self.teacher = model, plan, teacher
        self.optimizers = make_optimizers(model, plan.lr)
        self.parameters = list(model.parameters())
        # One thread per batch beats two threads per matrix as soon as anything else uses a core. The gradients are
        # summed in the order of the batches, so the number of workers does not change the result.
        self.workers = ThreadPoolExecutor(os.cpu_count())
        self.step = self.tokens = 0

    def save(self, path: Path) -> None:
        """Write a checkpoint in one piece."""
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "tokens": self.tokens,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, path.with_suffix(".new"))
        os.replace(path.with_suffix(".new"), path)

    def resume(self, path: Path) -> None:
        """Continue from a checkpoint."""
        state = torch.load(path)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.tokens = state["step"], state["tokens"]

    def train_step(self) -> float:
        """One optimiser step; returns its loss in nats per target token."""
        # The child need not start from easy levels: it starts from what its parent knows.
        progress = self.step / self.plan.steps if self.teacher is None else 1.0
        batches = step_batches(self.plan.seed, self.step, progress, self.plan.step_tokens)
        num_targets = sum(int(batch.is_target[:, 1:].sum()) for batch in batches)
        losses, gradients = zip(*self.workers.map(self._loss_and_gradients, batches), strict=True)
        for parameter, parts in zip(self.parameters, zip(*gradients, strict=True), strict=True):
            parameter.grad = torch.stack(parts).sum(0) / num_targets
        self.tokens += sum(int((batch.ids != PAD).sum()) for batch in batches)
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.plan.lr_at(self.step)
            optimizer.step()
        self.step += 1
        return sum(losses) / num_targets

    def _loss_and_gradients(self, batch: Batch) -> tuple[float, tuple[Tensor, ...]]:
        loss = self._loss(batch)
        return loss.item(), torch.autograd.grad(loss, self.parameters)

    def _loss(self, batch: Batch) -> Tensor:
        """Summed over the batch's targets: cross entropy, or its mean with the divergence from the teacher."""
        is_target = batch.is_target[:, 1:]
        logits = target_logits(self.model, batch.ids, is_target)
        cross_entropy = nn.functional.cross_entropy(logits, batch.ids[:, 1:][is_target], reduction="sum")
        if self.teacher is None:
            return cross_entropy
        with torch.no_grad():
            wanted = target_logits(self.teacher, batch.ids, is_target).log_softmax(-1)
        divergence = nn.functional.kl_div(logits.log_softmax(-1), wanted, reduction="sum", log_target=True)
        return 0.5 * (cross_entropy + divergence)


def target_logits(model: PocketModel, ids: Tensor, is_target: Tensor) -> Tensor:
    """Logits where the next token is a target. ids: [B, T], is_target: [B, T − 1] → [targets, vocab_size]."""
    hidden = model.embed(ids[:, :-1])
    for index in range(len(model.record.layers)):
        hidden = model.layer(index, hidden)
    return model.logits(hidden[is_target])


def train(trainer: Trainer, run_dir: Path, out: Path) -> None:
    """Run the plan to its end, with progress lines, checkpoints, and an export at each probe of the accuracy."""
    checkpoint = run_dir / "checkpoint.pt"
    if checkpoint.exists():
        trainer.resume(checkpoint)
        print(f"resumed at step {trainer.step}", flush=True)
    plan, probe = trainer.plan, heldout(PROBE_SEED, per_cell=2)
    saved_at = lines_at = time.monotonic()
    tokens_at, losses = trainer.tokens, []
    while trainer.step < plan.steps:
        losses.append(trainer.train_step())
        now = time.monotonic()
        if trainer.step % 20 == 0:
            rate = (trainer.tokens - tokens_at) / (now - lines_at)
            loss = sum(losses) / len(losses)
            print(
                f"step {trainer.step}/{plan.steps} tokens {trainer.tokens} tok/s {rate:.0f} loss {loss:.4f}", flush=True
            )
            lines_at, tokens_at, losses = now, trainer.tokens, []
        if now - saved_at > plan.checkpoint_seconds or trainer.step == plan.steps:
            trainer.save(checkpoint)
            saved_at = now
        if trainer.step % plan.probe_every == 0:
            on, off = (accuracy(trainer.model, probe, thinking)["all"] for thinking in (True, False))
            print(f"step {trainer.step} held-out ({len(probe)} items) on {on:.3f} off {off:.3f}", flush=True)
            export(trainer.model, out)


def evaluate(folder: Path, items: list[Item]) -> dict[str, dict[str, float]]:
    """Accuracy of an exported model (bf16 weights, float32 arithmetic) with thinking on and off."""
    model = load(folder)
    return {mode: accuracy(model, items, mode == "on") for mode in ("on", "off")}


def make_trainer(kind: str, plan: Plan, parent_folder: Path) -> Trainer:
    """The trainer at step 0: a fresh parent, or the surgically made child with its parent as teacher."""
    torch.manual_seed(plan.seed)
    if kind == "parent":
        return Trainer(PocketModel(PARENT), plan)
    teacher = load(parent_folder)
    sample = [batch for step in range(4) for batch in step_batches(plan.seed + 1, step, 1.0, plan.step_tokens)]
    return Trainer(pocket_surgery.derive(teacher, PUZZLE, sample), plan, teacher)


def main(argv: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("parent", "puzzle"))
    parser.add_argument("--out", type=Path, help="model folder to write (default: model_configs/pocket/KIND)")
    parser.add_argument("--parent", type=Path, default=POCKET / "parent", help="the parent's folder, for the puzzle")
    parser.add_argument("--run-dir", type=Path, help="checkpoint folder (default: bench/runs/KIND)")
    parser.add_argument("--steps", type=int, help="optimiser steps (0 for the puzzle: surgery only)")
    parser.add_argument("--step-tokens", type=int, default=6144)
    parser.add_argument("--lr", type=float, default=0.006)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--per-cell", type=int, default=25, help=f"final held-out items per cell ({len(CELLS)} cells)")
    parser.add_argument("--smoke", action="store_true", help="3 tiny steps, to see that everything runs")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # the cores are the workers'
    steps = args.steps if args.steps is not None else {"parent": 1300, "puzzle": 900}[args.kind]
    plan = Plan(steps, args.step_tokens, args.lr, args.seed, probe_every=200)
    if args.smoke:
        plan = Plan(3, 512, args.lr, args.seed, probe_every=1000)
    out = args.out or POCKET / args.kind
    trainer = make_trainer(args.kind, plan, args.parent)
    train(trainer, args.run_dir or RUNS / args.kind, out)
    export(trainer.model, out)
    items = heldout(FINAL_SEED, args.per_cell)
    scores = evaluate(out, items[:4] if args.smoke else items)
    print(json.dumps({"steps": trainer.step, "tokens": trainer.tokens, **scores}, indent=1), flush=True)


if __name__ == "__main__":
    main()
