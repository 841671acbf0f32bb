"""Tables for a terminal, and numbers as they stand in them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from unicodedata import combining, east_asian_width

UNKNOWN = "-"
INFINITE = "∞"
LEFT, RIGHT = "<", ">"


def width(text: str) -> int:
    """Columns that a text takes on a terminal."""
    return sum(0 if combining(letter) else 2 if east_asian_width(letter) in "WF" else 1 for letter in text)


def table(header: Sequence[str], rows: Iterable[Sequence[str]], align: str = "", gap: int = 2) -> str:
    """Columns as wide as their widest cell, without line end at the end and without blanks at the ends of lines.

    align: one of `<`, `>` per column; by default the first column to the left, all others to the right. Raises
    ValueError when a row has another number of cells than the header.
    """
    cells = [list(header), *(list(row) for row in rows)]
    for row in cells:
        if len(row) != len(header):
            raise ValueError(f"table: found a row of {len(row)} cells, allowed: {len(header)} as in the header")
    align = align or LEFT + RIGHT * (len(header) - 1)
    widths = [max(width(row[column]) for row in cells) for column in range(len(header))]
    lines = []
    for row in cells:
        padded = [_pad(cell, size, side) for cell, size, side in zip(row, widths, align, strict=True)]
        lines.append((" " * gap).join(padded).rstrip())
    return "\n".join(lines)


def _pad(cell: str, size: int, side: str) -> str:
    blanks = " " * (size - width(cell))
    return cell + blanks if side == LEFT else blanks + cell


def number(value: float | None, digits: int = 3) -> str:
    """So many digits or all before the point, thousands separated; a dash for unknown. Whole numbers stay whole."""
    if value is None or math.isnan(value):
        return UNKNOWN
    if math.isinf(value):
        return INFINITE if value > 0 else f"-{INFINITE}"
    if value == 0:
        return "0"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value) < 1e-4:
        return f"{value:.{digits - 1}e}"
    rounded = round(value, digits - 1 - math.floor(math.log10(abs(value))))
    decimals = digits - 1 - math.floor(math.log10(abs(rounded)))  # 9.996 becomes 10.0
    return f"{value:,.{max(0, decimals)}f}"


def percent(value: float | None, decimals: int = 1) -> str:
    """A share as a percentage."""
    return UNKNOWN if value is None or math.isnan(value) else f"{100 * value:.{decimals}f} %"


def points(value: float | None, decimals: int = 1) -> str:
    """A difference of shares in percentage points, signed."""
    return UNKNOWN if value is None or math.isnan(value) else f"{100 * value:+.{decimals}f}"


def factor(value: float | None) -> str:
    """A ratio."""
    return UNKNOWN if value is None or math.isnan(value) else f"{number(value)}x"
