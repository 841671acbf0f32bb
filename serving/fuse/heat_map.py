"""The dependency matrix as a PNG: a cell per pair, the fused FFNs outlined, a colour bar. Drawn with Pillow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from vllm_puzzle.serving.fuse.dependency import Matrix

Colour = tuple[int, int, int]
# Light to dark, so that it reads in grey too; equal steps of √distance, as most pairs are far below the greatest.
STOPS: tuple[Colour, ...] = ((247, 250, 252), (178, 214, 222), (86, 160, 180), (28, 97, 140), (14, 35, 82))
INK, BACKGROUND, NO_PAIR, OUTLINE = (30, 30, 30), (255, 255, 255), (228, 228, 228), (226, 88, 12)
LEFT, TOP, BOTTOM, BAR, RIGHT = 58, 66, 54, 18, 70  # margins and the width of the colour bar, in pixels
GAP, MIN_PLOT = 18, 320
FONT_SIZE = 12


def cell_size(num_layers: int) -> int:
    """Pixels of one cell's side: the plot is about 640 wide, a cell never below 5."""
    return max(5, min(44, 640 // num_layers))


def image_size(num_layers: int) -> tuple[int, int]:
    """(width, height) of the image in pixels."""
    side = max(MIN_PLOT, cell_size(num_layers) * num_layers)
    return LEFT + side + GAP + BAR + RIGHT, TOP + side + BOTTOM


def colour(distance: float, greatest: float) -> Colour:
    """The colour of a distance on a scale that ends at `greatest`."""
    place = math.sqrt(min(1.0, max(0.0, distance / greatest if greatest > 0 else 0.0))) * (len(STOPS) - 1)
    at = min(int(place), len(STOPS) - 2)
    share = place - at
    first, second = STOPS[at], STOPS[at + 1]
    return tuple(round(a + share * (b - a)) for a, b in zip(first, second, strict=True))  # type: ignore[return-value]


def write_heat_map(file: Path, matrix: Matrix, groups: Sequence[Sequence[int]], title: str) -> None:
    """Write the PNG. Row i, column j: what block j adds, without block i; `groups` are the layers of each fused FFN."""
    count, cell = len(matrix), cell_size(len(matrix))
    greatest = max((d for row in matrix for d in row if d is not None), default=0.0)
    image = Image.new("RGB", image_size(count), BACKGROUND)
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(FONT_SIZE)
    for i, row in enumerate(matrix):
        for j, distance in enumerate(row):
            x, y = LEFT + j * cell, TOP + i * cell
            fill = NO_PAIR if distance is None else colour(distance, greatest)
            draw.rectangle((x, y, x + cell - 1, y + cell - 1), fill)
            if distance is not None and cell >= 40:
                ink = BACKGROUND if sum(fill) < 380 else INK
                draw.text((x + cell / 2, y + cell / 2), f"{distance:.2f}", ink, font, anchor="mm")
    for group in groups:
        first, last = LEFT + group[0] * cell, LEFT + (group[-1] + 1) * cell - 1
        draw.rectangle((first, first - LEFT + TOP, last, last - LEFT + TOP), outline=OUTLINE, width=max(2, cell // 12))
    _label(draw, font, count, cell, title, bool(groups))
    _draw_bar(draw, font, max(MIN_PLOT, count * cell), greatest)
    image.save(file, optimize=True)


def _label(
    draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, count: int, cell: int, title: str,
    has_groups: bool,
) -> None:  # fmt: skip
    side = count * cell
    room = image_size(count)[0] - LEFT - 8
    while font.getlength(title) > room:
        title = title.removesuffix("…")[:-1] + "…"
    draw.text((LEFT, 8), title, INK, font)
    draw.text((LEFT, 26), "cosine distance of what block j adds, with and without block i", INK, font)
    every = next(step for step in (1, 2, 5, 10, 20, 50, 100) if step * cell >= 20 or step == 100)
    for index in range(0, count, every):
        middle = index * cell + cell / 2
        draw.text((LEFT + middle, TOP - 6), str(index), INK, font, anchor="ms")
        draw.text((LEFT - 6, TOP + middle), str(index), INK, font, anchor="rm")
    draw.text((LEFT - 6, TOP - 6), "i \\ j", INK, font, anchor="rs")
    if has_groups:
        bottom = TOP + max(MIN_PLOT, side) + 18
        draw.rectangle((LEFT, bottom, LEFT + 14, bottom + 14), outline=OUTLINE, width=2)
        draw.text((LEFT + 22, bottom + 7), "becomes one FFN", INK, font, anchor="lm")


def _draw_bar(
    draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, side: int, greatest: float
) -> None:
    x = LEFT + side + GAP
    for step in range(side):
        share = 1 - step / (side - 1)
        draw.line((x, TOP + step, x + BAR, TOP + step), colour(share * share * greatest, greatest))
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = TOP + (1 - share) * (side - 1)
        draw.line((x + BAR, y, x + BAR + 4, y), INK)
        draw.text((x + BAR + 8, y), f"{share * share * greatest:.3f}", INK, font, anchor="lm")
