"""Colours by role for light and dark pages, and how series are told apart: by colour, dash and marker at once.

The hues are those of Okabe and Ito's palette (2008), made for colour-blind readers, their lightness moved until each
stands out from the page by a contrast of 3 to 1 and any two are apart for every kind of colour blindness; a test
simulates both.
"""

from __future__ import annotations

from dataclasses import dataclass

LIGHT = {
    "page": "#ffffff",
    "panel": "#f6f7f9",
    "ink": "#1a1d21",
    "muted": "#5b636d",
    "grid": "#dfe3e8",
    "axis": "#8a939e",
    "band": "#e6ebf2",
    "s0": "#0072b2",
    "s1": "#d55e00",
    "s2": "#007a5a",
    "s3": "#b0508f",
    "s4": "#6b4a00",
    "s5": "#2f93c8",
    "s6": "#5c6670",
    "warn": "#9a3b00",
}
DARK = {
    "page": "#15181c",
    "panel": "#1e2227",
    "ink": "#e8eaed",
    "muted": "#a3abb5",
    "grid": "#32383f",
    "axis": "#6f7984",
    "band": "#272d35",
    "s0": "#3f95d0",
    "s1": "#f07a35",
    "s2": "#2fc79a",
    "s3": "#d683bb",
    "s4": "#f6da74",
    "s5": "#b5e0fb",
    "s6": "#9aa4af",
    "warn": "#ffb27d",
}
ROLES = tuple(LIGHT)
COLOURS = ("s0", "s1", "s2", "s3", "s4", "s5")
DASHES: tuple[tuple[float, ...], ...] = ((), (7.0, 3.0), (2.0, 2.5), (9.0, 3.0, 2.0, 3.0))
MARKERS = ("circle", "square", "diamond", "triangle", "down", "cross", "plus", "star")
# Of outcomes, right to nothing; each segment carries its name or a legend too.
OUTCOME_ROLES = {
    "correct": "s2",
    "wrong": "s1",
    "no_parse": "s4",
    "empty_answer": "s5",
    "truncated": "s3",
    "loop": "s0",
    "error": "s6",
    "timeout": "axis",
}


@dataclass(frozen=True, slots=True)
class Look:
    """How one series is drawn."""

    role: str
    dash: tuple[float, ...]
    marker: str


def look(number: int) -> Look:
    """The look of the `number`-th series: 24 that differ in colour or dash, markers besides."""
    colour, turn = number % len(COLOURS), number // len(COLOURS)
    return Look(COLOURS[colour], DASHES[turn % len(DASHES)], MARKERS[(colour + turn) % len(MARKERS)])
