"""Budgets in vLLM's V2 model runner, with the pocket model: the machine's own token sequences, drafts or not.

On a CPU the runner runs under Triton's interpreter (see v2_run.py), on a GPU compiled.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from vllm_puzzle.bench.pocket_tasks import heldout
from vllm_puzzle.kernels import thinking
from vllm_puzzle.kernels.thinking import LoopRule, ThinkingLimits, ThinkingMachine, ThinkingMarkers
from vllm_puzzle.serving.thinking_plan import markers_to_wire

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
MODEL = HERE.parent.parent / "model_configs" / "pocket" / "puzzle"
START, END, PHRASE, SEMICOLON = 261, 262, tuple(b"ok."), ord(";")
MARKERS = ThinkingMarkers((START,), ((END,),), (END,), PHRASE, frozenset({SEMICOLON, ord("\n")}))
PLANS: list[dict[str, Any] | None] = [
    {"budget": 0, "grace": 0, "loop": None},
    {"budget": 5, "grace": 0, "loop": None},
    {"budget": 9, "grace": 0, "loop": None},
    None,
    {"budget": 17, "grace": 12, "loop": None},
    {"budget": None, "grace": 0, "loop": [1, 8, 2]},
    {"budget": 1000, "grace": 0, "loop": None},
]
DRAFTS = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 1, "prompt_lookup_max": 3}
ENGINES: dict[str, dict[str, Any]] = {  # the last one also cuts prompts into chunks
    "plain": {"max_num_seqs": 7},
    "drafts": {"max_num_seqs": 7, "speculative_config": DRAFTS},
    "preempted": {"max_num_seqs": 7, "block_size": 16, "num_gpu_blocks_override": 22, "max_num_batched_tokens": 32},
}


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    questions = [item.question for item in heldout(2026, 1) if item.level >= 5]
    text = [
        tokenizer.apply_chat_template([{"role": "user", "content": q}], tokenize=False, add_generation_prompt=True)
        for q in questions
    ]
    return [tokenizer.encode(line, add_special_tokens=False) for line in text[: 2 * len(PLANS)]]


def jobs(prompts: list[list[int]], runner: str, engines: list[str]) -> list[dict[str, Any]]:
    # Two rounds: the second one's requests come into slots that others left.
    rounds = [
        [{"prompt": p, "max_tokens": 90} | ({} if plan is None else {"plan": plan})
         for p, plan in zip(prompts[first:], plans, strict=False)]
        for first, plans in ((0, PLANS), (len(PLANS), PLANS[::-1]))
    ]  # fmt: skip
    common = {"runner": runner, "markers": markers_to_wire(MARKERS), "rounds": rounds}
    found = [common | {"llm": {"model": str(MODEL)} | ENGINES[name]} for name in engines]
    if runner == "2":
        free = [[{"prompt": p, "max_tokens": 90} for p in prompts[:5]]]
        found.append(common | {"llm": {"model": str(MODEL), "max_num_seqs": 7}, "rounds": free, "close_after": 6})
        found.append(common | {"llm": {"model": str(MODEL), "max_num_seqs": 7}, "rounds": free})
    return found


def run(jobs: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    path = folder / "jobs.json"
    path.write_text(json.dumps(jobs))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_")}
    done = subprocess.run(
        [sys.executable, "-P", str(HERE / "v2_run.py"), str(path)],
        env=environment, capture_output=True, text=True, timeout=550,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def v2(prompts: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    names = list(ENGINES)
    found = run(jobs(prompts, "2", names), tmp_path_factory.mktemp("v2"))
    return dict(zip([*names, "closed", "free"], found, strict=True))


@pytest.fixture(scope="module")
def v1(prompts: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(jobs(prompts, "1", ["plain"]), tmp_path_factory.mktemp("v1"))[0]


def limits(plan: dict[str, Any] | None) -> ThinkingLimits:
    if plan is None:
        return ThinkingLimits()
    return ThinkingLimits(plan["budget"], plan["grace"], plan["loop"] and LoopRule(*plan["loop"]))


def requests(prompts: list[list[int]], result: dict[str, Any]) -> list[tuple[list[int], ThinkingLimits, list[int]]]:
    plans = [*PLANS, *PLANS[::-1]]
    tokens = [tokens for tokens_of_round in result["rounds"] for tokens in tokens_of_round]
    return [(p, limits(plan), t) for p, plan, t in zip(prompts, plans, tokens, strict=False)]


def test_it_is_the_v2_runner_with_our_class_and_the_events_happened(v2: dict[str, dict[str, Any]]) -> None:
    for name in ENGINES:
        assert v2[name]["is_v2"] and v2[name]["budgets"] == "DeviceThinkingBudgets", name
    assert v2["drafts"]["accepted"] > 20
    assert v2["preempted"]["preemptions"] > 0


@pytest.mark.parametrize("name", ENGINES)
def test_every_forced_token_came_and_no_budget_was_passed(
    v2: dict[str, dict[str, Any]], prompts: list[list[int]], name: str
) -> None:
    reasons = set()
    for prompt, allowed, tokens in requests(prompts, v2[name]):
        machine = ThinkingMachine.after_prompt(MARKERS, allowed, prompt)
        for token in tokens:
            assert machine.forced in (None, token)
            machine.feed([token])
        assert machine.num_thinking <= (machine.num_tokens if allowed.budget is None else allowed.budget)
        reasons.add(machine.reason)
    assert reasons >= {"natural", "budget"}


@pytest.mark.parametrize("name", ["drafts", "preempted"])
def test_drafts_and_preemption_change_no_token(v2: dict[str, dict[str, Any]], name: str) -> None:
    assert v2[name]["rounds"] == v2["plain"]["rounds"]


def test_both_runners_give_the_same_tokens(v1: dict[str, Any], v2: dict[str, dict[str, Any]]) -> None:
    assert not v1["is_v2"]
    assert v1["rounds"] == v2["plain"]["rounds"]


def test_a_request_without_limits_says_what_it_says_among_others_without_limits(
    v2: dict[str, dict[str, Any]],
) -> None:
    index = PLANS.index(None)
    assert v2["plain"]["rounds"][0][index] == v2["free"]["rounds"][0][index]


def test_a_user_ends_open_thoughts_of_requests_without_limits(
    v2: dict[str, dict[str, Any]], prompts: list[list[int]]
) -> None:
    phrase = [*PHRASE, END]
    for prompt, closed, free in zip(prompts, v2["closed"]["rounds"][0], v2["free"]["rounds"][0], strict=False):
        cut = next(at for at, (a, b) in enumerate(zip(closed, free, strict=False)) if a != b)
        assert closed[cut : cut + len(phrase)] == phrase and cut in (5, 6, 7)
        machine = ThinkingMachine.after_prompt(MARKERS, ThinkingLimits(), prompt)
        machine.feed(closed[:cut])
        machine.close(thinking.USER)
        machine.feed(closed[cut:])
        assert machine.reason == "user" and machine.num_answer > 0
