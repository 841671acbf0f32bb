"""The stated rule of extraction: which part of a reply is its answer, and when there is none."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest
from vllm_puzzle.bench.efficiency.record import CORRECT, NO_PARSE, WRONG
from vllm_puzzle.bench.efficiency.tasks import answers, puzzle_forms
from vllm_puzzle.bench.efficiency.tasks.answers import Form

DAYS = ("Monday", "Tuesday", "Sunday")


@pytest.mark.parametrize(
    ("reply", "outcome"),
    [
        ("\\boxed{41} and then \\boxed{42}, not 7", CORRECT),  # the last box, before anything behind it
        ("\\boxed{42}\nAnswer: 7", CORRECT),  # a box before a marker
        ("\\boxed{\\text{the sum is } 42}", CORRECT),
        ("Answer: 41\nNo, wait.\n**Final answer:** 42", CORRECT),
        ("Answer:\n\n  42.", CORRECT),
        ("ANSWER: 6 * 7 = 42", CORRECT),
        ("Answer: 42 apples, of 50", CORRECT),
        ("The answer is 42. I hope this answer is useful.", CORRECT),
        ("6 * 7 is 42", CORRECT),
        ("so 1,042 - 1,000 gives\n$42$", CORRECT),
        ("84/2", CORRECT),
        ("\\boxed{\\frac{84}{2}}", CORRECT),
        ("42.0", CORRECT),
        ("\u221242", WRONG),
        ("Answer: 420", WRONG),
        ("Answer: 42\nAnswer: 43", WRONG),
        ("\\boxed{43} 42", WRONG),
        ("3-42 = 42-81 = -39", WRONG),
        ("I do not know.", NO_PARSE),
        ("There are 42 of them. Answer: unknown", NO_PARSE),  # marked, and not readable: 42 stands there by chance
        ("42 \\boxed{x}", NO_PARSE),
        ("10^42", NO_PARSE),
        ("x42y", NO_PARSE),
        ("42/0", NO_PARSE),
    ],
)
def test_a_number_is_found_by_the_rule(reply: str, outcome: str) -> None:
    assert answers.number(42).grade(reply) == outcome


def test_numbers_are_compared_exactly() -> None:
    form = answers.number(Fraction("0.1"))
    assert form.grade("0.1000") == CORRECT
    assert form.grade("0.10000000000000000001") == WRONG
    assert answers.number(10**30 + 1).grade(f"Answer: {10**30:,}") == WRONG
    assert answers.number(10**30).grade(f"Answer: {10**30:,}") == CORRECT


def test_an_open_box_is_no_box() -> None:
    assert answers.boxed("\\boxed{1") is None
    assert answers.boxed("\\boxed{a{b}c} \\boxed{") == "a{b}c"


@pytest.mark.parametrize(
    ("reply", "outcome"),
    [
        ("sunday", CORRECT),
        ("It was a Tuesday then.\nSo it is **Sunday**.", CORRECT),
        ("Answer: Sunday, not Monday", CORRECT),
        ("Sunday or Monday", NO_PARSE),  # two, and nothing says which
        ("Sundays", NO_PARSE),
        ("Answer: Friday", NO_PARSE),
        ("Answer: Monday", WRONG),
    ],
)
def test_a_choice_needs_to_be_one(reply: str, outcome: str) -> None:
    assert answers.choice("Sunday", DAYS).grade(reply) == outcome


def test_a_longer_choice_is_not_its_beginning() -> None:
    form = answers.choice("mother", ("mother", "mother-in-law"))
    assert form.grade("mother-in-law") == WRONG
    assert form.grade("Mother.") == CORRECT


def test_other_forms_by_example() -> None:
    cases: list[tuple[Form, str, str]] = [
        (answers.items(["b", "a_"]), "Answer: b, a_.", CORRECT),
        (answers.items(["b", "a_"]), "['b', 'a_']", CORRECT),
        (answers.items(["b", "a_"]), "a_, b", WRONG),
        (answers.token("1f", "0123456789abcdef"), "In base 16 that is\n1F.", CORRECT),
        (answers.token("1f", "0123456789abcdef"), "Answer: 1g", NO_PARSE),
        (puzzle_forms.duration("3 days, 04:05"), "Answer: 3 days, 04:05:00", CORRECT),
        (puzzle_forms.duration("3 days, 04:05"), "04:05", WRONG),
        (puzzle_forms.duration("34 days"), "34 days", CORRECT),
        (puzzle_forms.duration("00:06"), "six minutes", NO_PARSE),
        (puzzle_forms.complex_number(-15, 3), "\\boxed{-15 + 3i}", CORRECT),
        (puzzle_forms.complex_number(-15, 3), "(1+2i) + (-16 + i) = -15.0 + 3.0i", CORRECT),
        (puzzle_forms.complex_number(0, -1), "-i", CORRECT),
        (puzzle_forms.complex_number(9, 0), "9.00", CORRECT),
        (puzzle_forms.complex_number(9, 0), "9i", WRONG),
        (puzzle_forms.complex_number(8, 3), "8.009+3i", WRONG),
        (puzzle_forms.hexadecimal("-0x1f"), "Answer: -0x1F", CORRECT),
        (puzzle_forms.hexadecimal("-0x1f"), "-31", NO_PARSE),
        (puzzle_forms.numbers_set([Fraction(-1), Fraction(2)], Fraction(1, 1000)), "2.0005, -1", CORRECT),
        (puzzle_forms.numbers_set([Fraction(-1), Fraction(2)], Fraction(1, 1000)), "2", WRONG),
        (puzzle_forms.roles({"Ann": "saint", "Ben": "sinner"}), "Ben is a sinner; Ann is a saint.", CORRECT),
        (puzzle_forms.roles({"Ann": "saint", "Ben": "sinner"}), "Ann is a saint", NO_PARSE),
        (puzzle_forms.roles({"Ann": "saint", "Ben": "sinner"}), "Ann is a saint, Ben is a saint", WRONG),
        (puzzle_forms.shortest_path(["*O", "O#"], "right down"), "Answer: down right", CORRECT),  # as short
        (puzzle_forms.shortest_path(["*O", "O#"], "right down"), "down up down right", WRONG),
        (puzzle_forms.shortest_path(["*O", "X#"], "right down"), "down right", WRONG),
        (puzzle_forms.shortest_path(["*X", "X#"], "infeasible"), "It is infeasible.", CORRECT),
        (puzzle_forms.shortest_path(["*X", "X#"], "infeasible"), "none", NO_PARSE),
        (puzzle_forms.factors(12), "12 = 3 * 2 \u00d7 2", CORRECT),
        (puzzle_forms.factors(12), "4 * 3", WRONG),
    ]
    for form, reply, outcome in cases:
        assert form.grade(reply) == outcome, (form.name, reply)


def test_a_grid_is_judged_by_its_rules_and_not_by_one_solution() -> None:
    form = puzzle_forms.small_sudoku([[0] * 4, [0] * 4, [0] * 4, [0, 0, 0, 1]])
    assert form.grade("Answer:\n2 3 1 4\n4 1 2 3\n1 4 3 2\n3 2 4 1") == CORRECT
    assert form.grade("| 3 | 2 | 1 | 4 |\n[4, 1, 2, 3]\n1432\n2 3 4 1") == CORRECT
    assert form.grade("2 3 1 4\n4 1 2 3\n1 4 3 2\n3 2 1 4") == WRONG
    assert form.grade("2 3 1 4") == NO_PARSE


@pytest.mark.parametrize(
    ("reply", "outcome"),
    [
        ("94*4 - 61 - 6", CORRECT),
        ("Answer: 94 \\times 4 - 61 - 6 = 309", CORRECT),
        ("4*94 - (61 + 6)", CORRECT),
        ("94*4 - 61 - 6 + 6 - 6", WRONG),  # a number twice
        ("309", WRONG),
        ("94/0", WRONG),
        ("9**9**9**9", NO_PARSE),
        ("__import__('os').getpid()", NO_PARSE),
        ("(" * 150, NO_PARSE),
    ],
)
def test_an_expression_is_computed_and_never_run(reply: str, outcome: str) -> None:
    assert puzzle_forms.expression([6, 61, 94, 4], 309).grade(reply) == outcome


def test_a_reply_of_megabytes_is_graded_at_once() -> None:
    forms = [
        answers.number(1),
        answers.choice("a", ("a", "b")),
        puzzle_forms.duration("00:01"),
        answers.items(["a"]),
        answers.token("1", "01"),
    ]
    started = time.perf_counter()
    for form in forms:
        for piece in ("1,", "answer is ", "\\boxed{", "(1+", "* ", "9"):
            form.grade(piece * (2_000_000 // len(piece)))
    assert time.perf_counter() - started < 5  # seconds; a quadratic search took 25
