"""Ours beside the papers' figures: never without the differences, and the right quotient."""

from __future__ import annotations

from dataclasses import replace

import pytest
from engine_rows import H100, row
from vllm_puzzle.bench.engine import report
from vllm_puzzle.bench.engine.anchors import ANCHORS, Answer, anchors_of, answer, derived_shapes
from vllm_puzzle.bench.engine.case import DECODE, PREFILL, Shape
from vllm_puzzle.bench.engine.derived import Derived, derive, mean_context, output_throughput
from vllm_puzzle.bench.engine.rows import Results
from vllm_puzzle.bench.engine.suites import SUITES, find_suite

SHORT, LONG = Shape(128, 128), Shape(65536, 65536)


def find(key: str, rows: list[object], card: str = H100, derived: tuple[Derived, ...] = ()) -> Answer:
    (anchor,) = (anchor for anchor in ANCHORS if anchor.key == key)
    return answer(anchor, rows, derived, card)  # type: ignore[arg-type]


def test_every_figure_has_a_source_a_set_up_and_a_key_of_its_own() -> None:
    assert len({anchor.key for anchor in ANCHORS}) == len(ANCHORS)
    for anchor in ANCHORS:
        assert anchor.suite in SUITES and anchor.source and anchor.setup and anchor.figure > 0
        # Nothing here was measured as the papers did; each says in what.
        assert anchor.differs, anchor.key


def test_every_quotient_is_of_cases_that_its_suite_has() -> None:
    for anchor in ANCHORS:
        if anchor.quotient is None:
            continue
        suite = find_suite(anchor.suite, True)
        names = {variant.name for variant in suite.variants}
        assert {anchor.quotient.over, anchor.quotient.under or anchor.quotient.over} <= names, anchor.key
        shapes = {(load.shape, load.role) for load in suite.loads}
        if not anchor.quotient.is_derived:
            assert (anchor.quotient.shape, "full") in shapes, anchor.key
            continue
        lengths = {(shape.input_len, role) for shape, role in shapes}
        assert (mean_context(anchor.quotient.shape), DECODE) in lengths, anchor.key
        assert (anchor.quotient.shape.input_len, PREFILL) in lengths, anchor.key


def test_a_figure_at_the_best_batch_takes_each_models_own() -> None:
    rows = [row("49b-fp8", SHORT, batch, rate) for batch, rate in ((64, 900.0), (256, 1000.0))]
    rows += [row("70b-fp8", SHORT, batch, rate) for batch, rate in ((64, 500.0), (256, 400.0))]
    found = find("puzzle-128/128-TP1", [*rows])
    assert (found.ours, found.cases) == (2.0, ("49b-fp8 128/128 b256", "70b-fp8 128/128 b64"))
    assert found.differences == (
        "49B in place of the 51B, whose layers are not public",
        "vLLM in place of TensorRT-LLM",
    )


def test_another_card_is_the_first_difference() -> None:
    rows = [row("49b-fp8", SHORT, 1, 3.0), row("70b-fp8", SHORT, 1, 2.0)]
    found = find("puzzle-128/128-TP1", [*rows], "NVIDIA H200")
    assert found.differences[0] == "measured on NVIDIA H200, the figure on H100 80GB HBM3"


def test_what_was_not_measured_has_no_value_and_keeps_its_differences() -> None:
    for rows in ([], [row("49b-fp8", SHORT, 1, 3.0)], [row("49b-fp8", SHORT, 1, 3.0), row("70b-fp8", SHORT, 1, None)]):
        found = find("puzzle-128/128-TP1", [*rows])
        assert found.ours is None and found.differences
    # More GPUs than one: no case of ours answers it.
    assert find("puzzle-128/1024-TP4", [row("49b-fp8", Shape(128, 1024), 1, 9.0)]).ours is None


def test_a_latency_is_the_smaller_the_better_and_of_one_batch() -> None:
    times = {"49b-fp8": (0.020, 0.030), "49b-fp8-fused": (0.018, 0.030)}
    rows = [
        row(name, SHORT, batch, 1.0, tpot_p50_s=seconds)
        for name, found in times.items()
        for batch, seconds in zip((1, 8), found, strict=True)
    ]
    assert find("fusion-b1", [*rows]).ours == pytest.approx(0.9)
    assert find("fusion-b8", [*rows]).ours == pytest.approx(1.0)


def test_a_batch_that_did_not_fit_at_once_is_said() -> None:
    shape = Shape(128, 1024)
    rows = [
        row("49b-fp8", shape, 256, 5.0, kv_capacity_tokens=400_000),
        row("70b-fp8", shape, 256, 1.0, kv_capacity_tokens=33_000),
    ]
    found = find("super-batch-256", [*rows])
    assert found.ours == 5.0
    assert [text for text in found.differences if "70b-fp8 holds fewer than 256" in text]
    assert not [text for text in found.differences if "49b-fp8 holds fewer" in text]


