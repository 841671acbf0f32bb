"""Forms of answers that need their puzzle to be judged: grids, paths, expressions, durations. Standard library only."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from vllm_puzzle.bench.efficiency.tasks.answers import Form, first_line, line_of, numbers, plain

MAX_EXPRESSION = 200  # characters; an honest solution has some forty
_STEPS = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
INFEASIBLE = "infeasible"
_DURATION = re.compile(
    r"(?:(?<!\d)(?P<days>\d{1,6})\s{0,4}days?\b)?,?\s*(?:(?<![\d:])(?P<h>\d{1,4}):(?P<m>\d\d)(?::(?P<s>\d\d))?(?![\d:]))?",
    re.IGNORECASE,
)


def duration(right: str) -> Form:
    """`3 days`, `04:05`, `04:05:06` or `3 days, 04:05`, equal in seconds."""
    gold = _seconds(right, True)
    return Form("duration", _seconds, lambda value: value == gold)


def _seconds(text: str, is_marked: bool) -> int | None:
    found = [match for match in _DURATION.finditer(plain(line_of(text, is_marked))) if match["days"] or match["h"]]
    if not found:
        return None
    match = found[0 if is_marked else -1]
    parts = [int(match[name] or 0) for name in ("days", "h", "m", "s")]
    return ((parts[0] * 24 + parts[1]) * 60 + parts[2]) * 60 + parts[3]


def complex_number(real: int, imaginary: int) -> Form:
    """`a + bi`, equal in both parts."""
    return Form("complex number", _complex, lambda value: value == (Fraction(real), Fraction(imaginary)))


def _complex(text: str, is_marked: bool) -> tuple[Fraction, Fraction] | None:
    line = re.sub(r"\s+", "", plain(line_of(text, is_marked)).rpartition("=")[2]).strip("()*_.")
    digits = r"[-+]?\d+(?:\.\d+)?"
    match = re.search(rf"(?P<real>{digits}(?![\d.]*[ij]))?(?P<imaginary>[-+]?(?:\d+(?:\.\d+)?)?[ij])?\)?$", line)
    if match is None or not (match["real"] or match["imaginary"]):
        return None
    imaginary = (match["imaginary"] or "0i")[:-1]
    return Fraction(match["real"] or 0), Fraction(imaginary + "1" if imaginary in ("", "+", "-") else imaginary)


def numbers_set(right: Sequence[Fraction], tolerance: Fraction) -> Form:
    """Numbers in any order, each within `tolerance`, no more and no fewer."""
    gold = sorted(right)

    def read(text: str, is_marked: bool) -> list[Fraction] | None:
        return sorted(numbers(line_of(text, is_marked))) or None

    def same(value: list[Fraction]) -> bool:
        return len(value) == len(gold) and all(abs(a - b) <= tolerance for a, b in zip(value, gold, strict=True))

    return Form("numbers", read, same)


def hexadecimal(right: str) -> Form:
    """A number in hexadecimal with its 0x."""

    def read(text: str, is_marked: bool) -> int | None:
        found = re.findall(r"(?<!\w)-?0x[0-9a-f]{1,300}(?!\w)", plain(line_of(text, is_marked)), re.IGNORECASE)
        return int(found[0 if is_marked else -1], 16) if found else None

    return Form("hexadecimal number", read, lambda value: value == int(right, 16))


def roles(right: Mapping[str, str]) -> Form:
    """`Ann is a knight, and Ben is a knave.`: one role for every person."""
    people = "|".join(map(re.escape, right))

    def read(text: str, is_marked: bool) -> dict[str, str] | None:
        pattern = rf"\b({people})\s+is\s+(?:an?\s+|the\s+)?([a-z]+)"
        found = re.findall(pattern, plain(text), re.IGNORECASE)
        said = {name.lower(): role.lower() for name, role in found}
        return said if len(said) == len(right) else None

    gold = {name.lower(): role.lower() for name, role in right.items()}
    return Form("roles", read, lambda value: value == gold)


def small_sudoku(puzzle: Sequence[Sequence[int]]) -> Form:
    """A 4 × 4 grid that keeps the given digits and holds each digit once per row, column and quarter."""

    def read(text: str, is_marked: bool) -> list[list[int]] | None:
        rows = [[int(char) for char in line if char in "1234"] for line in text.splitlines() if _is_row(line)]
        return (rows[:4] if is_marked else rows[-4:]) if len(rows) >= 4 else None

    def same(grid: list[list[int]]) -> bool:
        quarters = [[grid[r + i][c + j] for i in (0, 1) for j in (0, 1)] for r in (0, 2) for c in (0, 2)]
        groups = [*grid, *map(list, zip(*grid, strict=True)), *quarters]
        kept = all(
            given in (0, digit) for a, b in zip(puzzle, grid, strict=True) for given, digit in zip(a, b, strict=True)
        )
        return kept and all(sorted(group) == [1, 2, 3, 4] for group in groups)

    return Form("grid", read, same)


def _is_row(line: str) -> bool:
    return re.fullmatch(r"[\s|\[\](),;]*(?:[1-4][\s|\[\](),;]*){4}", line) is not None


def shortest_path(grid: Sequence[Sequence[str]], right: str) -> Form:
    """Directions from `*` to `#` over open cells, as few as possible; or that there is no way."""
    shortest = None if right == INFEASIBLE else len(right.split())

    def read(text: str, is_marked: bool) -> list[str] | None:
        words = re.findall(r"[a-z]+", plain(line_of(text, is_marked)).lower())
        path = [word for word in words if word in _STEPS]
        if INFEASIBLE in words:
            return None if path else []
        return path or None

    def same(path: list[str]) -> bool:
        return (len(path) == shortest and _arrives(grid, path)) if shortest is not None else path == []

    return Form("path", read, same)


def _arrives(grid: Sequence[Sequence[str]], path: Sequence[str]) -> bool:
    row, column = next((r, c) for r, cells in enumerate(grid) for c, cell in enumerate(cells) if cell == "*")
    for word in path:
        row, column = row + _STEPS[word][0], column + _STEPS[word][1]
        if not (0 <= row < len(grid) and 0 <= column < len(grid[0])) or grid[row][column] == "X":
            return False
    return grid[row][column] == "#"


def expression(operands: Sequence[int], target: int) -> Form:
    """Arithmetic over exactly these numbers, each as often as given, with the value `target`."""
    wanted = Counter(operands)

    def read(text: str, is_marked: bool) -> tuple[Fraction | None, Counter[int]] | None:
        if re.search(r"[\d)] ?\*\* ?[\d(]", line_of(text, is_marked)):
            return None  # a power; with the stars of bold print gone it would be something else
        line = plain(line_of(text, is_marked)).replace("\u00d7", "*").replace("\u00f7", "/").replace("\\times", "*")
        line = re.sub(r"\\div\b", "/", line).partition("=")[0].strip(" *_.")
        return evaluate(line)

    return Form("expression", read, lambda value: value[0] == target and value[1] == wanted)


def evaluate(text: str) -> tuple[Fraction | None, Counter[int]] | None:
    """Value and numbers of an expression in + - * / and brackets over integers; None for anything else.

    The value is None where it divides by zero. Nothing of the text is ever run.
    """
    if len(text) > MAX_EXPRESSION:
        return None
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        used: Counter[int] = Counter()
        return _value(tree, used), used
    except (SyntaxError, ValueError, KeyError, MemoryError, RecursionError):
        return None
    except ZeroDivisionError:
        return None, Counter()


def _value(node: ast.AST, used: Counter[int]) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        used[node.value] += 1
        return Fraction(node.value)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand, used)
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left, used), _value(node.right, used)
        steps: dict[type[Any], Any] = {
            ast.Add: lambda: left + right,
            ast.Sub: lambda: left - right,
            ast.Mult: lambda: left * right,
            ast.Div: lambda: left / right,
        }
        return steps[type(node.op)]()
    raise ValueError("not arithmetic")


def factors(number: int) -> Form:
    """The prime factors of a number, multiplied."""

    def read(text: str, is_marked: bool) -> list[int] | None:
        line = plain(first_line(text) if is_marked else line_of(text, False)).rpartition("=")[2]
        parts = re.split(r"\s*(?:\u00d7|\*|\\times|\\cdot|\u00b7|\bx\b)\s*", line.strip(" *_."))
        return [int(part) for part in parts] if all(re.fullmatch(r"\d{1,20}", part) for part in parts) else None

    def same(value: list[int]) -> bool:
        product = 1
        for factor in value:
            product *= factor
        return product == number and all(_is_prime(factor) for factor in value)

    return Form("factors", read, same)


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, min(int(number**0.5) + 1, 10**6)))
