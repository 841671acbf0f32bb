"""The commands against a mock in another process: what they print and leave; Ctrl-C, full disks, kills."""

from __future__ import annotations

import json
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import finish, served, start, wait_for
from vllm_puzzle.bench.efficiency.record import WARM_UP, read_records
from vllm_puzzle.bench.efficiency.run_folder import read_run, read_runs

# The mock's own times in seconds; how much later a chunk may be on a machine that others use too.
PREFILL, THINKING, ANSWERING, LATE = 0.02, 0.01, 0.005, 0.25


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    settings = (f"prefill={PREFILL}", f"thinking_tpot={THINKING}", f"answer_tpot={ANSWERING}", "thinking_tokens=[4,12]")
    with served(*settings) as (url, _):
        yield url


def run_flags(url: str, out: Path, *more: str) -> list[str]:
    return ["command:run", "--base-url", url, "--task", "repeat", "--out", str(out), *more]


def manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return found


def test_a_run_over_a_socket_has_the_scripts_times_and_counts(server: str, tmp_path: Path) -> None:
    flags = ["--num-prompts", "24", "--max-concurrency", "4", "--budget", "8", "--save-detailed", "--label", "tight"]
    flags += ["--goodput", "ttfat:5000", "e2el:9000", "--metadata", "who=me", "--num-cores", "2", "--seed", "3"]
    status, out, err = finish(start(*run_flags(server, tmp_path / "run", *flags)))
    found = manifest(tmp_path / "run")
    # A busy machine may make the client late; then the run says so, and all else holds.
    assert (status, found["status"]) in ((0, "complete"), (4, "invalid")), err
    records = list(read_records(tmp_path / "run" / "requests.jsonl"))
    assert [record.phase for record in records].count(WARM_UP) == 4 and len(records) == 28
    for record in records:
        thought = record.thinking_tokens
        assert thought is not None and 4 <= thought <= 8
        assert record.end_reason in ("natural", "budget") if thought == 8 else record.end_reason == "natural"
        assert record.thought == "t " * thought and record.answer == record.question and record.is_correct
        assert record.output_tokens == thought + 1 + 5 + 1
        # The script sleeps until each step is due: never earlier, later by what the machine takes.
        for seen, due in (
            (record.first, PREFILL + THINKING),
            (record.last_thinking, PREFILL + THINKING * thought),
            (record.first_answer, PREFILL + THINKING * thought + 2 * ANSWERING),
            (record.last, PREFILL + THINKING * thought + 6 * ANSWERING),
        ):
            assert seen is not None and -0.001 < seen - record.sent - due < LATE
    assert found["metadata"] == {"who": "me"} and found["config"]["goodput"] == ["ttfat:5000", "e2el:9000"]
    assert found["server"]["version"] == "mock" and found["machine"]["cores"] >= 1 and found["versions"]["commit"]
    assert out.startswith("tight c4 ") and "100.0%" in out
    assert "tight  24/24  ETA 0:00  accuracy 100.0%  TTFAT p50 " in err
    run = read_run(tmp_path / "run")
    assert (
        run.facts.num_cores == 2 and run.facts.slo is not None and run.facts.slo.limits() == {"ttfat": 5.0, "e2e": 9.0}
    )


