"""Scales, ticks, labels, colours, and the two ways in which a scene is drawn."""

from __future__ import annotations

import itertools
import math
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from vllm_puzzle.bench.efficiency.drawing import axes, style
from vllm_puzzle.bench.efficiency.drawing.markers import outline
from vllm_puzzle.bench.efficiency.drawing.png import MARGIN, SCALE, dashed, spelled, write_png
from vllm_puzzle.bench.efficiency.drawing.scene import Scene, Stroke, moved, shortened, stacked, text_width
from vllm_puzzle.bench.efficiency.drawing.svg import style_sheet, svg

# Machado, Oliveira & Fernandes 2009, severity 1: linear RGB as a reader without one kind of cone sees it.
SIGHTS = {
    "all cones": np.eye(3),
    "no red": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "no green": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "no blue": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}
TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)
PALETTES = {"light": style.LIGHT, "dark": style.DARK}


def linear(colour: str) -> np.ndarray:
    parts = np.array([int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)])
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    white = np.array([0.95047, 1.0, 1.08883])
    x = TO_XYZ @ np.clip(rgb, 0, 1) / white
    f = np.where(x > 216 / 24389, np.cbrt(x), (24389 / 27 * x + 16) / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def contrast(one: str, other: str) -> float:
    dark, light = sorted(float(np.array([0.2126, 0.7152, 0.0722]) @ linear(colour)) for colour in (one, other))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("name", PALETTES)
def test_words_and_lines_stand_out_from_the_page(name: str) -> None:
    colours = PALETTES[name]
    assert set(colours) == set(style.ROLES)
    # WCAG 2.1: 4.5 to 1 for text, 3 to 1 for what else must be seen.
    for role in ("ink", "muted", "warn"):
        assert contrast(colours[role], colours["page"]) >= 4.5
        assert contrast(colours[role], colours["panel"]) >= 4.5
    for role in (*style.COLOURS, "s6", "axis"):
        assert contrast(colours[role], colours["page"]) >= 3


@pytest.mark.parametrize("sight", SIGHTS)
@pytest.mark.parametrize("name", PALETTES)
def test_any_two_series_are_told_apart_by_everybody(name: str, sight: str) -> None:
    seen = [lab(SIGHTS[sight] @ linear(PALETTES[name][role])) for role in style.COLOURS]
    # Of CIELAB: 2.3 is just noticed side by side; four times that is seen across a page.
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 10


def test_twenty_four_series_differ_without_colour_too() -> None:
    looks = [style.look(number) for number in range(24)]
    assert len({(look.role, look.dash) for look in looks}) == 24
    assert len({(look.dash, look.marker) for look in looks}) == 24, "as a reader without any colour sees them"


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9))
def test_ticks_are_round_and_inside(low: float, span: float) -> None:
    high = low + span
    if high - low < 1e-9 * max(abs(low), abs(high), 1e-9):
        return
    ticks = axes.nice_ticks(low, high)
    slack = 1e-6 * span
    assert 2 <= len(ticks) <= 7 and all(low - slack <= tick <= high + slack for tick in ticks)
    gaps = np.diff(ticks)
    assert np.allclose(gaps, gaps[0], rtol=1e-3)


@given(st.floats(1e-6, 1e6), st.floats(1.3, 1e6))
def test_logarithmic_ticks_are_inside_and_few(low: float, factor: float) -> None:
    ticks = axes.log_ticks(low, low * factor)
    assert 1 <= len(ticks) <= 14 and all(low * 0.999 <= tick <= low * factor * 1.001 for tick in ticks)


@pytest.mark.parametrize("is_log", [False, True])
@pytest.mark.parametrize("values", [[], [0.0], [3.0], [3.0, 3.0], [math.inf, math.nan], [-1.0, 2.0], [1e-100, 1e100]])
def test_a_scale_of_any_values_has_a_range(values: list[float], is_log: bool) -> None:
    found = axes.scale(values, 0, 100, is_log=is_log)
    assert found.low < found.high and math.isfinite(found.low) and math.isfinite(found.high)
    for value in values:
        place = found.at(value)
        assert math.isnan(place) or -1e-6 <= place <= 100 + 1e-6
    assert math.isnan(found.at(math.inf)) and math.isnan(found.at(math.nan))


def test_a_logarithmic_scale_is_one() -> None:
    found = axes.Scale(1, 100, 0, 200, True)
    assert [found.at(value) for value in (1, 10, 100)] == pytest.approx([0, 100, 200])


