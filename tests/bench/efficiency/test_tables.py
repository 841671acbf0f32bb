"""Tables and numbers for a terminal."""

from __future__ import annotations

import math

import pytest
from hand_made import unhurried
from hypothesis import given
from hypothesis import strategies as st
from vllm_puzzle.bench.efficiency.tables import factor, number, percent, points, table, width


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    text = table(["arm", "cost"], [["off", "1.5"], ["reasoning", "12.25"]])
    assert text.splitlines() == ["arm         cost", "off          1.5", "reasoning  12.25"]
    assert table(["a", "b"], [["x", "y"]], align="><", gap=1) == "a b\nx y"
    assert table(["only"], []) == "only"


def test_wide_and_combining_letters_take_the_columns_they_take() -> None:
    assert (width("模型"), width("e\u0301"), width("abc")) == (4, 1, 3)
    assert table(["m", "n"], [["模型", "1"], ["ab", "22"]]).splitlines() == ["m      n", "模型   1", "ab    22"]


def test_a_row_of_another_length_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="row of 1 cells, allowed: 2"):
        table(["a", "b"], [["x"]])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"), (math.nan, "-"), (math.inf, "∞"), (-math.inf, "-∞"), (0.0, "0"), (3, "3"), (1234567, "1,234,567"),
        (0.12345, "0.123"), (9.996, "10.0"), (99.96, "100"), (1234.5, "1,234"), (-2.5, "-2.50"),
        (0.00012345, "0.000123"), (1.5e-7, "1.50e-07"), (0.99999, "1.00"), (999.96, "1,000"), (2.0, "2"),
    ],
)  # fmt: skip
def test_numbers_have_three_digits(value: float | None, text: str) -> None:
    assert number(value) == text


@unhurried
@given(st.floats(1e-3, 1e9))
def test_a_number_is_right_to_its_digits(value: float) -> None:
    assert float(number(value).replace(",", "")) == pytest.approx(value, rel=5.001e-3)


def test_shares_and_differences_say_their_unit_and_sign() -> None:
    assert (percent(0.9234), percent(None), points(0.012), points(-0.012)) == ("92.3 %", "-", "+1.2", "-1.2")
    assert (factor(0.5), factor(None), factor(1234.0)) == ("0.500x", "-", "1,234x")
