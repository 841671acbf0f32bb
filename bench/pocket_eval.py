"""Held-out accuracy of a served pocket model, with thinking and without.

    python -m vllm_puzzle.bench.pocket_eval --base-url http://127.0.0.1:8000/v1

Asks any OpenAI-compatible server every item twice, greedily, and grades the content alone. Prints a table and, as the
last line, one JSON document. Not a speed benchmark.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
from vllm_puzzle.bench.pocket_tasks import Item, heldout, is_correct

SEED = 2026
MAX_TOKENS = 300


@dataclass(frozen=True, slots=True)
class Reply:
    """One graded reply; token counts are the server's own."""

    item: Item
    correct: bool
    completion_tokens: int
    reasoning_tokens: int


async def ask_all(
    base_url: str, model: str, items: Sequence[Item], fields: Mapping[str, Any], concurrency: int
) -> list[Reply]:
    """Every item greedily, at most `concurrency` at a time. `fields` go into each request's body."""
    gate = asyncio.Semaphore(concurrency)
    async with httpx.AsyncClient(base_url=base_url.rstrip("/") + "/", timeout=300) as client:
        return list(await asyncio.gather(*(_ask(client, gate, model, item, fields) for item in items)))


async def _ask(
    client: httpx.AsyncClient, gate: asyncio.Semaphore, model: str, item: Item, fields: Mapping[str, Any]
) -> Reply:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": item.question}],
        "temperature": 0,
        "max_tokens": MAX_TOKENS,
        **fields,
    }
    async with gate:
        response = await client.post("chat/completions", json=body)
    response.raise_for_status()
    data = response.json()
    usage = data["usage"]
    content = data["choices"][0]["message"]["content"]
    reasoning_tokens = (usage.get("completion_tokens_details") or {}).get("reasoning_tokens", 0)
    return Reply(item, is_correct(item, content), usage["completion_tokens"], reasoning_tokens)


def summarise(replies: Sequence[Reply]) -> dict[str, Any]:
    """Accuracy and mean tokens, over all items and per task."""
    tasks = sorted({reply.item.task for reply in replies})
    return {
        "accuracy": _accuracy(replies),
        "mean_completion_tokens": sum(reply.completion_tokens for reply in replies) / len(replies),
        "mean_reasoning_tokens": sum(reply.reasoning_tokens for reply in replies) / len(replies),
        "tasks": {task: _accuracy([reply for reply in replies if reply.item.task == task]) for task in tasks},
    }


def _accuracy(replies: Sequence[Reply]) -> float:
    return sum(reply.correct for reply in replies) / len(replies)


def format_summary(summary: dict[str, Any]) -> str:
    """The summary as a table: one row per task, one column per mode."""
    lines = [f"{summary['num_items']} held-out items", f"{'':10s}{'thinking on':>14s}{'thinking off':>14s}"]
    on, off = summary["on"], summary["off"]
    for task in on["tasks"]:
        lines.append(f"{task:10s}{on['tasks'][task]:14.1%}{off['tasks'][task]:14.1%}")
    lines.append(f"{'all':10s}{on['accuracy']:14.1%}{off['accuracy']:14.1%}")
    lines.append(f"{'tokens':10s}{on['mean_completion_tokens']:14.1f}{off['mean_completion_tokens']:14.1f}")
    return "\n".join(lines)


def evaluate(base_url: str, model: str | None = None, per_cell: int = 13, concurrency: int = 32) -> dict[str, Any]:
    """Ask a server all held-out items of SEED; `model` None asks the server for its name."""
    model = model or first_model(base_url)
    items = heldout(SEED, per_cell)
    modes = {}
    for mode, thinking in (("on", True), ("off", False)):
        fields = {"chat_template_kwargs": {"enable_thinking": thinking}}
        modes[mode] = summarise(asyncio.run(ask_all(base_url, model, items, fields, concurrency)))
    return {"model": model, "num_items": len(items), **modes}


def first_model(base_url: str) -> str:
    """The name of the server's first model."""
    name: str = httpx.get(base_url.rstrip("/") + "/models").raise_for_status().json()["data"][0]["id"]
    return name


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="held-out accuracy of a served pocket model")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", help="served model name (default: the server's first)")
    parser.add_argument("--per-cell", type=int, default=13, help="items per task and level (41 cells)")
    parser.add_argument("--concurrency", type=int, default=32)
    options = parser.parse_args()
    summary = evaluate(options.base_url, options.model, options.per_cell, options.concurrency)
    print(format_summary(summary), file=sys.stderr)
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
