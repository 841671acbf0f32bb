"""Prometheus: how much this server's models think, why they stop, and how long an answer is waited for."""

from __future__ import annotations

from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Histogram
from vllm_puzzle.serving.thinking_watch import SequenceWatch

# Seconds until the first answer token: vLLM's own buckets for a first token, and minutes beyond, as thoughts are long.
BUCKETS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640)
PREFIX = "vllm_puzzle:"


class ThinkingMetrics:
    """The collectors of this process; a second server in it shares them."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        known: dict[str, Any] = getattr(registry, "_puzzle_collectors", {})
        if not known:
            known = {
                "thinking": Counter(f"{PREFIX}thinking_tokens", "Thinking tokens generated", registry=registry),
                "answer": Counter(f"{PREFIX}answer_tokens", "Answer tokens generated", registry=registry),
                "ends": Counter(
                    f"{PREFIX}thinking_ends", "Sequences by why thinking ended", ["reason"], registry=registry
                ),
                "first_answer": Histogram(
                    f"{PREFIX}time_to_first_answer_token_seconds",
                    "From the request's arrival in the engine client to its first answer token",
                    buckets=BUCKETS,
                    registry=registry,
                ),
            }
            registry._puzzle_collectors = known  # type: ignore[attr-defined]
        self.collectors = known

    def observe(self, sequence: SequenceWatch) -> None:
        """A sequence has finished."""
        self.collectors["thinking"].inc(sequence.num_thinking)
        self.collectors["answer"].inc(sequence.num_answer)
        self.collectors["ends"].labels(sequence.end_reason or "none").inc()
        if sequence.first_answer is not None:
            self.collectors["first_answer"].observe(sequence.first_answer)