def test_no_ratio_is_printed_without_what_differs() -> None:
    rows = [row("49b-fp8", SHORT, 1, 3.0), row("70b-fp8", SHORT, 1, 2.0)]
    results = Results("super49", "NVIDIA H200", rows)
    text = report.summary(results).splitlines()
    answers = report.finish(results)
    assert len(answers) == len(anchors_of("super49")) == len(results.anchors)
    for each in answers:
        (index,) = (i for i, line in enumerate(text) if line.startswith(f"  {each.anchor.what}: ours"))
        assert each.anchor.source in text[index + 1]
        assert text[index + 2].startswith("    ours differs: ") and each.differences[0] in text[index + 2]
    (line,) = (line for line in report.short_table([results]).splitlines() if "1.50x" in line)
    assert "2.07x" in line and "differs in 3: measured on NVIDIA H200" in line
    same = replace(answers[0], differences=())
    assert report.answer_lines([same])[-1] == "    ours: the same set-up"


# --- derived -------------------------------------------------------------------------------------------------------


def test_a_derived_rate_is_that_of_a_loop_counted_out() -> None:
    # Two places; each request: 3 s of prefill, which holds the other up, then 10 steps. A whole turn of both takes
    # 2 · 3 s + 10 · 0.5 s = 11 s and gives 20 tokens.
    assert output_throughput(Shape(7, 10), 2, 3.0, 0.5) == pytest.approx(20 / 11)


def test_a_step_at_the_mean_context_takes_the_mean_time() -> None:
    # Attention reads I + t tokens in step t, a window of 30 at most 30 (it is full from the prompt on).
    shape = Shape(64, 100)
    steps = [1.0 + 0.01 * (shape.input_len + t) + 0.01 * min(30, shape.input_len + t) for t in range(100)]
    middle = 1.0 + 0.01 * mean_context(shape) + 0.01 * 30
    # The mean of I + t over t = 0 … O − 1 is I + (O − 1) / 2: half a token less.
    assert sum(steps) / len(steps) == pytest.approx(middle, abs=0.01 * 0.5 + 1e-12)


def test_derived_figures_join_the_two_cases_of_one_variant() -> None:
    prefill = Shape(65536, 1)
    rows = [
        row("88b-fp8kv", prefill, 1, 1.0, role=PREFILL, duration_s=9.0, num_requests=3),
        row("88b-fp8kv", Shape(98304, 512), 20, 1.0, role=DECODE, steady_output_throughput=800.0),
        row("88b-fp8kv", Shape(98304, 512), 4, 1.0, role=DECODE, steady_output_throughput=None),
        row("120b-fp8kv", Shape(98304, 512), 7, 1.0, role=DECODE, steady_output_throughput=300.0),
        row("120b-bf16kv", prefill, 1, 1.0, role=PREFILL, duration_s=9.0, num_requests=3),
    ]
    (found,) = derive(rows, LONG)
    assert (found.variant, found.batch, found.prefill_s, found.step_s) == ("88b-fp8kv", 20, 3.0, 20 / 800)
    assert found.output_throughput == pytest.approx(20 * 65536 / (20 * 3.0 + 65536 * 0.025))
    assert LONG in derived_shapes("gptoss") and derived_shapes("super49") == ()


def test_a_derived_figure_stands_beside_the_measured_one_where_there_is_one() -> None:
    found = Derived("gptoss", "88b-fp8kv", 4096, 4096, 64, 900.0, 1.0, 1.0, "p", "d")
    rows = [row("88b-fp8kv", Shape(4096, 4096), batch, 850.0 + batch) for batch in (32, 64)]
    assert report.derived_line(found, rows).endswith(
        "b64: 900 tokens/s from 1 s a prompt and 1000.00 ms a step; measured 914"
    )
    assert "measured" not in report.derived_line(found, rows[:1])


def test_a_derived_ratio_says_that_it_is() -> None:
    some = [
        Derived("gptoss", name, 65536, 65536, batch, rate, 1.0, 1.0, "p", "d")
        for name, batch, rate in (("88b-fp8kv", 22, 900.0), ("88b-fp8kv", 1, 90.0), ("120b-fp8kv", 7, 300.0))
    ]
    found = find("p88-one-fp8", [], derived=tuple(some))
    assert found.ours == pytest.approx(3.0)
    assert found.cases == ("88b-fp8kv derived 65536/65536 b22", "120b-fp8kv derived 65536/65536 b7")
    assert any("ours is derived" in text for text in found.differences)
    assert any("reconstructed" in text for text in found.differences)
    assert find("p88-one-bf16", [], derived=tuple(some)).ours is None
