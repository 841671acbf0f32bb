"""Cases for the thinking tests on the real engine, and the one process that runs them all."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import scripted_model
from scripted_model import CALL, SHUT, THINK, encode, prompt
from vllm_puzzle.kernels.thinking import ThinkingMarkers
from vllm_puzzle.serving.thinking_plan import PLAN_KEY, markers_to_wire

RUNNER = Path(__file__).with_name("thinking_run.py")
NO_PLUGINS = "none"  # a name that no plugin has
LLM: dict[str, Any] = {"max_model_len": 1024, "max_num_seqs": 24}
# The n-gram drafter comes last: with numba in the process, vLLM's CPU build starts no further engine (0.32).
ENGINES: dict[str, dict[str, Any]] = {
    # Each request has 13 blocks at its first token, 14 from its 33rd: not all of the eight in the cache can grow.
    "preempted": LLM
    | {"max_num_seqs": 8, "block_size": 32, "num_gpu_blocks_override": 107, "enable_prefix_caching": False},
    "plain": LLM,
    "drafts and chunks": LLM
    | {
        "speculative_config": {
            "method": "ngram",
            "num_speculative_tokens": 4,
            "prompt_lookup_min": 1,
            "prompt_lookup_max": 3,
        },
        "max_num_batched_tokens": 136,
    },
}
SINGLE = ThinkingMarkers((THINK,), ((SHUT,),), (SHUT,))
MULTI = ThinkingMarkers(tuple(encode("([")), (tuple(encode("])~")),), tuple(encode("])~")))
RICH = ThinkingMarkers(
    (THINK,), ((SHUT,),), (SHUT,), tuple(encode("~~")), frozenset(encode("\n")), tool_starts=((CALL,),)
)
SHORT = ThinkingMarkers((THINK,), ((SHUT,),), (SHUT,), tuple(encode("~")), tool_starts=((CALL,),))
MARKERS = {"single": SINGLE, "multi": MULTI, "rich": RICH, "short": SHORT}
ROUNDS = list(MARKERS)
ANSWER = "XYZ<|end|>"
# Text before the thought, which n-gram drafts copy: right, then wrong after "b" and after the end.
HINTS = {
    "single": ("<think>abcdefg</think>XYZ", "<think>abg</think>Q"),
    "multi": ("([abcdefg])~XYZ", "([abg])~Q"),
}
BUDGETS = (0, 1, 2, 6, 7, 8, 50, None)
DIGITS = {"structured_outputs": {"regex": "[0-9]{2}"}}


def plan(budget: int | None = None, grace: int = 0, loop: list[int] | None = None) -> dict[str, Any]:
    return {"extra_args": {PLAN_KEY: {"budget": budget, "grace": grace, "loop": loop}}}


def request(script: str, tail: str, hint: str = "", params: dict[str, Any] | None = None, **what: Any) -> Any:
    return {"prompt": prompt(script, tail, hint), "params": params or {}, **what}


def table() -> dict[tuple[str, str], tuple[Any, str]]:
    """(round, name) → (request, expected text): every budget, opening and end."""
    cases = {}
    for kind, start, end in (("single", "<think>", "</think>"), ("multi", "([", "])~")):
        script = "plain" if kind == "single" else "multi"
        for budget in BUDGETS:
            kept = "abcdefg"[:budget] + end + ANSWER
            for opened_by, tail, expected in (
                ("prompt", start, kept),
                ("model", "?", start + kept),
                ("nobody", start + end, ANSWER),
            ):
                for number, hint in enumerate(HINTS[kind]):
                    asked = request(script, tail, hint, {"thinking_token_budget": budget})
                    cases[kind, f"{budget} opened by {opened_by}, hint {number}"] = asked, expected
    return cases


CASES: dict[tuple[str, str], tuple[Any, str]] = table() | {
    ("single", "a second block has what the first left"): (
        request("two blocks", "<think>", params={"thinking_token_budget": 7, "max_tokens": 20}),
        "abcde</think>X<think>ab</think>X" + "<think></think>X" * 2 + "<think></think>",
    ),
    ("single", "a loop is cut at its third copy"): (
        request("loop", "<think>", params=plan(loop=[2, 4, 3])),
        "abcdefgfgfg</think>" + ANSWER,
    ),
    ("single", "max_tokens before the budget"): (
        request("plain", "<think>", params={"thinking_token_budget": 6, "max_tokens": 4}),
        "abcd",
    ),
    ("single", "a stop string in the thought"): (
        request("plain", "<think>", params={"thinking_token_budget": 6, "stop": ["cd"]}),
        "abcd",
    ),
    ("single", "a stop string that the budget comes before"): (
        request("plain", "<think>", params={"thinking_token_budget": 2, "stop": ["cd"]}),
        "ab</think>" + ANSWER,
    ),
    ("single", "a budget and a schema"): (
        request("plain", "<think>", params={"thinking_token_budget": 3, **DIGITS}),
        "abc</think>00<|end|>",
    ),
    ("single", "a schema after a natural end"): (
        request("plain", "<think>", params={"thinking_token_budget": 50, **DIGITS}),
        "abcdefg</think>00<|end|>",
    ),
    ("single", "a schema and no thought"): (
        request("plain", "<think></think>", params={"thinking_token_budget": 3, **DIGITS}),
        "00<|end|>",
    ),
    ("rich", "a phrase inside the budget"): (
        request("plain", "<think>", params=plan(6)),
        "abcd~~</think>" + ANSWER,
    ),
    ("rich", "a phrase too long for the budget"): (request("plain", "<think>", params=plan(3)), "abc</think>" + ANSWER),
    ("rich", "no phrase after an end"): (request("plain", "<think>", params=plan(10)), "abcdefg</think>" + ANSWER),
    ("rich", "no phrase in an answer without a thought"): (request("plain", "<think></think>", params=plan(6)), ANSWER),
    ("rich", "a line end within the grace"): (
        request("lines", "<think>", params=plan(9, grace=3)),
        "abcd\n~~</think>" + ANSWER,
    ),
    ("rich", "a line end before the grace"): (
        request("lines", "<think>", params=plan(11, grace=3)),
        "abcd\nefgh~~</think>" + ANSWER,
    ),
    ("rich", "nothing is forced into a tool call"): (
        request("tool", "<think>", params=plan(3 + 2 + 1)),
        "abc<tool_call>defghi</tool_call>" + ANSWER,
    ),
    ("rich", "a cut before the tool call"): (request("tool", "<think>", params=plan(4)), "ab~~</think>" + ANSWER),
}  # fmt: skip
# Cases whose tokens are compared with the machine's, not with a text.
HAPPENINGS: dict[tuple[str, str], Any] = {
    ("single", "ended by a user"): request("endless", "<think>", params={"max_tokens": 60}, close_after=5),
    ("single", "ended by a user before its budget"): request(
        "endless", "<think>", params={"thinking_token_budget": 40, "max_tokens": 60}, close_after=5
    ),
    ("multi", "ended by a user"): request("multi", "([", params={"max_tokens": 60}, close_after=2),
    ("single", "aborted"): request("endless", "<think>", params={"thinking_token_budget": 30}, abort_after=5),
    ("single", "with log-probabilities"): request(
        "plain", "<think>", HINTS["single"][0], {"thinking_token_budget": 3, "logprobs": 1}
    ),
    ("single", "four at once"): request(
        "endless", "<think>", params={"thinking_token_budget": 9, "temperature": 1, "n": 4}
    ),
} | {
    (kind, f"at random {seed}"): request(
        "multi" if kind == "multi" else "endless",
        "([" if kind == "multi" else "<think>",
        params={**plan(9, grace=3, loop=[1, 4, 5]), "temperature": 2, "max_tokens": 50, "ignore_eos": True},
        arrives=seed,
    )
    for kind in ROUNDS
    for seed in range(5)
}  # fmt: skip


# What vLLM 0.32 does with a phrase "~" before its forced end, and what comes here: name → (request, theirs, ours).
DEFECTS: dict[str, tuple[Any, str, str]] = {
    "a phrase in the answer": (
        request("plain", "<think>", params={"thinking_token_budget": 9}),
        "abcdefg</think>X~</think>" + ANSWER,
        "abcdefg</think>" + ANSWER,
    ),
    "a phrase in an answer without a thought": (
        request("plain", "<think></think>", params={"thinking_token_budget": 2}),
        "X~</think>" + ANSWER,
        ANSWER,
    ),
    "an end in tool arguments": (
        request("tool", "<think>", params={"thinking_token_budget": 5}),
        "abc<tool_call>d~</think>" + ANSWER,
        "abc<tool_call>defghi</tool_call>" + ANSWER,
    ),
    "a fresh budget for a second block": (
        request("two blocks", "<think>", params={"thinking_token_budget": 7, "max_tokens": 16}),
        "abcde</think>X~</think>X<think>abcde",
        "abcde</think>X<think>a~</think>X<think></think>X<think>",
    ),
    "a phrase on top of the budget": (
        request("plain", "<think>", params={"thinking_token_budget": 4}),
        "abcd~</think>" + ANSWER,
        "abc~</think>" + ANSWER,
    ),
}


def run_jobs(folder: Path, jobs: dict[str, dict[str, Any]], plugins: str | None = None) -> dict[str, Any]:
    """Run `thinking_run.py` on the jobs in one process; their results by name."""
    model = scripted_model.write_model(folder / "model")
    listed = [{"model": str(model), "out": str(folder / f"{name}.json"), **job} for name, job in jobs.items()]
    (folder / "jobs.json").write_text(json.dumps(listed))
    environment = {key: value for key, value in os.environ.items() if key not in ("VLLM_PLUGINS", "PYTHONSAFEPATH")}
    environment |= {
        "PYTHONPATH": str(RUNNER.parent),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_CI_ENV": "1",
        "OMP_NUM_THREADS": "1",
    }
    if plugins is not None:
        environment["VLLM_PLUGINS"] = plugins
    command = [sys.executable, str(RUNNER), str(folder / "jobs.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {name: json.loads((folder / f"{name}.json").read_text()) for name in jobs}
    failed = [result for result in found.values() if isinstance(result, str)]
    assert not failed, failed
    return found


@functools.cache
def outcomes() -> dict[str, Any]:
    """engine → {"counters": …, (round, name): result}; run once for all test files."""
    requests = {key: asked for key, (asked, _) in CASES.items()} | HAPPENINGS
    requests |= {("short", name): asked for name, (asked, _, _) in DEFECTS.items()}
    keys = {kind: [key for key in requests if key[0] == kind] for kind in ROUNDS}
    rounds = [
        {"markers": markers_to_wire(MARKERS[kind]), "requests": [requests[key] for key in keys[kind]]}
        for kind in ROUNDS
    ]
    shared = {"reasoning": {"reasoning_parser": "nemotron_v3"}, "rounds": rounds}
    parser = {"structured_outputs_config": {"reasoning_parser": "nemotron_v3"}}
    jobs: dict[str, Any] = {name: {**shared, "llm": llm | parser} for name, llm in ENGINES.items()}
    long = {"thinking_token_budget": 45, "max_tokens": 60}
    jobs["preempted"]["rounds"] = [
        {
            "markers": markers_to_wire(SINGLE),
            "requests": [
                request("endless", "<think>", params=long if at % 2 else {"max_tokens": 60}) for at in range(8)
            ],
        }
    ]
    with tempfile.TemporaryDirectory() as folder:
        found = run_jobs(Path(folder), jobs)
    for result in found.values():
        for kind, results in zip(ROUNDS, result["rounds"], strict=False):
            result |= dict(zip(keys[kind], results, strict=False))
    return found


@functools.cache
def stock_outcomes() -> dict[str, dict[str, Any]]:
    """The same cases as DEFECTS in vLLM without our plugin: what is forced is its own `~</think>`."""
    reasoning = {"reasoning_parser": "nemotron_v3", "reasoning_end_str": "~</think>"}
    job = {"llm": LLM, "reasoning": reasoning, "rounds": [{"requests": [asked for asked, _, _ in DEFECTS.values()]}]}
    with tempfile.TemporaryDirectory() as folder:
        found = run_jobs(Path(folder), {"stock": job}, plugins=NO_PLUGINS)
    return dict(zip(DEFECTS, found["stock"]["rounds"][0], strict=True))
