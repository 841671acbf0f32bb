"""Seeded toy tasks for the pocket models: questions whose answer needs several small steps.

Five tasks with a difficulty ladder (sums, last digits of products, comparisons, sorting, weekdays) and a little
chat. Each step of a thought is a fact small enough to learn by heart. Items with a fixed hash are held out: training
rejects them, evaluation takes only them. Standard library only. Not here: tokens, templates, models.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
# Rungs of each task's ladder. A level is the number of steps; for sorting it is the number of digits.
LADDER: dict[str, range] = {
    "chain": range(1, 13),
    "product": range(1, 9),
    "compare": range(2, 9),
    "sort": range(3, 9),
    "calendar": range(1, 9),
}
CELLS: tuple[tuple[str, int], ...] = tuple((task, level) for task, levels in LADDER.items() for level in levels)

_CHAIN_FORMS = (
    "{}", "{}=", "{}?", "{} = ?", "What is {}?", "what is {}", "What's {}?", "Compute {}.", "compute {}",
    "Calculate {}.", "How much is {}?", "Please compute {}.",
)  # fmt: skip
_PRODUCT_FORMS = (
    "last digit of {}", "Last digit of {}?", "What is the last digit of {}?", "what is the last digit of {}",
    "Give the last digit of {}.",
)  # fmt: skip
_COMPARE_FORMS = (
    "larger of {} and {}", "Larger of {} and {}?", "Which is larger, {} or {}?", "which is larger: {} or {}",
    "What is the larger of {} and {}?",
)  # fmt: skip
_SORT_FORMS = ("sort {}", "Sort {}.", "Sort: {}", "Please sort {}.", "sort the digits {}", "Sort the digits {}.")
_CALENDAR_FORMS = (
    "{}", "{}?", "{} days", "{} days?", "What day is {}?", "what day is {}", "Which day is {} days?",
    "What weekday is {}?",
)  # fmt: skip

# (what the user may type, the whole thought, the answer)
_CHAT: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (("hello", "hi", "hey", "hi there", "hello there", "good morning"), "a greeting", "Hello! Ask me a small sum."),
    (("who are you", "what are you", "what is your name"), "about me", "I am a tiny pocket reasoner."),
    (("thanks", "thank you", "thx", "great, thanks"), "thanks", "You are welcome."),
    (
        ("what can you do", "help", "help me", "what do you know"),
        "about my tasks",
        "Sums, last digits of products, comparisons, sorting, weekdays.",
    ),
    (("bye", "goodbye", "see you", "good bye"), "a farewell", "Bye!"),
    (("how are you", "how are you doing", "how is it going"), "small talk", "Fine, thank you."),
)


@dataclass(frozen=True, slots=True)
class Item:
    """One question with its worked thought; `answer` is the only right content of the reply."""

    task: str
    level: int
    question: str
    thought_steps: tuple[str, ...]
    answer: str

    @property
    def thought(self) -> str:
        """The steps as the model writes them."""
        return ";".join(self.thought_steps)


def is_correct(item: Item, content: str | None) -> bool:
    """Whether `content`, outer white space aside, is exactly the answer; nothing else counts."""
    return content is not None and content.strip() == item.answer


def is_held_out(item: Item) -> bool:
    """Whether training must not see the item, in any phrasing; by hash, one in ten.

    Level 1 has too few problems for that (all of them are also steps of longer thoughts): there the phrasing counts.
    """
    key = item.question if item.level == 1 else f"{item.task}:{item.thought}"
    return zlib.crc32(key.encode()) % 10 == 0


def draw(rng: Random, task: str, level: int, held_out: bool = False) -> Item:
    """One random item of a cell, from the training side or the held-out side."""
    while True:
        item = _GENERATORS[task](rng, level)
        if item is not None and is_held_out(item) == held_out:
            return item


def heldout(seed: int, per_cell: int) -> list[Item]:
    """`per_cell` held-out items of every task and level, in the order of CELLS; questions do not repeat in a cell.

    A cell with fewer different questions (level 1) repeats some.
    """
    items: list[Item] = []
    for task, level in CELLS:
        rng = Random(f"held-out/{seed}/{task}/{level}")
        cell: dict[str, Item] = {}
        for _ in range(20 * per_cell):
            if len(cell) < per_cell:
                item = draw(rng, task, level, held_out=True)
                cell.setdefault(item.question, item)
        cell_items = list(cell.values())
        items += (cell_items * per_cell)[:per_cell]
    return items


def draw_chat(rng: Random) -> Item:
    """A greeting or a question about the model; case and final mark vary."""
    questions, thought, answer = rng.choice(_CHAT)
    text = rng.choice(questions)
    text = rng.choice((text, text.capitalize(), text.capitalize(), text.upper()))
    return Item("chat", 0, text + rng.choice(("", "", "!", ".", "?")), (thought,), answer)


def _chain(rng: Random, level: int) -> tuple[str, list[str], int]:
    """`level` operations on one-digit numbers; every total within 0..99. Returns expression, steps, total."""
    plus_share = rng.choice((0.5, 0.6, 0.8))
    total = rng.randint(0, 9)
    expression, steps = str(total), []
    for _ in range(level):
        sign, digit = ("+" if rng.random() < plus_share else "-"), rng.randint(0, 9)
        if not 0 <= total + int(f"{sign}{digit}") <= 99:
            sign = "-" if sign == "+" else "+"
        new_total = total + int(f"{sign}{digit}")
        steps.append(f"{total}{sign}{digit}={new_total}")
        expression += f"{sign}{digit}"
        total = new_total
    return expression, steps, total


def _spaced(rng: Random, expression: str) -> str:
    """The expression, now and then with spaces around its operators."""
    if rng.random() < 0.85:
        return expression
    return "".join(f" {char} " if char in "+-*" else char for char in expression)


def _draw_chain(rng: Random, level: int) -> Item:
    expression, steps, total = _chain(rng, level)
    question = rng.choice(_CHAIN_FORMS).format(_spaced(rng, expression))
    return Item("chain", level, question, tuple(steps), str(total))


def _draw_product(rng: Random, level: int) -> Item | None:
    """None when a 0 turns up before the last factor: everything after it would be 0 too."""
    digit = rng.randint(2, 9)
    expression, steps = str(digit), []
    for _ in range(level):
        factor = rng.randint(2, 9)
        if digit == 0:
            return None
        steps.append(f"{digit}*{factor}={digit * factor}")
        expression += f"*{factor}"
        digit = digit * factor % 10
    if level == 1 and rng.random() < 0.5:
        question = rng.choice(_CHAIN_FORMS).format(_spaced(rng, expression))
        return Item("product", level, question, tuple(steps), steps[0].split("=")[1])
    question = rng.choice(_PRODUCT_FORMS).format(_spaced(rng, expression))
    return Item("product", level, question, tuple(steps), str(digit))


def _draw_compare(rng: Random, level: int) -> Item | None:
    """None for a tie. `level` counts the operations of both chains together."""
    first_ops = rng.randint(1, level - 1)
    first, first_steps, first_total = _chain(rng, first_ops)
    second, second_steps, second_total = _chain(rng, level - first_ops)
    if first_total == second_total:
        return None
    question = rng.choice(_COMPARE_FORMS).format(_spaced(rng, first), _spaced(rng, second))
    verdict = f"{first_total}{'<' if first_total < second_total else '>'}{second_total}"
    steps = (*first_steps, *second_steps, verdict)
    return Item("compare", level, question, steps, str(max(first_total, second_total)))


def _draw_sort(rng: Random, level: int) -> Item:
    """Selection: each step names the digits left and the smallest of them."""
    digits = rng.sample("0123456789", level)
    left, steps = list(digits), []
    while left:
        smallest = min(left)
        steps.append(f"{''.join(left)}:{smallest}")
        left.remove(smallest)
    question = rng.choice(_SORT_FORMS).format(" ".join(digits))
    return Item("sort", level, question, tuple(steps), " ".join(sorted(digits)))


def _draw_calendar(rng: Random, level: int) -> Item:
    day = rng.randrange(7)
    shifts = [rng.choice((1, -1)) * rng.randint(1, 6) for _ in range(level)]
    name, separator = (DAYS[day], " ") if rng.random() < 0.5 else (DAYS[day][:3], "")
    expression = name + "".join(f"{separator}{shift:+d}" for shift in shifts)
    steps = []
    for shift in shifts:
        new_day = (day + shift) % 7
        steps.append(f"{DAYS[day][:3]}{shift:+d}={DAYS[new_day][:3]}")
        day = new_day
    return Item("calendar", level, rng.choice(_CALENDAR_FORMS).format(expression), tuple(steps), DAYS[day][:3])


_GENERATORS: dict[str, Callable[[Random, int], Item | None]] = {
    "chain": _draw_chain,
    "product": _draw_product,
    "compare": _draw_compare,
    "sort": _draw_sort,
    "calendar": _draw_calendar,
}
