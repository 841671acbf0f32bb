"""reasoning-gym as tasks: its generators, asked for on a ladder of difficulties, judged by our own graders.

The package (Apache-2.0, `pip install "vllm-puzzle[bench]"`) makes questions from seeds and downloads nothing. What is
mended here, each with a test: scores that are not 1 for right answers or not 0 for wrong ones (see `gym_scores.py`),
items whose own answer is wrong, seeds that overlap (item i of seed s is item i − 1 of seed s + 1), repeated questions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cache
from importlib import import_module
from itertools import islice
from typing import Any

from vllm_puzzle.bench.efficiency.question import Question
from vllm_puzzle.bench.efficiency.tasks import answers, puzzle_forms
from vllm_puzzle.bench.efficiency.tasks.answers import Form
from vllm_puzzle.model_configs.schema import ConfigError

Entry = Mapping[str, Any]
PACKAGE = "reasoning-gym"
# Item i of a seed is drawn with Random(seed + i): seeds of levels must lie further apart than any index.
_STRIDE = 1_000_003
_MAX_DRAWS = 20  # per question wanted, until a generator counts as exhausted
SUFFIX = "\n\nEnd your reply with `Answer:` and then the answer alone."
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
FAMILY = (
    "mother", "father", "sister", "brother", "daughter", "son", "wife", "husband", "grandmother", "grandfather",
    "aunt", "uncle", "niece", "nephew", "mother-in-law", "father-in-law",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Generator:
    """One of the package's generators. form: an entry's right answer. chance: of the best blind guess.

    steps: rungs of its curriculum that make levels 1, 2 and 3. settings: of its configuration, per level, over those.
    is_sound: whether the entry's own answer can be trusted.
    """

    name: str
    form: Callable[[Entry], Form]
    chance: Callable[[Entry], float] = lambda entry: 0.0
    steps: tuple[int, ...] = (0, 1, 2)
    settings: tuple[Mapping[str, Any], ...] = ()
    always: Mapping[str, Any] = field(default_factory=dict)
    is_sound: Callable[[Entry], bool] = lambda entry: True


def _number(entry: Entry) -> Form:
    return answers.number(Fraction(entry["answer"]))


def _calendar(entry: Entry) -> Form:
    if entry["answer"] in DAYS:
        return answers.choice(entry["answer"], DAYS)
    return answers.choice(entry["answer"], ("Yes", "No")) if entry["answer"] in ("Yes", "No") else _number(entry)


def _calendar_chance(entry: Entry) -> float:
    return 1 / 7 if entry["answer"] in DAYS else 0.5 if entry["answer"] in ("Yes", "No") else 0.0


def _base(entry: Entry) -> Form:
    digits = "0123456789abcdefghijklmnopqrstuvwxyz"
    return answers.token(entry["answer"], digits[: entry["metadata"]["target_base"]])


def _roles(entry: Entry) -> Form:
    metadata = entry["metadata"]
    names = zip(metadata["names"], metadata["solution"], strict=True)
    terms = metadata["knight_knave_terms"]
    return puzzle_forms.roles({str(name): str(terms["knight" if is_true else "knave"]) for name, is_true in names})


def _roots(entry: Entry) -> Form:
    # Four decimals are asked for; rounding down or up must not matter.
    return puzzle_forms.numbers_set([Fraction(text) for text in entry["answer"].split(",")], Fraction(2, 10_000))


def _is_duration_sound(entry: Entry) -> bool:
    """Not where the package cuts the time off behind `(Weekday)`, nor where the end seems to come first."""
    cut = entry["metadata"]["task_type"].startswith("datetime") and "day)" in entry["question"]
    return not cut and "-" not in entry["answer"]


def _countdown(entry: Entry) -> Form:
    return puzzle_forms.expression(entry["metadata"]["numbers"], entry["metadata"]["target"])


def _size(low: int, high: int) -> Mapping[str, Any]:
    return {"min_rows": low, "max_rows": high, "min_cols": low, "max_cols": high}


def _count(count: int) -> Mapping[str, Any]:
    return {"min_numbers": count, "max_numbers": count}


MIX: tuple[Generator, ...] = (
    Generator("gsm_symbolic", _number, steps=(0,)),
    Generator("chain_sum", _number, steps=(0, 2, 4)),
    Generator("decimal_chain_sum", _number),
    Generator("products", _number),
    Generator("base_conversion", _base, steps=(0, 1, 3)),
    Generator("calendar_arithmetic", _calendar, _calendar_chance, steps=(0, 1, 3)),
    Generator(
        "time_intervals",
        lambda entry: puzzle_forms.duration(entry["answer"]),
        steps=(1, 2, 4),
        # Answers to the millisecond are off by one where a float is cut.
        always={"task_types": ["time", "time_seconds", "date", "datetime", "datetime_tz"]},
        is_sound=_is_duration_sound,
    ),
    Generator("leg_counting", _number, steps=(1, 4, 8)),
    Generator("knights_knaves", _roles, lambda entry: 0.5 ** len(entry["metadata"]["names"]), steps=(0, 1, 3)),
    Generator(
        "family_relationships",
        lambda entry: answers.choice(entry["answer"], FAMILY),
        lambda entry: 1 / len(FAMILY),
        steps=(0, 2, 5),
    ),
    # Seven in ten are Yes.
    Generator("syllogism", lambda entry: answers.choice(entry["answer"], ("Yes", "No")), lambda entry: 0.7, (1, 2, 3)),
    Generator("word_sorting", lambda entry: answers.items(entry["metadata"]["sorted_words"])),
    Generator("mini_sudoku", lambda entry: puzzle_forms.small_sudoku(entry["metadata"]["puzzle"]), steps=(0, 2, 3)),
    Generator(
        "shortest_path",
        lambda entry: puzzle_forms.shortest_path(entry["metadata"]["matrix"], entry["answer"]),
        lambda entry: 0.1,  # so many have no way
        settings=(_size(4, 6), _size(7, 9), _size(10, 13)),
        always={"p_blocked": 0.25},
    ),
    Generator("simple_equations", _number),
    Generator("complex_arithmetic", lambda entry: puzzle_forms.complex_number(*entry["metadata"]["result"])),
    Generator("bitwise_arithmetic", lambda entry: puzzle_forms.hexadecimal(entry["answer"]), steps=(0, 2, 4)),
    Generator("course_schedule", lambda entry: answers.choice(entry["answer"], ("True", "False")), lambda entry: 0.5),
    Generator("dice", _number),
    Generator("countdown", _countdown, steps=(0, 0, 0), settings=(_count(3), _count(4), _count(5))),
    Generator("polynomial_equations", _roots, is_sound=lambda entry: bool(entry["answer"].strip())),
)
BY_NAME = {generator.name: generator for generator in MIX}
CORE = MIX[:20]
CORE_EACH, CORE_SIZE = 50, 1000
QUICK = tuple(
    BY_NAME[name] for name in ("chain_sum", "calendar_arithmetic", "knights_knaves", "base_conversion", "leg_counting")
)
QUICK_EACH, QUICK_SIZE = 20, 100


@cache
def package(module: str = "reasoning_gym") -> Any:
    """The package, or a part of it. Raises ConfigError where it is not installed."""
    try:
        return import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"task from {PACKAGE}: found {error}, allowed: the package, which `pip install {PACKAGE}` brings"
        ) from None


def dataset(generator: Generator, level: int, seed: int, size: int) -> Any:
    """The package's data set of one level (1, 2, 3) of a generator."""
    factory = package("reasoning_gym.factory")
    settings = dict(generator.always) | dict(generator.settings[level - 1] if generator.settings else {})
    drawn = {"seed": (3 * seed + level) * _STRIDE, "size": size}
    cls, config_cls = factory.DATASETS[generator.name]
    if generator.name not in factory.CURRICULA:
        return cls(config_cls(**drawn, **settings))
    ladder = package("reasoning_gym.coaching.base_curriculum")
    curriculum = factory.CURRICULA[generator.name]()
    for name, attribute in curriculum.attributes.items():
        curriculum.set_attr_level(name, min(generator.steps[level - 1], len(attribute.levels) - 1))
    # Each level is harder than the one before, instead of holding it too.
    context = ladder.DefaultCurriculumContext(mode=ladder.RangeAttributeMode.UPPER_BOUND)
    return cls(replace(curriculum.generate_configuration(defaults=drawn, context=context), **settings))


