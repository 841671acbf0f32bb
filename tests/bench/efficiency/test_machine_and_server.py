"""What is read of machine and server: counters that wrap, pages that are not there, the line on the terminal."""

from __future__ import annotations

import asyncio
import io
from dataclasses import replace
from pathlib import Path

import pytest
from virtual_runs import arm_of, finished, question
from vllm_puzzle.bench.efficiency.arm import CLOSED, Load
from vllm_puzzle.bench.efficiency.energy import find_meter
from vllm_puzzle.bench.efficiency.machine import describe_machine, describe_versions
from vllm_puzzle.bench.efficiency.mock import Mock
from vllm_puzzle.bench.efficiency.mock_behaviour import Behaviour
from vllm_puzzle.bench.efficiency.progress import Progress
from vllm_puzzle.bench.efficiency.run import Setup
from vllm_puzzle.bench.efficiency.runner import Options
from vllm_puzzle.bench.efficiency.server_facts import first_model, read_server, samples, total
from vllm_puzzle.bench.efficiency.virtual_time import MockTransport, VirtualLoop, run_virtual


class Package:
    """A processor package of a made-up powercap folder."""

    def __init__(self, root: Path, name: str, limit: int = 1_000_000) -> None:
        self.folder = root / name
        self.folder.mkdir(parents=True)
        (self.folder / "max_energy_range_uj").write_text(f"{limit - 1}\n")
        self.set(0)

    def set(self, microjoules: int) -> None:
        (self.folder / "energy_uj").write_text(f"{microjoules}\n")


def test_processor_energy_is_of_packages_and_survives_a_wrap(tmp_path: Path) -> None:
    packages = [Package(tmp_path, "intel-rapl:0"), Package(tmp_path, "intel-rapl:1")]
    part = Package(tmp_path, "intel-rapl:0:0")  # the cores, which are in the package
    meter = find_meter(powercap=tmp_path)
    assert meter is not None and meter.source == "rapl"
    packages[0].set(400_000)
    part.set(300_000)
    assert meter.read() == pytest.approx(0.4)
    packages[0].set(100_000)  # beyond a million it begins again: 700,000 more
    packages[1].set(50_000)
    assert meter.read() == pytest.approx(0.4 + 0.7 + 0.05)


def test_without_a_counter_energy_is_unknown(tmp_path: Path) -> None:
    assert find_meter(powercap=tmp_path) is None
    run = finished([question("1")], Load(CLOSED, concurrency=1))
    assert run.summary["energy_source"] is None and run.metrics["joules_per_correct"] is None


def test_energy_is_counted_over_the_steady_window(tmp_path: Path) -> None:
    package = Package(tmp_path, "intel-rapl:0", limit=10**9)
    meter = find_meter(powercap=tmp_path)
    # One joule for each request that has ended: 4 of the warm-up, then 8, then the drain.
    ended = 0

    def count(record: object) -> None:
        nonlocal ended
        ended += 1
        package.set(ended * 1_000_000)

    setup = Setup(options=replace(Options(), meter=meter, on_record=count))
    run = finished(
        [question(str(index)) for index in range(8)],
        Load(CLOSED, concurrency=1),
        warm_up=[question(str(1000 + index)) for index in range(4)],
        setup=setup,
    )
    # The window opens and closes before the record of the request that does it is written.
    (window,) = run.summary["facts"]["windows"]
    assert (run.summary["energy_source"], window["energy_j"]) == ("rapl", pytest.approx(8.0))
    assert run.metrics["joules_per_request"] == pytest.approx(1.0)


def test_the_machine_and_the_versions_are_described() -> None:
    machine, versions = describe_machine(), describe_versions()
    assert machine["cores"] >= 1 and machine["memory_bytes"] > 10**8 and isinstance(machine["gpus"], list)
    assert versions["vllm-puzzle"] and versions["httpx"] and len(versions["commit"]) == 40


def test_a_page_of_counters_is_read_and_what_is_none_is_passed_over() -> None:
    found = samples('# HELP a b\na_total{x="1",y="a\\"b,}"} 2\na_total 3.5e1\n\nnonsense\nb NaN 17\nc{} x\n')
    assert [(sample.name, sample.value) for sample in found[:2]] == [("a", 2.0), ("a", 35.0)]
    assert found[0].labels == {"x": "1", "y": 'a\\"b,}'}
    assert (total(found, "a"), total(found, "none")) == (37.0, None)


def test_a_server_tells_its_model_and_version_or_stays_unknown() -> None:
    transport = MockTransport(Mock(Behaviour(model="m")))
    assert run_virtual(first_model(transport, "http://mock", {})) == "m"
    facts = run_virtual(read_server(transport, replace(arm_of(), model="m")))
    assert (facts.version, facts.model["id"], facts.is_vllm, facts.is_reachable) == ("mock", "m", True, True)
    dead = Mock(Behaviour(dies_after=-1))
    nothing = run_virtual(read_server(MockTransport(dead), arm_of()))
    assert (nothing.version, nothing.is_reachable) == (None, False)
    assert run_virtual(first_model(MockTransport(dead), "http://mock", {})) is None


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(stream: io.StringIO) -> str:
    """Two requests a second are added for 25 s."""
    now = [0.0]
    run = finished([question(str(index)) for index in range(50)], Load(CLOSED, concurrency=1))
    show = Progress(60, "arm", stream, clock=lambda: now[0])
    show.skip(10)
    for record in run.records:
        now[0] += 0.5
        show.add(record)
    show.finish()
    return stream.getvalue()


def test_the_live_line_is_rewritten_on_a_terminal_and_rare_elsewhere() -> None:
    plain, live = shown(io.StringIO()), shown(Terminal())
    # After 10 and 20 s, and at the end.
    assert [line.split("  ")[:3] for line in plain.splitlines()] == [
        ["arm", "30/60", "ETA 0:15"], ["arm", "50/60", "ETA 0:05"], ["arm", "60/60", "ETA 0:00"]]  # fmt: skip
    assert "accuracy 0.0%  TTFAT p50 " in plain
    assert live.count("\r") == 51 and live.count("\n") == 1 and live.endswith("\n")


def test_a_virtual_loop_jumps_and_says_when_nobody_will_ever_go_on() -> None:
    async def sleep() -> float:
        await asyncio.sleep(86_400)
        return asyncio.get_running_loop().time()

    assert run_virtual(sleep()) == 86_400

    async def wait() -> None:
        await asyncio.get_running_loop().create_future()

    with pytest.raises(RuntimeError, match="nobody will ever go on"):
        run_virtual(wait())
    loop = VirtualLoop()
    assert loop.time() == 0.0
    loop.close()
