"""The child that measures an engine: real engines on a CPU, counts exact, times that agree with each other."""

from __future__ import annotations

import io
import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import families
import pytest
from vllm_puzzle.model_configs.schema import ConfigError
from vllm_puzzle.serving import engine_load, engine_measurement
from vllm_puzzle.serving.engine_load import Load, Step, steady_part

POCKET = Path(engine_measurement.__file__).resolve().parent.parent / "model_configs" / "pocket" / "puzzle"
COMMAND = [sys.executable, "-P", "-m", "vllm_puzzle.serving.engine_measurement"]
ENGINE = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256, "max_num_seqs": 8, "block_size": 32}
WARM_UP = {"input_len": 99, "output_len": 13, "num_requests": 7, "max_concurrency": 3, "seed": 5}
CROWDED = {"input_len": 17, "output_len": 180, "num_requests": 8, "max_concurrency": 8, "seed": 1}
ROUTING = {"routing": {"num_tokens": 7, "seed": 2}}


def start(folder: Path, model: Path, engine: dict[str, Any], *lines: dict[str, Any]) -> Any:
    """A child that reads these lines. Files, not pipes: nobody reads its log until it has ended."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    folder.mkdir()
    said = [json.dumps(line) for line in ({"model": str(model), "engine": engine}, *lines)]
    (folder / "in").write_text("".join(line + "\n" for line in said))
    with open(folder / "in") as stdin, open(folder / "out", "w") as stdout, open(folder / "err", "w") as stderr:
        return subprocess.Popen(COMMAND, env=environment, stdin=stdin, stdout=stdout, stderr=stderr)


def finish(folder: Path, child: Any) -> SimpleNamespace:
    try:
        status = child.wait(timeout=180)
    finally:
        child.kill()
    lines = [json.loads(line) for line in (folder / "out").read_text().splitlines()]
    return SimpleNamespace(status=status, lines=lines, log=(folder / "err").read_text())


@pytest.fixture(scope="module")
def children(tmp_path_factory: pytest.TempPathFactory) -> dict[str, SimpleNamespace]:
    """Both children, side by side: one ends by a bad line, one by the end of its input.

    The second serves gpt-oss with experts that differ by layer, on vLLM's dummy weights.
    """
    folder = tmp_path_factory.mktemp("children")
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(families.FAMILIES["gpt_oss"]))
    cache, dummy = {"kv_cache_memory_bytes": 3 << 20}, {"kv_cache_memory_bytes": 1 << 26, "load_format": "dummy"}
    one = {"input_len": 3, "output_len": 1, "num_requests": 5, "max_concurrency": 2}
    lines = WARM_UP, WARM_UP, one, CROWDED, WARM_UP | {"output_len": 250}
    started = {
        "load": start(folder / "load", POCKET, ENGINE | cache, *lines),
        "routing": start(folder / "routing", folder / "model", ENGINE | dummy, ROUTING, {"weights": "even"}, ROUTING),
    }
    return {name: finish(folder / name, child) for name, child in started.items()}


@pytest.mark.slow
def test_the_capacity_is_what_vllm_printed(children: dict[str, SimpleNamespace]) -> None:
    ready = children["load"].lines[0]
    pattern = r"KV cache size: ([\d,]+) tokens, Maximum concurrency for ([\d,]+) tokens per request: ([\d.]+)x"
    ((tokens, length, times),) = re.findall(pattern, children["load"].log)
    assert (ready["event"], ready["kv_capacity_tokens"]) == ("ready", int(tokens.replace(",", "")))
    assert (ready["max_model_len"], f"{ready['max_concurrency']:.2f}") == (int(length), times)
    assert ready["kv_capacity_tokens"] == int(ready["max_concurrency"] * ready["max_model_len"])


@pytest.mark.slow
def test_the_child_says_what_it_measures_with(children: dict[str, SimpleNamespace]) -> None:
    import torch

    ready = children["load"].lines[0]
    assert ready["model_class"] == "PuzzleForCausalLM"
    config = json.loads((POCKET / "config.json").read_text())
    num_attentions = sum(not block["attention"]["no_op"] for block in config["block_configs"])
    assert sum(ready["attention_backends"].values()) <= num_attentions
    assert set(ready["attention_backends"]) == {"CPU_ATTN"}
    assert ready["versions"]["torch"] == torch.__version__
    assert "cores" in ready["card"]
    assert ready["weights_bytes"] is None  # vLLM's CPU runner does not measure them
    assert 0 < ready["import_s"] < ready["start_s"] < 180
    assert ready["memory_bytes"] > 2**27  # torch and vLLM alone are larger


@pytest.mark.slow
def test_counts_are_exact_and_throughput_times_time_is_tokens(children: dict[str, SimpleNamespace]) -> None:
    cases = [line for line in children["load"].lines if line["event"] == "case"]
    assert [case["output_tokens"] for case in cases] == [7 * 13, 7 * 13, 5, 8 * 180]
    assert [case["input_tokens"] for case in cases] == [7 * 99, 7 * 99, 5 * 3, 8 * 17]
    for case in cases:
        for rate, amount in (
            ("output_throughput", case["output_tokens"]),
            ("total_token_throughput", case["input_tokens"] + case["output_tokens"]),
            ("request_throughput", case["num_requests"]),
        ):
            assert case[rate] * case["duration_s"] == pytest.approx(amount, rel=1e-12)
        if case["steady_s"] is not None:
            assert case["steady_output_throughput"] * case["steady_s"] == pytest.approx(case["steady_output_tokens"])
            assert case["steady_s"] < case["duration_s"]
    # Seven requests three at a time: the steady part lacks the first step's 3 tokens and the last request's 13.
    assert cases[1]["steady_output_tokens"] == 7 * 13 - 3 - 13
    assert (cases[1]["max_running"], cases[1]["num_preempted"]) == (3, 0)


@pytest.mark.slow
def test_times_of_requests_agree_with_each_other(children: dict[str, SimpleNamespace]) -> None:
    _, first, second, single, crowded, _ = children["load"].lines
    for case in (first, second, crowded):
        assert 0 < case["ttft_s"]["mean"] <= case["e2e_s"]["mean"] <= case["duration_s"]
        assert all(case[name]["p50"] <= case[name]["p99"] for name in ("ttft_s", "tpot_s", "e2e_s", "queue_s"))
        # Two clocks: vLLM's engine stamps tokens, its front end arrivals and ends; a step apart at most.
        by_token = case["ttft_s"]["mean"] + case["tpot_s"]["mean"] * (case["output_len"] - 1)
        assert by_token == pytest.approx(case["e2e_s"]["mean"], rel=0.1, abs=0.02)
    assert single["tpot_s"] is None  # one token has no time between tokens


@pytest.mark.slow
def test_the_same_prompts_again_hit_no_prefix(children: dict[str, SimpleNamespace]) -> None:
    _, first, second, *_ = children["load"].lines
    assert (first["event"], second["event"]) == ("case", "case")  # a hit would be an error
    assert first["seed"] == second["seed"]
    assert "enable_prefix_caching=True" in children["load"].log  # and it would take 64 tokens of each prompt


@pytest.mark.slow
def test_more_requests_than_the_cache_holds_are_preempted_and_counted(children: dict[str, SimpleNamespace]) -> None:
    ready, _, _, _, crowded, _ = children["load"].lines
    assert ready["kv_capacity_tokens"] < 8 * 197
    assert crowded["num_preempted"] > 0
    assert crowded["max_waiting"] > 0
    assert 0.8 < crowded["max_kv_cache_usage"] <= 1


@pytest.mark.slow
def test_a_bad_case_ends_the_child_with_one_line(children: dict[str, SimpleNamespace]) -> None:
    assert children["load"].status == 1
    assert children["load"].lines[-1] == {
        "event": "error",
        "message": "case: found input_len + output_len = 349, allowed: up to max_model_len 256",
    }


@pytest.mark.slow
def test_dummy_weights_route_every_token_alike_until_they_are_evened(children: dict[str, SimpleNamespace]) -> None:
    ready, dummy, _, even = children["routing"].lines
    assert (children["routing"].status, ready["model_class"]) == (0, "PuzzleForCausalLM")
    sizes = {0: (8, 4), 1: (4, 4), 3: (8, 2), 4: (8, 4)}  # experts, of which a token takes; layer 2 has none
    for answer in (dummy, even):
        layers = {int(row["layer"].split(".")[2]): row for row in answer["layers"]}
        assert {layer: (row["num_experts"], row["experts_per_token"]) for layer, row in layers.items()} == sizes
        for row in layers.values():
            num_experts, top_k = row["num_experts"], row["experts_per_token"]
            assert row["num_steps"] >= 8
            assert row["coverage_if_uniform"] == pytest.approx(1 - (1 - top_k / num_experts) ** 7)
            if answer is dummy or top_k == num_experts:  # the same experts for all, exactly
                assert (row["experts_touched"], row["coverage"]) == (top_k, top_k / num_experts)
                assert row["max_load_share"] == pytest.approx(1 / top_k)
                assert row["load_entropy"] == pytest.approx(math.log(top_k) / math.log(num_experts))
            else:  # seven tokens of a vocabulary of 97, nine steps: within a tenth of an even choice
                assert row["coverage"] == pytest.approx(row["coverage_if_uniform"], abs=0.1)
                assert row["load_entropy"] > 0.9


def test_weights_of_a_checkpoint_are_left_alone() -> None:
    engine = SimpleNamespace(vllm_config=SimpleNamespace(load_config=SimpleNamespace(load_format="auto")))
    with pytest.raises(ConfigError, match=r"^weights: found 'even' with load_format auto, allowed: 'even' with"):
        engine_measurement._even_weights(engine, "even")


def test_routing_of_given_choices_is_what_a_hand_counts() -> None:
    import torch
    from vllm_puzzle.serving.engine_routing import RoutingWatch

    watch = RoutingWatch(3)
    for chosen in ([[0, 1], [1, 2], [1, 0]], [[4, 3], [3, 4], [4, 3]], [[0, 1]]):  # the last has another size
        watch.see("layers.7.experts", 6, torch.tensor(chosen, dtype=torch.int32))
    (row,) = watch.described()
    assert (row["num_steps"], row["experts_touched"], row["coverage"]) == (2, 2.5, 2.5 / 6)
    assert row["max_load_share"] == 3 / 12
    # Loads 2, 3, 1, 3, 3, 0 of 12: -Σ p log p = (2 log 6 + 9 log 4 + log 12) / 12, over log 6.
    expected = (2 * 1.791759469 + 9 * 1.386294361 + 2.484906650) / 12 / 1.791759469
    assert row["load_entropy"] == pytest.approx(expected, rel=1e-8)


def step(time_s: float, tokens: int, first: int = 0, ends: int = 0) -> Step:
    return Step(time_s, tokens, first, ends, 0, 0, 0.0)


def test_the_steady_part_begins_with_the_last_first_token_and_ends_with_an_end_without_successor() -> None:
    steps = [
        step(1.0, 1, first=1), step(2.0, 2, first=1), step(4.0, 2, ends=1), step(5.0, 2, first=1), step(8.0, 2, ends=1),
        step(9.0, 1, ends=1),
    ]  # fmt: skip
    # Two at a time, three in all: from 2.0 to the second end at 8.0, which nobody follows.
    assert steady_part(steps, 3, 2) == (6, 6.0)
    # One at a time: from the first token at 1.0 to the third end.
    assert steady_part(steps, 3, 1) == (9, 8.0)


def test_the_steady_part_begins_with_an_end_where_prompts_are_long_and_may_be_empty() -> None:
    steps = [step(1.0, 1, first=1), step(3.0, 2, first=1, ends=1), step(4.0, 2, first=1, ends=1), step(6.0, 1, ends=3)]
    assert steady_part(steps, 5, 3) == (3, 3.0)
    assert steady_part(steps[:2], 3, 3) is None  # its only wave begins to end before the last prompt is read
    assert steady_part([], 3, 3) is None


def test_time_per_token_leaves_out_the_first_token() -> None:
    stats = SimpleNamespace(
        first_token_latency=0.25, first_token_ts=10.0, last_token_ts=11.0, num_generation_tokens=5, scheduled_ts=9.5,
        queued_ts=9.25, num_preemptions=2,
    )  # fmt: skip
    output = SimpleNamespace(outputs=[SimpleNamespace(token_ids=[0] * 5)], metrics=stats, num_cached_tokens=None)
    recorder = engine_load.StepRecorder()
    recorder.steps, recorder.ends = [step(1.0, 5, 1, 1)], [SimpleNamespace(e2e_latency=1.25)]
    load = Load(3, 5, 1, 1)
    result = engine_load._result(load, [output], recorder, 2.0)
    assert result["tpot_s"] == {"mean": 0.25, "p50": 0.25, "p99": 0.25}
    assert (result["queue_s"]["mean"], result["num_preempted"], result["output_throughput"]) == (0.25, 2, 2.5)
    with pytest.raises(RuntimeError, match=r"found 5 tokens in the replies and 5 in the engine's steps, allowed: 6"):
        engine_load._result(replace(load, output_len=6), [output], recorder, 2.0)


def test_prompts_differ_from_each_other_and_repeat_by_seed() -> None:
    load = Load(16, 1, 300, 1, seed=3)
    prompts = load.prompts(97)
    assert len({tuple(prompt) for prompt in prompts}) == 300
    assert {len(prompt) for prompt in prompts} == {16}
    assert {token for prompt in prompts for token in prompt} == set(range(97))
    assert prompts == load.prompts(97) != replace(load, seed=4).prompts(97)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"^line: found '\{', allowed: a JSON object$"),
        ("[1]", r"^line: found '\[1\]', allowed: a JSON object$"),
        ("{}", "^first line: found keys none, allowed: model and engine$"),
        ('{"model": "", "engine": {}}', "^first line, key `model`: found '', allowed: a folder or a name on the hub$"),
        ('{"model": "m", "engine": 3}', "^first line, key `engine`: found 3, allowed: an object of LLM's arguments$"),
        ('{"model": "m", "engine": {"disable_log_stats": 1}}', "^first line, key `engine`: found disable_log_stats, "),
    ],
)
def test_a_bad_first_line_is_refused_before_vllm_is_imported(line: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        engine_measurement.answer_lines(io.StringIO(line + "\n"), io.StringIO())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output_len": 0}, "^case, key `output_len`: found 0, allowed: an integer from 1 to"),
        ({"input_len": True}, "^case, key `input_len`: found True, allowed: an integer"),
        ({"seed": -1}, "^case, key `seed`: found -1, allowed: an integer from 0 to"),
        ({"temperature": "hot"}, "^case, key `temperature`: found 'hot', allowed: a number from 0 to 10$"),
        ({"max_concurrency": 8}, "^case, key `max_concurrency`: found 8, allowed: up to num_requests 7$"),
        ({"speed": 1}, "^case: found key `speed`, allowed: input_len, output_len"),
    ],
)
def test_a_bad_case_is_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Load.from_line(WARM_UP | changes)


def test_an_incomplete_case_names_what_is_missing() -> None:
    with pytest.raises(ConfigError, match=r"^case, key `num_requests`: found nothing, allowed: an integer"):
        Load.from_line({"input_len": 1, "output_len": 1, "max_concurrency": 1})


@pytest.mark.parametrize(("text", "status"), [("nonsense\n", 1), ("", 0)])
def test_a_child_without_an_engine_ends_at_once(text: str, status: int) -> None:
    done = subprocess.run(COMMAND, input=text, capture_output=True, text=True, timeout=60)
    assert done.returncode == status
    expected = [{"event": "error", "message": "line: found 'nonsense', allowed: a JSON object"}] if status else []
    assert [json.loads(line) for line in done.stdout.splitlines()] == expected
