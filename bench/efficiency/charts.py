"""The report's charts of settings: cost against accuracy, tokens by outcome, budgets, throughput and interactivity."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
from vllm_puzzle.bench.efficiency.drawing.axes import (
    Form,
    Frame,
    frame,
    legend,
    nice_ticks,
    percent,
    place_labels,
    scale,
    short,
)
from vllm_puzzle.bench.efficiency.drawing.scene import END, MIDDLE, Path, Scene, Stroke, shortened, text_width
from vllm_puzzle.bench.efficiency.drawing.style import MARKERS, OUTCOME_ROLES, Look, look
from vllm_puzzle.bench.efficiency.frontier import non_dominated
from vllm_puzzle.bench.efficiency.metrics_request import thinking_tokens
from vllm_puzzle.bench.efficiency.percentile import percentile
from vllm_puzzle.bench.efficiency.record import OUTCOMES
from vllm_puzzle.bench.efficiency.report_runs import ReportRun

WIDTH = 860.0
BAR_REACH = 3.0
SEEN_CHANCE = 0.02  # below, guessing is nothing that a chart need show
LEFT, RIGHT, TOP, BOTTOM = 70.0, 20.0, 34.0, 52.0
Bounds = tuple[float, float, float]  # estimate, low, high


def groups_of(runs: Sequence[ReportRun]) -> list[str]:
    """The models, each once, in their order."""
    return list(dict.fromkeys(run.group for run in runs))


def loads_of(runs: Sequence[ReportRun]) -> list[str]:
    """The loads, each once."""
    return list(dict.fromkeys(run.load for run in runs))


def empty(title: str, reason: str) -> Scene:
    """In place of a chart that has nothing to show."""
    scene = Scene(WIDTH, 60, title, reason)
    scene.text(0, 12, title, 13, is_bold=True)
    scene.text(0, 38, reason, 12, "muted")
    return scene


# --- accuracy against cost -----------------------------------------------------------------------------------------


def by_cost(run: ReportRun) -> Bounds | None:
    """Device-seconds per request with bounds."""
    cost, bounds = run.cost, run.cost_bounds
    if cost is None or not math.isfinite(cost) or cost <= 0:
        return None
    return (cost, cost, cost) if bounds is None else (cost, bounds.low, bounds.high)


def by_tokens(run: ReportRun) -> Bounds | None:
    """Output tokens per request."""
    tokens = run.metrics.get("tokens_per_request")
    return None if not tokens or not math.isfinite(tokens) else (tokens, tokens, tokens)


def frontier_chart(
    runs: Sequence[ReportRun], title: str, x_label: str, cost_of: Callable[[ReportRun], Bounds | None] = by_cost
) -> Scene:
    """Accuracy with its 95 % interval against cost; settings that another one beats are hollow. Upper left is best."""
    shown = [(run, cost, run.accuracy) for run in runs if (cost := cost_of(run)) is not None and run.accuracy]
    if not shown:
        return empty(title, "No run has both an accuracy and a cost.")
    groups = groups_of(runs)
    height = 400.0 + 18 * len(groups)
    scene = Scene(WIDTH, height, title, f"{len(shown)} settings; accuracy with 95 % intervals against {x_label}")
    scene.text(0, 8, title, 13, is_bold=True)
    top = TOP + 18 * len(groups)
    legend(scene, LEFT, 34, WIDTH - LEFT, [(name, look(number)) for number, name in enumerate(groups)], False)
    costs = [cost[0] for _, cost, _ in shown]
    # A bound that reaches far beyond all settings would press them into a corner: its bar ends at the frame, open.
    xs = [min(max(value, min(costs) / BAR_REACH), max(costs) * BAR_REACH) for _, cost, _ in shown for value in cost]
    ys = [value for _, _, accuracy in shown for value in (accuracy.low, accuracy.high)]
    chances = {run.chance for run, _, _ in shown}
    chance = chances.pop() if len(chances) == 1 else None
    ys += [chance] if chance and chance >= SEEN_CHANCE else []
    x = scale(xs, LEFT, WIDTH - RIGHT, is_log=True, pad=0.08)
    y = scale(ys, height - BOTTOM, top, low=max(0.0, min(ys) - 0.04), high=min(1.0, max(ys) + 0.04))
    plot = frame(scene, x, y, f"{x_label} (log scale)", "accuracy", short, percent)
    if chance and chance >= SEEN_CHANCE:
        scene.line(x.start, y.at(chance), x.end, y.at(chance), Stroke("muted", 1, (2.0, 3.0)))
        scene.text(x.end, y.at(chance) - 9, f"guessing, {percent(chance)}", 11, "muted", END)
    for number, group in enumerate(groups):
        mine = [one for one in shown if one[0].group == group]
        if mine:
            _frontier_of(plot, number, mine)
    _name_points(plot, [(cost[0], accuracy.estimate, run.arm) for run, cost, accuracy in shown])
    return scene


def _frontier_of(plot: Frame, number: int, mine: Sequence[tuple[ReportRun, Bounds, object]]) -> None:
    style = look(number)
    costs = np.array([cost[0] for _, cost, _ in mine])
    accuracies = np.array([accuracy.estimate for _, _, accuracy in mine])  # type: ignore[attr-defined]
    best = non_dominated(costs, accuracies)
    order = np.argsort(costs[best])
    hull = zip(costs[best][order], accuracies[best][order], strict=True)
    plot.scene.path([plot.point(cost, accuracy) for cost, accuracy in hull], Stroke(style.role, 2, style.dash))
    bar = Stroke(style.role, 1.25, opacity=0.7)
    for place, (run, cost, _) in enumerate(mine):
        accuracy = run.accuracy
        assert accuracy is not None, "only settings with one are shown"
        px, py = plot.point(cost[0], accuracy.estimate)
        for low, high, is_across in ((accuracy.low, accuracy.high, False), (cost[1], cost[2], True)):
            ends = [plot.x.at(v) if is_across else plot.y.at(v) for v in (low, high)]
            if abs(ends[1] - ends[0]) > 1:
                _whisker(plot, (px, py), ends, is_across, bar)
        plot.scene.marker(px, py, style.marker, style.role, 5.5, bool(best[place]))


def _whisker(plot: Frame, point: tuple[float, float], ends: Sequence[float], is_across: bool, stroke: Stroke) -> None:
    """A bar through the point, within the frame; an end that lies beyond it has no cap."""
    x, y = point
    axis = plot.x if is_across else plot.y
    least, most = sorted((axis.start, axis.end))
    kept = [min(max(end, least), most) for end in ends]
    bars = [(kept[0], y, kept[1], y)] if is_across else [(x, kept[0], x, kept[1])]
    for end in (end for end, inside in zip(ends, kept, strict=True) if end == inside):
        bars.append((end, y - 3, end, y + 3) if is_across else (x - 3, end, x + 3, end))
    for bar in bars:
        plot.scene.line(*bar, stroke)


def _name_points(plot: Frame, named: Sequence[tuple[float, float, str]]) -> None:
    """Names beside the points, off the lines that are drawn already."""
    spots = [(*plot.point(x, y), shortened(name, 150, 11)) for x, y, name in named]
    bounds = (plot.x.start, plot.y.end, plot.x.end, plot.y.start)
    drawn = [shape for shape in plot.scene.shapes if isinstance(shape, Path) and shape.stroke is not None]
    lines = [(*one, *other) for shape in drawn if shape.stroke and shape.stroke.role.startswith("s")
             for one, other in pairwise(shape.points)]  # fmt: skip
    for (x, y, anchor), (_, _, name) in zip(place_labels(spots, bounds, lines), spots, strict=True):
        plot.scene.text(x, y, name, 11, "ink", anchor, has_halo=True)


# --- rows of bars --------------------------------------------------------------------------------------------------


def _rows(runs: Sequence[ReportRun], title: str, description: str, head: float) -> tuple[Scene, float, list[float]]:
    """A scene with one row per run, its name in front: scene, where bars begin, the rows' middles."""
    names = [_name(run, runs) for run in runs]
    left = min(330.0, max(text_width(name, 12) for name in names) + 14)
    scene = Scene(WIDTH, head + 24 * len(runs) + BOTTOM, title, description)
    scene.text(0, 8, title, 13, is_bold=True)
    middles = [head + 12 + 24 * number for number in range(len(runs))]
    for name, middle in zip(names, middles, strict=True):
        scene.text(left - 10, middle, shortened(name, left - 12, 12), 12, "ink", END)
    return scene, left, middles


