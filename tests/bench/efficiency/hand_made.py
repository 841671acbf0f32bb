"""Records, facts and run folders made by hand, with times that binary fractions hold exactly."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from hypothesis import settings
from vllm_puzzle.bench.efficiency.facts import RunFacts, Window
from vllm_puzzle.bench.efficiency.record import CORRECT, STEADY, RequestRecord, to_line

# Examples of generated tests may wait for a shared machine.
unhurried = settings(deadline=None)

# Sent at 1, thinks from 1.5 to 3.5 (17 tokens, 1 of them in the first chunk), answers from 4 to 5 (9 tokens, 1 in the
# first), and three markers.
ANSWERED: dict[str, Any] = {
    "arm": "arm",
    "task": "sums",
    "question": "q0",
    "repeat": 0,
    "block": 0,
    "order": 0,
    "phase": STEADY,
    "outcome": CORRECT,
    "budget": None,
    "scheduled": None,
    "sent": 1.0,
    "first": 1.5,
    "first_thinking": 1.5,
    "first_answer": 4.0,
    "last_thinking": 3.5,
    "last_answer": 5.0,
    "last": 5.0,
    "done": 5.25,
    "chunks": 24,
    "first_thinking_tokens": 1,
    "first_answer_tokens": 1,
    "prompt_tokens": 64,
    "cached_tokens": 16,
    "thinking_tokens": 17,
    "answer_tokens": 9,
    "output_tokens": 29,
    "token_source": "server",
    "finish_reason": "stop",
    "end_reason": "natural",
}
NO_ANSWER: dict[str, Any] = {"first_answer": None, "last_answer": None, "answer_tokens": 0, "first_answer_tokens": None}
NOTHING: dict[str, Any] = NO_ANSWER | {
    "first": None,
    "first_thinking": None,
    "last_thinking": None,
    "last": None,
    "chunks": 0,
    "first_thinking_tokens": None,
    "prompt_tokens": None,
    "cached_tokens": None,
    "thinking_tokens": None,
    "answer_tokens": None,
    "output_tokens": None,
    "token_source": None,
    "finish_reason": None,
    "end_reason": None,
}


def made(**changes: Any) -> RequestRecord:
    """The answered request with some of its fields changed."""
    return RequestRecord(**(ANSWERED | changes))


def lasting(sent: float, duration: float, **changes: Any) -> RequestRecord:
    """A request without thought whose answer comes in equal steps from a quarter of its time on."""
    first = sent + duration / 4
    times = {"sent": sent, "first": first, "first_answer": first, "last": sent + duration, "done": sent + duration}
    thought = {"first_thinking": None, "last_thinking": None, "thinking_tokens": 0, "first_thinking_tokens": None}
    return made(
        **(thought | times | {"last_answer": sent + duration, "output_tokens": 10, "end_reason": None} | changes)
    )


def window(start: float = 0.0, end: float = 8.0, **facts: Any) -> RunFacts:
    """The facts of a run of one block."""
    return RunFacts((Window(start, end),), **facts)


def write_run(folder: Path, records: Iterable[RequestRecord], facts: RunFacts, **manifest: Any) -> Path:
    """A run folder as `bench run` leaves it."""
    folder.mkdir(parents=True)
    found = list(records)
    content = {
        "schema_version": 1,
        "status": "complete",
        "arm": found[0].arm,
        "fields": {},
        "max_tokens": 300,
        "sampling": {"temperature": 0},
        "load": {"kind": "closed", "concurrency": 4},
        "tasks": [{"name": "sums", "hash": "1f"}],
        "facts": facts.to_object(),
        "config": {"margin": 0.01},
    }
    (folder / "manifest.json").write_text(json.dumps(content | manifest))
    (folder / "requests.jsonl").write_text("".join(to_line(record) + "\n" for record in found))
    return folder


def batches(outcomes: Sequence[str], concurrency: int, duration: float, arm: str = "arm") -> list[RequestRecord]:
    """A closed loop in lockstep: every `duration` seconds as many requests as the concurrency; question i has the i-th
    outcome. The window 0 to `duration` times the number of batches holds all of them.
    """
    return [
        lasting(
            place // concurrency * duration, duration, outcome=outcome, question=f"q{place:04d}", order=place, arm=arm
        )
        for place, outcome in enumerate(outcomes)
    ]
