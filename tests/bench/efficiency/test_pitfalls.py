"""Pitfalls of benchmarks of reasoning models that a metric or a comparison alone decides. In each test a common way of
computing the figure is wrong, shown beside the right one.
"""

from __future__ import annotations

import math
from pathlib import Path
from statistics import mean

import numpy as np
import pytest
from hand_made import NO_ANSWER, NOTHING, batches, lasting, made, window, write_run
from vllm_puzzle.bench.efficiency.compare import compare
from vllm_puzzle.bench.efficiency.facts import RunFacts, Window
from vllm_puzzle.bench.efficiency.metrics import compute
from vllm_puzzle.bench.efficiency.metrics_rate import relative_rate
from vllm_puzzle.bench.efficiency.percentile import percentile
from vllm_puzzle.bench.efficiency.record import CORRECT, DRAIN, WARM_UP, WRONG
from vllm_puzzle.bench.efficiency.resampling import Interval
from vllm_puzzle.bench.efficiency.slo import Slo
from vllm_puzzle.bench.efficiency.uncertainty import BETTER, INCONCLUSIVE, accuracy_difference, verdict
from vllm_puzzle.model_configs.schema import ConfigError


def two_runs(tmp_path: Path, changes: dict[str, object], **record: object) -> list[str]:
    """Two equal runs of a hundred questions, of which the second is changed."""
    plain = batches([CORRECT] * 100, 4, 1.0)
    other = [made(**{name: getattr(one, name) for name in one.__slots__} | record) for one in plain]
    facts = window(0.0, 25.0, num_gpus=1)
    write_run(tmp_path / "a", plain, facts)
    write_run(tmp_path / "b", other, facts, **changes)
    return [str(tmp_path / "a"), str(tmp_path / "b")]


def test_1_speed_and_accuracy_of_different_questions_are_not_joined(tmp_path: Path) -> None:
    folders = two_runs(tmp_path, {}, task="other")
    with pytest.raises(ConfigError, match="questions: 200 were not asked as often"):
        compare(folders)


def test_1_speed_and_accuracy_of_different_task_versions_are_not_joined(tmp_path: Path) -> None:
    folders = two_runs(tmp_path, {"tasks": [{"name": "sums", "hash": "2e"}]})
    with pytest.raises(ConfigError, match="tasks: A has"):
        compare(folders)


@pytest.mark.parametrize("holder", ["sampling", "fields"])
def test_2_replies_of_a_fixed_length_hide_what_a_model_saves(tmp_path: Path, holder: str) -> None:
    plain = batches([CORRECT] * 100, 4, 1.0)
    for name in "ab":
        write_run(tmp_path / name, plain, window(0.0, 25.0), **{holder: {"ignore_eos": True}})
    with pytest.raises(ConfigError, match="ignore_eos: found true, allowed: replies that end by themselves"):
        compare([str(tmp_path / "a"), str(tmp_path / "b")])
    # Told to end by themselves, a model of half the words serves twice the requests at the same tokens/s.
    long = [lasting(0.0, 8.0, output_tokens=800), lasting(8.0, 8.0, output_tokens=800)]
    short = [lasting(4.0 * turn, 4.0, output_tokens=400) for turn in range(4)]
    facts = window(0.0, 16.0)
    assert compute("output_throughput", long, facts) == compute("output_throughput", short, facts) == 100.0
    assert relative_rate(short, facts, long, facts).direct == 2.0


def test_3_an_arm_that_never_answers_its_hard_questions_does_not_wait_less() -> None:
    honest = [lasting(0.0, 4.0)] * 80 + [lasting(0.0, 40.0)] * 20
    silent = [lasting(0.0, 4.0)] * 80 + [made(outcome="truncated", **NO_ANSWER)] * 20
    naive = [
        percentile([one.first_answer - one.start for one in run if one.first_answer is not None], 90)
        for run in (honest, silent)
    ]
    assert naive == [10.0, 1.0], "dropped, ten times as fast"
    facts = window(0.0, 64.0)
    assert [compute("ttfat_p90", run, facts) for run in (honest, silent)] == [10.0, math.inf]
    assert [compute("ttfat_p50", run, facts) for run in (honest, silent)] == [1.0, 1.0]


