"""What a reply says of its reasoning, in each API's own words: the text, the count, and `reasoning_info`. Pure.

Works on the JSON that leaves the server, streamed or whole, so that it holds for every parser and every path.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from vllm_puzzle.serving.dial.turn import Turn

Body = dict[str, Any]
INFO = "reasoning_info"
DATA = "data: "
COMPACT = (",", ":")
# vLLM's own name for a thought on chat completions.
STOCK_NAME = "reasoning"
MESSAGES = "/v1/messages"
OPENAI_ERROR = "invalid_request_error"
ANTHROPIC_ERRORS = {400: OPENAI_ERROR, 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
                    413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error"}  # fmt: skip


def finish_body(body: Body, turn: Turn) -> Body:
    """A whole reply, changed in place."""
    {"/v1/chat/completions": _chat, "/v1/responses": _response, "/v1/messages": _message}[turn.path](body, turn)
    return body


def finish_event(event: str, turn: Turn) -> str | None:
    """One server-sent event with its blank line; None when nothing of it is left."""
    if not any(sign in event for sign in SIGNS[turn.path]):
        return event
    head, found, data = event.partition(DATA)
    try:
        chunk = json.loads(data) if found else None
    except ValueError:
        return event
    if not isinstance(chunk, dict):
        return event
    if not CHUNKS[turn.path](chunk, turn):
        return None
    return f"{head}{DATA}{json.dumps(chunk, ensure_ascii=False, separators=COMPACT)}\n\n"


def error_body(path: str, status: int, message: str, param: str | None) -> Body:
    """An error in the shape of the API that was called."""
    if path == MESSAGES:
        kind = ANTHROPIC_ERRORS.get(status, OPENAI_ERROR if status < 500 else "api_error")
        return {"type": "error", "error": {"type": kind, "message": message}}
    return {"error": {"type": OPENAI_ERROR, "message": message, "param": param, "code": status}}


def shaped_error(path: str, body: Body, status: int) -> Body:
    """An error that vLLM answers, in its API's shape: one from before the handler has OpenAI's on Anthropic's path, and
    one from the web framework has neither."""
    found = body.get("error")
    if path != MESSAGES and isinstance(found, dict):
        return body
    message = found.get("message") if isinstance(found, dict) else body.get("detail")
    return error_body(path, status, str(message or body), None)


# --- chat completions --------------------------------------------------------------------------------------------


def _chat(body: Body, turn: Turn) -> None:
    for choice in body.get("choices", []):
        _name_thought(choice.get("message") or {}, turn)
        _hide_tokens(choice, turn)
    _count(body.get("usage"), "completion_tokens_details", "reasoning_tokens", turn.num_thinking)
    body[INFO] = turn.info()


def _chat_chunk(chunk: Body, turn: Turn) -> bool:
    """In place; whether anything is left to send. Every sequence's last chunk tells how its thinking went."""
    choices = chunk.get("choices") or []
    was_thought = False
    for choice in choices:
        delta = choice.get("delta") or {}
        was_thought |= _name_thought(delta, turn)
        _hide_tokens(choice, turn)
    usage = chunk.get("usage")
    if usage and choices:
        index = choices[0].get("index", 0)
        if turn.is_counted and index < len(turn.reports):
            so_far = turn.reports[index].thinking_tokens_at(usage.get("completion_tokens", 0))
            _count(usage, "completion_tokens_details", "reasoning_tokens", so_far)
    elif usage:
        _count(usage, "completion_tokens_details", "reasoning_tokens", turn.num_thinking)
    if any(choice.get("finish_reason") for choice in choices) or (usage and not choices):
        chunk[INFO] = turn.info()
    elif was_thought and not turn.is_visible and not usage:
        return any(any((choice.get("delta") or {}).values()) for choice in choices)
    return True


def _name_thought(message: Body, turn: Turn) -> bool:
    """Put the thought under the names asked for, or none; whether there was one."""
    if STOCK_NAME not in message:
        return False
    thought = message.pop(STOCK_NAME)
    if turn.is_visible:
        message.update(dict.fromkeys(turn.names, thought))
    elif "content" in message or "role" in message:
        message.update(dict.fromkeys(turn.names))
    return thought is not None


def _hide_tokens(choice: Body, turn: Turn) -> None:
    """A hidden thought is not to be read from log-probabilities or token ids either."""
    if not turn.is_visible:
        for key in ("logprobs", "token_ids"):
            if choice.get(key) is not None:
                choice[key] = None


# --- responses ---------------------------------------------------------------------------------------------------


def _response(body: Body, turn: Turn) -> None:
    if not turn.is_visible:
        for item in body.get("output", []):
            _empty_item(item)
    _count(body.get("usage"), "output_tokens_details", "reasoning_tokens", turn.num_thinking)
    body[INFO] = turn.info()


def _response_event(event: Body, turn: Turn) -> bool:
    kind = event.get("type", "")
    if isinstance(event.get("response"), dict) and kind in ENDS_OF_RESPONSES:
        _response(event["response"], turn)
    elif not turn.is_visible:
        if kind.startswith("response.reasoning_") or (event.get("part") or {}).get("type") == "reasoning_text":
            return False
        _empty_item(event.get("item") or {})
    return True


def _empty_item(item: Body) -> None:
    if item.get("type") == "reasoning":
        item["content"], item["summary"] = [], []


# --- messages ----------------------------------------------------------------------------------------------------


def _message(body: Body, turn: Turn) -> None:
    if not turn.is_visible:
        for block in body.get("content", []):
            if block.get("type") == "thinking":
                block["thinking"] = ""
    _count(body.get("usage"), "output_tokens_details", "thinking_tokens", turn.num_thinking)
    body[INFO] = turn.info()


def _message_event(event: Body, turn: Turn) -> bool:
    kind = event.get("type")
    if kind == "message_delta":
        _count(event.get("usage"), "output_tokens_details", "thinking_tokens", turn.num_thinking)
        event[INFO] = turn.info()
    elif not turn.is_visible:
        if (event.get("delta") or {}).get("type") == "thinking_delta":
            return False
        block = event.get("content_block") or {}
        if block.get("type") == "thinking":
            block["thinking"] = ""
    return True


def _count(usage: Body | None, details: str, key: str, num_thinking: int | None) -> None:
    if usage is not None and num_thinking is not None:
        usage[details] = {**(usage.get(details) or {}), key: num_thinking}


ENDS_OF_RESPONSES = ("response.completed", "response.incomplete", "response.failed")
CHUNKS: dict[str, Callable[[Body, Turn], bool]] = {
    "/v1/chat/completions": _chat_chunk,
    "/v1/responses": _response_event,
    "/v1/messages": _message_event,
}
# An event without any of these passes as it is, unparsed.
SIGNS = {
    "/v1/chat/completions": ('"reasoning":', '"usage"', '"finish_reason":"', '"logprobs":{', '"token_ids":['),
    "/v1/responses": ("response.completed", "response.incomplete", "response.failed", "reasoning"),
    "/v1/messages": ("message_delta", "thinking"),
}