def test_labels_keep_off_points_lines_and_one_another() -> None:
    points = [(100.0, 100.0, "first"), (112.0, 100.0, "second"), (104.0, 108.0, "third"), (395.0, 50.0, "at the edge")]
    bounds = (0.0, 0.0, 400.0, 200.0)
    placed = axes.place_labels(points, bounds, [(112.0, 100.0, 395.0, 50.0)])
    boxes = [
        axes._box(x, y, text_width(text, 11), 11, anchor)
        for (x, y, anchor), (_, _, text) in zip(placed, points, strict=True)
    ]
    for one, other in itertools.combinations(boxes, 2):
        assert axes._overlap(one, other) == 0
    for box in boxes:
        assert axes._outside(box, bounds) == pytest.approx(0)
        assert not any(box[0] < x < box[2] and box[1] < y < box[3] for x, y, _ in points)


@given(st.text("abcdef-", max_size=60), st.floats(20, 300))
def test_a_shortened_text_fits_and_keeps_both_ends(text: str, width: float) -> None:
    short = shortened(text, width, 12)
    assert text_width(short, 12) <= max(width, text_width("aaa", 12))
    assert short == text or (short[0] == text[0] and short[-1] == text[-1] and "…" in short)


def test_dashes_are_as_long_as_they_say() -> None:
    parts = dashed([(0.0, 0.0), (30.0, 0.0), (30.0, 40.0)], (6.0, 4.0))
    lengths = [sum(math.dist(a, b) for a, b in itertools.pairwise(part)) for part in parts]
    assert lengths == pytest.approx([6.0] * 7)


def everything() -> Scene:
    scene = Scene(300, 120, 'A <title> & "more"', "with\x07 noise")
    for number, shape in enumerate(style.MARKERS):
        scene.marker(20 + 30 * number, 20, shape, style.COLOURS[number % 6], is_filled=number % 2 == 0)
    scene.marker(math.nan, 0, "circle", "s0")
    scene.line(10, 40, 290, 40, Stroke("s1", 2, (5, 3)))
    scene.path([(10, 60), (math.nan, 1), (100, 80)], Stroke("s2"))
    scene.box(120, 50, 50, 30, "s3", 0.5)
    scene.text(150, 100, "µ \u00d7 ∞ <b> \U0001d538", anchor="middle", is_bold=True, has_halo=True)
    scene.text(290, 70, "turned", turn=90)
    return scene


def test_svg_is_well_formed_and_uses_only_roles_of_the_style_sheet() -> None:
    root = ET.fromstring(svg(everything()))
    assert len(root.findall("path")) == len(style.MARKERS)
    assert len(root.findall("polyline")) == 2 and len(root.findall("polygon")) == 1
    assert root.findtext("title") == 'A <title> & "more"'
    used = {word for element in root.iter() for word in (element.get("class") or "").split()}
    assert used and all(f".{word} {{" in style_sheet() for word in used)


def test_png_shows_every_shape_in_its_colour_where_it_belongs(tmp_path: Path) -> None:
    file = tmp_path / "scene.png"
    write_png(everything(), file)
    image = Image.open(file).convert("RGB")
    assert image.size == ((300 + 2 * MARGIN) * SCALE, (120 + 2 * MARGIN) * SCALE)

    def at(x: float, y: float) -> str:
        return "#{:02x}{:02x}{:02x}".format(
            *image.getpixel(((round((x + MARGIN) * SCALE)), round((y + MARGIN) * SCALE)))
        )

    assert at(20, 20) == style.LIGHT["s0"]
    assert at(50, 20) == style.LIGHT["page"], "hollow"
    assert at(12, 40) == style.LIGHT["s1"] and at(17, 40) == style.LIGHT["page"], "a dash and its gap"
    red, green, blue = image.getpixel(((round((145 + MARGIN) * SCALE)), round((65 + MARGIN) * SCALE)))
    full = [int(style.LIGHT["s3"][place : place + 2], 16) for place in (1, 3, 5)]
    assert [red, green, blue] == pytest.approx([(255 + part) / 2 for part in full], abs=3), "half transparent on white"
    words = image.crop(tuple((place + MARGIN) * SCALE for place in (100, 90, 200, 110)))
    assert len(words.getcolors(10_000)) > 20, "letters with soft edges"


def test_letters_that_the_font_lacks_are_spelled() -> None:
    assert spelled("3 \u00d7 2 µs → ∞ \u03c1 \u4e2d") == "3 x 2 us -> inf rho ?"


def test_moving_and_stacking_keep_shapes_as_they_are() -> None:
    one = everything()
    both = stacked([one, one], "both", gap=10)
    assert (both.width, both.height) == (300, 250)
    assert both.shapes[: len(one.shapes)] == one.shapes
    assert both.shapes[len(one.shapes) :] == [moved(shape, 0, 130) for shape in one.shapes]
    assert stacked([], "none").height == 1


@pytest.mark.parametrize("shape", style.MARKERS)
def test_markers_are_of_like_size(shape: str) -> None:
    points = np.array(outline(shape, 0, 0, 1))
    x, y = points[:, 0], points[:, 1]
    area = 0.5 * abs(float(x @ np.roll(y, 1) - y @ np.roll(x, 1)))
    assert 1.8 < area < 3.4
