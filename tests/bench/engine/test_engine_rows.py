"""Files of rows: read back as written, whole or not at all, without a path of the machine."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from engine_rows import row
from vllm_puzzle.bench.engine.case import Shape
from vllm_puzzle.bench.engine.rows import (
    COLUMNS,
    Results,
    find_commit,
    find_machine,
    is_named,
    load,
    measured,
    of_engine,
    open_results,
    results_path,
    slug,
    without_paths,
)
from vllm_puzzle.model_configs.schema import ConfigError

SHAPE = Shape(128, 128)
CARD = "Some Card (TM) 80GB"


def results() -> Results:
    rows = [row("a", SHAPE, 1, 1 / 3, start_s=2.0), row("b", SHAPE, 1, None, reason="no time left")]
    pairs = [{"case": "128/128 b1", "a": "a", "b": "b", "ratio": 1.0}]
    return Results("super49", CARD, rows, pairs, machine={"cores": 2})


def test_rows_read_back_as_they_were_written(tmp_path: Path) -> None:
    path = results().save(tmp_path)
    assert path.name == "engine-super49-some-card-tm-80gb.json" and load(path) == results()
    with path.with_suffix(".csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert tuple(lines[0]) == COLUMNS and [line["status"] for line in lines] == ["ok", "skipped"]
    assert lines[0]["output_throughput"] == "0.333333" and lines[1]["output_throughput"] == ""
    assert not list(tmp_path.glob("*.new"))


def test_an_empty_folder_is_no_results_yet(tmp_path: Path) -> None:
    assert open_results(tmp_path, "super49", CARD) == open_results(None, "super49", CARD) == Results("super49", CARD)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"schema": 99}, "key `schema`: found 99, allowed: 1"), ({"rows": [{"case": "x"}]}, "allowed: results of")],
)
def test_other_files_are_refused_in_one_line(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = results().save(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError, match=message) as error:
        open_results(tmp_path, "super49", CARD)
    assert str(tmp_path) not in str(error.value) and "\n" not in str(error.value)


def test_a_newer_row_takes_the_place_of_an_older_one() -> None:
    found = results()
    found.add(row("a", SHAPE, 1, 9.0))
    found.add_pair({"case": "128/128 b1", "a": "a", "b": "b", "ratio": 2.0})
    assert [(each.variant, each.output_throughput) for each in found.rows] == [("b", None), ("a", 9.0)]
    assert [pair["ratio"] for pair in found.pairs] == [2.0]


def test_only_an_equal_set_up_and_a_named_commit_are_known() -> None:
    found = results()
    assert found.known("a 128/128 b1", "s", "c0ffee") is not None
    for case, setup, commit in (("a", "s", "c0ffee"), ("a 128/128 b1", "t", "c0ffee"), ("a 128/128 b1", "s", "d")):
        assert found.known(case, setup, commit) is None
    assert found.known("b 128/128 b1", "s", "c0ffee") is None  # skipped
    assert [is_named(name) for name in ("c0ffee", "c0ffee-dirty", "unknown", "")] == [True, False, False, False]


def test_a_speed_needs_the_status_ok() -> None:
    with pytest.raises(ValueError, match="found a speed with status 'failed'"):
        row("a", SHAPE, 1, 3.0, status="failed")
    with pytest.raises(ValueError, match="found 'odd', allowed: ok, failed"):
        row("a", SHAPE, 1, None, status="odd")


def test_messages_lose_their_paths() -> None:
    text = without_paths("OSError: /tmp/x/model/config.json,\n see /usr/lib/a.py: 3/4 of it", Path("/tmp/x/model"))
    assert text == "OSError: MODEL/config.json, see …/a.py: 3/4 of it"
    assert len(without_paths("x" * 1000)) == 300


def test_answers_become_columns() -> None:
    assert measured({"ttft_s": {"p50": 2.0}, "tpot_s": None, "num_preempted": 3})["ttft_p50_s"] == 2.0
    assert measured({})["tpot_p99_s"] is None
    found = of_engine(
        {"attention_backends": {"FLASH_ATTN": 10, "CUSTOM": 26}, "versions": {"vllm": "1", "triton": None}}
    )
    assert (found["attention_backends"], found["versions"], found["model_class"]) == (
        "10 FLASH_ATTN + 26 CUSTOM",
        "vllm 1",
        "",
    )


def test_this_machine_has_a_name_and_files_are_named_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    machine = find_machine()
    assert machine.card and not machine.has_gpu and "processor" in machine.about
    assert results_path(Path("x"), "fusion", "NVIDIA H100 80GB HBM3") == Path(
        "x/engine-fusion-nvidia-h100-80gb-hbm3.json"
    )
    assert slug(machine.card).strip("-") == slug(machine.card) != ""
    assert find_commit("given") == "given" and find_commit(None)
