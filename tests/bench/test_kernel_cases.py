"""Names of cases: vLLM's batch grammar there and back, every listed case, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm_puzzle.bench.kernel import plan
from vllm_puzzle.bench.kernel.batch import format_batch, parse_batch
from vllm_puzzle.bench.kernel.cases import AttentionCase, FfnCase, parse_case
from vllm_puzzle.model_configs.schema import ConfigError


@pytest.mark.parametrize(
    ("text", "batch"),
    [
        ("64q1s4k", ((1, 4096),) * 64),
        ("q8k", ((8192, 8192),)),
        ("2q2k_32q1s1k", ((2048, 2048),) * 2 + ((1, 1024),) * 32),
        ("8q1s1000", ((1, 1000),) * 8),
        ("q5", ((5, 5),)),
    ],
)
def test_the_batch_grammar(text: str, batch: tuple[tuple[int, int], ...]) -> None:
    assert parse_batch(text) == batch
    assert format_batch(batch) == text


@pytest.mark.parametrize("text", ["", "64", "q", "q0", "0q1s4", "q5s4", "q1s4m", "2q1s4k__q1", "q1s4k ", "99999999q1"])
def test_what_is_no_batch_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ConfigError, match=r"found .*allowed: "):
        parse_batch(text)


SEQUENCES = st.tuples(st.integers(1, 9000), st.integers(0, 140000)).map(lambda pair: (pair[0], sum(pair)))


@given(st.lists(SEQUENCES, min_size=1, max_size=5).map(tuple))
def test_every_batch_is_read_back_from_its_name(batch: tuple[tuple[int, int], ...]) -> None:
    assert parse_batch(format_batch(batch)) == batch


def test_every_listed_case_is_read_back_from_its_name_and_listed_once() -> None:
    cases = plan.cases()
    assert len({case.name for case in cases}) == len(cases) > 300
    for case in cases:
        assert parse_case(case.name) == case
        assert case.cost.num_bytes > 0


def test_a_name_says_every_difference() -> None:
    case = AttentionCase("decode", ((1, 5000),) * 3, 777, 96, "fp8", 24, 3, 32, True, 4, True)
    assert case.name == "decode-3q1s5000-w777-h24kv3d96-fp8-page32-sinks-sink4-perhead"
    assert parse_case(case.name) == case
    assert FfnCase("ffn", 1, 8192, 2816, count=4).name == "ffn-m1-d8192-i4x2816-bf16"


@pytest.mark.parametrize(
    "name",
    [
        "decode",
        "decode-64q2s4k-w1k-h64kv8d128-fp8",  # decode has one query token
        "decode-64q1s4k-w0-h64kv8d128-fp8",
        "decode-64q1s4k-w1k-h64kv7d128-fp8",
        "decode-64q1s4k-w1k-h64kv8d128-int8",
        "decode-64q1s4k-w1k-h0kv8d128-fp8",
        "gate_up-m0-d8192-i17920-bf16",
        "gate_up-m1-d8192-i17920-fp4",
        "ffn-m1-d8192-i4x2816-fp8_tensor",
        "up-m1-d8192-i17920-bf16",
    ],
)
def test_what_is_no_case_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(ConfigError, match=r"found .*allowed: ") as caught:
        parse_case(name)
    assert "\n" not in str(caught.value)


def test_cases_that_are_judged_by_bandwidth_exceed_five_times_the_l2() -> None:
    # 50 MiB (H100) and 60 MB (H200): 256 MB of K and V, or of weights.
    for case in plan.BIG + plan.BIG_64 + plan.BIG_BF16:
        assert case.live_bytes >= 256e6
    for case in plan.DECODE_FFN + plan.DECODE_FFN_LARGER + plan.DOWN + plan.DECODE_FP8:
        assert case.cost.num_bytes >= 256e6
    sizes = [3 * 8192 * case.width * 2 for case in plan.PARALLEL_SMALL]
    assert max(sizes) <= 64e6
    assert min(3 * 8192 * case.width * 2 for case in plan.PARALLEL_LARGE) > 64e6
    assert max(3 * 8192 * case.width * 2 for case in plan.PARALLEL_LARGE) <= 400e6


def test_the_sweeps_hold_what_the_issue_names() -> None:
    names = {case.name for case in plan.cases()}
    for width in (2816, 5632, 7168, 17920):
        assert f"ffn-m1-d8192-i4x{width}-bf16" in names
    for window in ("w128", "w512", "w1k", "w4k", "w8k"):
        for head_dim in (64, 128):
            for cache in ("bf16", "fp8"):
                assert f"decode-128q1s128k-{window}-h64kv8d{head_dim}-{cache}" in names
    assert {case.op for case in plan.cases()} == {
        "gate_up", "down", "ffn", "decode", "verify", "prefill", "kv_write", "rope_kv_write", "fused_decode"
    }  # fmt: skip


def test_a_run_begins_with_a_case_of_each_kind_then_the_seven_promises() -> None:
    cases = [case.name for case in plan.cases()]
    assert cases[: len(plan.QUICK)] == [case.name for case in plan.QUICK]
    assert {case.op for case in plan.QUICK} == {case.op for case in plan.cases()}
    promised = {case.name for goal in plan.GOALS if goal.promise for case in goal.quantity.cases}
    assert promised <= set(cases[: len(promised) + len(plan.QUICK)])