def _name(run: ReportRun, runs: Sequence[ReportRun]) -> str:
    """As much of a run's title as tells it from the others."""
    parts = [run.group] if len(groups_of(runs)) > 1 else []
    parts.append(run.arm)
    return ", ".join([*parts, run.load] if len(loads_of(runs)) > 1 else parts)


def outcome_tokens(run: ReportRun) -> dict[str, tuple[float, float]]:
    """Per outcome, output tokens per issued request: those of the thought, and all others."""
    found: dict[str, tuple[float, float]] = {}
    for record in run.measured:
        thought = thinking_tokens(record) or 0
        rest = max(0, (record.output_tokens or 0) - thought)
        before = found.get(record.outcome, (0.0, 0.0))
        found[record.outcome] = before[0] + thought, before[1] + rest
    count = len(run.measured)
    return {name: (found[name][0] / count, found[name][1] / count) for name in OUTCOMES if name in found}


def outcome_chart(runs: Sequence[ReportRun]) -> Scene:
    """Where tokens went: stacked by what they came to, thoughts full, the rest of the output pale."""
    title = "Output tokens per request, by outcome"
    shown = [(run, outcome_tokens(run)) for run in runs]
    most = max((sum(map(sum, parts.values())) for _, parts in shown), default=0.0)
    if not most > 0:
        return empty(title, "No run has a count of output tokens.")
    present = [name for name in OUTCOMES if any(sum(parts.get(name, (0.0,))) for _, parts in shown)]
    scene, left, middles = _rows(runs, title, "Stacked bars: tokens of right answers first, then of each failure.", 64)
    _outcome_legend(scene, present)
    x = scale([0.0, most], left, WIDTH - RIGHT - 44, low=0.0, high=most)
    _value_axis(scene, x.at, nice_ticks(0, most), 64.0, middles[-1] + 12, "output tokens per request")
    for (_, parts), middle in zip(shown, middles, strict=True):
        at = 0.0
        scene.box(left, middle - 8, x.at(sum(map(sum, parts.values()))) - left, 16, "page")
        for name in present:
            for tokens, opacity in zip(parts.get(name, (0.0, 0.0)), (1.0, 0.45), strict=True):
                width = x.at(at + tokens) - x.at(at)
                if width > 0.05:
                    scene.box(x.at(at), middle - 8, width, 16, OUTCOME_ROLES[name], opacity)
                at += tokens
            if x.at(at) < WIDTH:
                scene.line(x.at(at), middle - 8, x.at(at), middle + 8, Stroke("page", 1))
        scene.text(x.at(at) + 6, middle, short(at), 11, "muted", has_halo=True)
    return scene


