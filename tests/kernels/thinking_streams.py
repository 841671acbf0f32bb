"""Random batches through the device kernel and the thinking machine side by side; run in a process of its own.

`python thinking_streams.py DEVICE STEPS [SEED]` prints JSON: case → [steps, forced rows, differences, end reasons].
On `cpu` the kernel is interpreted.
"""

from __future__ import annotations

import json
import os
import random
import sys
from dataclasses import dataclass, field, replace

import torch

if sys.argv[1:2] == ["cpu"]:  # Triton reads it when the kernel's module is imported
    os.environ["TRITON_INTERPRET"] = "1"

from vllm_puzzle.kernels import thinking, thinking_triton
from vllm_puzzle.kernels.thinking import LoopRule, ThinkingLimits, ThinkingMachine, ThinkingMarkers
from vllm_puzzle.kernels.thinking_triton import REASONS, Column, MarkerTables

SLOTS, LENGTH, VOCABULARY, MAX_PATTERN, MAX_ROWS = 5, 110, 37, 16, 6
SINGLE = ThinkingMarkers((1,), ((2,),), (2,))
PLAIN = ThinkingMarkers((1,), ((2,), (8, 9)), (2,), (4, 5), frozenset({6, 36}), ((7,),))
MULTI = ThinkingMarkers(
    (1, 3), ((2, 3, 2), (8, 9)), (2, 3, 2), (4, 4, 5), frozenset({6}), ((7, 8), (7, 9, 1)), ((1, 9, 4),)
)
# The start begins an end, an end begins another, the closing ends none, the phrase repeats itself.
NESTED = ThinkingMarkers(
    (1, 2), ((1, 2, 3), (3,), (3, 3)), (5, 2, 5), (5, 2, 5, 2), frozenset({2}), ((4, 1),), ((1, 2, 5), (2,))
)
CASES = {  # markers, most rows of a request, seed
    "single tokens": (SINGLE, 1, 33),
    "single tokens, drafts": (SINGLE, MAX_ROWS, 1),
    "phrase, boundaries, tools": (PLAIN, 1, 2),
    "phrase, boundaries, tools, drafts": (PLAIN, MAX_ROWS, 3),
    "markers of several tokens": (MULTI, 1, 4),
    "markers of several tokens, drafts": (MULTI, MAX_ROWS, 5),
    "nested markers": (NESTED, 1, 26),
    "nested markers, drafts": (NESTED, MAX_ROWS, 7),
}


@dataclass
class Request:
    """One running request: what the runner holds of it, and the machine that says what is right."""

    limits: ThinkingLimits | None
    prompt: list[int]
    outputs: list[int]
    machine: ThinkingMachine
    fed: int = 0


def random_limits() -> ThinkingLimits | None:
    if random.random() < 0.15:
        return None
    smallest = random.choice([1, 1, 2, 3])
    loop = LoopRule(smallest, random.choice([smallest, 5, MAX_PATTERN]), random.choice([2, 2, 3]))
    return ThinkingLimits(
        random.choice([None, 0, 1, 2, 3, 5, 8, 13, 2**31 + 5]),
        random.choice([0, 0, 2, 6]),
        loop if random.random() < 0.6 else None,
    )


