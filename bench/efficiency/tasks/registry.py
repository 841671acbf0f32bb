"""The tasks by name; each is imported when it is asked for. Standard library only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module

from vllm_puzzle.bench.efficiency.question import Question
from vllm_puzzle.model_configs.schema import ConfigError

# (how many at least, seed) → questions, or all there are where the task has fewer. The first n are the same whatever
# number is asked for.
Source = Callable[[int, int], Sequence[Question]]


@dataclass(frozen=True, slots=True)
class Task:
    """A source of questions. source: `module:function`. size: how many there are, None for any number."""

    name: str
    source: str
    purpose: str
    licence: str
    size: int | None = None

    def questions(self, count: int, seed: int) -> Sequence[Question]:
        """The first `count` questions, or all."""
        module, _, function = self.source.partition(":")
        load: Source = getattr(import_module(module), function)
        return load(count, seed)[:count]


TASKS = {
    task.name: task
    for task in (
        Task(
            "pocket",
            "vllm_puzzle.bench.efficiency.tasks.pocket:ladder",
            "sums, products, comparisons, sorting, weekdays on a ladder of 1 to 12 steps",
            "Apache-2.0",
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
    """The task of this name. Raises ConfigError."""
    if name not in TASKS:
        raise ConfigError(f"task: found {name!r}, allowed: {', '.join(TASKS)}")
    return TASKS[name]
