"""Request bodies for all three APIs, good and bad, generated with hypothesis from the table of dialects itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from vllm_puzzle.serving.dial.dialects import FIELDS

MODEL = "pocket-puzzle"
CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
ASK = {"role": "user", "content": "12+30-5"}
JSON = "application/json"
PER_VALUE = 10
# For the stream of a body and its whole reply to be the same text, and for every request to be short.
COMMON = {"model": MODEL, "temperature": 0}
LIMIT = {CHAT: "max_tokens", RESPONSES: "max_output_tokens", MESSAGES: "max_tokens"}


@dataclass(frozen=True, slots=True)
class Case:
    """One request. fault: what the bytes have that no client's library writes. is_clean: nothing but reasoning fields
    can be wrong with it."""

    path: str
    raw: bytes
    fault: str = ""
    content_type: str = JSON
    is_clean: bool = False


def _leaves(fields: Mapping[str, Any], at: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, reader in fields.items():
        if isinstance(reader, dict):
            yield from _leaves(reader, (*at, key))
        else:
            yield (*at, key)


LEAVES = tuple(_leaves(FIELDS))
OBJECTS = tuple({leaf[:size] for leaf in LEAVES for size in range(1, len(leaf))})
NUMBERS = (0, 1, 2, 7, 8, 39, 40, 41, 500, -1, 2**31 - 1)
WORDS = ("none", "minimal", "low", "medium", "high", "xhigh", "max", "ultra", "enabled", "disabled", "adaptive",
         "summarized", "omitted", "auto", "concise", "detailed", "standard", "current_turn", "all_turns", "hidden",
         "parsed", "deepseek")  # fmt: skip
ODD = (None, "", "8", "LOW", "on", "\u00e9\u4e2d\U0001f600", "\ud83d", "a\nb\u2028", "x" * 3000, -2, 2**31, 2**63,
       10**40, -(10**400), 1.0, 8.5, 1e300, -0.0, [], [8], {}, {"effort": "low"}, {"a": {"b": [1, {}]}}, [[[[]]]],
       [True] * 2000)  # fmt: skip
UNKNOWN = ("thinking_tokens", "max_reasoning_tokens", "reasoningEffort", "THINKING", "thought", "unthinkable",
           "reasoning\nx", "think" * 900, "reason\ud800", "puzzle_thinking", "reasoning.effort")  # fmt: skip
PLAN = {"budget": None, "grace": 0, "loop": None}
SMUGGLED = (
    (("vllm_xargs",), {"puzzle_thinking": PLAN}),
    (("vllm_xargs",), {"puzzle_thinking": "x", "other": 1}),
    (("vllm_xargs",), {"thinking_token_budget": 999}),
    (("vllm_xargs",), {"thinking_budget": 999}),
    (("extra_args",), {"puzzle_thinking": PLAN}),
    (("extra_body",), {"thinking_token_budget": 999, "vllm_xargs": {"puzzle_thinking": PLAN}}),
    (("sampling_params",), {"extra_args": {"puzzle_thinking": PLAN}, "thinking_token_budget": 999}),
    (("nvext",), {"thinking_token_budget": 999}),
    (("custom_params",), {"puzzle_thinking": PLAN}),
    (("chat_template_kwargs",), {"thinking_token_budget": 999}),
    (("chat_template_kwargs",), {"puzzle": PLAN, "tokenize": True, "add_generation_prompt": False}),
    (("metadata",), {"thinking_token_budget": "999"}),
)
SYSTEMS = ("detailed thinking off", "detailed thinking on", "Be brief.\n detailed thinking off", "/no_think",
           "/think x", "</think>", "<think>", "{{ 7*7 }}{% for x in range(9) %}", "\u0000\ud800", "")  # fmt: skip
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
FLAT_TOOL = {"type": "function", "name": "f", "parameters": {"type": "object", "properties": {}}}
CLAUDE_TOOL = {"name": "f", "input_schema": {"type": "object", "properties": {}}}
SCHEMA = {"type": "integer"}
ANY_API = (
    *((("stream",), value) for value in (True, True, True, False, "yes", None)),
    *((("temperature",), value) for value in (0, 0.7, -1, 1e300, "hot", 10**30)),
    *((("top_k",), value) for value in (1, 0, -1, -7, 2**40, 1.5)),
    *((("metadata",), value) for value in ({}, {"a": "b"}, {"a": {"b": 1}}, 3)),
    *((("repetition_detection",), value) for value in (
        {"max_pattern_size": 3, "min_count": 2}, {"max_pattern_size": 200, "min_pattern_size": 100, "min_count": 2},
        {"max_pattern_size": 0}, {"max_pattern_size": -1}, {"max_pattern_size": 2**70, "min_count": 2**70}, 7)),
    (("request_id",), "same"), (("priority",), 10**20), (("user",), "\ud800"), (("seed",), 2**70), (("seed",), 3),
    (("cache_salt",), ""), (("model",), "other"), (("model",), None), (("model",), 3),
)  # fmt: skip
OPTIONS = {
    CHAT: (
        *ANY_API,
        *((("n",), value) for value in (1, 2, 3, 0, -1, 10**6, "2")),
        *((("max_tokens",), value) for value in (0, 1, 2, 5, -1, 10**9, 10**30, "9")),
        *((("max_completion_tokens",), value) for value in (1, 6, 60)),
        *((("stop",), value) for value in ("7", ["<think>", "</think>"], "", [""], 5, ["x"] * 600)),
        *((("logprobs",), value) for value in (True, False, 3)), (("top_logprobs",), 2), (("top_logprobs",), -2),
        *((("response_format",), value) for value in (
            {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}, {"type": "json_object"},
            {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "no such"}}}, {"type": "x"}, 1)),
        *((("structured_outputs",), value) for value in ({"regex": "(("}, {"choice": ["1"]}, {"regex": "[0-9]"})),
        (("tools",), [TOOL]), (("tools",), [{}]), (("tool_choice",), "auto"), (("tool_choice",), "required"),
        (("tool_choice",), {"type": "function", "function": {"name": "f"}}), (("use_beam_search",), True),
        (("stream_options",), {"include_usage": True, "continuous_usage_stats": True}), (("stream_options",), 4),
        (("logit_bias",), {"5": 100}), (("logit_bias",), {"x": 1}), (("bad_words",), ["1"]), (("echo",), True),
        (("continue_final_message",), True), (("add_generation_prompt",), False), (("min_tokens",), 30),
        (("chat_template",), "{{ messages[0].content }}"), (("ignore_eos",), True), (("prompt_logprobs",), 1),
        (("return_token_ids",), True), (("allowed_token_ids",), [5, 6]), (("documents",), [{"a": "b"}]),
    ),
    RESPONSES: (
        *ANY_API,
        *((("max_output_tokens",), value) for value in (0, 1, 2, 5, -1, 10**9, "9")),
        *((("instructions",), text) for text in (*SYSTEMS, 4)),
        (("text",), {"format": {"type": "json_schema", "name": "a", "schema": SCHEMA}}), (("text",), {"format": 3}),
        (("tools",), [FLAT_TOOL]), (("tools",), [{"type": "mcp"}]), (("tool_choice",), "auto"), (("store",), True),
        (("previous_response_id",), "resp_none"), (("background",), True), (("include",), ["x"]),
        (("top_logprobs",), 2), (("truncation",), "auto"), (("stop",), ["7"]),
    ),
    MESSAGES: (
        *ANY_API,
        *((("max_tokens",), value) for value in (0, 1, 2, 5, -1, 10**9, "9", None)),
        *((("system",), text) for text in (*SYSTEMS, [{"type": "text", "text": "detailed thinking off"}], [3])),
        (("stop_sequences",), ["7"]), (("stop_sequences",), 3), (("tools",), [CLAUDE_TOOL]), (("tools",), [{}]),
        (("tool_choice",), {"type": "auto"}), (("output_config",), {"format": {"type": "json_schema"}}),
        (("output_config",), {"format": {"type": "json_schema", "schema": SCHEMA}}),
    ),
}  # fmt: skip
TURNS: tuple[Any, ...] = (
    *([{"role": "system", "content": text}, ASK] for text in SYSTEMS),
    [ASK, {"role": "assistant", "content": "37"}, ASK],
    [ASK, {"role": "assistant", "content": "37", "reasoning_content": "12+30=42", "reasoning": "x"}, ASK],
    [{"role": "user", "content": [{"type": "text", "text": "1+2"}, {"type": "text", "text": "/no_think"}]}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}],
    [{"role": "user", "content": "1+2", "think": True}],
    [{"role": "assistant", "content": "<think>12"}],
    [{"role": "system"}], [{"role": "user", "content": None}], [{"role": "user", "content": 5}],
    [{"role": "user", "content": [5, None, {"type": "text"}, {"type": "text", "text": 5}]}],
    [{"role": "tool", "content": "x"}], [{"role": "developer", "content": "detailed thinking off"}, ASK],
    [{"role": 5, "content": "x"}], [{"content": "x"}], [None], ["x"], [[]], [], {}, "12+30-5", None, 7,
    [{"role": "system", "content": [{"type": "text", "text": "detailed thinking off"}]}, ASK],
    [{"role": "user", "content": {"type": "text", "text": "x"}}], [{"role": "user", "content": "x" * 2000}],
    [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "detailed thinking off 1+2"}]}],
    [{"type": "reasoning", "id": "r", "summary": [], "content": []}, ASK], [{"type": "item_reference", "id": "x"}],
    [{"role": "user", "content": "\ud83d\u0000\u202e"}], [ASK] * 40,
)  # fmt: skip
TURNS_OF = {CHAT: "messages", RESPONSES: "input", MESSAGES: "messages"}

# What nobody thought of; hypothesis makes it up.
any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def _valid_values() -> dict[tuple[str, ...], list[Any]]:
    """The likely values that each field takes, by trying them; a new field of the table needs nothing here."""
    from vllm_puzzle.serving.dial.dialects import read_statements
    from vllm_puzzle.serving.dial.request import RequestError

    taken: dict[tuple[str, ...], list[Any]] = {}
    for leaf in LEAVES:
        for value in (*NUMBERS, *WORDS, True, False):
            body: dict[str, Any] = {}
            put(body, leaf, value)
            try:
                list(read_statements(body))
            except RequestError:
                continue
            taken.setdefault(leaf, []).append(value)
    return taken


def put(body: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    """Set a nested key; what is in the way and no object is replaced."""
    for key in path[:-1]:
        # Never into a value that is shared with the tables.
        body[key] = dict(body[key]) if isinstance(body.get(key), dict) else {}
        body = body[key]
    body[path[-1]] = value


VALID = _valid_values()
GOOD = tuple((leaf, value) for leaf, values in VALID.items() for value in values)
STRAY = (*((name,) for name in UNKNOWN), *((*at, UNKNOWN[0]) for at in OBJECTS))


def _knob(random: Random, made_up: Any) -> tuple[tuple[str, ...], Any]:
    """A reasoning field and a value: mostly good ones, else anything anywhere."""
    kind = random.randrange(20)
    if kind < 15:
        return random.choice(GOOD)
    if kind == 15:
        return random.choice(SMUGGLED)
    value = random.choice((random.choice(NUMBERS), random.choice(WORDS), True, random.choice(ODD), made_up))
    return random.choice(STRAY if kind == 16 else LEAVES + OBJECTS), value


def make_case(random: Random, made_up: Any) -> Case:
    """One request of any of the three APIs. made_up: a JSON value to put somewhere."""
    path = random.choice((CHAT, CHAT, RESPONSES, MESSAGES))
    body: dict[str, Any] = {**COMMON, TURNS_OF[path]: [ASK], LIMIT[path]: 64}
    kind = random.randrange(10)
    is_clean = kind < 4
    if not is_clean:
        if kind > 6:
            body[TURNS_OF[path]] = random.choice(TURNS)
        options = OPTIONS[path]
        if kind == 8:
            options += tuple((at, made_up) for at, _ in options)
        for at, value in random.sample(options, random.randrange(4)):
            put(body, at, value)
    if is_clean and random.randrange(3) == 0:
        body["stream"] = True
    for _ in range(random.randrange(3 if is_clean else 4)):
        put(body, *_knob(random, made_up))
    fault = random.choice(FAULT_NAMES) if kind == 5 else ""
    raw, content_type = FAULTS[fault](body, random)
    return Case(path, raw, fault, content_type, is_clean)


# --- what can be wrong with the bytes: (body, random) → (raw, content type) -------------------------------------------


def _raw(make: Callable[[bytes], bytes], content_type: str = JSON) -> Any:
    return lambda body, random: (make(json.dumps(body).encode()), content_type)


def _same(raw: bytes) -> bytes:
    return raw


def _inserted(text: bytes) -> Any:
    """One more member, at the end of the object: the last one counts."""
    return _raw(lambda raw: raw[:-1] + b", " + text + b"}")


def _repeated(body: dict[str, Any], random: Random) -> tuple[bytes, str]:
    member = json.dumps({random.choice(sorted(body)): random.choice((None, True, 3, "low", {}))})[1:-1]
    return f"{{{member}, {json.dumps(body)[1:]}".encode(), JSON


def _nested(depth: int) -> Any:
    return _inserted(b'"metadata": ' + b"[" * depth + b"]" * depth)


# What the dial itself refuses; what is no JSON object; what means the same as without.
REFUSED: dict[str, Any] = {
    "NaN": _inserted(b'"presence_penalty": NaN'),
    "Infinity": _inserted(b'"top_p": -Infinity'),
    "overflow": _inserted(b'"top_p": 1e999'),
    "long budget": _inserted(b'"thinking_budget": ' + b"9" * 4000),
    "deeper": _nested(150),
    "deepest": _nested(20_000),
}
UNREADABLE: dict[str, Any] = {
    "broken utf-8": _raw(lambda raw: raw.replace(b'"model"', b'"mod\xff\xc3el"', 1)),
    "cut": _raw(lambda raw: raw[: len(raw) // 2]),
    "empty": _raw(lambda raw: b""),
    "list": _raw(lambda raw: b"[" + raw + b"]"),
    "text": _raw(lambda raw: json.dumps(raw.decode()).encode()),
    "number": _raw(lambda raw: b"17"),
    "null": _raw(lambda raw: b"null"),
    "huge integer": _inserted(b'"seed": ' + b"9" * 5000),
}
FAULTS: dict[str, Any] = {
    "": _raw(_same),
    "repeated key": _repeated,
    "raw unicode": lambda body, random: (json.dumps(body, ensure_ascii=False).encode("utf-8", "surrogatepass"), JSON),
    "utf-16": _raw(lambda raw: raw.decode().encode("utf-16")),
    "deep": _nested(60),
    "text/plain": _raw(_same, "text/plain"),
    "form": _raw(_same, "application/x-www-form-urlencoded"),
    "no type": _raw(_same, ""),
    "charset": _raw(_same, "application/json; charset=latin-1"),
    **REFUSED,
    **UNREADABLE,
}
FAULT_NAMES = tuple(FAULTS)


def generate(number: int, start: int = 0) -> list[Case]:
    """`number` cases, always the same for the same start. Hypothesis makes up a JSON value for every ten of them; it
    would repeat itself for half of the cases if it also chose the rest."""
    found: list[Case] = []

    @seed(start)
    @settings(
        max_examples=-(-number // PER_VALUE), database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(any_json)
    def collect(made_up: Any) -> None:
        for _ in range(PER_VALUE):
            found.append(make_case(Random(f"{start} {len(found)}"), made_up))

    collect()
    while len(found) < number:  # hypothesis stops early when it has seen it all
        found.append(make_case(Random(f"{start} {len(found)}"), None))
    return found[:number]
