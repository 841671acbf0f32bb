"""What a client cannot do: pass a limit, reach another's request, have its text run, or fill the log with an error."""

from __future__ import annotations

import ast
import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fastapi
import httpx
import pytest
from dial_models import FAMILIES, dial
from fuzz_bodies import CHAT, LEAVES, MESSAGES, RESPONSES, VALID, put
from vllm_puzzle.kernels.thinking import ThinkingMarkers
from vllm_puzzle.serving.dial.dialects import read_statements
from vllm_puzzle.serving.dial.json_body import MAX_DEPTH, parse_body
from vllm_puzzle.serving.dial.middleware import DialMiddleware
from vllm_puzzle.serving.dial.policy import ReasoningPolicy
from vllm_puzzle.serving.dial.request import RequestError, combine
from vllm_puzzle.serving.dial.resolve import resolve
from vllm_puzzle.serving.dial.turn import TURN, Turn
from vllm_puzzle.serving.reasoning_routes import CONTROL, MAX_CONTROL_BYTES, make_router
from vllm_puzzle.serving.thinking_engine import ThinkingServer, WatchedEngine
from vllm_puzzle.serving.thinking_plan import PLAN_KEY, limits_of

SERVING = Path(__file__).resolve().parent.parent.parent / "serving"
MARKERS = ThinkingMarkers(start=(1,), ends=((2,),), closing=(2,))
LIMIT, CEILING = 100, 40


# --- sizes and shapes of bodies --------------------------------------------------------------------------------------


def refused(path: str, parts: list[bytes], *headers: tuple[bytes, bytes]) -> tuple[int, Any, int]:
    """(status, error, how many parts were read) of a body that the middleware must refuse."""
    sent: list[Any] = []
    left = list(parts)

    async def receive() -> Any:
        return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}

    async def send(message: Any) -> None:
        sent.append(message)

    async def app(*_: Any) -> None:
        raise AssertionError("the body must not reach the server")

    scope = {"type": "http", "method": "POST", "path": path, "headers": headers}
    asyncio.run(DialMiddleware(app, max_body_bytes=LIMIT)(scope, receive, send))
    return sent[0]["status"], json.loads(sent[1]["body"]), len(parts) - len(left)


@pytest.mark.parametrize("path", [CHAT, RESPONSES, MESSAGES])
def test_a_body_beyond_the_limit_is_413_and_is_not_read_to_its_end(path: str) -> None:
    status, error, num_read = refused(path, [b" " * 60] * 9)
    assert (status, num_read) == (413, 2)
    told = refused(path, [b" " * 60] * 9, (b"content-length", b"540"))
    assert told == (413, error, 0), "a size that is told is refused before a byte is read"
    if path == MESSAGES:
        assert error["error"]["type"] == "request_too_large"
    else:
        assert error["error"]["code"] == 413
    assert "found more than 100 bytes" in error["error"]["message"]


def test_a_false_content_length_does_not_raise_the_limit() -> None:
    for told in (b"5", b"-5", b"", b"x", b"9" * 99):
        assert refused(CHAT, [b" " * 60] * 9, (b"content-length", told))[0] == 413


@pytest.mark.parametrize("text", ["NaN", "-Infinity", "Infinity", "1e999", "-1e400"])
def test_a_number_that_json_does_not_have_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="found the number"):
        parse_body(f'{{"top_p": {text}}}'.encode())
    assert parse_body(b'{"top_p": "NaN"}') == {"top_p": "NaN"}


@pytest.mark.parametrize("opening", [b"[", b'{"a":'])
def test_nesting_ends_at_a_depth_that_every_later_step_bears(opening: bytes) -> None:
    closing = b"]" if opening == b"[" else b"}"
    for depth in (MAX_DEPTH - 1, MAX_DEPTH, 999, 100_000):
        raw = b'{"x": ' + opening * depth + b"1" + closing * depth + b"}"
        if depth < MAX_DEPTH:
            body = parse_body(raw)
            assert json.loads(json.dumps(body)) == body
            assert repr(body)
        else:
            with pytest.raises(RequestError, match=f"nested deeper than {MAX_DEPTH}"):
                parse_body(raw)


def test_what_is_not_read_is_sent_on_as_it_came() -> None:
    numbers = [2**63, 10**40, -(10**4000), 0.1, 1e-320, -0.0, 1.7976931348623157e308, 1.0]
    body = {"seed": numbers, "text": "\ud83d \u0000 \u2028 \U0001f600", "é": None}
    sent: dict[str, Any] = {}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        sent["raw"] = (await receive())["body"]

    async def receive() -> Any:
        return {"type": "http.request", "body": json.dumps({**body, "think": True}).encode(), "more_body": False}

    scope = {"type": "http", "method": "POST", "path": CHAT, "headers": []}
    asyncio.run(DialMiddleware(app)(scope, receive, lambda message: asyncio.sleep(0)))
    assert repr(json.loads(sent["raw"])) == repr(body)


