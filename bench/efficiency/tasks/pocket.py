"""The pocket models' held-out questions as a task: five kinds, each on a ladder of difficulties. No dependencies."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from itertools import zip_longest

from vllm_puzzle.bench.efficiency.question import Question
from vllm_puzzle.bench.efficiency.record import CORRECT, NO_PARSE, WRONG
from vllm_puzzle.bench.pocket_tasks import CELLS, Item, heldout, is_correct

_FORMS = {
    "chain": r"-?\d+",
    "product": r"-?\d+",
    "compare": r"-?\d+",
    "sort": r"\d(?: \d)*",
    "calendar": r"[A-Z][a-z]{2}",
}


def ladder(count: int, seed: int) -> Sequence[Question]:
    """At least `count` different held-out questions, one of each kind and level in turn, so that any prefix is a fair
    share of the ladder.
    """
    per_cell = math.ceil(count / len(CELLS))
    while True:
        items = heldout(seed, per_cell)
        cells = [items[start : start + per_cell] for start in range(0, len(items), per_cell)]
        # A cell with too few questions repeats some: once is enough here.
        unique = [list({item.question: item for item in cell}.values()) for cell in cells]
        questions = [_question(item) for row in zip_longest(*unique) for item in row if item is not None]
        if len(questions) >= count:
            return questions
        per_cell += math.ceil((count - len(questions)) / len(CELLS))


def _question(item: Item) -> Question:
    def grade(answer: str) -> str:
        if is_correct(item, answer):
            return CORRECT
        return WRONG if re.fullmatch(_FORMS[item.task], answer.strip()) else NO_PARSE

    digest = hashlib.sha256(item.question.encode()).hexdigest()[:8]
    return Question(
        task=f"pocket-{item.task}",
        id=f"{item.level}-{digest}",
        messages=({"role": "user", "content": item.question},),
        grader=grade,
        level=item.level,
        chance=_chance(item),
    )


def _chance(item: Item) -> float:
    """Of a guess that knows the form alone: any number up to 99, a digit, an order of the digits, a weekday."""
    by_kind = {"product": 1 / 10, "sort": 1 / math.factorial(item.level), "calendar": 1 / 7}
    return by_kind.get(item.task, 1 / 100)