def _outcome_legend(scene: Scene, names: Sequence[str]) -> None:
    at = 0.0
    for name in names:
        scene.box(at, 30, 14, 12, OUTCOME_ROLES[name])
        scene.text(at + 19, 36, name.replace("_", " "), 11)
        at += 19 + text_width(name, 11) + 18
    scene.text(at + 6, 36, "full: thought, pale: the rest", 11, "muted")


def _value_axis(
    scene: Scene, at: Callable[[float], float], ticks: Sequence[float], top: float, bottom: float, label: str,
    form: Form = short,
) -> None:  # fmt: skip
    for tick in ticks:
        scene.line(at(tick), top, at(tick), bottom, Stroke("grid"))
        scene.text(at(tick), bottom + 14, form(tick), 11, "muted", MIDDLE)
    scene.text((at(ticks[0]) + at(ticks[-1])) / 2, bottom + 34, label, 12, "ink", MIDDLE)


def budget_chart(runs: Sequence[ReportRun]) -> Scene:
    """Thinking tokens as a share of the budget: the middle half as a bar, all as a line, the budget at 100 %."""
    title = "Thinking tokens against the budget"
    shown: list[tuple[ReportRun, list[float]]] = []
    for run in runs:
        shares = [
            tokens / record.budget
            for record in run.measured
            if record.budget and (tokens := thinking_tokens(record)) is not None
        ]
        if shares:
            shown.append((run, shares))
    if not shown:
        return empty(title, "No run has a budget and a count of thinking tokens.")
    scene, left, middles = _rows([run for run, _ in shown], title, "Per run: least, quartiles, median and most.", 40)
    most = max(1.05, *(max(shares) for _, shares in shown))
    x = scale([0.0, most], left, WIDTH - RIGHT - 190, low=0.0, high=most)
    _value_axis(scene, x.at, nice_ticks(0, most), 40.0, middles[-1] + 12, "thinking tokens / budget", percent)
    scene.line(x.at(1), 36, x.at(1), middles[-1] + 12, Stroke("s1", 1.5, (5.0, 3.0)))
    for (run, shares), middle in zip(shown, middles, strict=True):
        low, first, half, third, high = (min(shares), *(percentile(shares, part) or 0.0 for part in (25, 50, 75, 100)))
        scene.line(x.at(low), middle, x.at(high), middle, Stroke("s0", 1.5))
        scene.box(x.at(first), middle - 6, max(1.0, x.at(third) - x.at(first)), 12, "s0", 0.5)
        scene.line(x.at(half), middle - 8, x.at(half), middle + 8, Stroke("ink", 2))
        cut, right = run.metrics.get("budget_cut"), run.metrics.get("budget_cut_correct")
        words = [f"most {percent(high)}"] + ([f"cut {percent(cut)}"] if cut is not None else [])
        words += [f"then right {percent(right)}"] if right is not None else []
        scene.text(x.end + 12, middle, ", ".join(words), 11, "muted")
    return scene


