"""What a client asks for, whatever words it used: one frozen record, put together from statements."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

# Every ecosystem's words, weakest first; "none" is a mode, not a level.
EFFORTS = ("minimal", "low", "medium", "high", "xhigh", "max")
UNLIMITED = -1
BAD_REQUEST, TOO_LARGE = 400, 413


class RequestError(ValueError):
    """A request whose reasoning fields are wrong. `param` is the field at fault, `status` HTTP's."""

    def __init__(self, message: str, param: str, status: int = BAD_REQUEST) -> None:
        super().__init__(message)
        self.param, self.status = param, status


@dataclass(frozen=True, slots=True)
class Statement:
    """One thing that one field of the request says. `about` is a field of ReasoningRequest."""

    about: str
    value: Any
    source: str  # the field, as the client wrote it: `reasoning.effort`


@dataclass(frozen=True, slots=True)
class ReasoningRequest:
    """A request's wishes; None where it says nothing.

    is_on: think or not. effort: one of EFFORTS. budget: most thinking tokens, UNLIMITED for no limit. is_visible: the
    reply carries the thinking text. keeps_history: earlier turns' thoughts stay in the prompt. `sources` tells for each
    which field said it.
    """

    is_on: bool | None = None
    effort: str | None = None
    budget: int | None = None
    is_visible: bool | None = None
    keeps_history: bool | None = None
    sources: dict[str, str] = field(default_factory=dict, compare=False)


def combine(statements: Iterable[Statement]) -> ReasoningRequest:
    """One request from all statements. Raises RequestError naming two fields that contradict each other.

    Saying the same thing twice is fine. A number of tokens says also that thinking is on (0: off), an effort that it is
    on; both are beaten by nothing, so that `off` beside either is a contradiction.
    """
    found: dict[str, Statement] = {}
    for statement in statements:
        earlier = found.setdefault(statement.about, statement)
        if earlier.value != statement.value:
            raise _contradiction(earlier, statement)
    implied = [_implied(found[about]) for about in ("effort", "budget") if about in found]
    stated = [found["is_on"]] if "is_on" in found else []
    first: Statement | None = None
    for statement in stated + implied:
        first = first or statement
        if statement.value != first.value:
            raise _contradiction(_original(found, first), _original(found, statement))
    values = {about: statement.value for about, statement in found.items()}
    if first is not None:
        values["is_on"] = first.value
    sources = {about: statement.source for about, statement in found.items()}
    if first is not None:
        sources.setdefault("is_on", first.source)
    return ReasoningRequest(**values, sources=sources)


def _implied(statement: Statement) -> Statement:
    return Statement("is_on", statement.about == "effort" or statement.value != 0, statement.source)


def _original(found: dict[str, Statement], statement: Statement) -> Statement:
    """The statement as the client made it, for the message."""
    return next((s for s in found.values() if s.source == statement.source), statement)


def _contradiction(one: Statement, other: Statement) -> RequestError:
    return RequestError(f"{_said(one)} contradicts {_said(other)}; allowed: one of the two", other.source)


def _said(statement: Statement) -> str:
    words = {"is_on": {True: "reasoning on", False: "reasoning off"}}.get(statement.about, {})
    return f"`{statement.source}` ({words.get(statement.value, f'{statement.about} {statement.value!r}')})"
