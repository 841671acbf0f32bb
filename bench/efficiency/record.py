"""What one request of a benchmark was, did and cost: the line of `requests.jsonl` that every metric is computed from.

Times are seconds on the client's monotonic clock since the run began, stamped when bytes arrive and before they are
parsed. Nothing here is derived: metrics.py derives. Standard library only.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1

# How a request ended, each request in exactly one way. The first is the only one that counts as right.
CORRECT = "correct"
WRONG = "wrong"  # a gradable answer that is not the right one
NO_PARSE = "no_parse"  # an answer in which the grader finds none
EMPTY = "empty_answer"  # the reply ended by itself without a character of answer
TRUNCATED = "truncated"  # max_tokens came first
LOOP = "loop"  # the server ended a repetition and nothing gradable came
ERROR = "error"  # refused, failed, or broken off
TIMEOUT = "timeout"  # the client gave up
OUTCOMES = (CORRECT, WRONG, NO_PARSE, EMPTY, TRUNCATED, LOOP, ERROR, TIMEOUT)

# Whose count of the tokens it is.
SERVER, CLIENT = "server", "client"

# Warm-up prompts; then what ended before the steady window, within it, and after it.
WARM_UP, RAMP, STEADY, DRAIN = "warm_up", "ramp", "steady", "drain"
PHASES = (WARM_UP, RAMP, STEADY, DRAIN)


class RecordError(ValueError):
    """A line that is no record; the message says what, where, found and allowed."""


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request.

    arm: the setting's name. task, question: which question; repeat: which asking of it; block: which turn of the arm in
    an interleaved sweep; order: place in the arm's work list. budget: the thinking budget asked for, None for none.
    scheduled: when it was to be sent (open loop), None in a closed one. sent: when it was. first, first_thinking,
    first_answer, last_thinking, last_answer, last: when text of any kind, of the thought, of the answer (or of a tool
    call) came first and last; None where none came. done: when the reply ended or broke off. chunks: how many carried
    text. first_thinking_tokens, first_answer_tokens: tokens of the phase that did not come after its first chunk and up
    to its last, so that the others are what the time in between was for; None where nobody can tell.
    prompt_tokens, cached_tokens, thinking_tokens, answer_tokens: None where neither the server nor a tokenizer tells;
    output_tokens: all generated ones, markers included. token_source: `server` or `client`. end_reason: what the server
    says ended the thought. answer, thought: the texts, where they are kept. level: rung of the task's ladder.
    span_tokens: of all output, those that came after the first chunk of text and up to the last one;
    None where not every chunk told its count.
    """

    arm: str
    task: str
    question: str
    repeat: int
    block: int
    order: int
    phase: str
    outcome: str
    budget: int | None
    scheduled: float | None
    sent: float
    first: float | None
    first_thinking: float | None
    first_answer: float | None
    last_thinking: float | None
    last_answer: float | None
    last: float | None
    done: float
    chunks: int
    first_thinking_tokens: int | None
    first_answer_tokens: int | None
    prompt_tokens: int | None
    cached_tokens: int | None
    thinking_tokens: int | None
    answer_tokens: int | None
    output_tokens: int | None
    token_source: str | None
    finish_reason: str | None = None
    end_reason: str | None = None
    error: str | None = None
    answer: str | None = None
    thought: str | None = None
    level: int | None = None
    span_tokens: int | None = None

    def __post_init__(self) -> None:
        for key, value, allowed in (("outcome", self.outcome, OUTCOMES), ("phase", self.phase, PHASES)):
            if value not in allowed:
                raise RecordError(f"request record, key `{key}`: found {value!r}, allowed: {', '.join(allowed)}")

    @property
    def start(self) -> float:
        """What latencies count from: the intended moment in an open loop, so that a late client hides nothing."""
        return self.sent if self.scheduled is None else self.scheduled

    @property
    def is_correct(self) -> bool:
        """Whether it counts as right."""
        return self.outcome == CORRECT

    @property
    def key(self) -> tuple[str, str]:
        """The question, which is what pairs two arms."""
        return self.task, self.question


FIELDS = tuple(field.name for field in fields(RequestRecord))


def to_line(record: RequestRecord) -> str:
    """One line of JSON, without line end."""
    return json.dumps(asdict(record), ensure_ascii=False, separators=(",", ":"))


def from_object(found: Mapping[str, Any], where: str) -> RequestRecord:
    """A parsed line. Unknown keys are an error: a newer schema must not be read as an older one."""
    surplus = sorted(set(found) - set(FIELDS))
    if surplus:
        raise RecordError(f"{where}: found the keys {surplus}, allowed: {', '.join(FIELDS)}")
    try:
        return RequestRecord(**found)
    except TypeError as error:
        raise RecordError(f"{where}: {error}") from None


def read_records(path: Path) -> Iterator[RequestRecord]:
    """The records of a `requests.jsonl`. A last line that a crash cut off is left out."""
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            found = json.loads(line)
        except ValueError:
            if number == len(lines):
                return
            raise RecordError(f"{path.name}, line {number}: found no JSON, allowed: one object a line") from None
        yield from_object(found, f"{path.name}, line {number}")


def measured(records: Iterable[RequestRecord]) -> list[RequestRecord]:
    """All that were issued after the warm-up; accuracy is of these, those of ramp and drain included."""
    return [record for record in records if record.phase != WARM_UP]
