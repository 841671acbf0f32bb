"""What the mock server does with a request: a timed list of steps, a pure function of request and settings.

By default it repeats the last number of the question, after a thought; how long, how fast, how rightly and how cleanly
is set here. A request may bring its own steps in the field `mock`. Standard library only.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

from vllm_puzzle.model_configs.schema import ConfigError

# Kinds of step. The first three carry text; `silent` are tokens that no chunk shows, such as a marker.
THINKING, ANSWER, TOOL = "thinking", "answer", "tool"
ROLE, EMPTY, COMMENT, SILENT, FINISH, DROP, ERROR = "role", "empty", "comment", "silent", "finish", "drop", "error"
KINDS = (THINKING, ANSWER, TOOL, ROLE, EMPTY, COMMENT, SILENT, FINISH, DROP, ERROR)
THOUGHT_FIELDS = ("reasoning", "reasoning_content", "both", "inline")
USAGES = ("continuous", "end", "none")
# What vLLM 0.32 takes for a cache salt.
MAX_SALT, BAD_IN_SALT = 128, "@/\\\0"
# Which part of its natural thought an effort takes.
EFFORTS = {"minimal": 0.25, "low": 0.5, "medium": 0.75, "high": 1.0, "xhigh": 1.0, "max": 1.0}


class Step(NamedTuple):
    """`delay` seconds after the step before: a chunk of `kind` with `text`, made of `tokens` generated tokens."""

    delay: float
    kind: str
    text: str = ""
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Script:
    """A reply. status: of HTTP; other than 200 it is the whole reply. end_reason: of the thought."""

    steps: tuple[Step, ...] = ()
    status: int = 200
    prompt_tokens: int = 16
    cached_tokens: int = 0
    end_reason: str | None = None


@dataclass(frozen=True, slots=True)
class Behaviour:
    """Settings. Times are in seconds, rates are shares of requests, ranges are uniform.

    prefill: until the first token. thinking_tpot, answer_tpot: from token to token. thinking_tokens, answer_tokens:
    natural lengths, from and to. needs: thinking tokens that a question needs, from and to; with fewer the answer is
    right in the share `guess`. wrong, no_parse, empty, drop, refused: shares of replies that are wrong whatever was
    thought, without a number, without an answer, broken off in the middle, or an HTTP 429. storm: from which request to
    which all get 429. bundle: tokens in a chunk; first_bundle: in the first. stall_every, stall: every so many requests
    one stops in the middle, for so long. has_role: a chunk with a role and an empty text comes first. pings: a comment
    before every chunk. slots: requests at a time, the others wait. usage: `continuous` where asked for, `end`, or
    `none`. thought_field: what a thought is called, or `inline` between tags. is_counted: whether usage tells the
    thinking tokens, and miscounts: as none; has_info: whether `reasoning_info` tells them. has_cache: a prompt that was
    asked before under the same cache salt has no prefill. dies_after: requests after which the server is gone. accept:
    of speculative decoding, the share of drafts accepted at each position.
    """

    seed: int = 0
    model: str = "mock"
    prefill: float = 0.02
    thinking_tpot: float = 0.005
    answer_tpot: float = 0.005
    thinking_tokens: tuple[int, int] = (8, 64)
    answer_tokens: tuple[int, int] = (1, 1)
    needs: tuple[int, int] = (0, 0)
    guess: float = 0.0
    wrong: float = 0.0
    no_parse: float = 0.0
    empty: float = 0.0
    drop: float = 0.0
    refused: float = 0.0
    storm: tuple[int, int] | None = None
    bundle: int = 1
    first_bundle: int = 1
    stall_every: int = 0
    stall: float = 0.0
    has_role: bool = True
    pings: bool = False
    slots: int | None = None
    usage: str = "continuous"
    thought_field: str = "reasoning"
    is_counted: bool = True
    miscounts: bool = False
    has_info: bool = True
    has_cache: bool = False
    dies_after: int | None = None
    accept: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for key, allowed in (("usage", USAGES), ("thought_field", THOUGHT_FIELDS)):
            if getattr(self, key) not in allowed:
                raise ConfigError(f"mock, key `{key}`: found {getattr(self, key)!r}, allowed: {', '.join(allowed)}")
        for key in ("guess", "wrong", "no_parse", "empty", "drop", "refused"):
            if not 0 <= getattr(self, key) <= 1:
                raise ConfigError(f"mock, key `{key}`: found {getattr(self, key)!r}, allowed: 0 to 1")
        for key in ("bundle", "first_bundle"):
            if getattr(self, key) < 1:
                raise ConfigError(f"mock, key `{key}`: found {getattr(self, key)!r}, allowed: 1 or more")

    def script(self, body: Mapping[str, Any], ordinal: int) -> Script:
        """The reply to the `ordinal`-th request, counted from 0. Raises ValueError for one that vLLM refuses too."""
        salt = str(body.get("cache_salt", ""))
        if len(salt) > MAX_SALT or set(salt) & set(BAD_IN_SALT):
            raise ValueError(
                f"cache_salt: found {salt!r}, allowed: at most {MAX_SALT} characters, none of {BAD_IN_SALT}"
            )
        if "mock" in body:
            return scripted(body["mock"])
        text = json.dumps(body.get("messages"), sort_keys=True)
        is_refused = self._unit(text, "refused") < self.refused
        if is_refused or (self.storm is not None and self.storm[0] <= ordinal < self.storm[1]):
            return Script(status=429)
        thought, end_reason = self._thought(body, text)
        script = Script(
            steps=tuple(self._steps(text, thought, self._answer(text, thought))),
            prompt_tokens=max(1, len(text) // 4),
            end_reason=end_reason,
        )
        if self.stall_every and ordinal % self.stall_every == self.stall_every - 1:
            script = replace(script, steps=_stalled(script.steps, self.stall))
        script = _cut(script, int(body.get("max_tokens") or 10**9))
        if self._unit(text, "drop") < self.drop:
            half = len(script.steps) // 2
            script = replace(script, steps=(*script.steps[:half], Step(0.0, DROP)))
        return script

    def _thought(self, body: Mapping[str, Any], text: str) -> tuple[int, str]:
        """How many tokens of thought, and what ended them."""
        template = body.get("chat_template_kwargs") or {}
        effort = body.get("reasoning_effort")
        budget = body.get("thinking_token_budget")
        if effort == "none" or template.get("enable_thinking") is False or budget == 0:
            return 0, "off"
        natural = max(1, round(self._between(self.thinking_tokens, text, "thought") * EFFORTS.get(effort or "high", 1)))
        if budget is not None and 0 <= budget < natural:
            return budget, "budget"
        return natural, "natural"

    def _answer(self, text: str, thought: int) -> str:
        """Characters are tokens, the blanks in front included."""
        numbers = re.findall(r"\d+", text)
        right = numbers[-1] if numbers else "0"
        if self._unit(text, "empty") < self.empty:
            return ""
        if self._unit(text, "no_parse") < self.no_parse:
            return "hm"
        knows = thought >= self._between(self.needs, text, "needs") or self._unit(text, "guess") < self.guess
        answer = right if knows and self._unit(text, "wrong") >= self.wrong else str(int(right) + 1)
        return answer.rjust(self._between(self.answer_tokens, text, "answer"))

    def _steps(self, text: str, thought: int, answer: str) -> list[Step]:
        steps = [Step(self.prefill, ROLE)] if self.has_role else []
        wait = 0.0 if self.has_role else self.prefill
        for kind, tokens, tpot in (
            (THINKING, ["t "] * thought, self.thinking_tpot),
            (ANSWER, list(answer), self.answer_tpot),
        ):
            if kind == ANSWER and thought:
                steps.append(Step(wait + tpot, SILENT, "</think>", 1))
                wait = 0.0
            size = self.first_bundle
            while tokens:
                part, tokens = tokens[:size], tokens[size:]
                steps.append(Step(wait + tpot * len(part), kind, "".join(part), len(part)))
                wait, size = 0.0, self.bundle
        steps.append(Step(wait + self.answer_tpot, FINISH, "stop", 1))
        if self.pings:
            steps = [part for step in steps for part in (Step(0.0, COMMENT), step)]
        return steps

    def _unit(self, text: str, what: str) -> float:
        digest = hashlib.sha256(f"{self.seed}/{what}/{text}".encode()).digest()
        return int.from_bytes(digest[:7], "big") / 2**56

    def _between(self, bounds: Sequence[int], text: str, what: str) -> int:
        low, high = bounds
        return low + int(self._unit(text, what) * (high - low + 1))


def scripted(found: Mapping[str, Any]) -> Script:
    """The field `mock` of a request. Raises ValueError."""
    steps = tuple(Step(*step) for step in found.get("steps", ()))
    unknown = {step.kind for step in steps} - set(KINDS)
    if unknown:
        raise ValueError(f"mock, key `steps`: found {sorted(unknown)}, allowed: {', '.join(KINDS)}")
    known = {field.name for field in fields(Script)} - {"steps"}
    return Script(steps, **{key: value for key, value in found.items() if key in known})


def warmed(script: Script) -> Script:
    """The same with the prompt in the cache: its first step comes at once."""
    first, *rest = script.steps
    return replace(script, steps=(first._replace(delay=0.0), *rest), cached_tokens=script.prompt_tokens)


def _cut(script: Script, max_tokens: int) -> Script:
    """Ended by `length` once `max_tokens` tokens came."""
    kept: list[Step] = []
    left = max_tokens
    for step in script.steps:
        if step.tokens > left or (step.tokens and left == 0):
            part = step.text[: len(step.text) * left // step.tokens] if step.tokens else ""
            if left and step.kind != FINISH:
                kept.append(step._replace(text=part, tokens=left))
            return replace(script, steps=(*kept, Step(0.0, FINISH, "length")), end_reason=_end(script, kept))
        kept.append(step)
        left -= step.tokens
    return script


def _end(script: Script, kept: Sequence[Step]) -> str | None:
    """`length` where the thought did not get to its end."""
    is_open = script.end_reason not in (None, "off") and not any(step.kind in (SILENT, ANSWER) for step in kept)
    return "length" if is_open else script.end_reason


def _stalled(steps: Sequence[Step], stall: float) -> tuple[Step, ...]:
    middle = len(steps) // 2
    return (*steps[:middle], steps[middle]._replace(delay=steps[middle].delay + stall), *steps[middle + 1 :])
