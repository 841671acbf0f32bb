"""The report: a page without anything from elsewhere, whose numbers are those of the files, for runs of any shape."""

from __future__ import annotations

import json
import math
import re
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hand_made import NO_ANSWER, NOTHING, batches, lasting, made, write_run
from PIL import Image
from vllm_puzzle.bench.efficiency import charts, charts_time, html, report_runs
from vllm_puzzle.bench.efficiency.drawing.scene import Marker, Scene, Text
from vllm_puzzle.bench.efficiency.drawing.style import look
from vllm_puzzle.bench.efficiency.facts import RunFacts, Window
from vllm_puzzle.bench.efficiency.metrics import METRICS, from_json
from vllm_puzzle.bench.efficiency.record import CORRECT, EMPTY, ERROR, TIMEOUT, TRUNCATED, WRONG, RequestRecord
from vllm_puzzle.bench.efficiency.report import build, charts_of, report
from vllm_puzzle.bench.efficiency.report_runs import read_report, read_reports
from vllm_puzzle.bench.efficiency.report_speculation import baseline, speed_up
from vllm_puzzle.bench.efficiency.summary import summary_of, write_summary
from vllm_puzzle.model_configs.schema import ConfigError

ARMS = {"off": 0.25, "budget-16": 0.5, "on": 0.75}
MODELS = {"parent": 1.0, "puzzle": 0.5}  # seconds a request


def write_summarised(folder: Path, records: Sequence[RequestRecord], facts: RunFacts, **manifest: Any) -> Path:
    write_run(folder, records, facts, **manifest)
    load = manifest.get("load", {}).get("name", "c4")
    write_summary(folder, summary_of(records, facts, {"arm": records[0].arm, "load": load, "status": "complete"}))
    return folder


