"""A scene as PNG, light, by Pillow, with the font that Pillow carries: the same picture on every machine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib import import_module
from itertools import pairwise
from pathlib import Path as File
from typing import Any

from vllm_puzzle.bench.efficiency.drawing.markers import outline
from vllm_puzzle.bench.efficiency.drawing.scene import END, MIDDLE, Marker, Path, Point, Scene, Text
from vllm_puzzle.bench.efficiency.drawing.style import LIGHT
from vllm_puzzle.model_configs.schema import ConfigError

SCALE = 2  # pixels of the file per pixel of the scene
_SMOOTH = 2  # drawn so much larger and reduced, since Pillow draws without smoothing
MARGIN = 16
# Pillow's font lacks these.
_SPELLED = {
    "\u00d7": "x",
    "\u2212": "-",
    "\u2013": "-",
    "\u221e": "inf",
    "\u00b5": "u",
    "\u2265": ">=",
    "\u2264": "<=",
    "\u2192": "->",
    "\u0398": "Theta",
    "\u03c1": "rho",
    "\u03bd": "nu",
}


def write_png(scene: Scene, file: File) -> None:
    """Draw it on white, with a margin. Raises ConfigError without Pillow, OSError."""
    try:
        modules = [import_module(f"PIL.{name}") for name in ("Image", "ImageDraw", "ImageFont")]
    except ImportError as error:
        raise ConfigError(f"PNG: found {error}, allowed: Pillow, which `pip install pillow` brings") from None
    image_module, draw_module, font_module = modules
    zoom = SCALE * _SMOOTH
    size = (math.ceil(scene.width + 2 * MARGIN), math.ceil(scene.height + 2 * MARGIN))
    image = image_module.new("RGB", (size[0] * zoom, size[1] * zoom), LIGHT["page"])
    canvas = _Canvas(draw_module.Draw(image, "RGBA"), zoom)
    for shape in scene.shapes:
        if not isinstance(shape, Text):
            canvas.draw(shape)
    # Letters after the reduction: their own smoothing is better.
    image = image.resize((size[0] * SCALE, size[1] * SCALE), image_module.Resampling.BOX)
    for shape in scene.shapes:
        if isinstance(shape, Text):
            _write(image, shape, image_module, draw_module, font_module)
    image.save(file)


class _Canvas:
    """Pillow's drawing in the scene's pixels."""

    def __init__(self, draw: Any, zoom: int) -> None:
        self.draw_on, self.zoom = draw, zoom

    def draw(self, shape: Path | Marker) -> None:
        """A path or a marker."""
        if isinstance(shape, Marker):
            points = outline(shape.shape, shape.x, shape.y, shape.size)
            self._polygon(points, shape.role if shape.is_filled else "page", 1.0)
            self._line([*points, points[0]], shape.role, 1.5, (), 1.0)
        elif shape.fill is not None:
            self._polygon(shape.points, shape.fill, shape.opacity)
        elif shape.stroke is not None:
            stroke = shape.stroke
            self._line(shape.points, stroke.role, stroke.width, stroke.dash, stroke.opacity)

    def _polygon(self, points: Sequence[Point], role: str, opacity: float) -> None:
        self.draw_on.polygon(self._zoomed(points), fill=_colour(role, opacity))

    def _line(self, points: Sequence[Point], role: str, width: float, dash: tuple[float, ...], opacity: float) -> None:
        for part in dashed(points, dash) if dash else [points]:
            thick = max(1, round(width * self.zoom))
            self.draw_on.line(self._zoomed(part), fill=_colour(role, opacity), width=thick, joint="curve")

    def _zoomed(self, points: Sequence[Point]) -> list[Point]:
        return [((x + MARGIN) * self.zoom, (y + MARGIN) * self.zoom) for x, y in points]


def _colour(role: str, opacity: float) -> tuple[int, int, int, int]:
    text = LIGHT[role]
    red, green, blue = (int(text[place : place + 2], 16) for place in (1, 3, 5))
    return red, green, blue, round(255 * opacity)


def _write(image: Any, text: Text, image_module: Any, draw_module: Any, font_module: Any) -> None:
    font = font_module.load_default(text.size * SCALE)
    words = spelled(text.text)
    left, _, right, _ = font.getbbox(words)
    wide = right - left
    before = {MIDDLE: wide / 2, END: wide}.get(text.anchor, 0.0)
    # The middle of lower-case letters, as in a browser's central baseline, whatever letters there are.
    ascent, descent = font.getmetrics()
    height = ascent + descent
    x, y = (text.x + MARGIN) * SCALE, (text.y + MARGIN) * SCALE
    colour = _colour(text.role, 1.0)
    if not text.turn:
        if text.has_halo:
            place, page = (x - before, y - height / 2), _colour("page", 1.0)
            draw_module.Draw(image).text(place, words, font=font, fill=page, stroke_width=4, stroke_fill=page)
        bold = {"stroke_width": 0.6, "stroke_fill": colour} if text.is_bold else {}
        draw_module.Draw(image).text((x - before, y - height / 2), words, font=font, fill=colour, **bold)
        return
    label = image_module.new("RGBA", (math.ceil(wide) + 4, height), (0, 0, 0, 0))
    draw_module.Draw(label).text((2 - left, 0), words, font=font, fill=colour)
    label = label.rotate(text.turn, expand=True)
    image.paste(label, (round(x - label.width / 2), round(y - label.height / 2)), label)


def spelled(text: str) -> str:
    """A text in letters that the font has."""
    for letter, word in _SPELLED.items():
        text = text.replace(letter, word)
    return "".join(char if " " <= char <= "\u00ff" or char == "…" else "?" for char in text)


def dashed(points: Sequence[Point], dash: tuple[float, ...]) -> list[list[Point]]:
    """The drawn parts of a dashed line through points; `dash` holds lengths on and off in turn."""
    parts: list[list[Point]] = []
    number, left, is_on = 0, dash[0], True
    current = [points[0]]
    for (x1, y1), (x2, y2) in pairwise(points):
        length, done = math.hypot(x2 - x1, y2 - y1), 0.0
        while length - done > left:
            done += left
            spot = (x1 + (x2 - x1) * done / length, y1 + (y2 - y1) * done / length)
            if is_on:
                parts.append([*current, spot])
            current, is_on, number = [spot], not is_on, number + 1
            left = dash[number % len(dash)]
        left -= length - done
        current.append((x2, y2))
    if is_on and len(current) > 1:
        parts.append(current)
    return parts
