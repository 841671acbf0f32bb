"""The pocket tasks: answers follow from the questions, the split is clean, the grader is strict."""

import re
from random import Random

import pytest
from vllm_puzzle.bench.pocket_data import draw_item, step_batches
from vllm_puzzle.bench.pocket_tasks import (
    CELLS,
    DAYS,
    Item,
    draw,
    draw_chat,
    heldout,
    is_correct,
    is_held_out,
)

SUM = Item("chain", 2, "3+4-2", ("3+4=7", "7-2=5"), "5")


def expected_answer(item: Item) -> str:
    """The answer worked out from the question's text alone, by other means than the generator's."""
    text = item.question.replace(" ", "")
    if item.task == "sort":
        return " ".join(sorted(re.findall(r"\d", text)))
    if item.task == "calendar":
        day = next(index for index, name in enumerate(DAYS) if name[:3] in text)
        return DAYS[(day + sum(int(shift) for shift in re.findall(r"[+-]\d", text))) % 7][:3]
    values = [eval(expression) for expression in re.findall(r"\d(?:[-+*]\d)*", text)]
    if item.task == "compare":
        return str(max(values))
    is_last_digit = item.task == "product" and "digit" in item.question
    return str(values[0] % 10 if is_last_digit else values[0])


@pytest.mark.parametrize(("task", "level"), CELLS)
def test_every_question_determines_its_answer(task: str, level: int) -> None:
    rng = Random(f"{task}{level}")
    for held_out in (False, True):
        for _ in range(40):
            item = draw(rng, task, level, held_out)
            assert item.answer == expected_answer(item), item


def test_the_steps_of_a_sum_are_right_and_totals_stay_within_two_digits() -> None:
    rng = Random(0)
    for _ in range(300):
        for step in draw(rng, "chain", rng.randint(1, 12)).thought_steps:
            left, right = step.split("=")
            assert eval(left) == int(right) and 0 <= int(right) <= 99


def test_training_rejects_held_out_items() -> None:
    rng = Random(3)
    assert not any(is_held_out(item) for item in (draw_item(rng, 0.5) for _ in range(2000)) if item.task != "chat")


def test_evaluation_takes_only_held_out_items_evenly_over_the_cells() -> None:
    items = heldout(seed=7, per_cell=6)
    assert all(is_held_out(item) for item in items)
    assert [(item.task, item.level) for item in items] == [cell for cell in CELLS for _ in range(6)]


def test_another_phrasing_of_a_held_out_problem_is_held_out_too() -> None:
    item = next(item for item in heldout(seed=7, per_cell=1) if item.task == "chain" and item.level == 5)
    rephrased = Item(item.task, item.level, f"Please work out {item.question}", item.thought_steps, item.answer)
    assert is_held_out(rephrased)


def test_the_same_seed_gives_the_same_items_and_another_seed_others() -> None:
    assert heldout(1, 2) == heldout(1, 2)
    assert heldout(1, 2) != heldout(2, 2)


def test_questions_do_not_repeat_in_a_cell_that_has_enough_of_them() -> None:
    items = [item for item in heldout(seed=5, per_cell=12) if item.level > 1]
    assert len({item.question for item in items}) == len(items)


@pytest.mark.parametrize("content", ["5", " 5", "5\n"])
def test_the_exact_answer_is_right_whatever_white_space_surrounds_it(content: str) -> None:
    assert is_correct(SUM, content)


@pytest.mark.parametrize("content", ["", None, "7", "05", "5.", "The answer is 5", "5 5", "3+4=7;7-2=5", "</think>5"])
def test_anything_but_the_exact_answer_is_wrong(content: str | None) -> None:
    assert not is_correct(SUM, content)


def test_a_greeting_gets_a_short_thought_and_an_answer() -> None:
    item = draw_chat(Random(0))
    assert item.task == "chat" and len(item.thought) < 30 and item.answer


def test_batches_depend_on_seed_and_step_alone() -> None:
    first, again = step_batches(0, 5, 0.5, 1024), step_batches(0, 5, 0.5, 1024)
    assert all((one.ids == two.ids).all() for one, two in zip(first, again, strict=True))
    assert not any(one.ids.equal(two.ids) for one, two in zip(first, step_batches(1, 5, 0.5, 1024), strict=False))
