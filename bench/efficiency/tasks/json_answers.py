"""Questions whose answer must be JSON under a schema, with the right value: thinking and format together.

A reply that is no JSON has no answer; JSON that breaks the schema, or holds another value, is wrong. The request
carries the schema as `response_format`; the `-prompted` tasks say it in the prompt alone, for servers without it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from random import Random
from typing import Any

from vllm_puzzle.bench.efficiency.question import Question
from vllm_puzzle.bench.efficiency.record import CORRECT, NO_PARSE, WRONG
from vllm_puzzle.bench.efficiency.tasks import gym, json_schema
from vllm_puzzle.bench.pocket_tasks import DAYS, LADDER, Item, draw

INTEGER = {"type": "integer"}
# Parts of a question, by level.
PARTS = (1, 2, 4)


@dataclass(frozen=True, slots=True)
class Typed:
    """A question with its answer as JSON. key: the answer's name in the object."""

    text: str
    key: str
    value: Any
    schema: Mapping[str, Any]
    chance: float


def grade(schema: Mapping[str, Any], value: Any) -> Callable[[str], str]:
    """The grader: valid JSON, under the schema, with this value."""

    def grader(answer: str) -> str:
        try:
            found = json_schema.parse(answer)
        except (ValueError, RecursionError):
            return NO_PARSE
        return CORRECT if json_schema.fits(found, schema) and json_schema.equal(found, value) else WRONG

    return grader


def build(task: str, parts: Sequence[Typed], level: int, is_enforced: bool) -> Question:
    """One question of several parts, whose answer is an object with a key for each."""
    names = [f"{part.key}_{number}" if len(parts) > 1 else part.key for number, part in enumerate(parts, start=1)]
    properties = {name: dict(part.schema) for name, part in zip(names, parts, strict=True)}
    schema = {"type": "object", "properties": properties, "required": names, "additionalProperties": False}
    value = {name: part.value for name, part in zip(names, parts, strict=True)}
    lines = [f"{name}: {part.text.strip()}" for name, part in zip(names, parts, strict=True)]
    text = "\n\n".join(
        [*lines, f"Reply with one JSON object, and nothing else, under this schema:\n{json.dumps(schema)}"]
    )
    chance = 1.0
    for part in parts:
        chance *= part.chance
    asked = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    digest = hashlib.sha256(text.encode()).hexdigest()[:10]
    fields = {"response_format": asked} if is_enforced else {}
    messages = ({"role": "user", "content": text},)
    return Question(task, f"{level}-{digest}", messages, grade(schema, value), level, chance, fields)


# --- over the pocket tasks: available everywhere -------------------------------------------------------------------


def pocket(argument: str, count: int, seed: int) -> Sequence[Question]:
    """Sums, products, comparisons, sorting and weekdays; level 1 to 3: one, two and four of them at once."""
    task = "json-pocket" if argument == "enforced" else "json-pocket-prompted"
    found: dict[str, Question] = {}
    rng = Random(f"json-pocket/{seed}")
    for number in range(20 * count):
        level = 1 + number % len(PARTS)
        parts = [_pocket_part(rng) for _ in range(PARTS[level - 1])]
        question = build(task, parts, level, argument == "enforced")
        found.setdefault(question.digest, question)
        if len(found) == count:
            break
    return list(found.values())


def _pocket_part(rng: Random) -> Typed:
    kind = rng.choice(sorted(LADDER))
    item = draw(rng, kind, rng.choice(LADDER[kind][1:]), held_out=True)
    key, value, schema, chance = _POCKET[kind](item)
    return Typed(item.question, key, value, schema, chance)


def _sorted_digits(item: Item) -> tuple[str, Any, Mapping[str, Any], float]:
    digits = [int(digit) for digit in item.answer.split()]
    element = {"type": "integer", "minimum": 0, "maximum": 9}
    return "sorted", digits, {"type": "array", "items": element, "minItems": len(digits), "maxItems": len(digits)}, 0.0


