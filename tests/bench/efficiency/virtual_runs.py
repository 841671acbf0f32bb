"""Runs against the mock in virtual time, on questions that bring their own script of steps.

Delays are multiples of 1/64 s, which binary fractions hold exactly: what is compared is compared for equality.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from vllm_puzzle.bench.efficiency.arm import Arm, Load
from vllm_puzzle.bench.efficiency.mock import Mock
from vllm_puzzle.bench.efficiency.mock_behaviour import ANSWER, FINISH, ROLE, SILENT, THINKING, Behaviour, Step
from vllm_puzzle.bench.efficiency.question import Ask, Question
from vllm_puzzle.bench.efficiency.record import CORRECT, NO_PARSE, WRONG, RequestRecord, read_records
from vllm_puzzle.bench.efficiency.run import Setup, run_arm
from vllm_puzzle.bench.efficiency.run_folder import REQUESTS
from vllm_puzzle.bench.efficiency.virtual_time import MockTransport, run_virtual

TICK = 1 / 64


def grade(answer: str) -> str:
    """`ok` is right, `no` is wrong, anything else is no answer."""
    return {"ok": CORRECT, "no": WRONG}.get(answer.strip(), NO_PARSE)


def steps(thought: int, answer: str = "ok", *, prefill: int = 8, thinking: int = 2, answering: int = 1) -> list[Step]:
    """A role chunk after `prefill` ticks, tokens `thinking` and `answering` ticks apart, one answer token a character;
    a closing marker that no chunk shows, and an end token.
    """
    found = [Step(prefill * TICK, ROLE)]
    found += [Step(thinking * TICK, THINKING, "t ", 1)] * thought
    found += [Step(answering * TICK, SILENT, "</think>", 1)] if thought else []
    found += [Step(answering * TICK, ANSWER, letter, 1) for letter in answer]
    return [*found, Step(answering * TICK, FINISH, "stop", 1)]


def question(name: str, script: Iterable[Step] = (), task: str = "task", **reply: Any) -> Question:
    """A question whose reply is `script`; without one the mock's own behaviour decides."""
    found = list(script)
    fields = {"mock": {"steps": [list(step) for step in found], **reply}} if found or reply else {}
    return Question(task, name, ({"role": "user", "content": f"question {name}"},), grade, fields=fields)


def asks_of(questions: Sequence[Question]) -> list[Ask]:
    """Each once, in their order."""
    return [Ask(found, 0, order) for order, found in enumerate(questions)]


def arm_of(name: str = "arm", **settings: Any) -> Arm:
    """An arm of the mock."""
    return Arm(name, "http://mock", "mock", **settings)


class Finished:
    """A run that is over: its summary, records and folder, and the mock with the requests it got."""

    def __init__(self, summary: dict[str, Any], folder: Path, mock: Mock) -> None:
        self.summary, self.folder, self.mock = summary, folder, mock
        self.records: list[RequestRecord] = list(read_records(folder / REQUESTS))

    @property
    def metrics(self) -> dict[str, Any]:
        """Values by name."""
        found: dict[str, Any] = self.summary["metrics"]
        return found

    @property
    def window(self) -> tuple[float, float]:
        """Its start and end."""
        (window,) = self.summary["facts"]["windows"]
        return window["start"], window["end"]


def finished(
    questions: Sequence[Question],
    load: Load,
    *,
    arm: Arm | None = None,
    behaviour: Behaviour | None = None,
    warm_up: Sequence[Question] = (),
    setup: Setup | None = None,
    folder: Path | None = None,
    latency: float = 0.0,
    mock: Mock | None = None,
) -> Finished:
    """Run it in virtual time."""
    folder = folder or Path(tempfile.mkdtemp()) / "run"
    mock = mock or Mock(behaviour)
    chosen = arm or arm_of()
    main = run_arm(chosen, load, asks_of(questions), warm_up, folder, MockTransport(mock, latency), setup or Setup())
    return Finished(run_virtual(main), folder, mock)
