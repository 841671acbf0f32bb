"""Metrics of one request: each a name, a formula, a unit and a function of its record.

None means that the quantity does not exist or that nobody can tell; +∞ that it was waited for and never came. Symbols
of the formulas: start = t_sched in an open loop, t0 in a closed one; t0 sent; t1, tR, tA first text of any kind, of the
thought, of the answer or a tool call; tZ last text; N_p, N_t, N_a, N_o tokens of prompt, thought, answer, output.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from vllm_puzzle.bench.efficiency.record import CLIENT, ERROR, TIMEOUT, RequestRecord
from vllm_puzzle.bench.efficiency.slo import Slo


@dataclass(frozen=True, slots=True)
class RequestMetric:
    """One quantity of a request."""

    name: str
    formula: str
    unit: str
    compute: Callable[[RequestRecord], float | None]


def ttft(record: RequestRecord) -> float:
    """Time to the first text, of thought or answer; role and empty chunks are none."""
    return math.inf if record.first is None else record.first - record.start


def ttfat(record: RequestRecord) -> float:
    """Time to the first answer text or tool call: what a reader waits for."""
    return math.inf if record.first_answer is None else record.first_answer - record.start


def queue_delay(record: RequestRecord) -> float | None:
    """How late the client sent it; None in a closed loop, where nothing was scheduled."""
    return None if record.scheduled is None else record.sent - record.scheduled


def thinking_time(record: RequestRecord) -> float | None:
    """From the first text of the thought to that of the answer; None without a thought."""
    if record.first_thinking is None:
        return None
    return math.inf if record.first_answer is None else record.first_answer - record.first_thinking


def answer_time(record: RequestRecord) -> float | None:
    """From the first text of the answer to the last text; None without an answer."""
    return None if record.first_answer is None or record.last is None else record.last - record.first_answer


def e2e(record: RequestRecord) -> float:
    """To the last text; never, where the reply failed, broke off or held no text."""
    if record.last is None or record.outcome in (ERROR, TIMEOUT):
        return math.inf
    return record.last - record.start


def thinking_tokens(record: RequestRecord) -> int | None:
    """N_t. A count of 0 beside the text of a thought is a server that does not count, not a thought without tokens."""
    return None if record.thinking_tokens == 0 and record.first_thinking is not None else record.thinking_tokens


def answer_tokens(record: RequestRecord) -> int | None:
    """N_a, with the same care."""
    return None if record.answer_tokens == 0 and record.first_answer is not None else record.answer_tokens


def _per_token(first: float | None, last: float | None, tokens: int | None, first_tokens: int | None) -> float | None:
    """Time between two chunks over the tokens that came after the first; None where either is not known or nothing."""
    if first is None or last is None or tokens is None or first_tokens is None:
        return None
    return (last - first) / (tokens - first_tokens) if tokens > first_tokens and last > first else None


def tpot_thinking(record: RequestRecord) -> float | None:
    """Time per token of the thought."""
    return _per_token(
        record.first_thinking, record.last_thinking, thinking_tokens(record), record.first_thinking_tokens
    )


def tpot_answer(record: RequestRecord) -> float | None:
    """Time per token of the answer."""
    return _per_token(record.first_answer, record.last_answer, answer_tokens(record), record.first_answer_tokens)


def tpot(record: RequestRecord) -> float | None:
    """Time per token of the whole output. Markers count: generating them takes the time of any other token.

    Where every chunk told its count, over the tokens between the first text and the last exactly. Else a server's total
    is all there is, in which tokens after the last text, such as the end token, are counted too.
    """
    if record.span_tokens is not None and record.token_source != CLIENT:
        return _per_token(record.first, record.last, record.span_tokens, 0)
    begins_with_thought = record.first_thinking is not None and record.first_thinking == record.first
    first_tokens = record.first_thinking_tokens if begins_with_thought else record.first_answer_tokens
    return _per_token(record.first, record.last, record.output_tokens, first_tokens)


def thinking_share(record: RequestRecord) -> float | None:
    """Part of the output that is thought; None without output."""
    tokens = thinking_tokens(record)
    return None if tokens is None or not record.output_tokens else tokens / record.output_tokens


def has_output(record: RequestRecord) -> bool:
    """Whether anything was generated for it, as far as anybody can tell; a refused request has none."""
    return record.first is not None or record.output_tokens is not None


def cut_by_budget(record: RequestRecord) -> bool | None:
    """Whether the budget ended the thought; None without a budget, or where the server does not say."""
    return None if record.budget is None or record.end_reason is None else record.end_reason == "budget"


def budget_excess(record: RequestRecord) -> int | None:
    """Tokens of the thought beyond its budget, negative below it; None without a budget or count."""
    tokens = thinking_tokens(record)
    return None if record.budget is None or tokens is None else tokens - record.budget


def meets(record: RequestRecord, slo: Slo) -> bool | None:
    """Whether a request whose answer is there meets every limit; None where a limit's quantity is not known.

    A limit that is broken decides, whatever is not known. An answer that came in one chunk has no gap between tokens
    that could break a limit on them.
    """
    tokens, first = answer_tokens(record), record.first_answer_tokens
    is_one_chunk = tokens is not None and first is not None and tokens <= first
    values = {
        "ttft": ttft(record),
        "ttfat": ttfat(record),
        "tpot": 0.0 if is_one_chunk else tpot_answer(record),
        "e2e": e2e(record),
    }
    is_unknown = False
    for name, limit in slo.limits().items():
        value = values[name]
        if value is None:
            is_unknown = True
        elif value > limit:
            return False
    return None if is_unknown else True


TIMES = (
    RequestMetric("ttft", "t1 - start, ∞ without text", "s", ttft),
    RequestMetric("ttfat", "tA - start, ∞ without an answer", "s", ttfat),
    RequestMetric("queue_delay", "t0 - t_sched", "s", queue_delay),
    RequestMetric("thinking_time", "tA - tR, ∞ without an answer", "s", thinking_time),
    RequestMetric("answer_time", "tZ - tA", "s", answer_time),
    RequestMetric("e2e", "tZ - start, ∞ where the reply failed or held no text", "s", e2e),
    RequestMetric(
        "tpot_thinking", "(last - first chunk of the thought) / (N_t - tokens in the first)", "s/token", tpot_thinking
    ),
    RequestMetric(
        "tpot_answer", "(last - first chunk of the answer) / (N_a - tokens in the first)", "s/token", tpot_answer
    ),
    RequestMetric("tpot", "(tZ - t1) / tokens after the first chunk", "s/token", tpot),
)
TOKENS = (
    RequestMetric("prompt_tokens", "N_p", "tokens", lambda record: record.prompt_tokens),
    RequestMetric("thinking_tokens", "N_t", "tokens", thinking_tokens),
    RequestMetric("answer_tokens", "N_a", "tokens", answer_tokens),
    RequestMetric("output_tokens", "N_o = N_t + N_a + markers", "tokens", lambda record: record.output_tokens),
    RequestMetric("thinking_share", "N_t / N_o", "1", thinking_share),
)
REQUEST_METRICS = TIMES + TOKENS