_POCKET: dict[str, Callable[[Item], tuple[str, Any, Mapping[str, Any], float]]] = {
    "chain": lambda item: ("result", int(item.answer), INTEGER, 0.01),
    "compare": lambda item: ("larger", int(item.answer), INTEGER, 0.01),
    "product": lambda item: ("last_digit", int(item.answer), {"type": "integer", "minimum": 0, "maximum": 9}, 0.1),
    "sort": _sorted_digits,
    "calendar": lambda item: (
        "weekday",
        next(day for day in DAYS if day.startswith(item.answer)),
        {"type": "string", "enum": list(DAYS)},
        1 / 7,
    ),
}

# --- over reasoning-gym's core -------------------------------------------------------------------------------------


def _integer(entry: gym.Entry) -> tuple[Any, Mapping[str, Any]]:
    return int(entry["answer"]), INTEGER


def _calendar(entry: gym.Entry) -> tuple[Any, Mapping[str, Any]]:
    if entry["answer"] in gym.DAYS:
        return entry["answer"], {"type": "string", "enum": list(gym.DAYS)}
    return (entry["answer"] == "Yes", {"type": "boolean"}) if entry["answer"] in ("Yes", "No") else _integer(entry)


def _words(entry: gym.Entry) -> tuple[Any, Mapping[str, Any]]:
    words = list(entry["metadata"]["sorted_words"])
    bounds = {"minItems": len(words), "maxItems": len(words)}
    return words, {"type": "array", "items": {"type": "string"}, **bounds}


def _grid(entry: gym.Entry) -> tuple[Any, Mapping[str, Any]]:
    row = {"type": "array", "items": {"type": "integer", "minimum": 1, "maximum": 4}, "minItems": 4, "maxItems": 4}
    return entry["metadata"]["solution"], {"type": "array", "items": row, "minItems": 4, "maxItems": 4}


def _fraction(entry: gym.Entry) -> tuple[Any, Mapping[str, Any]]:
    value = Fraction(entry["answer"])
    parts = {"numerator": value.numerator, "denominator": value.denominator}
    return parts, _object({name: {"type": "integer", "minimum": 0} for name in parts})


def _roles(entry: gym.Entry) -> tuple[Any, Mapping[str, Any]]:
    metadata = entry["metadata"]
    terms = [str(metadata["knight_knave_terms"][name]) for name in ("knight", "knave")]
    people = zip(metadata["names"], metadata["solution"], strict=True)
    value = {str(name): terms[0] if is_true else terms[1] for name, is_true in people}
    return value, _object({name: {"type": "string", "enum": terms} for name in value})


def _object(properties: Mapping[str, Any]) -> Mapping[str, Any]:
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(properties),
        "additionalProperties": False,
    }


_GYM: dict[str, Callable[[gym.Entry], tuple[Any, Mapping[str, Any]]]] = {
    "chain_sum": _integer,
    "leg_counting": _integer,
    "simple_equations": _integer,
    "calendar_arithmetic": _calendar,
    "family_relationships": lambda entry: (entry["answer"], {"type": "string", "enum": list(gym.FAMILY)}),
    "course_schedule": lambda entry: (entry["answer"] == "True", {"type": "boolean"}),
    "word_sorting": _words,
    "mini_sudoku": _grid,
    "dice": _fraction,
    "knights_knaves": _roles,
}
FORMAT_EACH = 50
FORMAT_SIZE = FORMAT_EACH * len(_GYM)


def core(argument: str, count: int, seed: int) -> Sequence[Question]:
    """Ten of reasoning-gym's generators, each answer in the JSON type that fits it, on three levels."""
    task = "format" if argument == "enforced" else "format-prompted"
    sources = []
    for place, name in enumerate(_GYM):
        steps = [1 + (place + step) % 3 for step in range(3)]
        levels = [_gym_level(task, name, level, seed, argument == "enforced") for level in steps]
        sources.append(islice(gym.in_turn(levels), FORMAT_EACH))
    return list(islice(gym.in_turn(sources), count))


def _gym_level(task: str, name: str, level: int, seed: int, is_enforced: bool) -> Iterator[Question]:
    generator = gym.BY_NAME[name]
    for entry in gym.entries(generator, level, seed, -(-FORMAT_EACH // 3)):
        value, schema = _GYM[name](entry)
        part = Typed(entry["question"], "answer", value, schema, generator.chance(entry))
        yield build(f"{task}-{name}", [part], level, is_enforced)
