"""Bytes of a stream → stamps, texts, counts and outcome, however they are cut and whatever is wrong with them."""

from __future__ import annotations

import itertools
import json
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from virtual_runs import arm_of, grade, question
from vllm_puzzle.bench.efficiency.account import count, outcome_of, split_inline, to_record
from vllm_puzzle.bench.efficiency.client import STREAM, Events, Piece, Reply, ask
from vllm_puzzle.bench.efficiency.question import Ask, Question
from vllm_puzzle.bench.efficiency.record import CORRECT, EMPTY, ERROR, LOOP, NO_PARSE, STEADY
from vllm_puzzle.bench.efficiency.virtual_time import run_virtual


def event(delta: dict[str, Any] | None = None, finish: str | None = None, **rest: Any) -> bytes:
    chunk = {"choices": [{"index": 0, "delta": delta or {}, "finish_reason": finish}], **rest}
    return b"data: " + json.dumps(chunk, ensure_ascii=False).encode() + b"\n\n"


STREAMED = (
    event({"role": "assistant", "content": ""})
    + b": ping\n\n"
    + event({"reasoning": "größer "}, usage={"completion_tokens": 2})
    + event({"reasoning_content": "als 7", "reasoning": "als 7"}, usage={"completion_tokens": 5})
    + event({"content": "o"}, usage={"completion_tokens": 7})
    + event({"content": "k"}, usage={"completion_tokens": 8})
    + event({}, "stop", usage={"completion_tokens": 9}, reasoning_info={"end_reason": "natural"})
    + b'data: {"choices": [], "usage": {"completion_tokens": 9, "prompt_tokens": 4, '
    + b'"prompt_tokens_details": {"cached_tokens": 3}}}\n\n'
    + b"data: [DONE]\n\n"
)


def read(parts: list[bytes]) -> Reply:
    """Part k arrives at k."""
    reply = Reply(sent=0.0)
    events = Events(reply)
    for stamp, part in enumerate(parts):
        events.feed(part, float(stamp))
    return reply


def texts(reply: Reply) -> tuple[str, str]:
    return "".join(piece.text for piece in reply.thought), "".join(piece.text for piece in reply.answer)


@settings(deadline=None)
@given(st.lists(st.integers(0, len(STREAMED)), max_size=12))
def test_wherever_the_bytes_are_cut_the_same_is_read(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(STREAMED)]
    reply = read([STREAMED[low:high] for low, high in itertools.pairwise(edges)])
    assert texts(reply) == ("größer als 7", "ok")
    assert (reply.chunks, reply.is_ended, reply.failure, reply.finish_reason) == (4, True, None, "stop")
    assert [piece.tokens for piece in reply.thought + reply.answer] == [2, 5, 7, 8]
    assert reply.usage["prompt_tokens_details"] == {"cached_tokens": 3}
    assert reply.info == {"end_reason": "natural"}


def test_an_event_counts_from_when_its_last_byte_came() -> None:
    first, second = event({"content": "o"}), event({"content": "k"})
    reply = read([first[:10], first[10:] + second[:5], second[5:]])
    assert [piece.stamp for piece in reply.answer] == [1.0, 2.0]


def test_lines_may_end_as_on_windows() -> None:
    assert texts(read([STREAMED.replace(b"\n", b"\r\n")])) == ("größer als 7", "ok")


@pytest.mark.parametrize(
    "bad",
    [b"data: {nonsense\n\n", b"data: 7\n\n", b'data: {"choices": [7]}\n\n', b'data: {"choices": [{"delta": 7}]}\n\n'],
)
def test_an_event_that_is_no_chunk_fails_the_request_and_no_more(bad: bytes) -> None:
    reply = read([event({"content": "o"}), bad, event({"content": "k"}, "stop")])
    assert reply.failure == STREAM and reply.error is not None and "no chunk" in reply.error
    assert texts(reply)[1] == "ok"


def test_an_error_in_the_stream_fails_the_request() -> None:
    reply = read([event({"content": "ok"}), b'data: {"error": {"message": "out of memory", "code": 500}}\n\n'])
    assert (reply.failure, reply.error) == (STREAM, "out of memory")


def test_tokens_listed_with_each_chunk_count_where_usage_does_not() -> None:
    chunks = [{"choices": [{"delta": {"content": "ab"}, "token_ids": [5, 6]}]}, {"choices": [{"delta": {"content": "c"},
              "token_ids": [7], "finish_reason": "stop"}]}]  # fmt: skip
    reply = read([b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks])
    assert [piece.tokens for piece in reply.answer] == [2, 3]


def pieces(*parts: str) -> list[Piece]:
    return [Piece(float(stamp), text, stamp + 1) for stamp, text in enumerate(parts)]


@pytest.mark.parametrize(
    ("parts", "thought", "answer", "first_answer"),
    [
        (["<think>", "a", "</think>", "ok"], "a", "ok", 3.0),
        (["<th", "ink>a", "b</th", "ink>o", "k"], "ab", "ok", 3.0),
        (["\n<think>a", "</think>"], "a", "", None),
        (["a", "b</think>ok"], "ab", "ok", 1.0),
        (["<think>a", "b"], "ab", "", None),
        (["ok"], "", "ok", 0.0),
        (["say <think>", "x</think>"], "", "say <think>x</think>", 0.0),
        (["<think></think>ok"], "", "ok", 0.0),
    ],
)
def test_tags_in_the_text_part_thought_from_answer(
    parts: list[str], thought: str, answer: str, first_answer: float | None
) -> None:
    found_thought, found_answer = split_inline([], pieces(*parts))
    assert "".join(piece.text for piece in found_thought) == thought
    assert "".join(piece.text for piece in found_answer) == answer
    assert (found_answer[0].stamp if found_answer else None) == first_answer


