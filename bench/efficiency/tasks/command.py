"""`vllm-puzzle bench tasks`: what can be asked, how hard it is, whose it is, and whether it is here."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from vllm_puzzle.bench.efficiency.tasks.registry import TASKS, Task, find_task
from vllm_puzzle.model_configs.schema import ConfigError

# So many are looked at for levels and chance; those of a small task all.
SAMPLE = 240
# A family of tasks is shown by one of them.
_EXAMPLES = {"gym-NAME": "gym-aiw"}


def tasks(argv: Sequence[str]) -> int:
    """List the tasks, or print questions of one. Returns the exit status; raises ConfigError."""
    parser = argparse.ArgumentParser(prog="vllm-puzzle bench tasks", description="the questions that runs can ask")
    parser.add_argument("task", nargs="?", help="print questions of this one")
    parser.add_argument("--num-prompts", type=int, default=3, help="how many (default: 3)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="for programs")
    options = parser.parse_args(argv)
    if options.task is not None:
        _show(find_task(options.task), options.num_prompts, options.seed, options.json)
        return 0
    rows = [describe(task, options.seed) for task in TASKS.values()]
    print(json.dumps(rows, indent=1) if options.json else table(rows))
    return 0


def describe(task: Task, seed: int = 0) -> dict[str, Any]:
    """One row: name, count (None: any number), levels, mean chance, licence, version, whether it is here, how else."""
    row: dict[str, Any] = {"name": task.name, "purpose": task.purpose, "count": task.size, "licence": task.licence}
    source = {"source": task.package or "vllm-puzzle", "version": task.version}
    try:
        sample = find_task(_EXAMPLES.get(task.name, task.name)).questions(SAMPLE, seed)
    except ConfigError:
        return row | {"levels": None, "chance": None} | source | {"available": False, "install": task.install}
    levels = [question.level for question in sample if question.level is not None]
    row["levels"] = [min(levels), max(levels)] if levels else None
    row["chance"] = sum(question.chance for question in sample) / len(sample)
    return row | source | {"available": True, "install": task.install}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows for a terminal; a note under those that are not here."""
    head = ("task", "questions", "levels", "chance", "licence", "source", "")
    lines = [head]
    for row in rows:
        levels = "-" if row["levels"] is None else "{} to {}".format(*row["levels"])
        chance = "-" if row["chance"] is None else f"{row['chance']:.1%}"
        count = "any number" if row["count"] is None else str(row["count"])
        source = f"{row['source']} {row['version'] or ''}".strip()
        state = "" if row["available"] else f"not here: {row['install']}"
        lines.append((row["name"], count, levels, chance, row["licence"], source, state))
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    out = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    purposes = [f"{row['name']}: {row['purpose']}" for row in rows]
    return "\n".join([*out, "", *purposes])


def _show(task: Task, count: int, seed: int, is_json: bool) -> None:
    for question in task.questions(count, seed):
        if is_json:
            fields = {"task": question.task, "id": question.id, "level": question.level, "chance": question.chance}
            print(json.dumps(fields | {"messages": list(map(dict, question.messages)), **question.fields}))
            continue
        print(f"--- {question.task} {question.id}, level {question.level}, chance {question.chance:.1%}")
        for message in question.messages:
            print(message["content"])
