"""Two engines that live at once, compared in blocks: how much faster or slower the second is, and how sure that is.

A block visits a, b, b, a (the next one b, a, a, b), so that a drift of the machine that is linear in time cancels out
of each block. The block's value is the mean of log(seconds of a) − log(seconds of b): b's speed over a's. Blocks are
taken as independent; their mean has Student's interval. Their number is fixed beforehand, since stopping once the
interval suits would make it too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from vllm_puzzle.bench.efficiency.resampling import CONFIDENCE, geometric_mean

A, B = "a", "b"
ORDERS = ((A, B, B, A), (B, A, A, B))
MET, MISSED, OPEN, UNJUDGED = "met", "not met", "inconclusive", "not judged"


@dataclass(frozen=True, slots=True)
class Visit:
    """One run of a case by one of both engines: seconds."""

    block: int
    arm: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """b's speed over a's, with its interval; `verdict` is about a loss of at most `tolerance`.

    met: the whole interval lies above 1 − tolerance; not met: below it; inconclusive: it lies on both sides.
    """

    case: str
    a: str
    b: str
    ratio: float
    low: float
    high: float
    blocks: int
    tolerance: float | None
    verdict: str
    seconds: tuple[tuple[float, ...], ...]
    orders: tuple[str, ...]
    confidence: float = CONFIDENCE

    def as_object(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def order(block: int) -> tuple[str, ...]:
    """Which engine is visited when, in block number `block` from 0."""
    return ORDERS[block % 2]


def compare(case: str, a: str, b: str, visits: Sequence[Visit], tolerance: float | None) -> Comparison:
    """The comparison over all complete blocks. Raises ValueError without any, or for seconds that are not positive."""
    numbers = sorted({visit.block for visit in visits})
    blocks = [[visit for visit in visits if visit.block == number] for number in numbers]
    blocks = [block for block in blocks if len(block) == len(ORDERS[0])]
    if not blocks or any(visit.seconds <= 0 for block in blocks for visit in block):
        raise ValueError(f"comparison of {a} and {b}: found {len(blocks)} whole blocks, allowed: 1 or more, in seconds")
    values = [_log_ratio(block) for block in blocks]
    found = geometric_mean(values)
    return Comparison(
        case, a, b, found.estimate, found.low, found.high, len(values), tolerance,
        verdict(found.low, found.high, tolerance),
        tuple(tuple(visit.seconds for visit in block) for block in blocks),
        tuple("".join(visit.arm for visit in block) for block in blocks),
    )  # fmt: skip


def verdict(low: float, high: float, tolerance: float | None) -> str:
    """What an interval of b's speed over a's says about a loss of at most `tolerance`."""
    if tolerance is None:
        return UNJUDGED
    if low >= 1 - tolerance:
        return MET
    return MISSED if high < 1 - tolerance else OPEN


def _log_ratio(block: Sequence[Visit]) -> float:
    """The block's log of b's speed over a's."""
    return fmean(math.log(v.seconds) for v in block if v.arm == A) - fmean(
        math.log(v.seconds) for v in block if v.arm == B
    )
