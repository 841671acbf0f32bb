"""What vLLM 0.32 gets wrong about budgets, seen on its own engine, and what comes here for the same request.

The first half of each test tells when upstream has mended it; the number is that of the survey's list of defects.
"""

from __future__ import annotations

import pytest
import thinking_cases
from scripted_model import decode
from thinking_cases import DEFECTS

pytestmark = pytest.mark.slow


def both(name: str) -> tuple[str, str]:
    """(stock vLLM's text, ours), each as it is told in DEFECTS."""
    stock = decode(thinking_cases.stock_outcomes()[name]["sequences"][0]["ids"])
    ours = {
        engine: found["short", name] for engine, found in thinking_cases.outcomes().items() if engine != "preempted"
    }
    texts = {engine: decode(result["sequences"][0]["ids"]) for engine, result in ours.items()}
    assert stock == DEFECTS[name][1]
    assert texts == dict.fromkeys(texts, DEFECTS[name][2])
    return stock, texts["plain"]


def test_defect_2_2_a_phrase_is_not_injected_into_the_answer() -> None:
    stock, ours = both("a phrase in the answer")
    assert "~" in stock.split("</think>")[1] and "~" not in ours


def test_defect_2_2_nothing_is_injected_into_a_reply_without_a_thought() -> None:
    stock, ours = both("a phrase in an answer without a thought")
    assert "~</think>" in stock and "</think>" not in ours


def test_defect_2_2_tool_arguments_are_whole() -> None:
    stock, ours = both("an end in tool arguments")
    assert "</tool_call>" not in stock and "defghi</tool_call>" in ours


def test_defect_2_2_a_second_block_has_no_budget_of_its_own() -> None:
    stock, ours = both("a fresh budget for a second block")
    assert sum(map(stock.count, "abcde~")) > 7 >= sum(map(ours.count, "abcde~"))


def test_defect_2_2_the_phrase_is_part_of_the_budget() -> None:
    stock, ours = both("a phrase on top of the budget")
    assert len(stock.split("</think>")[0]) == 5 and len(ours.split("</think>")[0]) == 4
