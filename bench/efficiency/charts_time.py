"""The report's charts over time: how long until an answer, and what was in flight."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from vllm_puzzle.bench.efficiency.charts import BOTTOM, LEFT, RIGHT, TOP, WIDTH, empty
from vllm_puzzle.bench.efficiency.drawing.axes import frame, legend, nice_ticks, percent, scale, seconds, short
from vllm_puzzle.bench.efficiency.drawing.scene import END, MIDDLE, Scene, Stroke, text_width
from vllm_puzzle.bench.efficiency.drawing.style import look
from vllm_puzzle.bench.efficiency.metrics_request import ttfat
from vllm_puzzle.bench.efficiency.report_runs import ReportRun
from vllm_puzzle.bench.efficiency.resampling import Array

_MOST_POINTS = 240  # of a curve: more are not seen, and each is a corner in the file
BINS, RATE_BINS = 96, 24  # of a timeline: of what is in flight, and of what ends, which is rare
_GAP = 0.02  # between blocks, of all their time


def answer_time_chart(runs: Sequence[ReportRun], title: str) -> Scene:
    """Share of all issued requests whose answer had begun by a time. What never came keeps the curve below 100 %."""
    shown = [(run, sorted(ttfat(record) for record in run.measured)) for run in runs if run.measured]
    finite = [wait for _, waits in shown for wait in waits if math.isfinite(wait) and wait > 0]
    if not finite:
        return empty(title, "No run has an answer whose time is known.")
    entries = [(_named(run.arm, waits), look(number)) for number, (run, waits) in enumerate(shown)]
    wide = min(300.0, max(text_width(name, 12) for name, _ in entries) + 44)
    height = max(320.0, 60 + 18 * len(entries))
    scene = Scene(WIDTH, height, title, "A curve that ends below 100 % has requests without an answer.")
    scene.text(0, 8, title, 13, is_bold=True)
    x = scale(finite, LEFT, WIDTH - wide - 24, is_log=True, pad=0.04)
    y = scale([0, 1], height - BOTTOM, TOP, low=0.0, high=1.0)
    plot = frame(scene, x, y, "time to first answer token (log scale)", "share of requests", seconds, percent)
    for (_, style), (_, waits) in zip(entries, shown, strict=True):
        points = [plot.point(*point) for point in steps(waits, x.low, x.high)]
        scene.path(points, Stroke(style.role, 2, style.dash))
    legend(scene, WIDTH - wide, 44, wide, entries, True)
    return scene


def _named(arm: str, waits: Sequence[float]) -> str:
    never = sum(math.isinf(wait) for wait in waits) / len(waits)
    return f"{arm}, {percent(never)} never" if never else arm


def steps(waits: Sequence[float], low: float, high: float) -> list[tuple[float, float]]:
    """The empirical distribution of sorted waits as the corners of its steps from `low` to `high`, some left out."""
    count = len(waits)
    known = sum(math.isfinite(wait) for wait in waits)
    kept = sorted({round(place) for place in np.linspace(1, known, min(known, _MOST_POINTS))}) if known else []
    points, share = [(low, 0.0)], 0.0
    for rank in kept:
        wait = max(waits[rank - 1], low)
        points += [(wait, share), (wait, rank / count)]
        share = rank / count
    return [*points, (high, share)]


def timeline_chart(run: ReportRun) -> Scene:
    """Requests in flight as an area, whole replies per second as a line; the steady windows are shaded."""
    title = run.title
    blocks = sorted({record.block for record in run.records})
    spans = {block: _span(run, block) for block in blocks}
    total = math.fsum(end - start for start, end in spans.values())
    if not total > 0:
        return empty(title, "No request was recorded.")
    scene = Scene(WIDTH, 172, title, "Area: requests in flight. Line: replies per second. Shaded: steady window.")
    scene.text(0, 8, title, 12, is_bold=True)
    left, right, bottom, top = LEFT, WIDTH - RIGHT - 50, 134.0, 26.0
    per_second = (right - left) / (total * (1 + _GAP * (len(blocks) - 1)))
    curves = {block: curve(run, block, *spans[block]) for block in blocks}
    most = max(float(flight.max()) for flight, _ in curves.values())
    fastest = max(float(rate.max()) for _, rate in curves.values())
    flight_y = scale([0], bottom, top, low=0.0, high=max(most, 1.0) * 1.05)
    rate_y = scale([0], bottom, top, low=0.0, high=max(fastest, 1e-9) * 1.05)
    for tick in nice_ticks(0, flight_y.high, 4):
        scene.line(left, flight_y.at(tick), right, flight_y.at(tick), Stroke("grid"))
        scene.text(left - 8, flight_y.at(tick), short(tick), 11, "s0", END)
    for tick in nice_ticks(0, rate_y.high, 4):
        scene.text(right + 8, rate_y.at(tick), short(tick), 11, "s1")
    origin = left
    for block in blocks:
        start, end = spans[block]
        flight, rate = curves[block]
        xs = origin + np.linspace(0, end - start, BINS + 1) * per_second
        rate_xs = origin + np.linspace(0, end - start, RATE_BINS + 1) * per_second
        _window(scene, run, block, origin, start, per_second, bottom, top)
        area = _corners(xs, [flight_y.at(float(value)) for value in flight])
        scene.path([(area[0][0], bottom), *area, (area[-1][0], bottom)], None, "s0", 0.3)
        scene.path(area, Stroke("s0", 1.25))
        scene.path(_corners(rate_xs, [rate_y.at(float(value)) for value in rate]), Stroke("s1", 1.5))
        label = f"block {block}, {end - start:.3g} s" if len(blocks) > 1 else f"{end - start:.3g} s"
        scene.text((xs[0] + xs[-1]) / 2, bottom + 14, label, 11, "muted", MIDDLE)
        origin += (end - start) * per_second + _GAP * total * per_second
    scene.line(left, bottom, right, bottom, Stroke("axis"))
    scene.text(left - 48, (top + bottom) / 2, "in flight", 11, "s0", MIDDLE, turn=90)
    scene.text(right + 46, (top + bottom) / 2, "replies/s", 11, "s1", MIDDLE, turn=90)
    return scene


def _window(
    scene: Scene, run: ReportRun, block: int, origin: float, start: float, per_second: float, bottom: float, top: float
) -> None:
    for window in () if run.facts is None else run.facts.windows:
        if window.block == block:
            x = origin + (max(window.start, start) - start) * per_second
            scene.box(x, top, (window.end - max(window.start, start)) * per_second, bottom - top, "band")


def _span(run: ReportRun, block: int) -> tuple[float, float]:
    mine = [record for record in run.records if record.block == block]
    return min(record.start for record in mine), max(record.done for record in mine)


def curve(run: ReportRun, block: int, start: float, end: float) -> tuple[Array, Array]:
    """Of one block: mean requests in flight in each of BINS, and replies per second in each of RATE_BINS."""
    mine = [record for record in run.records if record.block == block]
    begins, ends = np.array([r.start for r in mine]), np.array([r.done for r in mine])
    end = max(end, start + 1e-9)
    edges = np.linspace(start, end, BINS + 1)
    inside = np.minimum(ends[:, None], edges[1:]) - np.maximum(begins[:, None], edges[:-1])
    counts, _ = np.histogram(ends, RATE_BINS, (start, end))
    return np.maximum(inside, 0).sum(axis=0) / (edges[1] - edges[0]), counts * RATE_BINS / (end - start)


def _corners(xs: Array, ys: Sequence[float]) -> list[tuple[float, float]]:
    """The corners of steps; steps of one height are one."""
    kept = [place for place in range(len(ys)) if place == 0 or ys[place] != ys[place - 1]]
    ends = [*kept[1:], len(ys)]
    return [(float(xs[at]), ys[place]) for place, end in zip(kept, ends, strict=True) for at in (place, end)]
