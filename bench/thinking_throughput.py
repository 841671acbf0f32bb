"""What thinking budgets take from a server's decode throughput.

    python -m vllm_puzzle.bench.thinking_throughput --base-url http://127.0.0.1:8000/v1

Sends waves of simultaneous requests that all generate the same number of tokens: without budgets (A), and half of them
with one (B), in the order A B B A so that drift cancels. Prints the ratio B/A of tokens per second with its spread over
the blocks, and as the last line one JSON document. The floor is 1; the prediction is the sampler's cost per step
(`thinking_cost`) over the step's time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from typing import Any

import httpx
from vllm_puzzle.bench.pocket_eval import first_model
from vllm_puzzle.bench.pocket_tasks import heldout

SEED = 2026
TIMEOUT_S = 600


async def wave(client: httpx.AsyncClient, model: str, num_requests: int, max_tokens: int, with_budgets: bool) -> float:
    """Tokens per second of one wave. Raises RuntimeError when a reply has another length than asked for."""
    items = heldout(SEED, 20)
    bodies = [
        {
            "model": model,
            "messages": [{"role": "user", "content": items[index % len(items)].question}],
            "temperature": 0,
            "max_tokens": max_tokens,
            "ignore_eos": True,
            **({"thinking_token_budget": max_tokens} if with_budgets and index % 2 else {}),
        }
        for index in range(num_requests)
    ]
    began = time.perf_counter()
    replies = await asyncio.gather(*(client.post("chat/completions", json=body) for body in bodies))
    seconds = time.perf_counter() - began
    counts = {reply.raise_for_status().json()["usage"]["completion_tokens"] for reply in replies}
    if counts != {max_tokens}:
        raise RuntimeError(f"found replies of {sorted(counts)} tokens, allowed: {max_tokens}")
    return num_requests * max_tokens / seconds


async def measure(base_url: str, num_requests: int, max_tokens: int, num_blocks: int) -> dict[str, Any]:
    """Throughputs of all waves, and the ratio of each block."""
    model = first_model(base_url)
    blocks = []
    limits = httpx.Limits(max_connections=num_requests)
    async with httpx.AsyncClient(base_url=base_url.rstrip("/") + "/", timeout=TIMEOUT_S, limits=limits) as client:
        await wave(client, model, num_requests, max_tokens, True)  # warm-up
        for _ in range(num_blocks):
            rates = [await wave(client, model, num_requests, max_tokens, has) for has in (False, True, True, False)]
            blocks.append({"without": [rates[0], rates[3]], "with": [rates[1], rates[2]]})
    ratios = [sum(block["with"]) / sum(block["without"]) for block in blocks]
    return {
        "model": model, "num_requests": num_requests, "max_tokens": max_tokens, "blocks": blocks,
        "ratio": statistics.mean(ratios), "ratio_stdev": statistics.stdev(ratios),
    }  # fmt: skip


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="what thinking budgets take from a server's decode throughput")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--num-requests", type=int, default=256)
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--num-blocks", type=int, default=5, help="of four waves each, at least 2")
    options = parser.parse_args()
    result = asyncio.run(measure(options.base_url, options.num_requests, options.max_tokens, options.num_blocks))
    error = result["ratio_stdev"] / options.num_blocks**0.5
    print(f"tokens/s with budgets on half / without: {result['ratio']:.4f} ± {error:.4f} (s.e.)", file=sys.stderr)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
