"""The outlines of markers, as polygons of about equal area."""

from __future__ import annotations

import math

from vllm_puzzle.bench.efficiency.drawing.scene import Point


def outline(shape: str, x: float, y: float, size: float) -> tuple[Point, ...]:
    """The corners of a marker of style.MARKERS around a point, `size` its radius in pixels."""
    return tuple((x + size * dx, y + size * dy) for dx, dy in _UNIT[shape])


def _regular(corners: int, radius: float = 1.0, turn: float = -90.0) -> tuple[Point, ...]:
    angles = [math.radians(turn + 360 * number / corners) for number in range(corners)]
    return tuple((radius * math.cos(angle), radius * math.sin(angle)) for angle in angles)


def _star() -> tuple[Point, ...]:
    outer, inner = _regular(5, 1.3), _regular(5, 0.55, -54.0)
    return tuple(point for pair in zip(outer, inner, strict=True) for point in pair)


def _plus() -> tuple[Point, ...]:
    a, b = 1.15, 0.4
    return ((-b, -a), (b, -a), (b, -b), (a, -b), (a, b), (b, b), (b, a), (-b, a), (-b, b), (-a, b), (-a, -b), (-b, -b))


def _turned(points: tuple[Point, ...], degrees: float) -> tuple[Point, ...]:
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return tuple((c * x - s * y, s * x + c * y) for x, y in points)


_UNIT: dict[str, tuple[Point, ...]] = {
    "circle": _regular(24),
    "square": _regular(4, 1.25, 45.0),
    "diamond": _regular(4, 1.3, 0.0),
    "triangle": _regular(3, 1.35),
    "down": _regular(3, 1.35, 90.0),
    "plus": _plus(),
    "cross": _turned(_plus(), 45.0),
    "star": _star(),
}
