"""The jobs of test_thinking_v2.py, and a script that runs them: `thinking_v2_jobs.py 1|2` (which of vLLM's runners)."""

from __future__ import annotations

import gc
import json
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

from vllm_puzzle.bench.pocket_tasks import heldout
from vllm_puzzle.kernels.thinking import ThinkingMarkers
from vllm_puzzle.serving.thinking_plan import markers_to_wire

sys.path.insert(0, str(Path(__file__).parent))
import v2_run

MODEL = Path(__file__).resolve().parents[2] / "model_configs" / "pocket" / "puzzle"
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


@cache
def prompts() -> list[list[int]]:
    from transformers import AutoTokenizer  # not before `prepare`: it brings Triton

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    questions = [item.question for item in heldout(2026, 1) if item.level >= 5]
    text = [
        tokenizer.apply_chat_template([{"role": "user", "content": q}], tokenize=False, add_generation_prompt=True)
        for q in questions
    ]
    return [tokenizer.encode(line, add_special_tokens=False) for line in text[: 2 * len(PLANS)]]


def jobs(runner: str) -> list[dict[str, Any]]:
    # Two rounds: the second one's requests come into slots that others left.
    rounds = [
        [{"prompt": p, "max_tokens": 90} | ({} if plan is None else {"plan": plan})
         for p, plan in zip(prompts()[first:], plans, strict=False)]
        for first, plans in ((0, PLANS), (len(PLANS), PLANS[::-1]))
    ]  # fmt: skip
    common = {"runner": runner, "markers": markers_to_wire(MARKERS), "rounds": rounds}
    found = [
        common | {"llm": {"model": str(MODEL)} | ENGINES[name]} for name in ENGINES if runner == "2" or name == "plain"
    ]
    if runner == "2":
        free = [[{"prompt": p, "max_tokens": 90} for p in prompts()[:5]]]
        found.append(common | {"llm": {"model": str(MODEL), "max_num_seqs": 7}, "rounds": free, "close_after": 6})
        found.append(common | {"llm": {"model": str(MODEL), "max_num_seqs": 7}, "rounds": free})
    return found


if __name__ == "__main__":
    for key in [key for key in os.environ if key.startswith("VLLM_")]:
        del os.environ[key]
    v2_run.prepare(sys.argv[1])
    results = []
    for job in jobs(sys.argv[1]):
        results.append(v2_run.run(job))
        gc.collect()
    print(json.dumps(results))
