"""Finding the answer in a reply's text, by one stated rule for every task. Standard library only.

The rule, first match decides: (1) the last `\\boxed{…}`; (2) what follows the last `Answer:`, or an `answer is` that a
readable answer follows; (3) without either, the whole text, of which a form takes the last thing that looks like an
answer of its kind. A marked answer that cannot be read is no answer, whatever else the text holds: a right number that
stands somewhere by chance must not count. The text is that of the answer; nobody here sees the thought.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from vllm_puzzle.bench.efficiency.record import CORRECT, NO_PARSE, WRONG

MAX_CHARS = 20_000  # of a reply that is searched, its end; the patterns are linear, a reply of megabytes is a loop
MAX_MARKERS = 9  # `answer is` in one text, the last ones
MAX_DIGITS = 400  # of a number: longer ones are no answer to any question here, and slow to convert

_BRACE = re.compile(r"\\(?:boxed|fbox) ?\{|[{}]")
_COLON = re.compile(r"\banswer\b(?:\s+is\b)?[*_`\s]{0,8}[:\uff1a][*_`\s]{0,8}", re.IGNORECASE)
_IS = re.compile(r"\banswer\s+is\b[*_`\s]{0,8}", re.IGNORECASE)
_SPACING = re.compile(r"\\[,;!: ]|\{,\}|\\left|\\right|\$|\\\(|\\\)|\\\[|\\\]|\^\{?\\circ\}?|°|\\%|%|\*\*|`")
_FRAC = re.compile(r"\\[dt]?frac\s*\{\s*(-?\d+)\s*\}\s*\{\s*(\d+)\s*\}")
_TEXT = re.compile(r"\\(?:text|mathrm|mathbf|textbf|mathit)\s*\{([^{}]*)\}")
# A sign belongs to a number only where no operand stands before it.
_NUMBER = re.compile(
    r"(?<![\w.^/])(?P<sign>[-+]?)(?P<whole>\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?P<part>\.\d+)?(?:/(?P<over>\d+))?(?![\w^/]|\.\d)"
)

Reader = Callable[[str, bool], Any]


@dataclass(frozen=True, slots=True)
class Form:
    """A kind of answer. read: (text, whether a marker pointed at it) → value, or None where it holds none.

    same: whether a value is the right one.
    """

    name: str
    read: Reader
    same: Callable[[Any], bool]

    def grade(self, answer: str) -> str:
        """The outcome of one answer."""
        value = find(answer, self.read)
        if value is None:
            return NO_PARSE
        return CORRECT if self.same(value) else WRONG


def find(answer: str, read: Reader) -> Any:
    """The value that an answer gives by the rule above, or None."""
    text = answer[-MAX_CHARS:]
    box = boxed(text)
    if box is not None:
        return read(box, True)
    colons = list(_COLON.finditer(text))
    if colons:
        return read(text[colons[-1].end() :], True)
    for match in reversed(list(_IS.finditer(text))[-MAX_MARKERS:]):
        value = read(text[match.end() :], True)
        if value is not None:
            return value
    return read(text, False)


def boxed(text: str) -> str | None:
    """What stands in the last complete box, None without one."""
    opened: list[int | None] = []
    found: tuple[int, str] | None = None
    for match in _BRACE.finditer(text):
        if match[0] != "}":
            opened.append(match.end() if len(match[0]) > 1 else None)
        elif opened:
            start = opened.pop()
            if start is not None and (found is None or start > found[0]):
                found = start, text[start : match.start()]
    return None if found is None else found[1]


def plain(text: str) -> str:
    """Without the decoration of LaTeX and Markdown, and with one kind of minus."""
    text = _TEXT.sub(r" \1 ", text.replace("\u2212", "-").replace("\u2013", "-"))
    text = _FRAC.sub(r" \1/\2 ", text.replace("{,}", ","))
    return re.sub(r"(?<=\d)[ \t]*/[ \t]*(?=\d)", "/", _SPACING.sub("", text))


def first_line(text: str) -> str:
    """The first line with anything on it."""
    return next((line.strip() for line in text.splitlines() if line.strip(" *_`#>\t")), "")


def last_line(text: str) -> str:
    """The last line with anything on it."""
    return first_line("\n".join(reversed(text.splitlines())))


def line_of(text: str, is_marked: bool) -> str:
    """Where a one-line answer stands: right behind a marker, else on the last line."""
    return first_line(text) if is_marked else last_line(text)


def numbers(text: str) -> list[Fraction]:
    """Every number of a text, exactly: integers, decimals, fractions, thousands with commas."""
    found = []
    for match in _NUMBER.finditer(plain(text)):
        whole, part, over = (
            match["whole"].replace(",", ""),
            match["part"] or "",
            int((match["over"] or "1")[:MAX_DIGITS]),
        )
        if len(whole) + len(part) <= MAX_DIGITS and over:
            found.append(Fraction(f"{match['sign']}{whole}{part}") / over)
    return found


def read_number(text: str, is_marked: bool) -> Fraction | None:
    """Marked: the first number behind the line's last `=`, or on the line. Not marked: the text's last number."""
    if not is_marked:
        found = numbers(text)
        return found[-1] if found else None
    line = first_line(text)
    found = numbers(line.rpartition("=")[2]) or numbers(line)
    return found[0] if found else None


def number(right: Fraction | int | str, tolerance: Fraction | int = 0) -> Form:
    """A number, equal to `right` in value: `1,000`, `1000.0` and `2000/2` are the same."""
    gold = Fraction(right)
    return Form("number", read_number, lambda value: abs(value - gold) <= tolerance)


def read_choice(choices: Iterable[str]) -> Reader:
    """One of a few words. Marked: the first on the line; not marked: the only one in the text, or on its last line."""
    by_lower = {choice.lower(): choice for choice in choices}
    words = "|".join(map(_word, sorted(by_lower, key=len, reverse=True)))
    pattern = re.compile(rf"(?<![\w-])(?:{words})(?![\w-])", re.IGNORECASE | re.MULTILINE)

    def read(text: str, is_marked: bool) -> str | None:
        if is_marked:
            match = pattern.search(plain(first_line(text)))
            return by_lower[match[0].lower()] if match else None
        for part in (text, last_line(text)):
            found = {by_lower[word.lower()] for word in pattern.findall(plain(part))}
            if len(found) == 1:
                return found.pop()
        return None

    return read


def _word(word: str) -> str:
    # `No idea` is no answer; `No, it is not` is one.
    return re.escape(word) + (r"(?=\s*(?:[.,;:!)]|$))" if word in ("yes", "no") else "")


def choice(right: str, choices: Sequence[str]) -> Form:
    """One of `choices`, in any case of letters."""
    return Form("choice", read_choice(choices), lambda value: value == right)


def read_items(text: str, is_marked: bool) -> list[str] | None:
    """A comma-separated list on one line, brackets, quotes and a full stop aside; None for nothing."""
    line = plain(line_of(text, is_marked)).strip(" \t*.[](){}")
    found = [item.strip(" \t\"'*`[](){}") for item in line.split(",")]
    return found if any(found) else None


def items(right: Sequence[str]) -> Form:
    """A list of words in the right order; the letters' case counts. One item is no list where several are asked for."""

    def read(text: str, is_marked: bool) -> list[str] | None:
        found = read_items(text, is_marked)
        return found if found and (len(found) > 1 or len(right) == 1) else None

    return Form("list", read, lambda value: value == list(right))


def read_token(alphabet: str) -> Reader:
    """A word of these characters alone. Marked: the line's first; not marked: the last line's last that has a digit."""
    pattern = re.compile(rf"(?<![\w-])-?[{re.escape(alphabet)}]+(?![\w-])", re.IGNORECASE)

    def read(text: str, is_marked: bool) -> str | None:
        line = plain(line_of(text, is_marked)).strip(" .")
        found = [word for word in pattern.findall(line) if is_marked or word == line or re.search(r"\d", word)]
        return found[0 if is_marked else -1].lower() if found else None

    return read


def token(right: str, alphabet: str) -> Form:
    """Digits of a base, in any case of letters; leading zeros do not count."""
    return Form("token", read_token(alphabet), lambda value: value.lstrip("0") == right.lower().lstrip("0"))