def test_3_an_arm_that_breaks_off_is_not_more_accurate() -> None:
    honest = [lasting(0.0, 4.0)] * 60 + [lasting(0.0, 4.0, outcome=WRONG)] * 40
    silent = [lasting(0.0, 4.0)] * 55 + [made(outcome="truncated", **NO_ANSWER)] * 45
    facts = window(0.0, 64.0)
    graded = [compute("accuracy_given_completion", run, facts) for run in (honest, silent)]
    assert graded == [0.6, 1.0], "of what was graded, better"
    assert [compute("accuracy", run, facts) for run in (honest, silent)] == [0.6, 0.55]


def test_3_a_server_that_refuses_late_requests_has_no_more_goodput() -> None:
    slow = [lasting(0.0, 2.0)] * 6 + [lasting(0.0, 8.0)] * 4
    dropping = [lasting(0.0, 2.0)] * 6 + [made(outcome="error", **NOTHING)] * 4
    facts = window(0.0, 16.0, slo=Slo(e2e=4.0))
    served = [[one for one in run if one.last is not None] for run in (slow, dropping)]
    assert [mean(one.last - one.start <= 4.0 for one in run) for run in served] == [0.6, 1.0], "of what was served"
    assert [compute("slo_attainment", run, facts) for run in (slow, dropping)] == [0.6, 0.6]
    assert [compute("goodput", run, facts) for run in (slow, dropping)] == [6 / 16, 6 / 16]


def test_4_a_chunk_is_not_a_token() -> None:
    # 40 tokens in ten chunks of four, a quarter of a second apart: nine gaps for 36 tokens.
    record = made(first_answer=2.75, last_answer=5.0, last=5.0, answer_tokens=40, first_answer_tokens=4, chunks=10)
    naive = 2.25 / 9, 2.25 / 39
    assert compute("tpot_answer_mean", [record], window()) == 2.25 / 36 == 0.0625
    assert naive[0] == 4 * 0.0625, "per chunk: four times as slow"
    assert naive[1] < 0.0625, "per token after the first: faster than it was, by the rest of the first chunk"


def test_4_the_first_token_of_a_thought_is_the_first_token() -> None:
    record = made()
    assert compute("ttft_p50", [record], window()) == 0.5
    assert compute("ttfat_p50", [record], window()) == 3.0, "what a tool without the reasoning field calls TTFT"


def test_4_a_client_that_sends_late_hides_nothing() -> None:
    # One request a second; the server stalls for eight seconds, and the client sends what was due when it is through.
    run = [lasting(max(float(due), 8.0), 0.5, scheduled=float(due)) for due in range(16)]
    naive = percentile([one.last - one.sent for one in run], 90)
    assert naive == 0.5, "from sending on, nobody waited"
    assert compute("e2e_p90", run, window(0.0, 16.0)) == 7.5
    assert compute("queue_delay_max", run, window(0.0, 16.0)) == 8.0


def test_5_a_prefix_cache_that_only_one_arm_had_is_noticed(tmp_path: Path) -> None:
    folders = two_runs(tmp_path, {}, cached_tokens=60)
    with pytest.raises(ConfigError, match="prefix cache: 25% of A's prompt tokens came from it, 94% of B's"):
        compare(folders)


def test_6_arms_under_different_loads_are_not_compared(tmp_path: Path) -> None:
    # In a closed loop the arm that thinks less sets itself a higher rate; at that rate it is not the other's equal.
    folders = two_runs(tmp_path, {"load": {"kind": "poisson", "rate": 4.0}})
    with pytest.raises(ConfigError, match=r'load: A has \{"concurrency":4,"kind":"closed"\}, B has'):
        compare(folders)


def test_7_a_straggler_does_not_decide_the_throughput() -> None:
    # Four at a time, a second each, for ten seconds; one of the last runs for ten seconds alone.
    run = batches([CORRECT] * 40, 4, 1.0)
    run[-1] = lasting(9.0, 11.0, phase=DRAIN, question="q0039")
    naive = len(run) / max(one.done for one in run)
    assert naive == 2.0, "by wall time, half of what was served"
    facts = window(0.0, 9.0)
    assert compute("request_throughput", run, facts) == 4.0
    assert compute("e2e_max", run, facts) == 11.0, "and yet it is not forgotten"
    assert compute("drain_time", run, facts) == 11.0
    assert compute("issued", run, facts) == 40