def test_a_reasoning_field_said_twice_is_refused_and_others_keep_their_last_value() -> None:
    for raw in (
        b'{"think": true, "think": false}',
        b'{"reasoning": {"effort": "low", "effort": "none"}}',
        b'{"nvext": {"a": 1}, "nvext": null}',
        b'{"vllm_xargs": {"thinking_budget": 1, "thinking_budget": 1}}',
    ):
        with pytest.raises(RequestError, match="more than once"):
            list(read_statements(parse_body(raw) or {}))
    assert parse_body(b'{"user": "a", "user": "b"}') == {"user": "b"}
    assert not list(read_statements(parse_body(b'{"user": "a", "user": "b"}') or {}))


def test_errors_echo_a_bounded_part_of_what_the_client_wrote_in_one_line() -> None:
    long = "x\n" * 5000
    bodies: list[dict[str, Any]] = [{f"think{long}": 1}, {"reasoning": {long: 1}}, {"think\ud800\u2028\r": 1}]
    for leaf in LEAVES:
        for value in (long, [long], {long: long}, 10**4000, "\ud800\u2028"):
            body: dict[str, Any] = {}
            put(body, leaf, value)
            bodies.append(body)
    for body in bodies:
        with pytest.raises(RequestError) as caught:
            combine(read_statements(body))
        assert len(str(caught.value)) < 1200
        assert len(str(caught.value).splitlines()) == 1
        assert len(caught.value.param) < 150


# --- ceilings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_no_dialect_passes_the_ceiling(family: str) -> None:
    served = dial(family, ReasoningPolicy(ceiling=CEILING))
    for leaf, values in VALID.items():
        for value in values:
            body: dict[str, Any] = {}
            put(body, leaf, value)
            try:
                done = resolve(combine(read_statements(body)), served)
            except RequestError as error:
                assert "history" in ".".join(leaf) or error.param == ".".join(leaf), body
                continue
            assert (done.budget is not None and done.budget <= CEILING) or (done.is_on is False and not done.is_short)


@pytest.mark.parametrize("asked", [None, -1, 0, 7, CEILING, CEILING + 1, 2**31 - 1])
def test_no_path_passes_the_ceiling_nor_brings_its_own_plan(asked: int | None) -> None:
    """As on /v1/completions, which has vLLM's own field and `vllm_xargs`."""
    from vllm import SamplingParams

    server = ThinkingServer(None, MARKERS, ReasoningPolicy(ceiling=CEILING))
    forged = {"budget": None, "grace": 0, "loop": None}
    params = SamplingParams(max_tokens=500, thinking_token_budget=asked, extra_args={PLAN_KEY: forged, "other": 1})
    server.begin(params, "id", Turn(""))
    limits = limits_of(params)
    assert limits is not None
    assert limits.budget == (asked if asked is not None and 0 <= asked < CEILING else CEILING)
    assert params.extra_args["other"] == 1
    without = SamplingParams(extra_args={PLAN_KEY: forged})
    ThinkingServer(None, None).begin(without, "id", Turn(""))
    assert without.extra_args is None, "a server without markers takes the forged plan out too"


def test_a_repetition_rule_of_a_request_that_starts_several_is_raised_once() -> None:
    from vllm import SamplingParams
    from vllm.sampling_params import RepetitionDetectionParams

    server = ThinkingServer(None, MARKERS)
    rule = RepetitionDetectionParams(max_pattern_size=5, min_count=3)
    for number in range(3):
        params = SamplingParams(max_tokens=50, repetition_detection=rule)
        server.begin(params, str(number), Turn(""))
        assert params.repetition_detection.min_count == 4
        assert params.extra_args[PLAN_KEY]["loop"] == [1, 5, 3]
    assert rule.min_count == 3
    long = RepetitionDetectionParams(max_pattern_size=200, min_pattern_size=100, min_count=2)
    params = SamplingParams(max_tokens=50, repetition_detection=long)
    server.begin(params, "long", Turn(""))
    assert params.repetition_detection == long, "patterns too long for us stay vLLM's"
    for huge in ({"max_pattern_size": 2**70, "min_count": 2}, {"max_pattern_size": 2, "min_count": 2**70}):
        params = SamplingParams(repetition_detection=RepetitionDetectionParams(**huge))
        with pytest.raises(RequestError, match="found a number above"):
            server.begin(params, "huge", Turn(""))


# --- other users' requests -------------------------------------------------------------------------------------------


class Engine:
    """Records what reaches it."""

    def __init__(self) -> None:
        self.ended: list[Any] = []
        self.started: list[str] = []
        self.output_processor = SimpleNamespace(external_req_ids={"theirs": ["theirs-1"]})

    async def collective_rpc(self, method: str, args: Any) -> list[list[str]]:
        self.ended.append((method, *args))
        return [args[0]]

    async def generate(self, prompt: Any, params: Any, request_id: str) -> Any:
        self.started.append(request_id)
        yield 0


