"""A question with its grader, and the list of what a run asks: a pure function of the seed. Standard library only."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

from vllm_puzzle.bench.efficiency.record import CORRECT, EMPTY, NO_PARSE, WRONG

GRADES = (CORRECT, WRONG, NO_PARSE)
Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Question:
    """One question of a task.

    task, id: its name; the same in every arm, which is what pairs them. messages: of the chat request. grader: the text
    of an answer → correct, wrong or no_parse; it sees no thought. level: rung of the task's ladder. chance: share that
    blind guessing gets right. fields: further request fields that the question needs, such as `response_format`.
    """

    task: str
    id: str
    messages: tuple[Message, ...]
    grader: Callable[[str], str] = field(repr=False, compare=False)
    level: int | None = None
    chance: float = 0.0
    fields: Mapping[str, Any] = field(default_factory=dict)

    def grade(self, answer: str) -> str:
        """The outcome of a reply that ended by itself with this answer. A grader that raises finds no answer."""
        if not answer.strip():
            return EMPTY
        try:
            outcome = self.grader(answer)
        except (ValueError, TypeError, KeyError, IndexError, ArithmeticError, RecursionError):
            return NO_PARSE
        if outcome not in GRADES:
            raise ValueError(f"grader of {self.task}: found {outcome!r}, allowed: {', '.join(GRADES)}")
        return outcome

    @property
    def digest(self) -> str:
        """What is asked, as 16 hex digits: equal for equal prompts, whatever they are called."""
        asked = json.dumps([list(map(dict, self.messages)), dict(self.fields)], sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(asked.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Ask:
    """One place of a work list: which question, for the how many-eth time, in which place."""

    question: Question
    repeat: int
    order: int


def work_list(questions: Sequence[Question], num_prompts: int, seed: int) -> tuple[Ask, ...]:
    """`num_prompts` places; each question once before any comes twice, in an order that depends on the seed alone.

    Shuffled, so that no ladder of difficulties looks like a drift of the server.
    """
    asks: list[Ask] = []
    repeat = 0
    while len(asks) < num_prompts and questions:
        turn = list(questions)
        Random(f"work list/{seed}/{repeat}").shuffle(turn)
        asks += [Ask(question, repeat, 0) for question in turn]
        repeat += 1
    return tuple(Ask(ask.question, ask.repeat, order) for order, ask in enumerate(asks[:num_prompts]))


def warm_up_list(
    source: Sequence[Question], measured: Sequence[Question], count: int, seed: int
) -> tuple[Question, ...]:
    """`count` questions of which none is measured; plain prompts where the source has no others."""
    taken = {question.digest for question in measured}
    spare = [question for question in source if question.digest not in taken]
    Random(f"warm-up/{seed}").shuffle(spare)
    rng = Random(f"plain warm-up/{seed}")
    plain = [_plain(f"Say the number {rng.randrange(10**9)}.", index) for index in range(count - len(spare))]
    return tuple([*spare, *plain][:count])


def _plain(text: str, index: int) -> Question:
    return Question("warm-up", str(index), ({"role": "user", "content": text},), lambda answer: NO_PARSE)