@dataclass
class Batch:
    """Slots on the device, filled, run, preempted and recycled at random."""

    markers: ThinkingMarkers
    max_rows: int
    device: torch.device
    close_share: float = 0.02
    requests: dict[int, Request] = field(default_factory=dict)
    differences: list[str] = field(default_factory=list)
    num_forced: int = 0
    reasons: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        device = self.device
        self.tokens = torch.zeros(SLOTS, LENGTH, dtype=torch.int32, device=device)
        self.prompt_len = torch.zeros(SLOTS, dtype=torch.int32, device=device)
        self.total_len = torch.zeros(SLOTS, dtype=torch.int32, device=device)
        self.rows = torch.randint(-9, 99, (SLOTS, thinking_triton.ROW_SIZE), dtype=torch.int32, device=device)
        self.rows[:, Column.IS_TRACKED] = 0
        self.runs = torch.randint(0, 99, (SLOTS, MAX_PATTERN), dtype=torch.int32, device=device)
        self.tables = MarkerTables.build(self.markers, VOCABULARY, device)
        markers = self.markers
        pieces = [*markers.starts, *markers.ends, *markers.tool_starts, markers.phrase, markers.closing]
        self.pieces = [list(piece) for piece in pieces if piece]

    def some_tokens(self, most: int) -> list[int]:
        """Random tokens with a liking for markers, parts of them and repetition."""
        found: list[int] = []
        while len(found) < most:
            kind = random.random()
            if kind < 0.3:
                piece = random.choice(self.pieces)
                found += piece[: random.randint(1, len(piece))]
            elif kind < 0.45 and found:
                found += found[-random.randint(1, 3) :] * random.randint(1, 3)
            else:
                found.append(random.randrange(1, 12) if random.random() < 0.9 else random.randrange(VOCABULARY))
        return found[:most]

    def fill(self, slot: int, request: Request) -> None:
        """As the runner does at admission, and after a preemption with the outputs so far."""
        tokens = request.prompt + request.outputs
        self.requests[slot] = request
        self.tokens[slot] = torch.randint(1, 9, (LENGTH,))  # a former request's
        self.tokens[slot, : len(tokens)] = torch.tensor(tokens, dtype=torch.int32)
        self.prompt_len[slot], self.total_len[slot] = len(request.prompt), len(tokens)
        self.rows[slot] = torch.tensor(thinking_triton.state_row(request.limits))
        limits = request.limits or ThinkingLimits()
        request.machine, request.fed = ThinkingMachine.after_prompt(self.markers, limits, request.prompt), 0

    def admit(self) -> None:
        free = [slot for slot in range(SLOTS) if slot not in self.requests]
        if free and random.random() < 0.6:
            prompt = self.some_tokens(random.choice([1, 2, 7, 30]))
            if random.random() < 0.8:
                prompt += random.choice(self.markers.starts)
            request = Request(random_limits(), prompt, [], ThinkingMachine(self.markers))
            self.fill(random.choice(free), request)

    def leave(self) -> None:
        for slot, request in list(self.requests.items()):
            if len(request.prompt) + len(request.outputs) > LENGTH - 3 * MAX_ROWS or random.random() < 0.015:
                del self.requests[slot]
            elif random.random() < 0.03:  # preempted: resumes in another slot, or in the same
                del self.requests[slot]
                free = [other for other in range(SLOTS) if other not in self.requests]
                self.fill(random.choice(free), request)

    def step(self) -> None:
        """One step of a random part of the running requests, in random order; the others wait."""
        self.leave()
        self.admit()
        slots = [slot for slot in self.requests if random.random() < 0.85]
        random.shuffle(slots)
        layout = [(slot, self.some_tokens(random.randint(0, self.max_rows - 1))) for slot in slots]
        logits, expected = self.launch(layout), []
        for slot, drafts in layout:
            request = self.requests[slot]
            expected += request.machine.forced_along(drafts) if request.limits else [None] * (len(drafts) + 1)
        wanted = torch.zeros_like(logits, device="cpu")
        for row, token in enumerate(expected):
            if token is not None:
                wanted[row, token] = 1e9
                self.num_forced += 1
        if not torch.equal(logits.cpu(), wanted):
            self.differences.append(f"logits: {logits.cpu().argmax(1).tolist()} for {expected}")
        for slot, drafts in layout:
            self.compare(slot)
            self.commit(slot, drafts)

    def launch(self, layout: list[tuple[int, list[int]]]) -> torch.Tensor:
        slots, places, fed = [], [], []
        for slot, drafts in layout:
            request = self.requests[slot]
            request.machine.feed(request.outputs[request.fed :])
            request.fed = len(request.outputs)
            if request.limits and random.random() < self.close_share:
                request.machine.close(thinking.USER)
                self.rows[slot, Column.CLOSE_ASKED] = 1
            slots += [slot] * (len(drafts) + 1)
            places += range(len(drafts) + 1)
            fed += [(request.prompt + request.outputs)[-1], *drafts]
        logits = torch.zeros(len(slots), VOCABULARY + 2, device=self.device)[:, :VOCABULARY]
        mapping, local, ids = (torch.tensor(x, dtype=torch.int32, device=self.device) for x in (slots, places, fed))
        thinking_triton.launch_thinking(
            logits, mapping, local, ids, self.tokens, self.prompt_len, self.total_len, self.rows, self.runs,
            self.tables, self.max_rows,
        )  # fmt: skip
        return logits

    def compare(self, slot: int) -> None:
        request, row = self.requests[slot], self.rows[slot].tolist()
        if request.limits is None:
            return
        machine, columns = request.machine, ("MODE", "NUM_TOKENS", "NUM_THINKING", "NUM_MARKERS", "NUM_BLOCKS")
        self.reasons |= {machine.reason} - {None}
        found = [row[Column[column]] for column in columns]
        wanted = [getattr(machine, column.lower()) for column in columns]
        if found != wanted or REASONS[row[Column.REASON]] != machine.reason:
            self.differences.append(f"state: {found} {row[Column.REASON]} for {machine}")
        if row[Column.SCANNED] != len(request.prompt) + len(request.outputs) or row[Column.CLOSE_ASKED]:
            self.differences.append(f"bookkeeping: {row}")

    def commit(self, slot: int, drafts: list[int]) -> None:
        """Some accepted drafts and one more token; mostly what was forced, at times what a foreign sampler took."""
        request = self.requests[slot]
        kept = drafts[: random.randint(0, len(drafts))]
        forced = request.machine.forced_along(kept)[-1] if request.limits else None
        bonus = forced if forced is not None and random.random() < 0.9 else self.some_tokens(1)[0]
        more = self.some_tokens(random.choice([0, 0, 0, 4]))  # a step that this machine did not see
        new, total = [*kept, bonus, *more], len(request.prompt) + len(request.outputs)
        self.tokens[slot, total : total + len(new)] = torch.tensor(new, dtype=torch.int32)
        self.total_len[slot] += len(new)
        request.outputs += new


