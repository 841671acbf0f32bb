"""`vllm-puzzle bench report RUN…`: one page about runs and sweeps, its charts as PNG, and a table on the terminal."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_puzzle.bench.efficiency import html
from vllm_puzzle.bench.efficiency.charts import (
    budget_chart,
    by_tokens,
    frontier_chart,
    groups_of,
    loads_of,
    outcome_chart,
    throughput_chart,
)
from vllm_puzzle.bench.efficiency.charts_time import answer_time_chart, timeline_chart
from vllm_puzzle.bench.efficiency.drawing.png import write_png
from vllm_puzzle.bench.efficiency.drawing.scene import Scene, stacked
from vllm_puzzle.bench.efficiency.metrics_rate import relative_rate
from vllm_puzzle.bench.efficiency.report_runs import ReportRun, read_reports
from vllm_puzzle.bench.efficiency.report_speculation import speculation_section
from vllm_puzzle.bench.efficiency.tables import factor, number, percent, table
from vllm_puzzle.model_configs.schema import ConfigError

NAME = "report.html"
# Manifest keys that arms to be compared have in common.
_SAME = ("max_tokens", "sampling", "tasks")
_DEFINITIONS = (
    "N_p, N_t, N_a, N_o: tokens of prompt, thought, answer, output. t_sched, t0: due, sent. t1, tR, tA: first "
    "text of any kind, of the thought, of the answer. tZ: last text. start: t_sched in an open load, t0 in a closed."
)


@dataclass(frozen=True, slots=True)
class Chart:
    """One file and figure. name: of the file."""

    name: str
    scene: Scene
    caption: str = ""


def report(argv: Sequence[str]) -> int:
    """Write the report. Returns the exit status; raises ConfigError."""
    parser = argparse.ArgumentParser(prog="vllm-puzzle bench report", description="one page about runs and sweeps")
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="folder of a run or of a sweep")
    parser.add_argument("--out", type=Path, help=f"the page (default: {NAME} in the first folder)")
    parser.add_argument("--title", help="of the page")
    parser.add_argument("--no-png", action="store_true", help="only the page")
    options = parser.parse_args(argv)
    runs = read_reports(options.runs)
    out: Path = options.out or options.runs[0] / NAME
    charts = charts_of(runs)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(build(runs, options.title, charts), encoding="utf-8")
        files = [] if options.no_png else [out.with_name(f"{out.stem}-{name}.png") for name in pictures(charts)]
        for file, scene in zip(files, pictures(charts).values(), strict=False):
            write_png(scene, file)
    except OSError as error:
        raise ConfigError(f"{out}: found {error.strerror}, allowed: a file that can be written") from None
    print(terminal_table(runs))
    print(f"\n{out}" + (f" and {len(files)} PNG files beside it" if files else ""))
    return 0


def charts_of(runs: Sequence[ReportRun]) -> dict[str, list[Chart]]:
    """All charts by the section that they stand in."""
    device = runs[0].device if len({run.device for run in runs}) == 1 else "device"
    found: dict[str, list[Chart]] = {"frontier": [], "tokens": [], "answer": [], "timeline": []}
    for load in loads_of(runs):
        mine = [run for run in runs if run.load == load]
        at = f"at load {load}"
        label = f"{device}·s per request"
        found["frontier"].append(Chart(f"frontier-{load}", frontier_chart(mine, f"Accuracy against cost, {at}", label)))
        title = f"Accuracy against tokens, {at}"
        found["tokens"].append(
            Chart(f"tokens-{load}", frontier_chart(mine, title, "output tokens per request", by_tokens))
        )
        for group in groups_of(mine):
            title = f"Time to first answer token, {group}, {at}"
            scene = answer_time_chart([run for run in mine if run.group == group], title)
            found["answer"].append(Chart(f"answer-{group}-{load}", scene))
    found["outcomes"] = [Chart("outcomes", outcome_chart(runs))]
    found["budget"] = [Chart("budget", budget_chart(runs))]
    found["throughput"] = [Chart("throughput", throughput_chart(runs))]
    found["timeline"] = [Chart(f"timeline-{number}", timeline_chart(run)) for number, run in enumerate(runs)]
    return found


def pictures(charts: Mapping[str, Sequence[Chart]]) -> dict[str, Scene]:
    """One picture per section, by the name that its file ends in."""
    return {
        name: stacked([chart.scene for chart in group], group[0].scene.title)
        for name, group in charts.items()
        if group and (name != "timeline" or len(group) <= 30)
    }


def build(
    runs: Sequence[ReportRun], title: str | None = None, charts: Mapping[str, Sequence[Chart]] | None = None
) -> str:
    """The page."""
    charts = charts_of(runs) if charts is None else charts
    title = title or "What a correct answer costs: " + ", ".join(groups_of(runs))
    figures = {name: [html.figure(chart.scene, chart.caption) for chart in group] for name, group in charts.items()}
    parts = [
        html.warnings(runs, mismatches(runs)),
        html.headline_table(runs),
        html.section(
            "Accuracy against cost",
            "Each point is one setting under one load: accuracy over all requests that were issued, with its 95\u00a0% "
            "interval, against measured device time per whole answer (bars where three or more blocks tell its noise). "
            "A line joins the settings of a model that none of its others beats; hollow points are beaten. Upper left "
            "is best.",
            *figures["frontier"],
            html.folded("Against tokens per request, which no hardware enters", "\n".join(figures["tokens"])),
        ),
        relative_section(runs),
        html.section(
            "Time to the first answer token",
            "Of all requests issued. One without an answer waits for ever: its curve never reaches 100 %.",
            *figures["answer"],
        ),
        html.section("Where the tokens went", "Thought and answer of every request, by what became of it.",
                     *figures["outcomes"]),
        html.section("Budgets", "A budget is kept when no thought is longer.", *figures["budget"]),
        html.section("Throughput against interactivity",
                     "Tokens per second can fall while right answers per second rise: never a result alone.",
                     *figures["throughput"]),
        html.section("Over time", "Whether the load was steady in the shaded window that rates are taken from.",
                     *_folded_beyond(figures["timeline"], 4)),
        speculation_section(runs),
        html.section("By task", "Accuracy of each task, and what blind guessing gets.", html.task_table(runs)),
        html.section("All metrics", _DEFINITIONS, html.metric_tables(runs)),
        html.section("Manifests", "What was run, on what, as declared and as found.", html.manifests(runs)),
    ]  # fmt: skip
    return html.page(title, lead(runs), [part for part in parts if part])


def _folded_beyond(figures: Sequence[str], most: int) -> list[str]:
    rest = list(figures[most:])
    return [*figures[:most], html.folded(f"{len(rest)} more", "\n".join(rest))] if rest else list(figures)


def lead(runs: Sequence[ReportRun]) -> str:
    """When, where and how much."""
    first = runs[0].manifest
    machine, versions = (found if isinstance(found := first.get(key), dict) else {} for key in ("machine", "versions"))
    gpus = [str(gpu.get("name")) for gpu in machine.get("gpus") or ()]
    where = ", ".join(gpus) or f"{machine.get('cores', '?')} cores of {machine.get('processor') or 'a processor'}"
    requests = sum(len(run.measured) for run in runs)
    commit = str(versions.get("commit") or "")[:10]
    parts = [f"{len(runs)} run(s), {requests:,} requests", str(first.get("started_at") or ""), f"client on {where}"]
    parts.append(f"commit {commit}" if commit else "")
    return "; ".join(part for part in parts if part) + "."


def mismatches(runs: Sequence[ReportRun]) -> list[str]:
    """What differs between runs that the charts put side by side."""
    lines = []
    for key in _SAME:
        for load in loads_of(runs):
            found = {str(run.manifest.get(key)) for run in runs if run.load == load}
            if len(found) > 1:
                lines.append(f"runs at load {load} differ in {key}: compare them with care")
    if len({run.device for run in runs}) > 1:
        lines.append("costs are counted in different devices")
    return lines


def relative_section(runs: Sequence[ReportRun]) -> str:
    """The paper's relative request rate, as a quotient and as measured; nothing without a declared reference."""
    rows = []
    for load in loads_of(runs):
        mine = [run for run in runs if run.load == load and run.facts is not None and run.records]
        base = _reference(mine)
        for run in mine if base is not None else ():
            assert base is not None and base.facts is not None and run.facts is not None, "filtered above"
            rate = relative_rate(run.records, run.facts, base.records, base.facts)
            cells = [factor(rate.throughput), factor(rate.verbosity), factor(rate.quotient), factor(rate.direct)]
            accuracy = "-" if run.accuracy is None else percent(run.accuracy.estimate)
            rows.append([run.arm, run.group, run.load, base.title, *cells, accuracy])
    if not rows:
        return ""
    header = ["arm", "model", "load", "reference", "throughput, relative", "tokens, relative",
              "request rate: throughput / tokens", "request rate: measured", "accuracy"]  # fmt: skip
    text = (
        "Requests per second over the reference's: once as throughput over tokens, as arXiv 2602.11937 asks, and once "
        "as counted. They differ where lengths vary, replies fail, or the drain is long."
    )
    return html.section(
        "Relative request rate", text, html.table(header, rows, dict.fromkeys((1, 2, 3), "words"), apart=2)
    )


def _reference(runs: Sequence[ReportRun]) -> ReportRun | None:
    """The arm that the runs declared as the reference; of several models' the first."""
    for run in runs:
        config = run.manifest.get("config")
        if isinstance(config, dict) and config.get("reference") == run.arm:
            return run
    return None


def terminal_table(runs: Sequence[ReportRun]) -> str:
    """One row per run, and the warnings under it."""
    header = ["run", "accuracy", "95 %", "cost", "tokens", "TTFAT p50", "requests/s", "status"]
    rows = []
    for run in runs:
        bounds = run.accuracy
        cells = ["-", "-"] if bounds is None else [
            percent(bounds.estimate), f"{percent(bounds.low)} … {percent(bounds.high)}"
        ]  # fmt: skip
        names = ("tokens_per_request", "ttfat_p50", "request_throughput")
        cost = "-" if run.cost is None else f"{number(run.cost)} {run.device}·s"
        rows.append([run.title, *cells, cost, *(number(run.metrics.get(name)) for name in names), run.status])
    notes = [f"{run.title}: {line}" for run in runs for line in run.warnings] + mismatches(runs)
    return "\n".join([table(header, rows), *(f"warning: {line}" for line in notes)])
