"""One HTTP request on its way: what was asked, what was done, and what the reply must say about it. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

from vllm_puzzle.serving.dial.request import ReasoningRequest
from vllm_puzzle.serving.dial.resolve import Effective

# vLLM writes the first; DeepSeek's API and everything modelled on it reads the second.
NAMES = ("reasoning", "reasoning_content")


class Report(Protocol):
    """What is known of one sequence of the reply (n of them). Times in seconds since the request began."""

    @property
    def num_thinking(self) -> int:
        """Thinking tokens."""

    @property
    def num_answer(self) -> int:
        """Answer tokens."""

    first_thinking: float | None
    first_answer: float | None

    def thinking_tokens_at(self, num_tokens: int) -> int:
        """Thinking tokens among the sequence's first `num_tokens`."""

    @property
    def end_reason(self) -> str | None:
        """Why thinking ended."""


@dataclass(slots=True)
class Turn:
    """A request and its reply. The middleware makes it, the handlers fill it in.

    wish: None on paths without reasoning fields. names: the fields that carry a thought on chat completions.
    is_followed: whether one engine request is one sequence, so that its thoughts can be followed.
    sources: reports by sequence index, of each engine request. is_counted: whether the server knows the model's
    markers, so that there are reports.
    """

    path: str
    wish: ReasoningRequest = field(default_factory=ReasoningRequest)
    authorization: str | None = None
    wants_continuous_usage: bool = False
    effective: Effective | None = None
    is_followed: bool = True
    names: Sequence[str] = NAMES
    is_counted: bool = False
    sources: list[Mapping[int, Report]] = field(default_factory=list)

    @property
    def is_visible(self) -> bool:
        """Whether the reply carries the thinking text."""
        return self.effective is None or self.effective.is_visible

    @property
    def reports(self) -> list[Report]:
        """One for each sequence that has begun, in the order of their indices."""
        return [source[index] for source in self.sources for index in sorted(source)]

    @property
    def num_thinking(self) -> int | None:
        """Thinking tokens of the whole reply."""
        return sum(report.num_thinking for report in self.reports) if self.is_counted else None

    def info(self) -> dict[str, Any]:
        """The extension object `reasoning_info`. Counts are null where the server cannot know them."""
        done = self.effective or Effective()
        requested = {"mode": mode(self.wish.is_on), "effort": self.wish.effort, "budget": self.wish.budget}
        effective = {"mode": mode(done.is_on), "effort": done.effort, "budget": done.budget}
        info: dict[str, Any] = {"requested": requested, "effective": effective}
        reports = self.reports if self.is_counted else []
        info |= self._counts(reports[0] if len(reports) == 1 else None)
        if len(reports) > 1:
            info |= {
                "thinking_tokens": self.num_thinking,
                "answer_tokens": sum(report.num_answer for report in reports),
            }
            info["choices"] = [self._counts(report) for report in reports]
        if done.notes:
            info["notes"] = list(done.notes)
        return info

    def _counts(self, report: Report | None) -> dict[str, Any]:
        return {
            "thinking_tokens": report and report.num_thinking,
            "answer_tokens": report and report.num_answer,
            "end_reason": report and report.end_reason,
            "time_to_first_thinking_ms": report and milliseconds(report.first_thinking),
            "time_to_first_answer_ms": report and milliseconds(report.first_answer),
        }


def mode(is_on: bool | None) -> str | None:
    """The word for a switch; None leaves it to the model."""
    return None if is_on is None else "on" if is_on else "off"


def milliseconds(seconds: float | None) -> float | None:
    """To a hundredth of a millisecond."""
    return None if seconds is None else round(seconds * 1000, 2)


TURN: ContextVar[Turn | None] = ContextVar("reasoning_turn", default=None)