# --- throughput against interactivity ------------------------------------------------------------------------------


def throughput_chart(runs: Sequence[ReportRun]) -> Scene:
    """Output tokens/s per device against tokens/s that one user sees; a line joins the loads of a setting."""
    title = "Throughput against interactivity"
    points: dict[tuple[str, str], list[tuple[float, float, str]]] = {}
    for run in runs:
        tpot, throughput = run.metrics.get("tpot_p50"), run.metrics.get("output_throughput")
        devices = 1 if run.facts is None else run.facts.devices[0]
        if tpot and throughput and math.isfinite(tpot):
            points.setdefault((run.group, run.arm), []).append((1 / tpot, throughput / devices, run.load))
    if not points:
        return empty(title, "No run has a throughput and a time per token.")
    several = len({group for group, _ in points}) > 1
    names = [", ".join(key) if several else key[1] for key in points]
    height = max(380.0, 60 + 18 * len(names))
    scene = Scene(WIDTH, height, title, "Upper right is best; one line per setting, one point per load.")
    scene.text(0, 8, title, 13, is_bold=True)
    wide = min(260.0, max(text_width(name, 12) for name in names) + 40)
    x = scale([p[0] for mine in points.values() for p in mine], LEFT, WIDTH - wide - 30)
    y = scale([p[1] for mine in points.values() for p in mine], height - BOTTOM, TOP)
    device = runs[0].device if len({run.device for run in runs}) == 1 else "device"
    plot = frame(scene, x, y, "output tokens/s of one request (1 / median time per token)", f"tokens/s per {device}")
    groups, arms = groups_of(runs), list(dict.fromkeys(run.arm for run in runs))
    # The model is the colour, the arm the marker, so that either can be followed.
    looks = [Look(look(groups.index(group)).role, (), MARKERS[arms.index(arm) % len(MARKERS)]) for group, arm in points]
    for style, mine in zip(looks, points.values(), strict=True):
        places = [plot.point(a, b) for a, b, _ in sorted(mine)]
        scene.path(places, Stroke(style.role, 1.5, style.dash))
        for px, py in places:
            scene.marker(px, py, style.marker, style.role, 4.5)
    legend(scene, WIDTH - wide, 44, wide, list(zip(names, looks, strict=True)), False)
    loads = loads_of(runs)
    if 1 < len(loads) <= 6:
        first = next(iter(points.values()))
        _name_points(plot, [(a, b, load) for a, b, load in first])
    return scene
