"""The device kernel computes what the thinking machine computes: random batches.

Without a GPU the kernel runs under Triton's interpreter, in one process of its own: Triton reads TRITON_INTERPRET when
the kernel is defined, and this process may have defined it before.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from beside import Script, outcome
from vllm_puzzle.kernels import thinking_triton
from vllm_puzzle.kernels.thinking import LoopRule, ThinkingLimits, ThinkingMarkers
from vllm_puzzle.kernels.thinking_triton import Column, MarkerTables, state_row

CASES = (
    *(f"{name}{drafts}" for drafts in ("", ", drafts")
      for name in ("single tokens", "phrase, boundaries, tools", "markers of several tokens", "nested markers")),
    "a neighbour changes nothing",
)  # fmt: skip
Outcome = dict[str, tuple[int, int, list[str], list[str]]]


STREAMS = Path(__file__).with_name("thinking_streams.py")
BESIDE = (Script(STREAMS, ("cpu", "10")),)


@pytest.fixture(scope="module")
def interpreted() -> Outcome:
    return outcome(BESIDE[0])


@pytest.fixture(scope="module")
def compiled() -> Outcome:
    return outcome(Script(STREAMS, ("cuda", "2000")))


def check(outcome: Outcome, case: str) -> None:
    steps, num_forced, differences, _ = outcome[case]
    assert differences == []
    assert steps >= 5 and num_forced >= 3, "the streams must reach forced tokens, or nothing was compared"


@pytest.mark.parametrize("case", CASES)
def test_the_kernel_forces_what_the_machine_forces_and_counts_the_same(interpreted: Outcome, case: str) -> None:
    check(interpreted, case)


def test_every_case_of_the_streams_is_looked_at_and_thoughts_ended_in_every_way(interpreted: Outcome) -> None:
    assert set(interpreted) == set(CASES)
    assert {reason for case in CASES for reason in interpreted[case][3]} == set(thinking_triton.REASONS) - {None}


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_the_compiled_kernel_does_too(compiled: Outcome, case: str) -> None:
    check(compiled, case)


def test_tables_hold_the_markers_right_aligned() -> None:
    markers = ThinkingMarkers((1,), ((2, 3, 4), (5,)), (5,), (6, 7), frozenset({8}), ((9, 1),), ((1, 10),))
    tables = MarkerTables.build(markers, 11, torch.device("cpu"))
    assert tables.table.tolist() == [
        [-1, -1, -1, 1], [-1, -1, 1, 10], [-1, 2, 3, 4], [-1, -1, -1, 5], [-1, -1, 9, 1], *[[-2] * 4] * 3
    ]  # fmt: skip
    assert tables.sizes.tolist() == [1, 2, 3, 1, 2, 0, 0, 0]
    assert (tables.queue.tolist(), tables.phrase_size, tables.queue_size) == ([6, 7, 5, 0], 2, 3)
    assert (tables.num_starts, tables.num_ends) == (2, 2)
    assert tables.boundaries.nonzero().tolist() == [[8]]


@pytest.mark.parametrize("where", ["start", "closing", "phrase", "boundaries"])
def test_a_marker_beyond_the_vocabulary_is_refused(where: str) -> None:
    tokens = {"start": (1,), "closing": (2,), "phrase": (), "boundaries": frozenset[int]()}
    tokens |= {where: frozenset({11}) if where == "boundaries" else (11,)}
    with pytest.raises(ValueError, match=r"found the token ids \[11\], allowed: 0 to 10"):
        MarkerTables.build(ThinkingMarkers(ends=((2,),), **tokens), 11, torch.device("cpu"))  # type: ignore[arg-type]


def test_numbers_beyond_32_bits_are_the_largest_that_fit() -> None:
    row = state_row(ThinkingLimits(2**40, 2**35, LoopRule(1, 64, 2**33)))
    assert row[Column.BUDGET] == row[Column.GRACE] == 2**31 - 1
    assert row[Column.COUNT] * 64 < 2**31
    assert state_row(None)[Column.IS_TRACKED] == 0
