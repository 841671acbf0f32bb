"""The report as one page: text, tables and inline SVG, no script, nothing from elsewhere; well-formed XML as well."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any
from xml.sax.saxutils import escape

from vllm_puzzle.bench.efficiency.charts import groups_of, loads_of
from vllm_puzzle.bench.efficiency.drawing.scene import Scene
from vllm_puzzle.bench.efficiency.drawing.svg import clean, style_sheet, svg
from vllm_puzzle.bench.efficiency.metrics import METRICS
from vllm_puzzle.bench.efficiency.report_runs import ReportRun
from vllm_puzzle.bench.efficiency.resampling import Interval
from vllm_puzzle.bench.efficiency.tables import number, percent

STYLE = """
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.5rem 4rem; max-width: 68rem; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .3rem; letter-spacing: -.01em; }
h2 { font-size: 1.15rem; margin: 2.6rem 0 .4rem; padding-top: 1rem; border-top: 1px solid var(--grid); }
p { max-width: 46rem; margin: .4rem 0 .9rem; }
.lead, .note, caption, figcaption { color: var(--muted); }
.note, caption, figcaption { font-size: .86rem; }
figure { margin: 1rem 0 1.6rem; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; margin: .6rem 0 1rem; }
caption { text-align: left; padding-bottom: .3rem; }
th, td { padding: .26rem .6rem; text-align: right; border-bottom: 1px solid var(--grid); white-space: nowrap; }
th { font-weight: 600; vertical-align: bottom; }
th[scope=row], .words, .prose { text-align: left; }
th[scope=row] { vertical-align: top; } td.words, td.prose { color: var(--muted); }
.prose { white-space: normal; min-width: 15rem; }
th:first-child, td:first-child { padding-left: 0; }
tr.apart td, tr.apart th { border-top: 2px solid var(--axis); }
thead th { border-bottom: 1.5px solid var(--axis); white-space: normal; }
.warnings { background: var(--panel); border-left: 4px solid var(--warn); padding: .7rem 1rem; margin: 1.2rem 0; }
.warnings ul { margin: .3rem 0; padding-left: 1.1rem; } .warnings strong { color: var(--warn); }
details { margin: .5rem 0; } summary { cursor: pointer; color: var(--muted); }
pre { background: var(--panel); padding: .8rem 1rem; overflow-x: auto; font-size: .78rem; line-height: 1.45; }
@media print { body { max-width: none; } details:not([open]) { display: none; } }
"""
_APART = ' class="apart"'
# Columns of the first table: metric, heading.
HEADLINES = (
    ("tokens_per_request", "tokens per request"),
    ("tokens_per_correct", "tokens per correct"),
    ("ttfat_p50", "TTFAT p50, s"),
    ("ttfat_p99", "TTFAT p99, s"),
    ("request_throughput", "requests/s"),
    ("correct_throughput", "correct/s"),
    ("correct_goodput", "correct within SLO/s"),
)


def page(title: str, lead: str, sections: Iterable[str]) -> str:
    """The whole document."""
    body = "\n".join(sections)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8"/>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        f"<title>{words(title)}</title>\n<style>\n{style_sheet()}\n{STYLE}</style>\n</head>\n<body>\n"
        f'<h1>{words(title)}</h1>\n<p class="lead">{words(lead)}</p>\n{body}\n</body>\n</html>\n'
    )


def words(text: str) -> str:
    """A text as the page holds it."""
    return escape(clean(text))


def section(heading: str, text: str, *parts: str) -> str:
    """A heading, what is to be seen, and the parts."""
    inside = "\n".join(part for part in parts if part)
    return f"<section>\n<h2>{words(heading)}</h2>\n<p>{words(text)}</p>\n{inside}\n</section>"


def figure(scene: Scene, caption: str = "") -> str:
    """A chart."""
    below = f"<figcaption>{words(caption)}</figcaption>" if caption else ""
    return f"<figure>\n{svg(scene)}\n{below}</figure>"


def folded(summary: str, inside: str) -> str:
    """Something that opens on a click."""
    return f"<details>\n<summary>{words(summary)}</summary>\n{inside}\n</details>"


def table(
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    kinds: Mapping[int, str] = MappingProxyType({}),
    apart: int = 0,
) -> str:
    """A table; the first column names the rows. kinds: column → `words` or `prose`, which begin at the left; the others
    hold numbers. apart: a line is drawn where the values of the columns 1 to `apart` change.
    """
    classes = {0: ' class="words"'} | {at: f' class="{kind}"' for at, kind in kinds.items()}
    head = "".join(f'<th scope="col"{classes.get(at, "")}>{words(cell)}</th>' for at, cell in enumerate(header))
    lines: list[str] = []
    before: Sequence[str] = ()
    for row in rows:
        cells = [f'<th scope="row">{words(row[0])}</th>']
        cells += [f"<td{classes.get(at, '')}>{words(cell)}</td>" for at, cell in enumerate(row[1:], start=1)]
        is_apart = before and before != row[1 : 1 + apart]
        lines.append(f"<tr{_APART if is_apart else ''}>{''.join(cells)}</tr>")
        before = row[1 : 1 + apart]
    body = "\n".join(lines)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'


def warnings(runs: Sequence[ReportRun], others: Sequence[str] = ()) -> str:
    """A box with what is to be known first; nothing where nothing is. The same warning of several runs is one line."""
    whose: dict[str, list[str]] = {}
    for run in runs:
        for line in run.warnings:
            whose.setdefault(line, []).append(run.title)
    lines = [f"<li>{words(line)}</li>" for line in others]
    for line, titles in whose.items():
        who = "all runs" if len(titles) == len(runs) > 1 else "; ".join(titles)
        lines.append(f'<li>{words(line)} <span class="note">({words(who)})</span></li>')
    if not lines:
        return ""
    items = "\n".join(["<strong>Before you believe a number</strong>", "<ul>", *lines, "</ul>"])
    return f'<div class="warnings" role="note">\n{items}\n</div>'


def with_bounds(interval: Interval | None, form: Any = percent) -> str:
    """An estimate and its bounds."""
    if interval is None:
        return "-"
    return f"{form(interval.estimate)} ({form(interval.low)} … {form(interval.high)})"


def headline_table(runs: Sequence[ReportRun]) -> str:
    """One row per run: what it is, accuracy with bounds, cost, and what else is known of any."""
    known = [one for one in HEADLINES if any(run.metrics.get(one[0]) is not None for run in runs)]
    header = ["arm", "model", "load", "status", "accuracy (95 %)", "device-s per request"]
    rows = []
    for run in runs:
        cost = number(run.cost) + ("" if run.cost is None else f" {run.device}·s")
        cells = [run.arm, run.group, run.load, run.status, with_bounds(run.accuracy), cost]
        rows.append([*cells, *(number(run.metrics.get(name)) for name, _ in known)])
    return table([*header, *(heading for _, heading in known)], rows, dict.fromkeys((1, 2, 3), "words"), apart=2)


def value(amount: float | None, unit: str) -> str:
    """A metric's value, as in every table of the page."""
    return percent(amount) if unit == "1" and amount is not None and math.isfinite(amount) else number(amount)