def control(raw: bytes, key: str | None, engine: Engine) -> tuple[int, Any]:
    """Post to the control route of a server on which the request `theirs` runs, which came with the key `a`."""
    from vllm import SamplingParams

    app = fastapi.FastAPI()
    app.include_router(make_router())
    app.state.puzzle_thinking = server = ThinkingServer(engine, MARKERS)
    server.begin(SamplingParams(max_tokens=9), "theirs", Turn("", authorization="Bearer a"))

    async def post() -> httpx.Response:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            headers = {} if key is None else {"authorization": f"Bearer {key}"}
            return await client.post(CONTROL, content=raw, headers=headers)

    reply = asyncio.run(post())
    return reply.status_code, reply.json()


@pytest.mark.parametrize("key", ["b", "", None, "A"])
def test_another_users_request_is_as_unknown_as_none(key: str | None) -> None:
    engine = Engine()
    raw = json.dumps({"id": "theirs", "action": "reasoning_end"}).encode()
    status, body = control(raw, key, engine)
    assert (status, engine.ended) == (404, [])
    other = control(raw.replace(b"theirs", b"nobody"), key, engine)[1]
    assert json.dumps(body).replace("theirs", "nobody") == json.dumps(other)
    assert control(raw, "a", engine)[0] == 200
    assert engine.ended == [("puzzle_end_thinking", ["theirs-1"])]


@pytest.mark.parametrize(
    ("raw", "status"),
    [(b"[" * 4000, 400), (b'{"id": NaN}', 400), (b"{}", 400), (b"\xff", 400), (b'{"id": 5, "action": "x"}', 400),
     (b'{"id": "' + b"x" * MAX_CONTROL_BYTES + b'"}', 413), (b'{"id": "a", "action": ["' + b"y" * 3000 + b'"]}', 400),
     (b'{"id": "a", "action": "reasoning_end", "' + b"z" * 3000 + b'": 1}', 400),
     (b'{"id": "\\ud800' + b"w" * 3000 + b'", "action": "reasoning_end"}', 404)],
)  # fmt: skip
def test_no_control_message_is_a_500_or_is_echoed_at_length(raw: bytes, status: int) -> None:
    found, body = control(raw, "a", Engine())
    assert found == status
    assert set(body["error"]) == {"type", "message", "param", "code"}
    assert len(json.dumps(body)) < 400


def test_a_client_that_chooses_a_running_id_gets_another_one_in_the_engine() -> None:
    from vllm import SamplingParams

    engine = Engine()
    server = ThinkingServer(engine, MARKERS)
    watched = WatchedEngine(engine, server)

    async def both() -> None:
        TURN.set(Turn("", authorization="Bearer a"))
        first = watched.generate("", SamplingParams(max_tokens=9), "same")
        TURN.set(Turn("", authorization="Bearer b"))
        second = watched.generate("", SamplingParams(max_tokens=9), "same")
        assert server.watches.running["same"].authorization == "Bearer a"
        for outputs in (second, first):
            async for _ in outputs:
                pass

    asyncio.run(both())
    other, same = engine.started
    assert same == "same"
    assert other.startswith("same-")
    assert not server.watches.running


# --- nothing of a client is run --------------------------------------------------------------------------------------

# Builtins and methods that make code, objects or patterns of text.
RUNS = {"eval", "exec", "compile", "__import__", "import_module", "from_string", "system", "popen", "Popen"}
LOADS = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "importlib", "subprocess"}
REQUEST_PATH = sorted(
    [*(SERVING / "dial").glob("*.py"), *SERVING.glob("reasoning_*.py"), *SERVING.glob("thinking_*.py")]
)
# Read once when the server starts, from the operator's or the model's files: the model's own chat template.
AT_START = {"template.py"}


def is_constant(node: ast.expr) -> bool:
    """A literal, or names in capitals (module constants) in a literal."""
    inner = [part for part in ast.walk(node) if isinstance(part, ast.Name | ast.Call | ast.Attribute)]
    return all(isinstance(part, ast.Name) and part.id.isupper() for part in inner)


@pytest.mark.parametrize("path", REQUEST_PATH, ids=lambda path: path.name)
def test_nothing_that_a_client_sends_can_be_run_or_become_a_pattern(path: Path) -> None:
    tree = ast.parse(path.read_text())
    imported = {
        alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    }
    imported |= {(node.module or "").split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not imported & LOADS
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        function = call.func
        name = function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")
        owner = (
            function.value.id if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name) else ""
        )
        if owner == "re":
            assert is_constant(call.args[0]), f"line {call.lineno}: a pattern that is no constant"
        elif owner == "yaml":
            assert name == "safe_load", f"line {call.lineno}"
        elif name in RUNS and not (name == "from_string" and path.name in AT_START):
            raise AssertionError(f"line {call.lineno}: {name}")


def test_templates_are_compiled_at_start_only() -> None:
    """Nothing on a request's way compiles a template. The gateway keeps what it read of its upstream's."""
    users = {
        path.name
        for path in SERVING.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").endswith("dial.template")
    }
    assert users == {"derive.py", "prompt_template.py"}
    derive_users = {path.name for path in SERVING.rglob("*.py") if "dial.derive import" in path.read_text()}
    assert derive_users <= {"profile.py", "reasoning_endpoint.py", "plan.py"}