def test_7_what_was_in_flight_when_the_window_began_makes_up_for_what_was_when_it_ended() -> None:
    # Requests of eight seconds, one sent each second; a window of twelve seconds. One ends each second.
    run = [lasting(float(sent), 8.0, phase=WARM_UP if sent < 12 else "steady") for sent in range(40)]
    begun_inside = sum(12 < one.done <= 24 and one.sent >= 12 for one in run)
    assert begun_inside / 12 < 0.5, "what began and ended inside: less than half"
    assert compute("request_throughput", run, window(12.0, 24.0)) == 1.0


def test_7_twenty_questions_prove_no_difference_of_ten_points() -> None:
    columns = np.ones((20, 4))
    columns[:4, 0], columns[4:6, 2] = 0, 0  # A 80 %, B 90 %
    found = accuracy_difference(columns)
    assert found.estimate == pytest.approx(0.1)
    assert verdict(found, 0.01) == INCONCLUSIVE


def test_7_pairing_finds_what_unpaired_intervals_cannot() -> None:
    columns = np.ones((400, 4))
    columns[:160, [0, 2]] = 0
    columns[160:184, 0] = 0  # B is right on 24 of those on which A is not, and wrong on 4 that A knows
    columns[184:188, 2] = 0
    shares = columns[:, 0].mean(), columns[:, 2].mean()
    half = 1.96 * math.sqrt(sum(share * (1 - share) for share in shares) / 400)
    unpaired = Interval(shares[1] - shares[0], shares[1] - shares[0] - half, shares[1] - shares[0] + half)
    assert verdict(unpaired, 0.01) == INCONCLUSIVE
    assert verdict(accuracy_difference(columns), 0.01) == BETTER


def test_7_all_blocks_count_and_not_the_best() -> None:
    facts = RunFacts((Window(0.0, 8.0, 0), Window(0.0, 8.0, 1), Window(0.0, 8.0, 2)), num_gpus=1)
    run = [lasting(0.0, 4.0, block=block) for block, count in ((0, 4), (1, 8), (2, 6)) for _ in range(count)]
    best = max(sum(one.block == block for one in run) / 8 for block in range(3))
    assert (best, compute("request_throughput", run, facts)) == (1.0, 0.75)


def test_8_tokens_per_second_fall_while_a_right_answer_gets_cheaper() -> None:
    # Half the thinking: prefill weighs more, so tokens/s fall, and yet each answer takes two thirds of the machine.
    long = [lasting(3.0 * turn, 3.0, output_tokens=600) for turn in range(4)]
    short = [lasting(2.0 * turn, 2.0, output_tokens=300) for turn in range(6)]
    facts = window(0.0, 12.0, num_gpus=1)
    throughput = [compute("output_throughput", run, facts) for run in (long, short)]
    per_correct = [compute("gpu_s_per_correct", run, facts) for run in (long, short)]
    assert throughput == [200.0, 150.0] and per_correct == [3.0, 2.0]
    found = relative_rate(short, facts, long, facts)
    assert (found.throughput, found.verbosity, found.quotient, found.direct) == (0.75, 0.5, 1.5, 1.5)


def test_9_a_server_that_counts_no_thinking_tokens_does_not_think_for_nothing() -> None:
    run = [made(thinking_tokens=0, budget=8)]
    facts = window()
    names = ("thinking_tokens_mean", "thinking_share_mean", "tpot_thinking_mean", "budget_over", "budget_excess_max")
    assert {compute(name, run, facts) for name in names} == {None}, "0 would be the best value of each"
    off = [lasting(0.0, 4.0, thinking_tokens=0)]
    assert compute("thinking_tokens_mean", off, facts) == 0


def test_9_tokens_of_wrong_and_broken_replies_are_part_of_what_a_right_one_costs() -> None:
    run = [lasting(0, 1, output_tokens=100), lasting(0, 1, output_tokens=700, outcome="truncated")]
    assert mean(one.output_tokens for one in run if one.is_correct) == 100, "of the right ones alone"
    assert compute("tokens_per_correct", run, window()) == 800


def test_10_other_sampling_parameters_are_a_hidden_lever(tmp_path: Path) -> None:
    folders = two_runs(tmp_path, {"sampling": {"temperature": 0.6}})
    with pytest.raises(ConfigError, match=r'sampling: A has \{"temperature":0\}, B has \{"temperature":0\.6\}'):
        compare(folders)