def run(device: torch.device, steps: int, first_seed: int = 0) -> dict[str, tuple[int, int, list[str], list[str]]]:
    found = {}
    for name, (markers, max_rows, seed) in CASES.items():
        random.seed(first_seed + seed)
        torch.manual_seed(first_seed + seed)
        batch = Batch(markers, max_rows, device, close_share=0.02 if max_rows > 1 else 0.1)
        for _ in range(2 * SLOTS):
            batch.admit()
        count = steps if max_rows > 1 else 3 * steps  # steps without drafts bring a third of the tokens
        for _ in range(count):
            batch.step()
        found[name] = (count, batch.num_forced, batch.differences[:3], sorted(batch.reasons))
    found["a neighbour changes nothing"] = neighbours(device)
    return found


def neighbours(device: torch.device) -> tuple[int, int, list[str], list[str]]:
    """The same requests alone and beside others: the same logits."""
    random.seed(99)
    batch = Batch(MULTI, MAX_ROWS, device, close_share=0)
    for slot in range(SLOTS):
        limits = replace(random_limits() or ThinkingLimits(), budget=slot)
        batch.fill(slot, Request(limits, [9, *MULTI.start], batch.some_tokens(slot), ThinkingMachine(MULTI)))
    layout = [(slot, batch.some_tokens(slot)) for slot in (3, 0, 4, 1, 2)]
    fresh = batch.rows.clone()
    together, first, differences, forced = batch.launch(layout), 0, [], 0
    for slot, drafts in layout:
        batch.rows.copy_(fresh)
        alone = batch.launch([(slot, drafts)])
        if not torch.equal(alone, together[first : first + len(drafts) + 1]):
            differences.append(f"slot {slot}")
        first += len(drafts) + 1
        forced += int((alone > 0).sum())
    return len(layout), forced, differences, []


if __name__ == "__main__":
    print(json.dumps(run(torch.device(sys.argv[1]), *map(int, sys.argv[2:]))))