def blocks_of(arm: str, share: float, duration: float, concurrency: int) -> list[RequestRecord]:
    """Three blocks of the same 40 questions, of which a share is right; a block is an eighth slower than the last."""
    records = []
    for block in range(3):
        outcomes = [CORRECT if place % 4 < 4 * share else WRONG for place in range(40)]
        records += [
            replace(record, block=block, repeat=block, cached_tokens=0, budget=16 if arm == "budget-16" else None,
                    thinking_tokens=0 if arm == "off" else 16, end_reason="budget" if arm == "budget-16" else None)
            for record in batches(outcomes, concurrency, duration * (1 + block / 8), arm)
        ]  # fmt: skip
    return records


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models, three arms, two loads; not to be changed."""
    tmp_path = tmp_path_factory.mktemp("sweeps")
    for model, duration in MODELS.items():
        for arm, share in ARMS.items():
            for concurrency in (4, 10):
                records = blocks_of(arm, share, duration, concurrency)
                windows = tuple(Window(0, 40 / concurrency * duration * (1 + block / 8), block) for block in range(3))
                write_summarised(
                    tmp_path / model / f"{arm}@c{concurrency}",
                    records,
                    RunFacts(windows, num_cores=2),
                    model=model,
                    load={"kind": "closed", "concurrency": concurrency, "name": f"c{concurrency}"},
                    config={"margin": 0.01, "reference": "on"},
                    fields={"arm": arm},
                    tasks=[{"name": "sums", "chance": 0.01}],
                )
    return [tmp_path / model for model in MODELS]


@pytest.fixture
def sweeps(finished: list[Path], tmp_path: Path) -> list[Path]:
    """A copy of them."""
    return [Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in finished]


def parsed(page: str) -> ET.Element:
    """The page as XML, which it is."""
    head, _, rest = page.partition("\n")
    assert head == "<!DOCTYPE html>"
    return ET.fromstring(rest)


def text_of(element: ET.Element) -> str:
    return " ".join("".join(element.itertext()).split())


def assert_self_contained(page: str) -> None:
    root = parsed(page)
    for element in root.iter():
        assert element.tag not in ("script", "link", "iframe", "img", "object", "embed", "base", "form"), element.tag
        for name, value in element.attrib.items():
            assert name not in ("src", "href", "srcset", "data", "action") and not name.startswith("on"), name
            assert "://" not in value and "url(" not in value, value
    (style,) = root.iter("style")
    assert "url(" not in (style.text or "") and "@import" not in (style.text or "")


def test_the_page_is_well_formed_and_needs_nothing_from_elsewhere(finished: list[Path]) -> None:
    page = build(read_reports(finished))
    assert_self_contained(page)
    assert "prefers-color-scheme: dark" in page


def test_every_arm_model_load_metric_and_definition_is_there(finished: list[Path]) -> None:
    root = parsed(build(read_reports(finished)))
    cells = {text_of(cell) for cell in (*root.iter("td"), *root.iter("th"))}
    assert {*ARMS, *MODELS, "c4", "c10"} <= cells
    assert {metric.name for metric in METRICS} <= cells
    assert {metric.formula for metric in METRICS} <= cells
    drawn = {text_of(text) for text in root.iter("text")}
    assert {*ARMS, *MODELS} <= drawn


def test_values_are_those_of_the_summary(finished: list[Path]) -> None:
    root = parsed(build(read_reports(finished)))
    tables = {
        text_of(details.find("summary")).partition(":")[0]: details.find(".//table")  # type: ignore[arg-type]
        for details in root.iter("details")
        if "metrics of" in text_of(details.find("summary"))  # type: ignore[arg-type]
    }
    assert set(tables) == {f"{model}, c{load}" for model in MODELS for load in (4, 10)}
    for name, found in tables.items():
        model, load = name.split(", ")
        assert found is not None
        header = [text_of(cell) for cell in found.iter("th") if cell.get("scope") == "col"]
        rows = {text_of(row[0]): [text_of(cell) for cell in row] for row in found.find("tbody") or ()}
        for arm in ARMS:
            summary = json.loads((finished[0].parent / model / f"{arm}@{load}" / "summary.json").read_text())
            values = from_json(summary["metrics"])
            for metric in METRICS:
                shown = rows[metric.name][header.index(arm)]
                assert shown == html.value(values[metric.name], metric.unit), (name, arm, metric.name)
                value = values[metric.name]
                if value is not None and math.isfinite(value) and value:
                    read = float(re.sub(r"[ ,%]", "", shown)) / (100 if "%" in shown else 1)
                    # Shares are shown to 0.1 point, others to three digits.
                    assert read == pytest.approx(value, rel=6e-3, abs=5.1e-4 if "%" in shown else 0)


def positions(scene: Scene, role: str) -> list[Marker]:
    return [shape for shape in scene.shapes if isinstance(shape, Marker) and shape.role == role]


def axis_of(scene: Scene, is_x: bool) -> tuple[float, float]:
    """Value = slope · pixel + offset (of the logarithm along x), from the two outermost tick labels."""
    ticks = [shape for shape in scene.shapes if isinstance(shape, Text) and shape.size == 11 and shape.role == "muted"]
    found = sorted(
        (shape.x if is_x else shape.y, float(shape.text.rstrip(" %")))
        for shape in ticks
        if (shape.anchor == "middle") == is_x and re.fullmatch(r"[\d.]+(?: %)?", shape.text)
    )
    (first, low), (last, high) = found[0], found[-1]
    if is_x:
        low, high = math.log(low), math.log(high)
    slope = (high - low) / (last - first)
    return slope, low - slope * first


def test_points_of_the_frontier_lie_at_their_cost_and_accuracy(finished: list[Path]) -> None:
    runs = [run for run in read_reports(finished) if run.load == "c4"]
    scene = charts.frontier_chart(runs, "title", "core·s per request")
    (x_slope, x_offset), (y_slope, y_offset) = axis_of(scene, True), axis_of(scene, False)
    for number, model in enumerate(MODELS):
        _, *points = positions(scene, look(number).role)
        mine = [run for run in runs if run.group == model]
        assert len(points) == len(mine) == 3
        for run, point in zip(mine, points, strict=True):
            assert math.exp(x_slope * point.x + x_offset) == pytest.approx(run.cost, rel=0.02)
            assert (y_slope * point.y + y_offset) / 100 == pytest.approx(ARMS[run.arm], abs=0.002)
        # All arms cost the same here: the most accurate beats the others.
        assert [point.is_filled for point in points] == [ARMS[run.arm] == 0.75 for run in mine]


def test_a_bound_without_end_leaves_the_settings_apart(finished: list[Path]) -> None:
    runs = [run for run in read_reports(finished) if run.load == "c4" and run.arm == "on"]
    reach = {run.group: (run.cost or 0.0, 1e-9, 1e9) for run in runs}
    scene = charts.frontier_chart(runs, "title", "cost", lambda run: reach[run.group])
    xs = [positions(scene, look(number).role)[1].x for number in (0, 1)]
    assert abs(xs[0] - xs[1]) > 150  # of 770 pixels, for costs that differ by two
    assert all(-1 <= x <= scene.width for shape in scene.shapes for x, _ in getattr(shape, "points", ()))


def test_the_chance_level_is_drawn_where_it_is_worth_seeing(finished: list[Path]) -> None:
    runs = [run for run in read_reports(finished) if run.load == "c4"]
    for chance, is_drawn in ((0.25, True), (0.01, False)):
        for run in runs:
            run.manifest = dict(run.manifest) | {
                "tasks": [{"chance": 0.5, "questions": 10}, {"chance": 0, "questions": 10}]
            }
            run.manifest["tasks"][0]["chance"] = 2 * chance
        scene = charts.frontier_chart(runs, "title", "cost")
        labels = [shape for shape in scene.shapes if isinstance(shape, Text) and shape.text.startswith("guessing")]
        assert len(labels) == is_drawn
        if is_drawn:
            slope, offset = axis_of(scene, False)
            assert labels[0].text == "guessing, 25 %"
            assert slope * (labels[0].y + 9) + offset == pytest.approx(25, abs=0.2)


def test_costs_and_their_bounds_are_those_of_the_blocks(finished: list[Path]) -> None:
    (run,) = [r for r in read_reports(finished) if (r.group, r.arm, r.load) == ("puzzle", "on", "c4")]
    # Each block has 40 requests of 2 cores, 4 at a time: 2 · duration / 4 each.
    assert run.cost == pytest.approx(2 * 0.5 * 1.125 / 4)
    assert run.cost_bounds is not None
    assert run.cost_bounds.low < 2 * 0.5 / 4 * 1.01 and run.cost_bounds.high > 2 * 0.5 * 1.25 / 4 * 0.99
    assert run.accuracy is not None and run.accuracy.estimate == 0.75
    # Three repeats of a question that always end alike are one piece of news: as wide as for 40 requests.
    assert run.accuracy.high - run.accuracy.low == pytest.approx(0.26, abs=0.01)


def test_the_curve_of_waits_ends_below_one_where_answers_never_came() -> None:
    points = charts_time.steps([1.0, 2.0, 2.0, math.inf], 0.5, 8.0)
    assert points[0] == (0.5, 0.0) and points[-1] == (8.0, 0.75)
    assert (1.0, 0.25) in points and (2.0, 0.75) in points
    assert charts_time.steps([math.inf], 1, 2) == [(1, 0.0), (2, 0.0)]
    many = charts_time.steps([float(place) for place in range(1, 10_001)], 1, 1e4)
    assert len(many) < 600 and many[-1] == (1e4, 1.0)


def test_tokens_by_outcome_sum_up_to_tokens_per_request(tmp_path: Path) -> None:
    records = [made(question="a"), made(question="b", outcome=WRONG, thinking_tokens=40, output_tokens=60),
               made(question="c", outcome=TRUNCATED, **NO_ANSWER)]  # fmt: skip
    run = read_report(write_summarised(tmp_path / "run", records, RunFacts((Window(0, 8),))))
    found = charts.outcome_tokens(run)
    assert found == {CORRECT: (17 / 3, 12 / 3), WRONG: (40 / 3, 20 / 3), TRUNCATED: (17 / 3, 12 / 3)}
    assert sum(map(sum, found.values())) == pytest.approx(run.metrics["tokens_per_request"])


def test_the_timeline_holds_every_second_in_flight_and_every_reply(tmp_path: Path) -> None:
    records = [lasting(0.5 * place, 1 + place % 3, question=str(place)) for place in range(40)]
    run = read_report(write_summarised(tmp_path / "run", records, RunFacts((Window(0, 20),))))
    start, end = 0.0, max(record.done for record in records)
    flight, rate = charts_time.curve(run, 0, start, end)
    assert flight.sum() * (end - start) / len(flight) == pytest.approx(sum(1 + place % 3 for place in range(40)))
    assert rate.sum() * (end - start) / len(rate) == pytest.approx(40)
    assert np.all(flight >= 0)


def test_what_is_to_be_known_first_stands_on_top(tmp_path: Path) -> None:
    records = [lasting(0, 1, question=str(place), cached_tokens=32) for place in range(20)]
    records += [
        made(question="over", budget=16, thinking_tokens=17),
        made(question="lost", outcome=ERROR, error="HTTP 500", **NOTHING),
    ]
    records += [made(question="late", outcome=TIMEOUT, **NOTHING), made(question="told", token_source="client")]
    folder = write_run(
        tmp_path / "run",
        records,
        RunFacts((Window(0, 8),)),
        status="interrupted",
        planned=100,
        stationarity="drifting",
        is_steady=False,
    )
    write_summary(folder, summary_of(records, RunFacts((Window(0, 8),)), {"invalid_because": ["client: late by 9 ms"]}))
    page = build(read_reports([folder]))
    (box,) = [part for part in parsed(page).iter("div") if part.get("class") == "warnings"]
    said = text_of(box)
    for words in (
        "client: late by 9 ms",
        "interrupted: 24 of 100 requests are kept",
        "no steady window",
        "drift in 1 block(s)",
        "noise in time is unknown",
        "prefix cache",
        "counted by the client",
        "budget: exceeded by 100",
        "2 of 24 requests failed and count as wrong, most often: HTTP 500",
    ):
        assert words in said
    assert page.index('class="warnings"') < page.index("<table>")


def test_blocks_with_a_slow_client_are_told(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [made()], RunFacts((Window(0, 8),)), status="invalid")
    blocks = [{"block": block, "client": {"lag": {"p99_s": late}}} for block, late in enumerate([0.001, 0.009, None])]
    write_summary(folder, summary_of([made()], RunFacts((Window(0, 8),)), {"by_block": blocks}))
    said = " ".join(read_report(folder).warnings)
    assert "late by up to 9.0 ms at p99 in 1 block(s)" in said and "not to be compared" in said


def test_a_sound_run_has_no_warning(finished: list[Path]) -> None:
    runs = read_reports(finished)
    assert [run.warnings for run in runs] == [[]] * 12
    assert 'class="warnings"' not in build(runs)


def test_runs_that_differ_in_what_they_were_asked_are_named(tmp_path: Path) -> None:
    for name, tokens in (("a", 300), ("b", 400)):
        write_summarised(tmp_path / name, [made(arm=name)], RunFacts((Window(0, 8),)), max_tokens=tokens)
    assert "differ in max_tokens" in build(read_reports([tmp_path]))


STRANGE = '<i>&"\x07\ud800 \u4e2d' * 9
ODD = (
    "no answer", "nothing at all", "one request", "instant", "empty answers", "unknown tokens", "warm-up only", "huge",
    "odd names", "no window", "odd manifest",
)  # fmt: skip


def odd(name: str) -> tuple[list[RequestRecord], dict[str, Any]]:
    """Records and manifest of a run of an odd shape."""
    one = made(sent=1.0)
    shapes: dict[str, tuple[list[RequestRecord], dict[str, Any]]] = {
        "no answer": ([made(question=str(n), outcome=TRUNCATED, **NO_ANSWER) for n in range(5)], {}),
        "nothing at all": ([made(question=str(n), outcome=ERROR, **NOTHING) for n in range(5)], {}),
        "one request": ([one], {}),
        "instant": ([made(sent=1.0, first=1.0, first_answer=1.0, first_thinking=None, last_thinking=None, last=1.0,
                          last_answer=1.0, done=1.0)], {}),
        "empty answers": ([made(question=str(n), outcome=EMPTY, **NO_ANSWER) for n in range(3)], {"status": "invalid"}),
        "unknown tokens": ([made(thinking_tokens=None, answer_tokens=None, output_tokens=None, budget=8)], {}),
        "warm-up only": ([made(phase="warm_up")], {"status": "running"}),
        "huge": ([made(thinking_tokens=10**12, output_tokens=10**12, budget=1, done=1e7, last=1e7)], {}),
        "odd names": ([made(arm=STRANGE, task="t<&")], {"arm": STRANGE, "model": "\x00"}),
        "no window": ([one], {"facts": {"windows": []}, "status": "server lost"}),
        "odd manifest": ([one], {"load": None, "tasks": ["sums"], "machine": None, "config": None, "facts": 7}),
    }  # fmt: skip
    return shapes[name]


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("has_summary", [True, False])
def test_a_run_of_an_odd_shape_is_shown_as_that(
    name: str, has_summary: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records, manifest = odd(name)
    facts = RunFacts((Window(0, 8),))
    monkeypatch.setattr("hand_made.to_line", lambda record: json.dumps(record_object(record)))
    folder = write_run(tmp_path / "run", records, facts)
    file = folder / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | manifest))
    if has_summary:
        write_summary(folder, summary_of(records, facts, {"status": "complete"}))
    out = tmp_path / "page.html"
    assert report([str(folder), "--out", str(out), *([] if has_summary else ["--no-png"])]) == 0
    assert_self_contained(out.read_text())
    pictures = list(tmp_path.glob("page-*.png"))
    assert len(pictures) == (7 if has_summary else 0)
    for file in pictures:
        Image.open(file).verify()


def record_object(record: RequestRecord) -> dict[str, Any]:
    return {name: getattr(record, name) for name in RequestRecord.__slots__}


def test_files_that_are_missing_or_broken_are_named_and_the_rest_is_shown(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", [made()], RunFacts((Window(0, 8),)))
    (folder / "summary.json").write_text("{")
    (folder / "requests.jsonl").write_text('{"strange": 1}\n{}\n')
    (run,) = read_reports([folder])
    assert any("summary.json could not be read" in line for line in run.warnings)
    assert any("requests.jsonl could not be read" in line for line in run.warnings)
    assert_self_contained(build([run]))
    (folder / "requests.jsonl").unlink()
    (folder / "summary.json").write_text(
        '{"metrics": {"accuracy": NaN, "request_throughput": 0.0, "ttfat_p50": "inf"}}'
    )
    (run,) = read_reports([folder])
    assert any("no number: accuracy" in line for line in run.warnings)
    page = build([run])
    assert_self_contained(page)
    assert "∞" in page


def test_two_sweeps_of_one_model_are_told_apart_by_their_folders(sweeps: list[Path], tmp_path: Path) -> None:
    other = tmp_path / "again"
    other.mkdir()
    (tmp_path / "parent" / "on@c4").rename(other / "on@c4")
    runs = read_reports([tmp_path / "parent", other])
    assert {run.group for run in runs} == {"parent (parent)", "parent (again)"}


def test_a_folder_without_a_run_and_a_place_that_cannot_be_written_are_one_clear_line(
    sweeps: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    for argv in ([str(tmp_path / "nowhere")], [str(tmp_path)], [str(sweeps[0]), "--out", str(tmp_path / "file" / "x")]):
        with pytest.raises(ConfigError) as error:
            report(argv)
        assert "found" in str(error.value) and "allowed" in str(error.value) and "\n" not in str(error.value)


def test_the_command_writes_page_and_pictures_and_prints_a_table(
    sweeps: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out" / "report.html"
    few = [str(folder / f"{arm}@c4") for folder in sweeps for arm in ("budget-16", "on")]
    assert report([*few, "--out", str(out), "--title", "Parent & puzzle"]) == 0
    assert "<title>Parent &amp; puzzle</title>" in out.read_text()
    names = sorted(file.name for file in out.parent.glob("*.png"))
    assert names == [f"report-{name}.png" for name in
                     ("answer", "budget", "frontier", "outcomes", "throughput", "timeline", "tokens")]  # fmt: skip
    for file in out.parent.glob("*.png"):
        colours = Image.open(file).convert("RGB").getcolors(2**24)
        assert colours is not None and len(colours) > 50, f"{file.name} shows nothing"
    printed = capsys.readouterr().out
    assert printed.count("complete") == 4 and "75.0 %" in printed and "core·s" in printed


def test_speculation_and_relative_rates_are_shown_where_there_are_any(sweeps: list[Path]) -> None:
    folder = sweeps[0] / "on@c4"
    summary = json.loads((folder / "summary.json").read_text())
    summary["by_block"] = [
        {
            "block": 0,
            "speculation": {
                "length": 2.5,
                "rate": 0.5,
                "rate_by_position": [0.9, 0.6],
                "by_task": {"sums": {"length": 3.25}},
            },
        }
    ]
    (folder / "summary.json").write_text(json.dumps(summary))
    root = parsed(build(read_reports(sweeps)))
    headings = {text_of(heading) for heading in root.iter("h2")}
    assert {"Speculative decoding", "Relative request rate"} <= headings
    cells = {text_of(cell) for cell in root.iter("td")}
    assert {"2.50", "3.25", "90.0 %, 60.0 %", "block 0, sums"} <= cells
    # Half the time per request at equal tokens: twice the requests, either way.
    rows = [[text_of(cell) for cell in row] for row in root.iter("tr")]
    (row,) = [row for row in rows if row[:3] == ["on", "puzzle", "c4"] and "x" in row[-2]]
    assert row[3:8] == ["parent, on, c4", "2x", "1x", "2x", "2x"]
    assert "Relative request rate" not in build([r for r in read_reports(sweeps) if r.arm != "on"])


def test_speculations_speed_up_is_over_the_same_requests_without_it_load_by_load(sweeps: list[Path]) -> None:
    for load in ("c4", "c10"):
        file = sweeps[1] / f"on@{load}" / "summary.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"speculation": {"length": 2.5, "rate": 0.5}}))
    runs = read_reports(sweeps)
    rows = [[text_of(cell) for cell in row] for row in parsed(build(runs)).iter("tr")]
    for load in ("c4", "c10"):
        # The puzzle takes half the parent's time in every block: twice the tokens a second, whatever the block.
        (row,) = [row for row in rows if row[:3] == [load, "puzzle, on", "parent, on"]]
        assert row[3:5] == ["2x", "2x … 2x"] and row[-2:] == ["75.0 %", "75.0 %"]
    spoiled = next(run for run in runs if run.title == "puzzle, on, c4")
    assert baseline(spoiled, [run for run in runs if run.group == "puzzle"]) is None
    # Blocks of 1, 2 and 4 times the baseline's rate.
    (base,) = [run for run in runs if run.title == "parent, on, c4"]
    scaled = [replace(record, output_tokens=(record.output_tokens or 0) * 2**record.block) for record in base.records]
    gain = speed_up(replace(base, records=tuple(scaled)), base)
    reach = 4.302653 * math.log(2) / math.sqrt(3)  # t(0.975, 2), spread of the logarithms 0, log 2, log 4
    assert gain is not None and gain.estimate == pytest.approx(2)
    assert (gain.low, gain.high) == pytest.approx((2 / math.exp(reach), 2 * math.exp(reach)), rel=1e-5)


def test_charts_never_leave_their_frame(finished: list[Path]) -> None:
    for group in charts_of(read_reports(finished)).values():
        for chart in group:
            scene = chart.scene
            for shape in scene.shapes:
                spots = getattr(shape, "points", None) or [(shape.x, shape.y)]  # type: ignore[union-attr]
                assert all(-1 <= x <= scene.width + 1 and -1 <= y <= scene.height + 1 for x, y in spots), chart.name


def test_loads_are_in_the_order_of_their_numbers() -> None:
    assert sorted(["c16", "c4", "poisson-10", "poisson-2.5"], key=report_runs.natural) == [
        "c4", "c16", "poisson-2.5", "poisson-10",
    ]  # fmt: skip
