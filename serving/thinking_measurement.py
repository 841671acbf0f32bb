"""What share of decoding the V1 sampler's thinking budgets take: `python -m vllm_puzzle.serving.thinking_measurement`.

An offline engine decodes 256 requests at once, half of them with budgets; the time inside ThinkingHolder is divided by
the time of the whole. (Tokens per second with and without budgets differ by less than two shared cores' noise of 4 %.)
Prints one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_puzzle.kernels.thinking import ThinkingLimits
from vllm_puzzle.serving.thinking_plan import PLAN_KEY, plan_of
from vllm_puzzle.serving.thinking_v1 import ThinkingHolder

MODEL = Path(__file__).resolve().parent.parent / "model_configs" / "pocket" / "puzzle"
TIMED = ("sync_batch", "update_state", "apply_to_logits")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="what share of decoding thinking budgets take")
    parser.add_argument("--num-requests", type=int, default=256)
    parser.add_argument("--max-tokens", type=int, default=200)
    options = parser.parse_args()
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    print(json.dumps(measure(options.num_requests, options.max_tokens)))


def measure(num_requests: int, max_tokens: int) -> dict[str, Any]:
    """Seconds in the holder and in all, without budgets and with budgets (and a grace) on every second request."""
    from vllm import LLM
    from vllm.config import ReasoningConfig

    spent = {"seconds": 0.0}
    for name in TIMED:
        setattr(ThinkingHolder, name, _timed(getattr(ThinkingHolder, name), spent))
    engine = LLM(
        str(MODEL), enforce_eager=True, max_model_len=1024, max_num_seqs=num_requests, dtype="float32",
        kv_cache_memory_bytes=1 << 30, reasoning_config=ReasoningConfig(reasoning_parser="nemotron_v3"),
    )  # fmt: skip
    _decode(engine, num_requests, 8, False)  # warm-up
    rows = {}
    for name, has_budgets in (("without", False), ("half", True), ("half again", True), ("without again", False)):
        spent["seconds"] = 0.0
        seconds = _decode(engine, num_requests, max_tokens, has_budgets)
        rows[name] = {
            "seconds": round(seconds, 4),
            "in_sampler": round(spent["seconds"], 6),
            "share": round(spent["seconds"] / seconds, 6),
            "tokens_per_second": round(num_requests * max_tokens / seconds, 1),
        }
    return {"num_requests": num_requests, "max_tokens": max_tokens, "rows": rows}


def _timed(method: Callable[..., Any], spent: dict[str, float]) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return method(*args, **kwargs)
        finally:
            spent["seconds"] += time.perf_counter() - began

    return timed


def _decode(engine: Any, num_requests: int, max_tokens: int, has_budgets: bool) -> float:
    from vllm import SamplingParams

    plan = {PLAN_KEY: plan_of(ThinkingLimits(max_tokens // 2, max_tokens // 20))}
    common: dict[str, Any] = {"temperature": 0, "max_tokens": max_tokens, "ignore_eos": True, "detokenize": False}
    params = [
        SamplingParams(**common, extra_args=plan if has_budgets and index % 2 else None)
        for index in range(num_requests)
    ]
    start = engine.get_tokenizer().encode("<think>", add_special_tokens=False)
    prompts = [{"prompt_token_ids": [65 + index % 26, *start]} for index in range(num_requests)]
    began = time.perf_counter()
    outputs = engine.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - began
    lengths = {len(output.outputs[0].token_ids) for output in outputs}
    if lengths != {max_tokens}:
        raise RuntimeError(f"found replies of {sorted(lengths)} tokens, allowed: {max_tokens}")
    return seconds


if __name__ == "__main__":
    main()