@settings(deadline=None)
@given(st.text("ab<>/think", max_size=30), st.integers(1, 4))
def test_splitting_loses_no_text_but_the_tags(text: str, size: int) -> None:
    parts = [text[start : start + size] for start in range(0, len(text), size)]
    thought, answer = ("".join(piece.text for piece in found) for found in split_inline([], pieces(*parts)))
    assert (text.endswith(answer) and len(text) - len(thought) - len(answer) in (0, 7, 8, 15)) or text.lstrip() != text
    whole_thought, whole_answer = split_inline([], pieces(text) if text else [])
    assert ["".join(piece.text for piece in found) for found in (whole_thought, whole_answer)] == [thought, answer]


def reply_of(thought: list[Piece], answer: list[Piece], **fields: Any) -> Reply:
    return Reply(0.0, thought=thought, answer=answer, finish_reason="stop", is_ended=True, **fields)


def test_a_tokenizer_counts_where_the_server_is_silent_and_corrects_one_that_is_wrong() -> None:
    thought, answer = [Piece(0.0, "a b ", None), Piece(1.0, "c d e", None)], [Piece(2.0, "x y", None)]
    words = lambda text: len(text.split())  # noqa: E731
    silent = count(reply_of(thought, answer), thought, answer, words)
    assert (silent.thinking, silent.answer, silent.output, silent.source) == (5, 2, 7, "client")
    assert (silent.thinking_first, silent.answer_first) == (2, 2)
    usage = {"completion_tokens": 9, "completion_tokens_details": {"reasoning_tokens": 6}}
    close = count(reply_of(thought, answer, usage=usage), thought, answer, words)
    assert (close.thinking, close.answer, close.output, close.source) == (6, 3, 9, "server")
    wrong = {"completion_tokens": 90, "completion_tokens_details": {"reasoning_tokens": 60}}
    mended = count(reply_of(thought, answer, usage=wrong), thought, answer, words)
    assert (mended.thinking, mended.answer, mended.source) == (5, 2, "client")
    nobody = count(reply_of(thought, answer), thought, answer)
    assert (nobody.thinking, nobody.answer, nobody.output, nobody.source) == (None, None, None, None)


@pytest.mark.parametrize("value", [True, -3, "7", 2.5, None, {}])
def test_counts_that_are_no_counts_are_unknown(value: Any) -> None:
    usage = {"completion_tokens": value, "prompt_tokens": value}
    found = count(reply_of([], pieces("ok"), usage=usage), [], pieces("ok"))
    assert (found.output, found.prompt, found.source) == (None, None, None)


def test_a_repetition_that_the_server_ended_is_a_loop_unless_an_answer_came() -> None:
    for fields in ({"info": {"end_reason": "loop"}}, {}):
        reply = reply_of([], [], **fields)
        reply.finish_reason = "stop" if fields else "repetition"
        assert outcome_of(reply, question("q"), "") == LOOP
        assert outcome_of(reply, question("q"), "ok") == CORRECT
    assert outcome_of(reply_of([], []), question("q"), "") == EMPTY


def test_a_grader_that_raises_finds_no_answer_and_one_that_makes_up_a_grade_is_an_error() -> None:
    def raises(answer: str) -> str:
        raise ValueError("no number")

    assert Question("t", "q", (), raises).grade("x") == NO_PARSE
    with pytest.raises(ValueError, match="found 'splendid', allowed: correct, wrong, no_parse"):
        Question("t", "q", (), lambda answer: "splendid").grade("x")


class Canned(httpx.AsyncBaseTransport):
    """One reply in given parts, or an error; stamps are the client's own."""

    def __init__(self, parts: list[bytes], status: int = 200, error: Exception | None = None) -> None:
        self.parts, self.status, self.error = parts, status, error

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if self.error is not None:
            raise self.error
        return httpx.Response(self.status, stream=_Parts(self.parts))


class _Parts(httpx.AsyncByteStream):
    def __init__(self, parts: list[bytes]) -> None:
        self.parts = parts

    async def __aiter__(self) -> Any:
        for part in self.parts:
            yield part


@pytest.mark.parametrize(
    ("transport", "error"),
    [
        (Canned([event({"content": "ok"})]), "the stream ended without a finish reason"),
        (Canned([event({"content": "ok"}, "error")]), "the server ended it: error"),
        (Canned([b'{"error": {"message": "slow\\n down"}}'], 429), "HTTP 429: slow down"),
        (Canned([b"<html>bad gateway</html>"], 502), "HTTP 502: <html>bad gateway</html>"),
        (Canned([], error=httpx.ConnectError("refused")), "no connection: refused"),
        (Canned([], error=httpx.ReadError("reset")), "ReadError: reset"),
    ],
)
def test_every_failure_is_that_requests_error_in_one_line(transport: Canned, error: str) -> None:
    arm, found = arm_of(), question("q")
    reply = run_virtual(ask(transport, arm, found, lambda: 1.0))
    record = to_record(reply, Ask(found, 0, 0), arm, block=0, phase=STEADY, origin=0.0, scheduled=None)
    assert (record.outcome, record.error) == (ERROR, error)


def test_a_stream_without_done_but_with_a_finish_reason_is_whole() -> None:
    reply = run_virtual(
        ask(Canned([event({"content": "ok"}), event({}, "stop")[:-2]]), arm_of(), question("q"), lambda: 1.0)
    )
    assert (reply.failure, reply.finish_reason) == (None, "stop")
    assert grade(texts(reply)[1]) == CORRECT


def test_keys_are_sent_and_never_written() -> None:
    arm = arm_of(headers={"authorization": "Bearer secret"})
    assert "secret" not in json.dumps(arm.described()) + repr(arm)
