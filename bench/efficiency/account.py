"""A reply's account: which text is thought and which is answer, tokens of each, outcome; the line that is written.

The answer alone is graded, never the thought; a thought that was not closed is no answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm_puzzle.bench.efficiency.arm import Arm
from vllm_puzzle.bench.efficiency.client import TIME, Piece, Reply
from vllm_puzzle.bench.efficiency.question import Ask, Question
from vllm_puzzle.bench.efficiency.record import (
    CLIENT,
    EMPTY,
    ERROR,
    LOOP,
    NO_PARSE,
    SERVER,
    TIMEOUT,
    TRUNCATED,
    RequestRecord,
)

OPEN, CLOSE = "<think>", "</think>"
CountTokens = Callable[[str], int]


@dataclass(frozen=True, slots=True)
class Counts:
    """Tokens of a reply; None where nobody tells. thinking_first, answer_first: those of the phase that did not come
    after its first chunk, so that the others are what the time from first to last chunk was for.
    """

    prompt: int | None
    cached: int | None
    thinking: int | None
    answer: int | None
    output: int | None
    thinking_first: int | None
    answer_first: int | None
    source: str | None
    span: int | None = None


def split_inline(thought: list[Piece], answer: list[Piece]) -> tuple[list[Piece], list[Piece]]:
    """Thought and answer of a server that leaves the tags in the text; as they are where it names the thought.

    The first closing tag counts, wherever chunks cut it, unless an opening one precedes it that does not begin the
    text: then the tags are what is talked about.
    """
    if thought or not answer:
        return thought, answer
    text = "".join(piece.text for piece in answer)
    start = len(text) - len(text.lstrip())
    is_opened = text.startswith(OPEN, start)
    end = text.find(CLOSE)
    if not is_opened and (end < 0 or 0 <= text.find(OPEN) < end):
        return thought, answer
    begin = start + len(OPEN) if is_opened else 0
    stop = len(text) if end < 0 else end
    return _between(answer, begin, stop), _between(answer, stop + len(CLOSE), len(text), has_tools=True)


def _between(pieces: list[Piece], begin: int, end: int, has_tools: bool = False) -> list[Piece]:
    """What of the pieces lies in text[begin:end]; a tool call is a piece without text."""
    found, position = [], 0
    for piece in pieces:
        low, high = max(begin, position), min(end, position + len(piece.text))
        if low < high:
            found.append(piece._replace(text=piece.text[low - position : high - position]))
        elif not piece.text and has_tools:
            found.append(piece)
        position += len(piece.text)
    return found


def count(reply: Reply, thought: list[Piece], answer: list[Piece], tokenizer: CountTokens | None = None) -> Counts:
    """Tokens by the server's word where it is to be believed, else by the tokenizer's.

    A server that counts no thinking while it sends a thought is not believed; nor is one whose count of a phase is off
    by more than a few markers (3 tokens and 5 %) from the tokenizer's. Where it counts the whole output only, markers
    and the end token are among the answer's tokens.
    """
    usage, info = reply.usage, reply.info
    output = _integer(usage.get("completion_tokens"))
    told = _integer((usage.get("completion_tokens_details") or {}).get("reasoning_tokens"))
    if told == 0 and thought:
        told = None
    thinking = _integer(info.get("thinking_tokens"))
    thinking = told if thinking is None or (thinking == 0 and thought) else thinking
    if thinking is None:
        thinking = (thought[-1].tokens if thought else 0) if output is not None else None
    answered = _integer(info.get("answer_tokens"))
    if answered is None and output is not None and thinking is not None:
        answered = max(0, output - thinking)
    source = SERVER if output is not None else None
    firsts = [_first(thinking, thought), _first(answered, answer)]
    if tokenizer is not None:
        texts = [
            "".join(piece.text for piece in thought),
            "".join(piece.text for piece in answer) + "".join(reply.tools),
        ]
        counted = [tokenizer(text) if text else 0 for text in texts]
        if not (_agree(thinking, counted[0]) and _agree(answered, counted[1])):
            source = CLIENT
            thinking, answered = counted
            output = sum(counted) if output is None else output
            firsts = [tokenizer(pieces[0].text) if pieces else None for pieces in (thought, answer)]
    span = _span(thought + answer)
    prompt = _integer(usage.get("prompt_tokens"))
    cached = _integer((usage.get("prompt_tokens_details") or {}).get("cached_tokens"))
    return Counts(prompt, cached, thinking, answered, output, firsts[0], firsts[1], source, span)


def _span(pieces: list[Piece]) -> int | None:
    counts = [piece.tokens for piece in pieces]
    known = [count for count in counts if count is not None]
    return max(known) - min(known) if known and len(known) == len(counts) else None


def _first(total: int | None, pieces: list[Piece]) -> int | None:
    if total is None or not pieces:
        return None
    first, last = pieces[0].tokens, pieces[-1].tokens
    return None if first is None or last is None else total - (last - first)


def _agree(told: int | None, counted: int) -> bool:
    return told is not None and abs(told - counted) <= 3 + 0.05 * counted


def _integer(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def outcome_of(reply: Reply, question: Question, answer: str) -> str:
    """How the request ended. `answer` is what stands outside the thought."""
    if reply.failure is not None:
        return TIMEOUT if reply.failure == TIME else ERROR
    if reply.finish_reason == "length":
        return TRUNCATED
    graded = question.grade(answer)
    is_loop = reply.finish_reason == "repetition" or reply.info.get("end_reason") == "loop"
    return LOOP if is_loop and graded in (EMPTY, NO_PARSE) else graded


def to_record(
    reply: Reply,
    ask: Ask,
    arm: Arm,
    *,
    block: int,
    phase: str,
    origin: float,
    scheduled: float | None,
    tokenizer: CountTokens | None = None,
    keeps_text: bool = False,
) -> RequestRecord:
    """The record of a finished request. origin: the run's beginning on the clock of the reply's stamps."""
    question = ask.question
    thought, answer = split_inline(reply.thought, reply.answer)
    text = "".join(piece.text for piece in answer)
    counts = count(reply, thought, answer, tokenizer)
    stamps = sorted({piece.stamp - origin for pieces in (thought, answer) for piece in (pieces[:1] + pieces[-1:])})
    end_reason = reply.info.get("end_reason")
    return RequestRecord(
        arm=arm.name,
        task=question.task,
        question=question.id,
        repeat=ask.repeat,
        block=block,
        order=ask.order,
        phase=phase,
        outcome=outcome_of(reply, question, text),
        budget=arm.budget,
        scheduled=scheduled,
        sent=reply.sent - origin,
        first=stamps[0] if stamps else None,
        first_thinking=thought[0].stamp - origin if thought else None,
        first_answer=answer[0].stamp - origin if answer else None,
        last_thinking=thought[-1].stamp - origin if thought else None,
        last_answer=answer[-1].stamp - origin if answer else None,
        last=stamps[-1] if stamps else None,
        done=reply.done - origin,
        chunks=reply.chunks,
        first_thinking_tokens=counts.thinking_first,
        first_answer_tokens=counts.answer_first,
        prompt_tokens=counts.prompt,
        cached_tokens=counts.cached,
        thinking_tokens=counts.thinking,
        answer_tokens=counts.answer,
        output_tokens=counts.output,
        token_source=counts.source,
        finish_reason=reply.finish_reason,
        end_reason=end_reason if isinstance(end_reason, str) else None,
        error=reply.error,
        answer=text if keeps_text else None,
        thought="".join(piece.text for piece in thought) if keeps_text else None,
        level=question.level,
        span_tokens=counts.span,
    )
