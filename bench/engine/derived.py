"""Throughput of lengths that take hours, from two cases that take minutes. Every such figure is labelled derived.

A closed loop of B requests with I prompt and O reply tokens spends, per B requests, B · p on prefill (p: seconds of one
prompt of I tokens) and O steps of s seconds on decoding, so that it puts out B · O / (B · p + O · s) tokens/s. Within a
reply the context grows from I to I + O. The time of a step is linear in it (attention reads the cache; a window's part
stays constant once it is full), so that a step at the mean context I + O / 2 takes the mean time. Assumed besides: no
overlap of prefill with decoding gains anything, and the batch is full all the time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from vllm_puzzle.bench.engine.case import DECODE, PREFILL, Shape
from vllm_puzzle.bench.engine.rows import Row


@dataclass(frozen=True, slots=True)
class Derived:
    """What follows for `shape` at `batch` requests: output tokens/s, from seconds of prefill and of one step."""

    suite: str
    variant: str
    input_len: int
    output_len: int
    batch: int
    output_throughput: float
    prefill_s: float
    step_s: float
    prefill_case: str
    decode_case: str
    formula: str = "B·O / (B·p + O·s)"

    def as_object(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def output_throughput(shape: Shape, batch: int, prefill_s: float, step_s: float) -> float:
    """Output tokens/s of a full closed loop; `prefill_s` of one prompt, `step_s` of one step of the whole batch."""
    return batch * shape.output_len / (batch * prefill_s + shape.output_len * step_s)


def mean_context(shape: Shape) -> int:
    """Tokens in view of a decoding step, in the mean over a reply."""
    return shape.input_len + shape.output_len // 2


def derive(rows: Iterable[Row], shape: Shape) -> list[Derived]:
    """The figures for `shape`, one for each variant and batch whose two cases were measured.

    The decoding case's prompt is the mean context; the prefill case's prompt is the shape's.
    """
    rows = [row for row in rows if row.status == "ok"]
    found = []
    for decode in rows:
        if decode.role != DECODE or decode.input_len != mean_context(shape) or not decode.steady_output_throughput:
            continue
        for prefill in rows:
            is_its = prefill.role == PREFILL and prefill.variant == decode.variant
            if not is_its or prefill.input_len != shape.input_len or not prefill.duration_s or not prefill.num_requests:
                continue
            batch = decode.batch or 1
            prefill_s, step_s = prefill.duration_s / prefill.num_requests, batch / decode.steady_output_throughput
            rate = output_throughput(shape, batch, prefill_s, step_s)
            cases = prefill.case, decode.case
            lengths = shape.input_len, shape.output_len
            found.append(Derived(decode.suite, decode.variant, *lengths, batch, rate, prefill_s, step_s, *cases))
    return found
