"""A question whose answer stands in it: to see that a server answers at all, and what the mock server knows."""

from __future__ import annotations

import re
from collections.abc import Sequence
from random import Random

from vllm_puzzle.bench.efficiency.question import Question
from vllm_puzzle.bench.efficiency.record import CORRECT, NO_PARSE, WRONG


def numbers(count: int, seed: int) -> Sequence[Question]:
    """`count` different numbers of five digits to repeat."""
    chosen = Random(f"repeat/{seed}").sample(range(10_000, 100_000), 90_000)[:count]
    return [_question(number) for number in chosen]


def _question(number: int) -> Question:
    def grade(answer: str) -> str:
        found = re.findall(r"\d+", answer)
        return NO_PARSE if not found else CORRECT if found[-1] == str(number) else WRONG

    text = f"Repeat this number and write nothing else: {number}"
    return Question("repeat", str(number), ({"role": "user", "content": text},), grade, chance=1 / 90_000)