def metric_tables(runs: Sequence[ReportRun]) -> str:
    """Every metric of every run with its definition: one table per model and load, an arm a column."""
    parts = []
    for group in groups_of(runs):
        for load in loads_of(runs):
            mine = [run for run in runs if run.group == group and run.load == load]
            if mine:
                rows = [
                    [m.name, *(value(run.metrics.get(m.name), m.unit) for run in mine), _unit(m.unit), m.formula]
                    for m in METRICS
                ]
                count = len(mine)
                header = ["metric", *(run.arm for run in mine), "unit", "definition"]
                inside = table(header, rows, {count + 1: "words", count + 2: "prose"})
                parts.append(folded(f"{group}, {load}: {len(METRICS)} metrics of {count} arm(s)", inside))
    return "\n".join(parts)


def _unit(unit: str) -> str:
    return "share" if unit == "1" else unit


def task_table(runs: Sequence[ReportRun]) -> str:
    """Accuracy by task, with the chance level."""
    tasks: dict[str, str] = {}
    for run in runs:
        for task in run.manifest.get("tasks") or ():
            if isinstance(task, Mapping):
                chance = task.get("chance")
                tasks[str(task.get("name"))] = percent(chance) if isinstance(chance, int | float) else "-"
    rows = []
    for run in runs:
        by_task = run.summary.get("by_task") or {}
        cells = [by_task.get(name, {}).get("accuracy") for name in tasks]
        rows.append([run.title, *(percent(cell) if isinstance(cell, int | float) else "-" for cell in cells)])
    rows.append(["guessing", *tasks.values()])
    return table(["accuracy", *tasks], rows) if tasks else ""


def manifests(runs: Sequence[ReportRun]) -> str:
    """The manifests as they are, without the list of questions."""
    parts = []
    for run in runs:
        kept = {key: found for key, found in run.manifest.items() if key != "questions"}
        text = json.dumps(kept, indent=1, ensure_ascii=False)
        parts.append(folded(f"{run.title}: {run.path.name}", f"<pre>{words(text)}</pre>"))
    return "\n".join(parts)
