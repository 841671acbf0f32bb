"""A picture as a list of plain shapes in pixels, y downwards, to be drawn as SVG or as PNG. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

Point = tuple[float, float]
START, MIDDLE, END = "start", "middle", "end"
# Of a letter's height, its mean width in the fonts that pages use.
_LETTER = 0.55


@dataclass(frozen=True, slots=True)
class Stroke:
    """A line's look. role: a colour of style.py. dash: lengths on and off."""

    role: str
    width: float = 1.0
    dash: tuple[float, ...] = ()
    opacity: float = 1.0


@dataclass(frozen=True, slots=True)
class Path:
    """A line through points; closed and filled where `fill` names a role."""

    points: tuple[Point, ...]
    stroke: Stroke | None = None
    fill: str | None = None
    opacity: float = 1.0


@dataclass(frozen=True, slots=True)
class Marker:
    """A point. shape: one of style.MARKERS; hollow where not `is_filled`."""

    x: float
    y: float
    shape: str
    role: str
    size: float = 5.0
    is_filled: bool = True


@dataclass(frozen=True, slots=True)
class Text:
    """A line of text; y is its middle. turn: degrees, to the left. has_halo: the page's colour around its letters."""

    x: float
    y: float
    text: str
    size: float = 12.0
    role: str = "ink"
    anchor: str = START
    is_bold: bool = False
    turn: int = 0
    has_halo: bool = False


Shape = Path | Marker | Text


@dataclass(slots=True)
class Scene:
    """A picture. title and description: for people who hear the page."""

    width: float
    height: float
    title: str
    description: str = ""
    shapes: list[Shape] = field(default_factory=list)

    def line(self, x1: float, y1: float, x2: float, y2: float, stroke: Stroke) -> None:
        """A straight line."""
        self.path([(x1, y1), (x2, y2)], stroke)

    def path(
        self, points: Iterable[Point], stroke: Stroke | None = None, fill: str | None = None, opacity: float = 1.0
    ) -> None:
        """A line or an area. Points that are no numbers are left out."""
        kept = tuple(point for point in points if math.isfinite(point[0]) and math.isfinite(point[1]))
        if len(kept) > 1:
            self.shapes.append(Path(kept, stroke, fill, opacity))

    def box(self, x: float, y: float, width: float, height: float, fill: str, opacity: float = 1.0) -> None:
        """A filled rectangle."""
        self.path([(x, y), (x + width, y), (x + width, y + height), (x, y + height)], None, fill, opacity)

    def marker(self, x: float, y: float, shape: str, role: str, size: float = 5.0, is_filled: bool = True) -> None:
        """A point, unless it lies nowhere."""
        if math.isfinite(x) and math.isfinite(y):
            self.shapes.append(Marker(x, y, shape, role, size, is_filled))

    def text(
        self,
        x: float,
        y: float,
        text: str,
        size: float = 12.0,
        role: str = "ink",
        anchor: str = START,
        is_bold: bool = False,
        turn: int = 0,
        has_halo: bool = False,
    ) -> None:
        """A line of text."""
        if text and math.isfinite(x) and math.isfinite(y):
            self.shapes.append(Text(x, y, text, size, role, anchor, is_bold, turn, has_halo))


def text_width(text: str, size: float) -> float:
    """About how wide a text is, in pixels."""
    return len(text) * size * _LETTER


def shortened(text: str, width: float, size: float) -> str:
    """A text that fits, its middle left out where it must be: names differ at their ends."""
    most = max(3, int(width / (size * _LETTER)))
    if len(text) <= most:
        return text
    front = (most - 1) // 2
    return text[:front] + "…" + text[len(text) - (most - 1 - front) :]


def stacked(scenes: Sequence[Scene], title: str, description: str = "", columns: int = 1, gap: float = 16.0) -> Scene:
    """Several pictures as one, row by row."""
    rows = [scenes[start : start + columns] for start in range(0, len(scenes), columns)]
    width = max((sum(one.width for one in row) + gap * (len(row) - 1) for row in rows), default=1.0)
    height = sum(max(one.height for one in row) for row in rows) + gap * max(0, len(rows) - 1)
    whole = Scene(width, max(height, 1.0), title, description)
    y = 0.0
    for row in rows:
        x = 0.0
        for one in row:
            whole.shapes += [moved(shape, x, y) for shape in one.shapes]
            x += one.width + gap
        y += max(one.height for one in row) + gap
    return whole


def moved(shape: Shape, dx: float, dy: float) -> Shape:
    """The same shape elsewhere."""
    if isinstance(shape, Path):
        return replace(shape, points=tuple((x + dx, y + dy) for x, y in shape.points))
    return replace(shape, x=shape.x + dx, y=shape.y + dy)
