"""Accuracy of a served pocket model against its thinking budget.

    python -m vllm_puzzle.bench.budget_curve --base-url http://127.0.0.1:8000/v1

Asks every held-out item under each budget, greedily, and grades the content alone; a reply that thinks longer than its
budget is an error. Prints a table and a plot, and as the last line one JSON document. Not a speed benchmark.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import sys
from collections.abc import Sequence
from typing import Any

from vllm_puzzle.bench.pocket_eval import MAX_TOKENS, SEED, ask_all, first_model, summarise
from vllm_puzzle.bench.pocket_tasks import heldout

BUDGETS = (0, 8, 16, 24, 32, 48, 64, 96, 128)
# 95 % of a normal distribution.
Z = 1.96
WIDTH = 50


def measure(base_url: str, model: str, budgets: Sequence[int], per_cell: int, concurrency: int) -> dict[str, Any]:
    """One row per budget, and a last one without. Raises RuntimeError when the server does not hold a budget."""
    items = heldout(SEED, per_cell)
    rows = []
    for budget in (*budgets, None):
        # The reserve for an answer would lower a budget near MAX_TOKENS; none here is.
        fields = {"thinking_token_budget": -1 if budget is None else budget}
        replies = asyncio.run(ask_all(base_url, model, items, fields, concurrency))
        longest = max(reply.reasoning_tokens for reply in replies)
        if budget is not None and longest > budget:
            raise RuntimeError(f"budget {budget}: found a thought of {longest} tokens")
        summary = summarise(replies)
        low, high = wilson(round(summary["accuracy"] * len(items)), len(items))
        rows.append({"budget": budget, "longest_thought": longest, "low": low, "high": high, **summary})
    return {"model": model, "num_items": len(items), "max_tokens": MAX_TOKENS, "rows": rows}


def wilson(successes: int, total: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion (E. B. Wilson, 1927)."""
    share, square = successes / total, Z * Z
    centre = (share + square / (2 * total)) / (1 + square / total)
    half = Z * math.sqrt(share * (1 - share) / total + square / (4 * total * total)) / (1 + square / total)
    return centre - half, centre + half


def format_curve(result: dict[str, Any]) -> str:
    """Table and plot in one: a bar per budget."""
    lines = [f"{result['model']}, {result['num_items']} held-out items", "budget  thinking  accuracy  95 % interval"]
    for row in result["rows"]:
        name = "free" if row["budget"] is None else str(row["budget"])
        bar = "█" * round(row["accuracy"] * WIDTH)
        lines.append(
            f"{name:>6s}{row['mean_reasoning_tokens']:10.1f}{row['accuracy']:10.1%}"
            f"  {row['low']:6.1%} …{row['high']:6.1%}  {bar}"
        )
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="accuracy of a served pocket model against its thinking budget")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", help="served model name (default: the server's first)")
    parser.add_argument("--budgets", type=int, nargs="+", default=BUDGETS)
    parser.add_argument("--per-cell", type=int, default=13, help="items per task and level (41 cells)")
    parser.add_argument("--concurrency", type=int, default=32)
    options = parser.parse_args()
    model = options.model or first_model(options.base_url)
    result = measure(options.base_url, model, options.budgets, options.per_cell, options.concurrency)
    print(format_curve(result), file=sys.stderr)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
