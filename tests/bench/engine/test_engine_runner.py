"""What the runner makes of an engine that answers, fails, hangs or dies; what it does not measure twice."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from engine_rows import names, run_of, suite
from vllm_puzzle.bench.engine import runner
from vllm_puzzle.bench.engine.case import DECODE, FIT, Load, Shape
from vllm_puzzle.bench.engine.driver import EngineChild, EngineError
from vllm_puzzle.bench.engine.pair_runner import median_event
from vllm_puzzle.bench.engine.paired import MET, MISSED
from vllm_puzzle.bench.engine.rows import load
from vllm_puzzle.bench.engine.runner import run_suite
from vllm_puzzle.bench.engine.session import setup
from vllm_puzzle.bench.engine.suites import Suite

# -S: without the environment's packages, which the script does not need, it starts at once.
ENGINE = (sys.executable, "-S", "-P", str(Path(__file__).with_name("scripted_engine.py")))
MINUTE = 60.0


def run(asked: Suite, folder: Path, seconds: float = MINUTE, **more: object) -> tuple[dict[str, str], list[str]]:
    """Run a suite; (case → status, lines shown)."""
    one, lines = run_of(asked, folder, ENGINE, time.monotonic() + seconds, **more)
    run_suite(one)
    return {row.case: row.status for row in one.results.rows}, lines


def test_each_case_becomes_a_row_with_the_engines_facts(tmp_path: Path) -> None:
    asked = suite({"tokens_per_s": 100.0, "noise": True})
    one, lines = run_of(asked, tmp_path, ENGINE, time.monotonic() + MINUTE)
    run_suite(one)
    rows = {row.case: row for row in one.results.rows}
    assert list(rows) == names(asked) == ["v0 5/50 b1", "v0 5/50 b3", "v0 7/20 b2"]
    found = rows["v0 5/50 b3"]
    assert (found.status, found.num_requests, found.output_tokens, found.output_throughput) == ("ok", 3, 150, 100.0)
    assert (found.ttft_p99_s, found.tpot_p50_s, found.memory_bytes, found.start_s) == (1.5, None, 77, 1.5)
    assert (found.model_class, found.versions) == ("Scripted", "torch 2, vllm 0.32.0")
    assert "v0: Scripted, 1.5 s to start, KV cache of 4,096 tokens" in lines


def test_what_was_measured_is_not_measured_again_unless_asked_for_or_changed(tmp_path: Path) -> None:
    asked = suite({"started": str(tmp_path / "starts")})
    first, _ = run_of(asked, tmp_path, ENGINE, time.monotonic() + MINUTE)
    run_suite(first)
    path = tmp_path / "out" / "engine-trial-a-card.json"

    def starts(**more: object) -> int:
        before = (tmp_path / "starts").read_text().count("start")
        run(asked, tmp_path, results=load(path), **more)
        return (tmp_path / "starts").read_text().count("start") - before

    assert starts() == 0
    assert starts(is_again=True) == 1
    assert starts(commit="another") == 1
    assert starts(commit="another") == 0
    # A tree with changes, or one that nobody can name, may be any.
    assert starts(commit="another-dirty") == starts(commit="another-dirty") == 1
    assert starts(commit="unknown") == 1


def test_another_set_up_is_another_fingerprint() -> None:
    (case, *_), (other, *_) = (suite({"a": n}).cases(suite({"a": n}).variants[0]) for n in (1, 2))
    assert setup(case) == setup(replace(case)) and setup(case) != setup(other)
    longer = replace(case, variant=replace(case.variant, env={"X": "1"}))
    described = replace(case, variant=replace(case.variant, as_decilm=True))
    assert len({setup(case), setup(longer), setup(described), setup(replace(case, batch=2))}) == 4


def test_a_case_that_fails_costs_itself_and_a_new_start(tmp_path: Path) -> None:
    # A case is a warm-up and a measurement; the second case's warm-up is the third request.
    asked = suite({"fail_at": 3, "started": str(tmp_path / "starts")})
    status, lines = run(asked, tmp_path)
    assert status == {"v0 5/50 b1": "ok", "v0 5/50 b3": "failed", "v0 7/20 b2": "ok"}
    assert (tmp_path / "starts").read_text().count("start") == 2
    (line,) = (line for line in lines if "failed" in line)
    assert line == "  v0 5/50 b3: failed, no room in MODEL for this"


def test_an_engine_that_dies_is_a_row_without_paths(tmp_path: Path) -> None:
    status, lines = run(suite({"dies": True}), tmp_path)
    assert set(status.values()) == {"failed"}
    assert "start: last words, said in …/engine.py" in lines[0]


def test_a_case_without_an_answer_is_given_up_and_the_rest_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "MIN_LIMIT_S", 1.0)
    monkeypatch.setattr(runner, "LIMIT_FACTOR", 0.0)
    began = time.monotonic()
    status, lines = run(suite({"hang_at": 3}), tmp_path, MINUTE)
    assert status == {"v0 5/50 b1": "ok", "v0 5/50 b3": "failed", "v0 7/20 b2": "ok"}
    assert "  v0 5/50 b3: failed, no answer within 1 s" in lines
    assert time.monotonic() - began < 45  # it would hang for 60 s, and end by itself within 15


def test_what_would_last_too_long_is_left_for_another_call(tmp_path: Path) -> None:
    asked = suite({}, loads=(Load(Shape(5, 50), (1,)), Load(Shape(5, 4_000_000), (1,))))
    status, lines = run(asked, tmp_path)
    assert status == {"v0 5/50 b1": "ok", "v0 5/4000000 b1": "skipped"}
    (line,) = (line for line in lines if "skipped" in line)
    assert re.fullmatch(r"  v0 5/4000000 b1: skipped, about \d+ s, \d\d s left", line)


def test_what_fails_when_the_time_is_gone_was_not_measured(tmp_path: Path) -> None:
    ends = {seconds: run_of(suite({}), tmp_path, ENGINE, time.monotonic() + seconds)[0] for seconds in (0.0, MINUTE)}
    assert [one.failure() for one in ends.values()] == ["skipped", "failed"]


def test_without_time_nothing_starts(tmp_path: Path) -> None:
    asked = suite({"started": str(tmp_path / "starts")})
    status, lines = run(asked, tmp_path, 5.0)
    assert set(status.values()) == {"skipped"} and not (tmp_path / "starts").exists()
    assert lines[0] == "  v0 5/50 b1: skipped, no time left"


def test_a_skipped_case_does_not_replace_a_measured_one(tmp_path: Path) -> None:
    asked = suite({})
    one, _ = run_of(asked, tmp_path, ENGINE, time.monotonic() + MINUTE)
    run_suite(one)
    again, _ = run_of(asked, tmp_path, ENGINE, time.monotonic() + 1.0, results=one.results, is_again=True)
    run_suite(again)
    assert {row.status for row in again.results.rows} == {"ok"}


def test_two_engines_are_compared_in_blocks(tmp_path: Path) -> None:
    # The drift of each engine's own clock is by its own requests, equal for both; b is 2 % slower.
    asked = suite({"tokens_per_s": 1000.0}, {"tokens_per_s": 980.0}, pairs=True, blocks=3)
    one, lines = run_of(asked, tmp_path, ENGINE, time.monotonic() + MINUTE)
    run_suite(one)
    assert {pair["case"]: (pair["blocks"], pair["verdict"]) for pair in one.results.pairs} == dict.fromkeys(
        ("5/50 b1", "5/50 b3", "7/20 b2"), (3, MISSED)
    )
    assert all(pair["ratio"] == pytest.approx(0.98) for pair in one.results.pairs)
    assert {row.case for row in one.results.rows} == set(names(asked))
    assert (
        "  5/50 b1: v1 -2.00 % in speed against v0 (-2.00 to -2.00 %, 3 blocks); at most 1 % slower: not met" in lines
    )
    same = suite({}, {}, pairs=True)
    other, _ = run_of(same, tmp_path / "same", ENGINE, time.monotonic() + MINUTE)
    run_suite(other)
    assert {pair["verdict"] for pair in other.results.pairs} == {MET}


def test_a_comparison_is_not_repeated_but_more_blocks_are_another(tmp_path: Path) -> None:
    scripts = [{"started": str(tmp_path / "starts")}] * 2
    asked = suite(*scripts, pairs=True)
    one, _ = run_of(asked, tmp_path, ENGINE, time.monotonic() + MINUTE)
    run_suite(one)
    for wanted, starts in ((asked, 2), (replace(asked, blocks=4), 4)):
        again, _ = run_of(wanted, tmp_path, ENGINE, time.monotonic() + MINUTE, results=one.results)
        run_suite(again)
        assert (tmp_path / "starts").read_text().count("start") == starts


def test_as_many_as_fit_needs_a_card_that_is_known() -> None:
    from vllm_puzzle.bench.engine.plan import planned_batch
    from vllm_puzzle.model_configs.schema import ConfigError

    asked = suite({}, loads=(Load(Shape(5, 5), (FIT,), DECODE),))
    (case,) = asked.cases(asked.variants[0])
    with pytest.raises(ConfigError, match="found no card, allowed: one of "):
        planned_batch(case, None)


def test_experts_are_evened_before_the_cases_and_their_routing_is_logged(tmp_path: Path) -> None:
    for asked in (suite({}, is_evened=True), suite({}, {}, is_evened=True, pairs=True)):
        one, lines = run_of(replace(asked, has_routing=True), tmp_path, ENGINE, time.monotonic() + MINUTE)
        run_suite(one)
        assert {row.status for row in one.results.rows} == {"ok"}  # the engine refuses any other order
        (entry,) = one.results.routing
        assert entry["model"] == "llama-h512" and [step["num_tokens"] for step in entry["steps"]] == [1, 32, 256]
        assert "  routing, 32 tokens a step: 50 to 50 % of the experts of 1 layers" in lines
        again, _ = run_of(one.suite, tmp_path, ENGINE, time.monotonic() + 1.0, results=one.results)
        run_suite(again)
        assert one.results.routing == [entry]


def test_vllms_own_decilm_class_is_not_taken_for_ours(tmp_path: Path) -> None:
    asked = suite({}, {}, pairs=True)
    described = replace(asked.variants[1], as_decilm=True)
    status, lines = run(replace(asked, variants=(asked.variants[0], described)), tmp_path)
    assert set(status.values()) == {"failed"}
    assert lines[0].endswith(
        "found Scripted serving DeciLMForCausalLM, allowed: PuzzleForCausalLM (is our plugin loaded?)"
    )


def test_the_row_of_a_comparison_is_the_visit_in_the_middle() -> None:
    events = [{"duration_s": seconds} for seconds in (3.0, 1.0, 2.0, 9.0)]
    assert median_event(events) == {"duration_s": 3.0}


def test_an_engine_that_is_late_is_killed_with_its_children(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)'])\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))\n"
        "time.sleep(99)\n"
    )
    with EngineChild("late", tmp_path, {}, {}, tmp_path / "log", (sys.executable, "-P", str(script))) as child:
        assert wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text() != "")
        worker = int((tmp_path / "pid").read_text())
        assert is_alive(worker)
        with pytest.raises(EngineError, match="no answer within 0 s"):
            child.ready(0.1)
        child.stop(is_patient=False)
    assert wait_for(lambda: not is_alive(worker))


def is_alive(pid: int) -> bool:
    state = Path(f"/proc/{pid}/stat")
    return state.exists() and state.read_text().split(") ")[1][0] != "Z"


def wait_for(condition: Callable[[], bool]) -> bool:
    for _ in range(400):
        if condition():
            return True
        time.sleep(0.05)
    return False