def test_ctrl_c_keeps_what_has_ended_and_says_so(server: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = start(*run_flags(server, out, "--num-prompts", "2000", "--max-concurrency", "8"))
    wait_for(lambda: (out / "requests.jsonl").exists() and (out / "requests.jsonl").read_text().count("\n") > 20)
    process.send_signal(signal.SIGINT)
    status, _, err = finish(process)
    assert status == 130 and "run is not to be compared: interrupted" in err and "Traceback" not in err
    records = list(read_records(out / "requests.jsonl"))
    found = manifest(out)
    assert found["status"] == "interrupted"
    assert found["ended"] == len(records) > 20 and found["abandoned"] in range(9)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["metrics"]["issued"] == len([record for record in records if record.phase != WARM_UP])


def test_a_server_that_dies_in_the_middle_ends_the_run(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with served("dies_after=40", "prefill=0.01", "thinking_tokens=[2,4]") as (url, server):
        status, _, err = finish(start(*run_flags(url, out, "--num-prompts", "2000", "--max-concurrency", "4")))
        assert server.wait(10) == 1
    assert status == 3 and "server lost" in err
    assert manifest(out)["status"] == "server lost"
    outcomes = [record.outcome for record in read_records(out / "requests.jsonl")]
    assert outcomes.count("correct") in range(36, 41) and set(outcomes) == {"correct", "error"}
    status, _, err = finish(start(*run_flags(url, tmp_path / "again", "--num-prompts", "9")))
    assert (status, err) == (1, f"vllm-puzzle: server: found none at {url}, allowed: the address of one that runs\n")


def small_files() -> None:
    """As a full disk: no file may grow beyond this."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (48_000, 48_000))


def test_a_full_disk_ends_the_run_and_what_fitted_stays(server: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    flags = run_flags(server, out, "--num-prompts", "150", "--max-concurrency", "16")
    status, _, err = finish(start(*flags, preexec_fn=small_files))
    assert status == 3 and "disk full" in err and "Traceback" not in err
    found = manifest(out)
    assert found["status"] == "disk full"
    records = list(read_records(out / "requests.jsonl"))
    assert 20 < len(records) <= found["ended"] < 166


def test_a_sweep_that_is_killed_goes_on_where_it_was(server: str, tmp_path: Path) -> None:
    config = tmp_path / "sweep.yaml"
    config.write_text(
        "task: repeat\nnum_prompts: 8\nnum_warmups: 2\nmargin: 0.02\nreference: full\n"
        "arms:\n- thinking: off\n- label: full\n  budget: 2\nloads:\n- max_concurrency: 4\n- request_rate: 40\n"
    )
    out = tmp_path / "out"
    flags = [
        "command:sweep",
        "--config",
        str(config),
        "--base-url",
        server,
        "--out",
        str(out),
        "--blocks",
        "3",
        "--retries",
        "0",
    ]
    process = start(*flags)
    wait_for(lambda: len(list(out.glob("*/blocks/*/summary.json"))) >= 5)
    process.kill()
    process.communicate()
    done = {path.parent for path in out.glob("*/blocks/*/summary.json")}
    stamps = {folder: manifest(folder)["started_at"] for folder in done if manifest(folder)["status"] == "complete"}
    assert 5 <= len(done) < 12
    status, _, err = finish(start(*flags))
    assert status in (0, 4), err
    assert {folder: manifest(folder)["started_at"] for folder in stamps} == stamps
    assert "96/96  ETA 0:00" in err
    names = [run.path.name for run in read_runs(out)]
    assert names == sorted(f"{arm}@{load}" for arm in ("off", "full") for load in ("c4", "poisson-40"))
    for run in read_runs(out):
        assert len(run.records) == 3 * 10 and len(run.facts.windows) == 3
        assert run.declared["margin"] == 0.02 and run.declared["reference"] == "full"


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--thinking", "off", "--budget", "8"], "found thinking off beside effort None and budget 8, allowed: one"),
        (["--task", "nonsense"], "task: found 'nonsense', allowed: pocket, "),
        (["--request-rate", "-1"], "load, key `rate`: found -1.0, allowed: a number above 0"),
        (["--num-prompts", "0"], "--num-prompts: found 0, allowed: 1 or more"),
        (["--goodput", "tpot"], "SLO: found 'tpot', allowed: NAME:MILLISECONDS"),
        (["--extra-body", "[1]"], "--extra-body: found '[1]', allowed: a JSON object"),
        (
            ["--trace", "nowhere"],
            "nowhere: found [Errno 2] No such file or directory",
        ),
        (["--tokenizer", "nowhere"], "tokenizer nowhere: found No such file or directory"),
    ],
)
def test_a_mistake_is_one_line(
    flags: list[str], line: str, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In this process: an import takes a second, and a mistake must not leave anything behind either.
    from vllm_puzzle.bench.efficiency.command import run
    from vllm_puzzle.model_configs.schema import ConfigError

    monkeypatch.setenv("OPENAI_API_KEY", "")
    with pytest.raises(ConfigError) as raised:
        run(["--base-url", server, "--task", "repeat", "--out", str(tmp_path / "run"), *flags])
    assert line in str(raised.value) and "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()
