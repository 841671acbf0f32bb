"""The line that tells how a run goes: rewritten in place on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from statistics import median
from typing import TextIO

from vllm_puzzle.bench.efficiency.record import WARM_UP, RequestRecord

TERMINAL_S, PLAIN_S = 0.5, 10.0
_KEPT = 500  # latest requests that the median is of


class Progress:
    """Counts records. total: of all to come. label: what is under way."""

    def __init__(
        self,
        total: int,
        label: str = "",
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.label = total, label
        self.stream = sys.stderr if stream is None else stream
        self.is_terminal = self.stream.isatty()
        self._clock = clock
        self._begin = self._shown = clock()
        self._done = self._correct = self._skipped = 0
        self._waits: list[float] = []
        self._width = 0

    def skip(self, count: int) -> None:
        """Requests that an earlier attempt has done; they take no time."""
        self._skipped += count

    def add(self, record: RequestRecord) -> None:
        """One request has ended."""
        if record.phase == WARM_UP:
            return
        self._done += 1
        self._correct += record.is_correct
        self._waits.append(math.inf if record.first_answer is None else record.first_answer - record.start)
        del self._waits[:-_KEPT]
        if self._clock() - self._shown >= (TERMINAL_S if self.is_terminal else PLAIN_S):
            self.show()

    def line(self) -> str:
        """Done of total, time left, accuracy so far, median time to the first answer token."""
        done = self._done + self._skipped
        parts = [f"{done}/{self.total}", f"ETA {self._left()}"]
        if self._done:
            parts.append(f"accuracy {self._correct / self._done:.1%}")
            wait = median(self._waits)
            parts.append("TTFAT p50 none" if math.isinf(wait) else f"TTFAT p50 {wait * 1000:.0f} ms")
        return "  ".join([self.label, *parts] if self.label else parts)

    def _left(self) -> str:
        if not self._done:
            return "?"
        left = (self._clock() - self._begin) / self._done * max(0, self.total - self._done - self._skipped)
        minutes, seconds = divmod(round(left), 60)
        return f"{minutes}:{seconds:02d}"

    def show(self) -> None:
        """Print it now."""
        self._shown = self._clock()
        line = self.line()
        if self.is_terminal:
            self.stream.write("\r" + line.ljust(self._width))
            self._width = len(line)
        else:
            self.stream.write(line + "\n")
        self.stream.flush()

    def note(self, text: str) -> None:
        """A line of its own."""
        self.finish()
        self.stream.write(text + "\n")
        self.stream.flush()

    def finish(self) -> None:
        """The last state, with a line end."""
        self.show()
        if self.is_terminal:
            self.stream.write("\n")
            self.stream.flush()
            self._width = 0
