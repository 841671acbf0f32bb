"""Scales, ticks and the frame of a plot. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from vllm_puzzle.bench.efficiency.drawing.scene import END, MIDDLE, Scene, Stroke, shortened, text_width
from vllm_puzzle.bench.efficiency.drawing.style import Look

Form = Callable[[float], str]


@dataclass(frozen=True, slots=True)
class Scale:
    """From a range of values to a range of pixels, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def at(self, value: float) -> float:
        """The pixel of a value; NaN where it has none. Values outside lie outside."""
        if not math.isfinite(value) or (self.is_log and value <= 0):
            return math.nan
        low, high, value = (math.log(x) for x in (self.low, self.high, value)) if self.is_log else (
            self.low, self.high, value
        )  # fmt: skip
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    @property
    def ticks(self) -> list[float]:
        """Round values within the range."""
        return log_ticks(self.low, self.high) if self.is_log else nice_ticks(self.low, self.high)


def scale(
    values: Iterable[float],
    start: float,
    end: float,
    *,
    is_log: bool = False,
    pad: float = 0.05,
    low: float | None = None,
    high: float | None = None,
) -> Scale:
    """A scale around the finite values, with a margin of `pad` of the range at both ends; low, high: fixed bounds.

    Without any value, or of one alone, it is a range around it.
    """
    known = [value for value in values if math.isfinite(value) and (value > 0 or not is_log)]
    least, most = min(known, default=1.0), max(known, default=1.0)
    if is_log:
        least, most = (least / 1.6, most * 1.6) if most / least < 1.2 else (least, most)
        reach = (most / least) ** pad
        return Scale(low or least / reach, high or most * reach, start, end, True)
    if most - least <= 1e-12 * max(abs(most), abs(least), 1e-300):
        half = abs(most) / 2 or 0.5
        least, most = most - half, most + half
    reach = (most - least) * pad
    bottom = least - reach if low is None else low
    top = most + reach if high is None else high
    return Scale(bottom, top if top > bottom else bottom + 1.0, start, end)


def nice_ticks(low: float, high: float, about: int = 6) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten."""
    step = 10.0 ** math.floor(math.log10((high - low) / about))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= about)
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 12) + 0.0 for number in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten, and 2 and 5 between them while they are few; round values of a narrow range."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1,), (1, 3), (1, 2, 5)):
        found = [digit * 10.0**power for power in decades for digit in digits if low <= digit * 10.0**power <= high]
        if len(found) >= 3:
            return found
    return [tick for tick in nice_ticks(low, high, 5) if tick > 0]


def short(value: float) -> str:
    """A tick's number: three digits, thousands as k."""
    if value == 0:
        return "0"
    if abs(value) >= 10_000:
        return f"{value / 1e6:.3g}M" if abs(value) >= 1e6 else f"{value / 1000:.3g}k"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def percent(value: float) -> str:
    """A share as a tick."""
    return f"{100 * value:.3g} %"


def seconds(value: float) -> str:
    """A time as a tick."""
    return f"{value * 1000:.3g} ms" if abs(value) < 1 and value else f"{value:.3g} s"


@dataclass(frozen=True, slots=True)
class Frame:
    """A plot's scene with both scales."""

    scene: Scene
    x: Scale
    y: Scale

    def point(self, x: float, y: float) -> tuple[float, float]:
        """The pixel of a point."""
        return self.x.at(x), self.y.at(y)


def frame(
    scene: Scene, x: Scale, y: Scale, x_label: str, y_label: str, x_form: Form = short, y_form: Form = short
) -> Frame:
    """Grid, ticks and labels of a plot whose scales hold its place in the scene."""
    left, right, bottom, top = x.start, x.end, y.start, y.end
    for tick in y.ticks:
        place = y.at(tick)
        scene.line(left, place, right, place, Stroke("grid"))
        scene.text(left - 8, place, y_form(tick), 11, "muted", END)
    last = -math.inf
    for tick in x.ticks:
        place, label = x.at(tick), x_form(tick)
        scene.line(place, bottom, place, top, Stroke("grid"))
        half = text_width(label, 11) / 2
        if place - half > last + 6:
            scene.text(place, bottom + 14, label, 11, "muted", MIDDLE)
            last = place + half
    scene.line(left, bottom, right, bottom, Stroke("axis"))
    scene.text((left + right) / 2, bottom + 34, x_label, 12, "ink", MIDDLE)
    scene.text(left - 48, (top + bottom) / 2, y_label, 12, "ink", MIDDLE, turn=90)
    return Frame(scene, x, y)


def legend(scene: Scene, x: float, y: float, width: float, entries: Sequence[tuple[str, Look]], has_line: bool) -> None:
    """One series under the other: its line and marker, then its name."""
    for number, (name, look) in enumerate(entries):
        place = y + 18 * number
        if has_line:
            scene.line(x, place, x + 26, place, Stroke(look.role, 2, look.dash))
        else:
            scene.marker(x + 13, place, look.marker, look.role)
        scene.text(x + 34, place, shortened(name, width - 34, 12), 12)


def place_labels(
    labels: Sequence[tuple[float, float, str]],
    bounds: tuple[float, float, float, float],
    lines: Iterable[tuple[float, float, float, float]] = (),
    size: float = 11,
) -> list[tuple[float, float, str]]:
    """Where names of points can stand without covering points or one another: x, y and anchor of each.

    Of ten places around the point the one with the least overlap. bounds: left, top, right, bottom. lines: that are
    better not covered, from point to point.
    """
    taken = [(x - 7, y - 7, x + 7, y + 7) for x, y, _ in labels]
    for x1, y1, x2, y2 in lines:
        pieces = max(1, int(math.hypot(x2 - x1, y2 - y1) / 4))
        spots = [(x1 + (x2 - x1) * at / pieces, y1 + (y2 - y1) * at / pieces) for at in range(pieces + 1)]
        taken += [(x - 1.5, y - 1.5, x + 1.5, y + 1.5) for x, y in spots]
    placed = []
    for x, y, text in labels:
        wide = text_width(text, size)
        options = [(x + 10, y, "start"), (x - 10, y, END), (x, y - 14, MIDDLE), (x, y + 14, MIDDLE),
                   (x + 9, y - 11, "start"), (x + 9, y + 11, "start"), (x - 9, y - 11, END), (x - 9, y + 11, END),
                   (x, y - 26, MIDDLE), (x, y + 26, MIDDLE)]  # fmt: skip
        boxes = [_box(px, py, wide, size, anchor) for px, py, anchor in options]
        costs = [sum(_overlap(box, other) for other in taken) + 4 * _outside(box, bounds) for box in boxes]
        best = costs.index(min(costs))
        taken.append(boxes[best])
        placed.append(options[best])
    return placed


Box = tuple[float, float, float, float]


def _box(x: float, y: float, wide: float, size: float, anchor: str) -> Box:
    left = {"start": x, MIDDLE: x - wide / 2, END: x - wide}[anchor]
    return left, y - size / 2 - 1, left + wide, y + size / 2 + 1


def _overlap(one: Box, other: Box) -> float:
    wide = min(one[2], other[2]) - max(one[0], other[0])
    high = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, wide) * max(0.0, high)


def _outside(box: Box, bounds: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1]) - _overlap(box, bounds)
