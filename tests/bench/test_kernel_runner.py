"""The runner on a CPU with a wall clock: what is wrong gets no speed, what fails or is absent is told; baselines are
held to the same reference as our kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from vllm_puzzle.bench.kernel import attention_baselines, report
from vllm_puzzle.bench.kernel.attention import AttentionProblem, Inputs
from vllm_puzzle.bench.kernel.card import Ceilings, measure_ceilings
from vllm_puzzle.bench.kernel.cases import AttentionCase, FfnCase, parse_case
from vllm_puzzle.bench.kernel.ffn import FfnProblem
from vllm_puzzle.bench.kernel.problem import Absent, Prepare
from vllm_puzzle.bench.kernel.record import OURS, Row
from vllm_puzzle.bench.kernel.runner import Runner
from vllm_puzzle.bench.kernel.timing import Call, wall_clock_timer
from vllm_puzzle.kernels import reference

CEILINGS = Ceilings(copy=1e10, read=1e10, matmul_bf16=1e11, matmul_fp8=1e11)
DECODE = "decode-3q1s50-w17-h6kv2d16-fp8"


class TwinProblem(AttentionProblem):
    """Runs the plain-PyTorch twin in the place of our kernel, then `spoil`s what it wrote."""

    spoil: Callable[[Inputs], Any] = staticmethod(lambda inputs: None)
    others: Mapping[str, Prepare] = {}

    def ours(self) -> Sequence[Call]:
        return [partial(self._twin, inputs) for inputs in self.sets]

    def _twin(self, inputs: Inputs) -> Inputs:
        if self.case.op == "kv_write":
            self.write(reference.write_kv, inputs)
        elif self.case.op == "rope_kv_write":
            self.rope_and_write(reference.rope_and_write_kv, inputs)
        else:
            inputs.out.copy_(
                reference.paged_attention(
                    inputs.q, self.k_cache, self.v_cache, block_table=inputs.block_table, seq_lens=self.seq_lens,
                    query_start_loc=self.query_start_loc, **self.scales, **self.masking,
                )
            )  # fmt: skip
        self.spoil(inputs)
        return inputs

    def baselines(self) -> Mapping[str, Prepare]:
        return self.others


def run(problem: Any, **more: Any) -> list[Row]:
    runner = Runner(wall_clock_timer, CEILINGS, l2_bytes=4096, max_sets=3, **more)
    return runner.run(problem, "B1.1")


def attention(name: str) -> AttentionCase:
    case = parse_case(name)
    assert isinstance(case, AttentionCase)
    return case


def twin(name: str = DECODE, spoil: Callable[[Inputs], Any] | None = None) -> TwinProblem:
    problem = TwinProblem(attention(name), "cpu")
    if spoil is not None:
        problem.spoil = spoil
    return problem


@pytest.mark.parametrize("name", [DECODE, "kv_write-3q5s50-h6kv2d16-fp8", "rope_kv_write-q21-h6kv2d16-fp8-perhead"])
def test_a_right_op_gets_its_speed_and_share_of_the_limit(name: str) -> None:
    (row,) = run(twin(name), count_launches=lambda call: 7)
    assert row.status == "ok" and row.reason == "" and row.launches == 7
    assert row.p20_us is not None and row.p50_us is not None and row.p80_us is not None
    assert 0 < row.p20_us <= row.p50_us <= row.p80_us
    floor = attention(name).cost.seconds(1e10, 1e11) * 1e6
    assert row.floor_us == pytest.approx(floor)
    assert row.percent_of_limit == pytest.approx(100 * floor / row.p50_us)
    assert row.num_sets == 3 and row.goals == "B1.1"


def one_head_off(inputs: Inputs) -> None:
    inputs.out[0, 0] *= 1.05


def unwritten(inputs: Inputs) -> None:
    inputs.out[-1, -1, -1] = float("nan")


@pytest.mark.parametrize("spoil", [one_head_off, unwritten])
def test_an_op_that_is_wrong_in_one_head_or_leaves_one_element_unwritten_prints_no_speed(
    spoil: Callable[[Inputs], None],
) -> None:
    (row,) = run(twin(spoil=spoil))
    assert (row.status, row.p50_us, row.percent_of_limit, row.tflops) == ("wrong", None, None, None)
    assert "allowed 0.003" in row.reason
    printed = report.case_block([row])
    assert "wrong: error" in printed and "µs" not in printed and "GB/s" not in printed


def test_one_flipped_bit_of_a_written_cache_is_wrong() -> None:
    problem = twin("kv_write-3q5s50-h6kv2d16-fp8")

    def flip(inputs: Inputs) -> None:
        slot = int(inputs.slot_mapping[7])
        problem.v_cache.view(torch.uint8)[slot // 16, 1, slot % 16, 3] ^= 1

    problem.spoil = flip
    (row,) = run(problem)
    assert row.status == "wrong" and row.error == 1 and row.p50_us is None


def test_an_op_that_is_right_once_and_wrong_as_it_is_timed_prints_no_speed() -> None:
    runs: list[int] = []

    def later(inputs: Inputs) -> None:
        runs.append(1)
        if len(runs) > 1:
            inputs.out.mul_(1.5)

    (row,) = run(twin(spoil=later))
    assert row.status == "wrong" and row.reason.startswith("as it was timed") and row.p50_us is None


def test_an_op_that_raises_is_a_row_and_baselines_still_run() -> None:
    problem = twin(spoil=lambda inputs: 1 / 0)
    problem.others = {"sdpa": partial(attention_baselines.sdpa, problem)}
    ours, sdpa = run(problem)
    assert (ours.status, ours.reason) == ("failed", "ZeroDivisionError: division by zero")
    assert sdpa.status == "ok" and sdpa.p50_us is not None and sdpa.ratio is None


def absent() -> Sequence[Call]:
    raise Absent("library X is not installed")


def raising() -> Sequence[Call]:
    raise RuntimeError("no kernel image\nsecond line")


def test_baselines_that_are_absent_raise_or_are_wrong_are_told_and_get_no_ratio() -> None:
    problem = twin()
    problem.others = {
        "sdpa": partial(attention_baselines.sdpa, problem),
        "absent": absent,
        "raising": raising,
        "wrong": lambda: [partial(torch.zeros, 3, 6, 16)],
    }
    rows = {row.implementation: row for row in run(problem)}
    assert rows[OURS].status == rows["sdpa"].status == "ok"
    assert rows["sdpa"].ratio == pytest.approx(rows["sdpa"].p50_us / rows[OURS].p50_us)  # type: ignore[operator]
    assert (rows["absent"].status, rows["absent"].reason) == ("absent", "library X is not installed")
    assert (rows["raising"].status, rows["raising"].reason) == ("failed", "RuntimeError: no kernel image")
    assert rows["wrong"].status == "wrong" and rows["wrong"].ratio is None
    printed = report.case_block(list(rows.values()))
    for text in ("absent: library X", "failed: RuntimeError", "wrong: error 1", "x ours"):
        assert text in printed


SMALL = (
    DECODE,
    "decode-3q1s50-w17-h6kv2d16-bf16-sink4",
    "verify-2q3s50-w17-h6kv2d16-fp8-perhead",
    "prefill-q40s70-w20-h4kv2d16-fp8-sinks",
)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", SMALL)
def test_sdpa_and_flex_attention_compute_what_the_reference_computes(name: str) -> None:
    problem = AttentionProblem(attention(name), "cpu")
    problem.make(2)
    for baseline in ("sdpa", "flex_attention"):
        if baseline == "sdpa" and problem.case.sinks:
            with pytest.raises(Absent, match="no learned sinks"):
                problem.baselines()[baseline]()
            continue
        calls = problem.baselines()[baseline]()
        assert len(calls) == 2
        # Probabilities rounded to bf16 before the second product: twice the rounding of a fused kernel at most.
        assert problem.check_baseline(calls[0]()).error < 6e-3


@pytest.mark.parametrize("cache", ["fp8", "bf16", "fp8-perhead"])
@pytest.mark.parametrize("op", ["kv_write", "rope_kv_write"])
def test_torchs_operations_write_the_references_bits(op: str, cache: str) -> None:
    problem = AttentionProblem(attention(f"{op}-3q5s50-h6kv2d16-{cache}"), "cpu")
    problem.make(2)
    problem.poison(None)
    assert not problem.check(problem.sets[0]).is_passed
    assert problem.check(problem.baselines()["torch"]()[0]()).is_passed


FFN_CASES = [
    (FfnCase("gate_up", 5, 256, 384), "torch_compile"),
    (FfnCase("gate_up", 5, 256, 384), "cublas"),
    (FfnCase("down", 5, 256, 384), "cublas"),
    (FfnCase("ffn", 3, 256, 128, count=3), "one_by_one_cublas"),
    (FfnCase("ffn", 3, 256, 128, count=3), "torch_compile"),
    (FfnCase("ffn", 3, 256, 128, count=3), "cublas"),
    (FfnCase("gate_up", 16, 256, 384, "fp8_tensor"), "scaled_mm"),
    (FfnCase("gate_up", 16, 256, 384, "fp8_channel"), "scaled_mm"),
    (FfnCase("down", 16, 256, 384, "fp8_channel"), "scaled_mm"),
]


@pytest.mark.parametrize(("case", "baseline"), FFN_CASES, ids=lambda value: getattr(value, "name", value))
def test_ffn_baselines_compute_what_the_reference_computes(case: FfnCase, baseline: str) -> None:
    problem = FfnProblem(case, "cpu")
    problem.make(2)
    check = problem.check_baseline(problem.baselines()[baseline]()[0]())
    # bf16 rounding; an e4m3 result is off by 2⁻⁴ at most, about 2.6 % in the mean.
    assert check.error < (0.04 if case.precision == "fp8_tensor" else 0.01)
    assert problem.check(problem.torch_bf16(problem.sets[0])).is_passed


def test_the_ceilings_are_measured_and_a_card_without_fp8_products_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    found = measure_ceilings(wall_clock_timer, "cpu", copy_bytes=1 << 16, side=64)
    assert min(found.copy, found.read, found.matmul_bf16, found.flops("fp8")) > 0

    def refuses(*_arguments: Any, **_options: Any) -> torch.Tensor:
        raise RuntimeError("needs compute capability 8.9")

    monkeypatch.setattr(torch, "_scaled_mm", refuses)
    without = measure_ceilings(wall_clock_timer, "cpu", copy_bytes=1 << 16, side=64)
    assert without.matmul_fp8 is None and "8.9" in without.notes
    with pytest.raises(ValueError, match="found none"):
        without.flops("fp8")
