"""Every other generator of reasoning-gym, with the package's own score where it can be trusted, and mended where not.

Faults of reasoning-gym 0.1.25: `game_of_life_halting` takes any reply for right; `prime_factorization` and `boxnet`
raise on replies that they cannot read; several scores are partial (`aiw`, `letter_counting`, `spell_backward`,
`countdown`), so that only 0.99 and more counts as right; and some scores run the reply as code, which is refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from itertools import islice
from typing import Any

from vllm_puzzle.bench.efficiency.question import Question
from vllm_puzzle.bench.efficiency.record import CORRECT, NO_PARSE, WRONG
from vllm_puzzle.bench.efficiency.tasks import answers, puzzle_forms
from vllm_puzzle.bench.efficiency.tasks.answers import Form
from vllm_puzzle.bench.efficiency.tasks.gym import (
    BY_NAME,
    Entry,
    Generator,
    dataset,
    entries,
    in_turn,
    ladder,
    package,
    question,
)
from vllm_puzzle.model_configs.schema import ConfigError

MIN_SCORE = 0.99
# Their scorers hand the reply to eval() or to sympy's parse_expr, which is eval().
RUNS_REPLIES = (
    "binary_matrix", "intermediate_integration", "n_queens", "polynomial_multiplication", "puzzle24",
    "simple_integration", "spiral_matrix", "string_insertion",
)  # fmt: skip
# The same seed and index do not give the same item twice, or there is no item of its own.
NO_ITEMS = ("list_functions", "composite")


def _integer(entry: Entry) -> Form:
    return answers.number(Fraction(entry["answer"]))


def _boxes(text: str, is_marked: bool) -> Any:
    """A plan: a JSON list of objects, text → text, whose keys name a square."""
    try:
        plan = json.loads(text.strip().removeprefix("```json").strip("`\n "))
    except ValueError:
        return None
    is_plan = isinstance(plan, list) and all(
        isinstance(step, dict)
        and all(isinstance(move, str) and len(re.findall(r"\d+\.?\d*", key)) == 2 for key, move in step.items())
        for step in plan
    )
    return plan if is_plan else None


MENDED: dict[str, Callable[[Entry], Form]] = {
    "game_of_life_halting": lambda entry: answers.choice(entry["answer"], ("True", "False")),
    "prime_factorization": lambda entry: puzzle_forms.factors(entry["metadata"]["number"]),
    "aiw": _integer,
    "letter_counting": _integer,
    "spell_backward": lambda entry: Form("word", _word, lambda value: value.lower() == entry["answer"].lower()),
}


def _word(text: str, is_marked: bool) -> str | None:
    found = re.findall(r"[^\W\d_]+", answers.plain(answers.line_of(text, is_marked)))
    return found[0 if is_marked else -1] if found else None


def scored(data: Any, name: str, entry: Entry) -> Form:
    """An entry's form: mended, or the package's score of the text that the answer gives."""
    if name in MENDED:
        return MENDED[name](entry)

    def score(value: Any) -> bool:
        return float(data.score_answer(value, entry)) >= MIN_SCORE

    if name == "boxnet":
        return Form("plan", _boxes, lambda plan: score(json.dumps(plan)))
    return Form("text", lambda text, is_marked: text.strip(" *`\t\r\n") or None, score)


def grader(form: Form) -> Callable[[str], str]:
    """Its grade; a score that raises found no answer that it can read."""

    def grade(answer: str) -> str:
        value = answers.find(answer, form.read)
        if value is None:
            return NO_PARSE
        try:
            return CORRECT if form.same(value) else WRONG
        except Exception:  # scorers of the package raise whatever their reading of a reply meets
            return NO_PARSE

    return grade


def find_generator(name: str) -> Generator:
    """A generator by the package's name. Raises ConfigError for one that is not there or cannot be judged."""
    if name in BY_NAME:
        return BY_NAME[name]
    factory = package("reasoning_gym.factory")
    if name in RUNS_REPLIES or name in NO_ITEMS or name not in factory.DATASETS:
        allowed = sorted(set(factory.DATASETS) - {*RUNS_REPLIES, *NO_ITEMS})
        reason = " (its scorer runs the reply as code)" if name in RUNS_REPLIES else ""
        raise ConfigError(f"task gym-{name}: found {name!r}{reason}, allowed: {', '.join(allowed)}")
    steps = (0, 1, 2) if name in factory.CURRICULA else (0,)
    return Generator(name, _integer, steps=steps)


def questions(name: str, count: int, seed: int) -> Sequence[Question]:
    """`count` questions of one generator, by the package's name, its levels in turn."""
    generator = find_generator(name)
    if name in BY_NAME:
        return list(ladder(generator, seed, count))
    each = -(-count // len(generator.steps))
    levels = [_level(generator, level, seed, each) for level in range(1, len(generator.steps) + 1)]
    try:
        return list(islice(in_turn(levels), count))
    except (AssertionError, ValueError) as error:
        # Some curricula of the package lead to settings that its generators refuse.
        raise ConfigError(f"task gym-{name}: found {error}, allowed: another generator") from None


def _level(generator: Generator, level: int, seed: int, most: int) -> Iterator[Question]:
    data = dataset(generator, level, seed, 1)
    for entry in entries(generator, level, seed, most):
        form = scored(data, generator.name, entry)
        yield question(generator.name, entry["question"], grader(form), level, 0.0)