def entries(generator: Generator, level: int, seed: int, most: int) -> Iterator[Entry]:
    """Up to `most` different sound entries of one level."""
    found: set[str] = set()
    size = most * _MAX_DRAWS
    data = dataset(generator, level, seed, size)
    for index in range(size):
        if len(found) == most:
            return
        entry = data[index]
        if entry["question"] not in found and generator.is_sound(entry):
            found.add(entry["question"])
            yield entry


def ladder(generator: Generator, seed: int, most: int, first: int = 0) -> Iterator[Question]:
    """Up to `most` questions of a generator, its levels in turn, beginning with the one at place `first`."""
    count = len(generator.steps)
    levels = [1 + (first + place) % count for place in range(count)]
    yield from islice(in_turn([_level(generator, level, seed, most) for level in levels]), most)


def _level(generator: Generator, level: int, seed: int, most: int) -> Iterator[Question]:
    for entry in entries(generator, level, seed, -(-most // len(generator.steps))):
        yield question(generator.name, entry["question"], generator.form(entry).grade, level, generator.chance(entry))


def question(name: str, text: str, grader: Callable[[str], str], level: int | None, chance: float) -> Question:
    """One question; its id follows from its text, so that it is the same whatever stands before it."""
    digest = hashlib.sha256(text.encode()).hexdigest()[:10]
    message = {"role": "user", "content": text.rstrip() + SUFFIX}
    return Question(f"gym-{name}", f"{level or 0}-{digest}", (message,), grader, level, chance)


def in_turn(iterators: Sequence[Iterator[Question]]) -> Iterator[Question]:
    """One of each, round and round; those that end are left out."""
    left = list(iterators)
    while left:
        for iterator in tuple(left):
            item = next(iterator, None)
            if item is None:
                left.remove(iterator)
            else:
                yield item


def core(count: int, seed: int) -> Sequence[Question]:
    """20 generators × 50 questions on three levels."""
    return _suite(CORE, CORE_EACH, count, seed)


def quick(count: int, seed: int) -> Sequence[Question]:
    """5 generators × 20 questions."""
    return _suite(QUICK, QUICK_EACH, count, seed)


def _suite(generators: Sequence[Generator], each: int, count: int, seed: int) -> Sequence[Question]:
    # Each generator begins on another level, so that a few questions are a fair share of the ladder too.
    return list(
        islice(in_turn([ladder(generator, seed, each, place) for place, generator in enumerate(generators)]), count)
    )
