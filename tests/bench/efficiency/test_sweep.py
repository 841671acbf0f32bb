"""Sweeps in virtual time: the order of blocks, the same questions in every arm, going on after a crash, pooling."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from virtual_runs import arm_of, grade, question
from vllm_puzzle.bench.efficiency.arm import CLOSED, Load
from vllm_puzzle.bench.efficiency.compare import compare
from vllm_puzzle.bench.efficiency.lag import LagMonitor
from vllm_puzzle.bench.efficiency.manifest import read_manifest, write_manifest
from vllm_puzzle.bench.efficiency.mock import Mock
from vllm_puzzle.bench.efficiency.mock_behaviour import Behaviour
from vllm_puzzle.bench.efficiency.progress import Progress
from vllm_puzzle.bench.efficiency.question import Question
from vllm_puzzle.bench.efficiency.record import WARM_UP
from vllm_puzzle.bench.efficiency.run import Setup
from vllm_puzzle.bench.efficiency.run_folder import read_run, read_runs
from vllm_puzzle.bench.efficiency.summary import Deployment
from vllm_puzzle.bench.efficiency.sweep import Plan, Setting, run_sweep
from vllm_puzzle.bench.efficiency.virtual_time import MockTransport, run_virtual
from vllm_puzzle.model_configs.schema import ConfigError

OFF = arm_of("off", fields={"reasoning_effort": "none"})
LOW = arm_of("low", fields={"reasoning_effort": "low"}, budget=None)
TIGHT = arm_of("budget-8", fields={"thinking_token_budget": 8}, budget=8)


def plan_of(**changes: Any) -> Plan:
    questions = tuple(Question("task", str(i), question(str(i)).messages, grade) for i in range(12))
    warm_up = (question("1000"), question("1001"))
    settings = tuple(
        Setting(arm, Load(CLOSED, concurrency=2), warm_up, Deployment(num_gpus=number))
        for number, arm in enumerate((OFF, LOW, TIGHT), start=1)
    )
    return replace(Plan(settings, questions, num_prompts=12, seed=7, blocks=4), **changes)


def swept(
    plan: Plan, out: Path, mock: Mock | None = None, transport: MockTransport | None = None
) -> tuple[str, Mock, str]:
    """Run it; returns how it ended, the mock, and what was shown."""
    transport = transport or MockTransport(mock or Mock(Behaviour()))
    shown = io.StringIO()
    show = Progress(plan.blocks * len(plan.settings) * len(plan.asks(0)), stream=shown, clock=lambda: 0.0)
    status = run_virtual(run_sweep(plan, out, transport, Setup(), show))
    return status, transport.app, show.line()


def kind(body: dict[str, Any]) -> str:
    return "budget-8" if "thinking_token_budget" in body else {"none": "off", "low": "low"}[body["reasoning_effort"]]


def runs_in_order(mock: Mock) -> list[str]:
    kinds = [kind(body) for body in mock.requests]
    size = 14  # 12 measured and 2 to warm up
    assert all(len(set(kinds[start : start + size])) == 1 for start in range(0, len(kinds), size))
    return kinds[::size]


def test_blocks_go_there_and_back(tmp_path: Path) -> None:
    status, mock, line = swept(plan_of(), tmp_path)
    there = ["off", "low", "budget-8"]
    assert status == "complete"
    assert runs_in_order(mock) == there + there[::-1] + there + there[::-1]
    assert line.startswith("block 4/4 off@c2  144/144  ETA 0:00  accuracy ")


def test_every_arm_is_asked_the_same_in_order_and_no_block_finds_anothers_prompts_cached(
    tmp_path: Path,
) -> None:
    _, mock, _ = swept(plan_of(), tmp_path)
    blocks = [mock.requests[start : start + 14] for start in range(0, len(mock.requests), 14)]
    asked = [[body["messages"][0]["content"] for body in block] for block in blocks]
    for turn in range(4):
        first, *others = asked[3 * turn : 3 * turn + 3]
        assert all(other == first for other in others)
    assert asked[0] != asked[3], "another block has another order"
    salts = [{body["cache_salt"] for body in block} for block in blocks]
    assert not set.intersection(*salts) and len(set.union(*salts)) >= len(blocks)


def test_a_split_sweep_asks_each_question_once_per_arm(tmp_path: Path) -> None:
    swept(plan_of(is_split=True), tmp_path)
    records = [record for record in read_run(tmp_path / "off@c2").records if record.phase != WARM_UP]
    assert sorted(int(record.question) for record in records) == list(range(12))
    assert [len([record for record in records if record.block == block]) for block in range(4)] == [3, 3, 3, 3]


def test_pooled_runs_are_what_compare_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    swept(plan_of(), tmp_path)
    runs = read_runs(tmp_path)
    assert [run.path.name for run in runs] == ["budget-8@c2", "low@c2", "off@c2"]
    for run in runs:
        assert run.status == "complete"
        assert [window.block for window in run.facts.windows] == [0, 1, 2, 3]
        blocks = [json.loads((run.path / "blocks" / str(b) / "summary.json").read_text()) for b in range(4)]
        pooled = json.loads((run.path / "summary.json").read_text())
        assert pooled["metrics"]["issued"] == 48
        rates = [block["metrics"]["request_throughput"] * block["metrics"]["duration"] for block in blocks]
        durations = [block["metrics"]["duration"] for block in blocks]
        assert pooled["metrics"]["request_throughput"] == pytest.approx(sum(rates) / sum(durations))
        assert len(pooled["by_block"]) == 4
    assert [run.facts.num_gpus for run in runs] == [3, 2, 1], "each arm has its own devices"
    compare([str(tmp_path / "off@c2"), str(tmp_path / "low@c2"), "--margin", "0.01"])
    assert "accuracy" in capsys.readouterr().out


class Crash(Exception):
    """What ends a process, as far as a sweep can see."""


class Crashing(MockTransport):
    """Takes the whole benchmark down at one request."""

    def __init__(self, at: int) -> None:
        super().__init__(Mock(Behaviour()))
        self.at = at

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if len(self.app.requests) == self.at and request.method == "POST":
            raise Crash
        return await super().handle_async_request(request)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    assert swept(plan_of(), folder)[0] == "complete"
    return folder


@pytest.mark.parametrize("at", [0, 40, 167])
def test_a_sweep_goes_on_after_a_crash_as_if_nothing_had_been(tmp_path: Path, whole: Path, at: int) -> None:
    with pytest.raises(ExceptionGroup) as raised:
        swept(plan_of(), tmp_path / "out", transport=Crashing(at))
    assert raised.group_contains(Crash)
    status, mock, line = swept(plan_of(), tmp_path / "out")
    assert status == "complete"
    # Blocks that had come to their end are not asked again; the one that broke off is, whole.
    assert len(mock.requests) == 168 - at // 14 * 14
    assert "  144/144  " in line
    for name in ("off@c2", "low@c2", "budget-8@c2"):
        one, other = (read_run(folder / name) for folder in (whole, tmp_path / "out"))
        assert one.records == other.records
    asides = sorted(path.name for path in (tmp_path / "out").glob("*/blocks/*.partial-*"))
    assert len(asides) == 1, "what had been written before the crash is kept"
    again, mock, _ = swept(plan_of(), tmp_path / "out")
    assert (again, mock.requests) == ("complete", [])


def test_blocks_that_were_killed_lost_or_found_invalid_are_done_again(tmp_path: Path) -> None:
    swept(plan_of(), tmp_path)
    folder = tmp_path / "low@c2" / "blocks" / "2"
    write_manifest(folder, read_manifest(folder) | {"status": "running"})
    (tmp_path / "off@c2" / "blocks" / "1" / "manifest.json").write_text("{")
    shutil.rmtree(tmp_path / "budget-8@c2" / "blocks" / "0")
    late = tmp_path / "off@c2" / "blocks" / "2"
    write_manifest(late, read_manifest(late) | {"status": "invalid"})
    status, mock, _ = swept(plan_of(), tmp_path)
    assert status == "complete"
    assert sorted(runs_in_order(mock)) == ["budget-8", "low", "off", "off"]
    assert read_run(tmp_path / "off@c2").status == "complete"


def test_a_folder_of_another_sweep_is_refused(tmp_path: Path) -> None:
    swept(plan_of(blocks=1), tmp_path)
    with pytest.raises(ConfigError, match="found a sweep with other blocks, seed, allowed: the same"):
        swept(plan_of(blocks=2, seed=8), tmp_path)


def test_a_server_that_is_lost_ends_the_sweep_and_the_blocks_before_stay(tmp_path: Path) -> None:
    status, _, _ = swept(plan_of(), tmp_path, Mock(Behaviour(dies_after=20)))
    assert status == "server lost"
    assert read_manifest(tmp_path / "off@c2" / "blocks" / "0")["status"] == "complete"
    assert read_manifest(tmp_path / "low@c2" / "blocks" / "0")["status"] == "server lost"
    assert read_manifest(tmp_path / "off@c2")["status"] == "running"  # one of four blocks
    status, mock, _ = swept(plan_of(), tmp_path)
    assert (status, len(mock.requests)) == ("complete", 168 - 14)


@pytest.mark.parametrize(("late", "status"), [(2, "complete"), (3, "invalid")])
def test_a_block_that_the_client_was_too_slow_for_is_done_again_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: int, status: str
) -> None:
    real, calls = LagMonitor.quantile, []

    def quantile(self: LagMonitor, share: float) -> float | None:
        calls.append(share)
        # `run` asks for the p99 once more than the summary, which asks for three.
        return 1.0 if calls.count(0.99) <= 2 * late else real(self, share)

    monkeypatch.setattr(LagMonitor, "quantile", quantile)
    found, mock, line = swept(plan_of(blocks=1), tmp_path)
    assert found == status
    assert runs_in_order(mock) == ["off"] * 3 + ["low", "budget-8"]
    assert len(list((tmp_path / "off@c2" / "blocks").glob("0.partial-*"))) == 2
    assert read_run(tmp_path / "off@c2").status == status and "60/60" in line


def test_two_arms_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match="more than once, allowed: different labels"):
        plan_of(settings=plan_of().settings[:1] * 2)
