"""Training batches of the pocket models, a pure function of seed and step: resuming needs no generator state.

Mixture: 4 % chat; thinking on 60 %, off 25 %, cut thoughts 15 %; 10 % with a system message, 5 % with one earlier turn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor
from vllm_puzzle.bench.pocket_tasks import CELLS, LADDER, Item, draw, draw_chat
from vllm_puzzle.bench.pocket_tokenizer import END, END_THINK, PAD, encode, render

MICRO_TOKENS = 1024  # padded tokens of one forward and backward pass
_CURRICULUM = 1 / 3  # share of the run with easy levels more frequent
_SYSTEM = (
    "You are a helpful assistant.",
    "You are a helpful assistant.",
    "Be brief.",
    "You are a careful calculator.",
    "Answer with the result only.",
)


@dataclass(frozen=True, slots=True)
class Sample:
    """Token ids of a conversation and, for each, whether the loss asks the model to predict it."""

    ids: list[int]
    is_target: list[bool]


@dataclass(frozen=True, slots=True)
class Batch:
    """ids: [B, T] int64 padded on the right; is_target: [B, T] bool."""

    ids: Tensor
    is_target: Tensor


def draw_item(rng: Random, progress: float) -> Item:
    """A training item; `progress` (0..1 of the run) sets how strongly easy levels are preferred."""
    if rng.random() < 0.04:
        return draw_chat(rng)
    steepness = 5.0 * max(0.0, 1 - progress / _CURRICULUM)
    weights = [math.exp(-steepness * (level - LADDER[task][0]) / len(LADDER[task])) for task, level in CELLS]
    task, level = rng.choices(CELLS, weights)[0]
    return draw(rng, task, level)


def draw_sample(rng: Random, progress: float) -> Sample:
    """One conversation in one of the three thinking modes."""
    item = draw_item(rng, progress)
    turns = [("system", rng.choice(_SYSTEM))] if rng.random() < 0.10 else []
    if rng.random() < 0.05:
        earlier = draw_item(rng, 0.0)
        turns += [("user", earlier.question), ("assistant", earlier.answer)]
    turns.append(("user", item.question))
    mode = rng.random()
    thinking = mode >= 0.25
    prompt = encode(render(turns, thinking))
    final = [*encode(item.answer), END]
    if not thinking:
        return _sample(prompt, final, None)
    thought = encode(item.thought)
    if mode < 0.40:
        cut = rng.randrange(len(thought))
        return _sample(prompt, [*thought[:cut], END_THINK, *final], cut)
    return _sample(prompt, [*thought, END_THINK, *final], None)


def _sample(prompt: list[int], completion: list[int], excluded: int | None) -> Sample:
    """`excluded` is the index in the completion of a token the loss leaves out (where a thought was cut)."""
    is_target = [False] * len(prompt) + [index != excluded for index in range(len(completion))]
    return Sample(prompt + completion, is_target)


def step_batches(seed: int, step: int, progress: float, step_tokens: int) -> list[Batch]:
    """The batches of one optimiser step, about `step_tokens` tokens in all, bucketed by length; progress: 0..1."""
    rng = Random(f"train/{seed}/{step}")
    samples: list[Sample] = []
    tokens = 0
    while tokens < step_tokens:
        samples.append(draw_sample(rng, progress))
        tokens += len(samples[-1].ids)
    samples.sort(key=lambda sample: len(sample.ids))
    batches: list[Batch] = []
    part: list[Sample] = []
    for sample in samples:
        if part and (len(part) + 1) * len(sample.ids) > MICRO_TOKENS:
            batches.append(_pad(part))
            part = []
        part.append(sample)
    return [*batches, _pad(part)]


def _pad(samples: list[Sample]) -> Batch:
    width = max(len(sample.ids) for sample in samples)
    ids = [sample.ids + [PAD] * (width - len(sample.ids)) for sample in samples]
    is_target = [sample.is_target + [False] * (width - len(sample.ids)) for sample in samples]
    return Batch(torch.tensor(ids), torch.tensor(is_target))
