"""What ends a run early: dead servers, refusals, Ctrl-C, full disks. Partial results stay and the manifest says why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from virtual_runs import TICK, arm_of, asks_of, finished, question, steps
from vllm_puzzle.bench.efficiency.arm import CLOSED, CONSTANT, Load
from vllm_puzzle.bench.efficiency.lag import LagMonitor
from vllm_puzzle.bench.efficiency.manifest import read_manifest, write_manifest
from vllm_puzzle.bench.efficiency.mock import Mock
from vllm_puzzle.bench.efficiency.mock_behaviour import Behaviour
from vllm_puzzle.bench.efficiency.question import Question
from vllm_puzzle.bench.efficiency.record import CORRECT, ERROR
from vllm_puzzle.bench.efficiency.run import Setup, exit_status, run_arm
from vllm_puzzle.bench.efficiency.runner import GIVE_UP_AFTER, GIVE_UP_CONNECTING
from vllm_puzzle.bench.efficiency.virtual_time import MockTransport, run_virtual
from vllm_puzzle.model_configs.schema import ConfigError

FOUR = Load(CLOSED, concurrency=4)
QUESTIONS = [question(f"q{index}", steps(4)) for index in range(200)]


def status_on_disk(folder: Path) -> str:
    return str(json.loads((folder / "manifest.json").read_text())["status"])


def test_a_server_that_dies_is_given_up_and_what_came_before_stays() -> None:
    run = finished(QUESTIONS, FOUR, behaviour=Behaviour(dies_after=50))
    outcomes = [record.outcome for record in run.records]
    # The fifty that it answered, but for those in flight when it went down.
    assert outcomes.count(CORRECT) in range(47, 51) and outcomes.count(ERROR) >= GIVE_UP_CONNECTING
    assert run.summary["status"] == status_on_disk(run.folder) == "server lost"
    assert exit_status("server lost") == 3
    assert run.summary["issued"] == run.summary["ended"] + run.summary["abandoned"] < 200
    # Every issued request counts, those that the server took down with it too.
    assert run.metrics["accuracy"] == outcomes.count(CORRECT) / len(outcomes)


def test_a_storm_of_429_is_not_retried_and_ends_the_run() -> None:
    run = finished(QUESTIONS, FOUR, mock=_Storm(30, 10_000))
    assert (run.summary["status"], exit_status("refused")) == ("refused", 3)
    refused = [record for record in run.records if record.outcome == ERROR]
    assert {record.error for record in refused} == {"HTTP 429: mock: 429"}
    asked = [body["messages"][0]["content"] for body in run.mock.requests]
    assert len(asked) == len(set(asked)) <= 30 + GIVE_UP_AFTER + 4, "no question was sent twice"


def test_a_storm_that_passes_costs_the_requests_in_it_and_no_more() -> None:
    run = finished(QUESTIONS, Load(CONSTANT, rate=1 / (16 * TICK)), mock=_Storm(50, 50 + GIVE_UP_AFTER - 1))
    assert run.summary["status"] == "complete"
    assert run.metrics["outcome_error"] == (GIVE_UP_AFTER - 1) / 200
    assert run.metrics["accuracy"] == (200 - GIVE_UP_AFTER + 1) / 200


class _Storm(Mock):
    """Refuses a stretch of requests although they bring their scripts."""

    def __init__(self, start: int, end: int) -> None:
        super().__init__(Behaviour())
        self.span = (start, end)

    async def _chat(self, raw: bytes, send: object) -> None:
        if self.span[0] <= len(self.requests) < self.span[1]:
            body = json.loads(raw)
            raw = json.dumps(body | {"mock": {"status": 429}}).encode()
        await super()._chat(raw, send)  # type: ignore[arg-type]


def test_an_error_of_ours_is_raised_and_written_down(tmp_path: Path) -> None:
    def broken(answer: str) -> str:
        return "splendid"

    found = Question("t", "q", ({"role": "user", "content": "1"},), broken)
    main = run_arm(arm_of(), FOUR, asks_of([found]), (), tmp_path / "run", MockTransport(Mock()), Setup())
    with pytest.raises(BaseExceptionGroup) as raised:
        run_virtual(main)
    assert raised.group_contains(ValueError, match="found 'splendid'")
    assert status_on_disk(tmp_path / "run") == "failed"


def test_a_folder_with_a_run_is_not_written_over(tmp_path: Path) -> None:
    finished(QUESTIONS[:2], FOUR, folder=tmp_path / "run")
    before = (tmp_path / "run" / "requests.jsonl").read_bytes()
    with pytest.raises(ConfigError, match="found a run, allowed: a folder without one"):
        finished(QUESTIONS[:2], FOUR, folder=tmp_path / "run")
    assert (tmp_path / "run" / "requests.jsonl").read_bytes() == before


def test_the_state_gets_into_the_manifest_of_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_manifest(tmp_path, {"schema_version": 1, "status": "running"})
    real = Path.open

    def full(self: Path, mode: str = "r", *rest: object, **named: object) -> object:
        if "w" in mode:
            raise OSError(28, "No space left on device")
        return real(self, mode, *rest, **named)  # type: ignore[call-overload]

    monkeypatch.setattr(Path, "open", full)
    write_manifest(tmp_path, {"schema_version": 1, "status": "disk full", "note": "x" * 2000})
    with pytest.raises(OSError, match="on a full disk"):
        write_manifest(tmp_path, {"schema_version": 1, "status": "disk full", "note": "x" * 10_000})
    monkeypatch.undo()
    assert read_manifest(tmp_path)["status"] == "disk full"
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_a_client_that_is_late_makes_the_run_invalid(monkeypatch: pytest.MonkeyPatch) -> None:
    real = LagMonitor.quantile
    monkeypatch.setattr(LagMonitor, "quantile", lambda self, share: (real(self, share) or 0.0) + 0.0051)
    run = finished(QUESTIONS[:12], FOUR)
    assert run.summary["status"] == status_on_disk(run.folder) == "invalid"
    assert run.summary["invalid_because"] == ["client: event loop late by 5.1 ms at p99, allowed: 5 ms"]
    assert exit_status("invalid") == 4
    assert run.metrics["accuracy"] == 1.0, "the numbers are there all the same"


def test_a_loop_that_is_blocked_shows_for_as_long_as_it_was() -> None:
    monitor = LagMonitor(tick=0.005)
    due, now = 0.005, 0.0
    for _ in range(100):  # a good second, then half a second in one block
        now = due + 0.0001
        due = monitor.record(due, now)
    due = monitor.record(due, due + 0.5001)
    # 100 ticks on time and 101 that the block swallowed, late by 500, 495, … 0 ms.
    assert len(monitor.samples) == 201
    assert monitor.quantile(1.0) == pytest.approx(0.5001)
    assert monitor.quantile(0.75) == pytest.approx(0.25, abs=0.01)
    naive = sorted([0.0001] * 100 + [0.5])
    assert naive[round(0.98 * len(naive))] == 0.0001, "one sample per wake-up shows nothing at p98"
    assert due > 1.0
