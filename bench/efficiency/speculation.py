"""How much of what a speculative decoder drafts is accepted: vLLM's counters before and after a run, by position.

Counters are the server's, over all requests; by category they are read around one category at a time. Real questions
only: random tokens are accepted otherwise than text.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
from vllm_puzzle.bench.efficiency.arm import Arm
from vllm_puzzle.bench.efficiency.client import ask
from vllm_puzzle.bench.efficiency.question import Question
from vllm_puzzle.bench.efficiency.server_facts import Sample, read_counters, total

PREFIX = "vllm:spec_decode_num_"


@dataclass(frozen=True, slots=True)
class Acceptance:
    """Counts. drafts: times a draft was verified. drafted: tokens in them. by_position: accepted tokens per place."""

    drafts: float
    drafted: float
    accepted: float
    by_position: tuple[float, ...] = ()

    def __sub__(self, before: Acceptance) -> Acceptance:
        places = max(len(self.by_position), len(before.by_position))
        padded = [part + (0.0,) * (places - len(part)) for part in (self.by_position, before.by_position)]
        return Acceptance(
            self.drafts - before.drafts,
            self.drafted - before.drafted,
            self.accepted - before.accepted,
            tuple(now - then for now, then in zip(*padded, strict=True)),
        )

    @property
    def length(self) -> float | None:
        """Mean tokens a step yields: those accepted and the one that the model itself samples."""
        return 1 + self.accepted / self.drafts if self.drafts > 0 else None

    @property
    def rate(self) -> float | None:
        """Accepted of drafted tokens."""
        return self.accepted / self.drafted if self.drafted > 0 else None

    def to_object(self) -> dict[str, Any]:
        """For a summary."""
        rates = [accepted / self.drafts for accepted in self.by_position] if self.drafts > 0 else []
        return {"drafts": self.drafts, "length": self.length, "rate": self.rate, "rate_by_position": rates}


def acceptance(found: Sequence[Sample]) -> Acceptance | None:
    """The counters of a /metrics page; None where nothing is speculated. Engines are summed."""
    listed = list(found)
    drafts, drafted = total(listed, PREFIX + "drafts"), total(listed, PREFIX + "draft_tokens")
    accepted = total(listed, PREFIX + "accepted_tokens")
    if drafts is None or drafted is None or accepted is None:
        return None
    places: dict[int, float] = {}
    for sample in listed:
        if sample.name == PREFIX + "accepted_tokens_per_pos":
            place = int(sample.labels["position"])
            places[place] = places.get(place, 0.0) + sample.value
    return Acceptance(drafts, drafted, accepted, tuple(places.get(place, 0.0) for place in range(len(places))))


def difference(before: Sequence[Sample], after: Sequence[Sample]) -> Acceptance | None:
    """Between two readings; None where there is nothing to read, or the server started anew in between."""
    now, then = acceptance(after), acceptance(before)
    if now is None:
        return None
    changed = now if then is None else now - then
    return changed if changed.drafts >= 0 and changed.accepted >= 0 else None


async def by_category(
    transport: httpx.AsyncBaseTransport,
    arm: Arm,
    questions: Sequence[Question],
    concurrency: int,
    clock: Callable[[], float],
    fields: Mapping[str, Any] | None = None,
) -> dict[str, Acceptance]:
    """Acceptance of each task's questions, asked by themselves, task after task. Empty where nothing is speculated."""
    found: dict[str, Acceptance] = {}
    slots = asyncio.Semaphore(concurrency)

    async def one(question: Question) -> None:
        async with slots:
            await ask(transport, arm, question, clock, fields)

    before = await read_counters(transport, arm)
    if acceptance(before) is None:
        return found
    for task in sorted({question.task for question in questions}):
        await asyncio.gather(*(one(question) for question in questions if question.task == task))
        after = await read_counters(transport, arm)
        changed = difference(before, after)
        if changed is not None:
            found[task] = changed
        before = after
    return found
