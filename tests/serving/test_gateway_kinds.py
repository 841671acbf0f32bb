"""Every dialect in front of every kind of server: it gets its own words and no others; the reply says what was done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from scripted_upstream import MODEL, OWN_FIELDS, THOUGHT, Scripted, answer_to, serving
from vllm_puzzle.serving.gateway.app import Gateway
from vllm_puzzle.serving.gateway.service import Options
from vllm_puzzle.serving.gateway.upstream import Upstream

CLIENT = httpx.Client()  # one: each loads certificates anew
KINDS = tuple(OWN_FIELDS)
CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}
OFF: dict[str, dict[str, Any]] = {
    "OpenAI": {"reasoning_effort": "none"},
    "OpenRouter": {"reasoning": {"enabled": False}},
    "Anthropic, DeepSeek, GLM": {"thinking": {"type": "disabled"}},
    "Gemini": {"extra_body": {"google": {"thinking_config": {"thinking_budget": 0}}}},
    "Qwen": {"enable_thinking": False},
    "Kimi": {"chat_template_kwargs": {"thinking": False}},
    "Ollama": {"think": False},
    "vLLM, TensorRT-LLM": {"thinking_token_budget": 0},
    "NIM": {"nvext": {"max_thinking_tokens": 0}},
}
LEVEL: dict[str, dict[str, Any]] = {
    "OpenAI": {"reasoning_effort": "low"},
    "OpenRouter": {"reasoning": {"effort": "low"}},
    "Anthropic": {"output_config": {"effort": "low"}},
    "Gemini": {"google": {"thinking_config": {"thinking_level": "low"}}},
    "Ollama": {"think": "low"},
    "Nemotron 3": {"chat_template_kwargs": {"low_effort": True}},
    "Kimi": {"chat_template_kwargs": {"thinking_effort": "low"}},
}
BUDGET: dict[str, dict[str, Any]] = {
    "OpenRouter": {"reasoning": {"max_tokens": 7}},
    "Anthropic": {"thinking": {"type": "enabled", "budget_tokens": 7}},
    "Gemini": {"google": {"thinking_config": {"thinking_budget": 7}}},
    "Qwen": {"thinking_budget": 7},
    "llama.cpp": {"thinking_budget_tokens": 7},
    "NIM, Dynamo": {"nvext": {"max_thinking_tokens": 7}},
    "SGLang": {"custom_params": {"thinking_budget": 7}},
    "Nemotron 3": {"chat_template_kwargs": {"reasoning_budget": 7}},
    "vLLM, TensorRT-LLM": {"thinking_token_budget": 7},
}
OWN_BUDGET: dict[str, dict[str, Any]] = {
    "vllm": {"thinking_token_budget": 7},
    "trtllm": {"thinking_token_budget": 7},
    "sglang": {"custom_params": {"thinking_budget": 7}},
    "nim": {"nvext": {"max_thinking_tokens": 7}},
    "llamacpp": {"thinking_budget_tokens": 7},
}


@contextmanager
def gateway(upstream: Scripted, **options: Any) -> Iterator[str]:
    with serving(upstream) as behind, serving(Gateway(Upstream(behind), Options(**options)), "on") as url:
        yield url


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[Scripted, str]]:
    upstream = Scripted(request.param)
    with gateway(upstream) as url:
        yield upstream, url


def ask(url: str, **fields: Any) -> dict[str, Any]:
    reply = CLIENT.post(f"{url}/v1/chat/completions", json={**CHAT, **fields})
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found


def refused(url: str, path: str = "/v1/chat/completions", **fields: Any) -> str:
    reply = CLIENT.post(url + path, json={**CHAT, **fields})
    assert reply.status_code == 400, reply.text
    return str(reply.json()["error"]["message"])


def knobs(upstream: Scripted) -> dict[str, Any]:
    """What the upstream got beside the plain request."""
    return {key: value for key, value in upstream.chats()[-1].items() if key not in CHAT}


def test_the_kind_is_found_by_the_routes_that_only_it_has(pair: tuple[Scripted, str]) -> None:
    upstream, url = pair
    health = CLIENT.get(f"{url}/health").json()
    assert (health["status"], health["upstream_kind"]) == ("ok", upstream.kind)


@pytest.mark.parametrize("name", OFF)
def test_off_in_every_dialect_is_off_in_the_servers_own_words(pair: tuple[Scripted, str], name: str) -> None:
    upstream, url = pair
    reply = ask(url, **OFF[name])
    own: dict[str, Any] = {"chat_template_kwargs": {"enable_thinking": False}}
    if upstream.kind == "openai":
        own = {"reasoning_effort": "none"}
    elif upstream.kind != "llamacpp":  # whose template is known, and reads one name only
        own = {"chat_template_kwargs": {"enable_thinking": False, "thinking": False}}
    assert knobs(upstream) == own
    assert reply["choices"][0]["message"]["content"] == answer_to("")
    info = reply["reasoning_info"]
    assert (info["requested"]["mode"], info["effective"]["mode"], info["end_reason"]) == ("off", "off", "off")
    known = upstream.kind == "llamacpp"
    assert info["guarantees"]["mode"] == ("in the template" if known else "sent, template unknown")


@pytest.mark.parametrize("name", LEVEL)
def test_a_level_in_every_dialect_is_a_level_in_the_servers_own_words(pair: tuple[Scripted, str], name: str) -> None:
    upstream, url = pair
    reply = ask(url, **LEVEL[name])
    sent = knobs(upstream)
    if upstream.kind in ("vllm", "sglang", "llamacpp", "openai"):
        assert sent.pop("reasoning_effort") == "low"
    if upstream.kind != "openai":
        arguments = sent.pop("chat_template_kwargs")
        assert (arguments["enable_thinking"], arguments["reasoning_effort"]) == (True, "low")
    assert sent == {}
    assert reply["reasoning_info"]["effective"]["effort"] == "low"


@pytest.mark.parametrize("name", BUDGET)
def test_a_budget_in_every_dialect_is_the_servers_own_field(pair: tuple[Scripted, str], name: str) -> None:
    upstream, url = pair
    if upstream.kind == "openai":
        assert "neither holds a budget nor continues a begun reply" in refused(url, **BUDGET[name])
        return
    reply = ask(url, **BUDGET[name])
    sent = knobs(upstream)
    assert sent.pop("chat_template_kwargs")["enable_thinking"] is True
    assert sent == OWN_BUDGET[upstream.kind]
    message, info = reply["choices"][0]["message"], reply["reasoning_info"]
    assert message["reasoning"] == message["reasoning_content"] == THOUGHT[:7]
    assert message["content"] == answer_to(THOUGHT[:7])
    assert (info["effective"]["budget"], info["calls"], info["upstream_kind"]) == (7, 1, upstream.kind)
    # Only vLLM's usage tells the thinking tokens; nobody else's number is made up.
    counts = upstream.kind == "vllm"
    assert info["thinking_tokens"] == (7 if counts else None)
    assert info["end_reason"] == ("budget" if counts else None)
    assert info["guarantees"]["budget"] == ("exact by server" if counts else "by server, not verified")


def test_no_limit_sends_no_limit(pair: tuple[Scripted, str]) -> None:
    upstream, url = pair
    info = ask(url, thinking_budget=-1)["reasoning_info"]
    assert not knobs(upstream).keys() & {key for own in OWN_BUDGET.values() for key in own}
    assert (info["requested"]["budget"], info["effective"]["budget"]) == (-1, None)


def test_a_silent_request_passes_as_it_is(pair: tuple[Scripted, str]) -> None:
    upstream, url = pair
    info = ask(url, temperature=0.5, seed=3)["reasoning_info"]
    assert knobs(upstream) == {"temperature": 0.5, "seed": 3}
    assert info["requested"] == {"mode": None, "effort": None, "budget": None}
    assert info["guarantees"] == {"mode": None, "effort": None, "budget": None}
    assert (info["end_reason"], info["effective"]["mode"]) == ("natural", "on")


def test_other_keys_of_shared_objects_stay_and_reasoning_keys_go() -> None:
    upstream = Scripted("nim")
    with gateway(upstream) as url:
        ask(url, nvext={"greed_sampling": True, "max_thinking_tokens": 7}, chat_template_kwargs={"colour": "red"})
    assert knobs(upstream)["nvext"] == {"greed_sampling": True, "max_thinking_tokens": 7}
    assert knobs(upstream)["chat_template_kwargs"]["colour"] == "red"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"think": True, "reasoning_effort": "none"}, "contradicts"),
        ({"thinking_tokens": 8}, "`thinking_tokens`: found an unknown reasoning field"),
        ({"thinking_budget": "8"}, "`thinking_budget`: found '8', allowed: an integer"),
        ({"reasoning": 3}, "`reasoning`: found 3, allowed: an object"),
        ({"chat_template_kwargs": {"preserve_thinking": True}}, "`chat_template_kwargs.preserve_thinking`: found with"),
    ],
)
def test_what_cannot_be_honoured_is_a_400_that_never_reaches_the_server(
    pair: tuple[Scripted, str], fields: dict[str, Any], message: str
) -> None:
    upstream, url = pair
    before = len(upstream.requests)
    assert message in refused(url, **fields)
    assert len(upstream.requests) == before


def test_a_server_of_levels_cannot_be_told_only_to_think() -> None:
    with gateway(Scripted("openai")) as url:
        assert "knows levels only, allowed: a level" in refused(url, think=True)


def test_a_thought_that_was_switched_off_and_came_is_reported() -> None:
    class Deaf(Scripted):
        def _from_start(self, is_on: bool, budget: int | None) -> list[tuple[str, str]]:
            return super()._from_start(True, None)

    with gateway(Deaf("vllm")) as url:
        info = ask(url, thinking_budget=0)["reasoning_info"]
        over = ask(url, thinking_budget=7)["reasoning_info"]
    assert (info["requested"]["mode"], info["effective"]["mode"]) == ("off", "on")
    assert info["guarantees"]["budget"] == over["guarantees"]["budget"] == "none"


def test_a_known_template_without_levels_says_so() -> None:
    with gateway(Scripted("llamacpp", template="{{ messages }}{{ enable_thinking }}")) as url:
        info = ask(url, reasoning_effort="high")["reasoning_info"]
    assert (info["requested"]["effort"], info["effective"]["effort"]) == ("high", None)
    assert info["guarantees"]["effort"] == "none"


def test_a_known_template_with_the_switch_as_a_line_gets_the_line() -> None:
    upstream = Scripted("llamacpp", template="{{ messages }} detailed thinking")
    with gateway(upstream) as url:
        ask(url, think=False)
        assert upstream.chats()[-1]["messages"][0] == {"role": "system", "content": "detailed thinking off"}
        line = [{"role": "system", "content": "detailed thinking on"}]
        ask(url, think=False, messages=line)
        said = upstream.chats()[-1]["messages"]
        assert said == [{"role": "system", "content": "detailed thinking off"}], "the field wins, and the text agrees"


@pytest.mark.parametrize("kind", KINDS)
def test_a_hidden_thought_is_thought_and_left_out(kind: str) -> None:
    upstream = Scripted(kind)
    with gateway(upstream) as url:
        message = ask(url, include_reasoning=False)["choices"][0]["message"]
        assert message == {"role": "assistant", "content": answer_to(THOUGHT)}
        assert knobs(upstream) == {}
        with CLIENT.stream(
            "POST", f"{url}/v1/chat/completions", json={**CHAT, "think": "low", "stream": True}
        ) as shown:
            assert THOUGHT[0] in shown.read().decode()
        hidden = {**CHAT, "reasoning": {"exclude": True}, "stream": True}
        with CLIENT.stream("POST", f"{url}/v1/chat/completions", json=hidden) as reply:
            text = reply.read().decode()
    assert '"reasoning"' not in text
    assert "reasoning_content" not in text
    assert '"reasoning_info"' in text


RESPONSES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"think": False}, {"reasoning": {"effort": "none"}}),
    ({"output_config": {"effort": "high"}}, {"reasoning": {"effort": "high"}}),
    ({"reasoning": {"effort": "low", "summary": "auto"}}, {"reasoning": {"effort": "low", "summary": "auto"}}),
    ({"think": True}, {"chat_template_kwargs": {"enable_thinking": True, "thinking": True}}),
    ({}, {}),
]
MESSAGES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"think": False}, {"thinking": {"type": "disabled"}}),
    ({"reasoning_effort": "high"}, {"output_config": {"effort": "high"}}),
    ({"thinking_budget": 2000}, {"thinking": {"type": "enabled", "budget_tokens": 2000}}),
    ({"thinking": {"type": "between_tools"}}, {}),
    ({"output_config": {"effort": "low", "format": {}}}, {"output_config": {"format": {}, "effort": "low"}}),
]


def test_responses_and_messages_get_their_own_apis_words() -> None:
    upstream = Scripted("vllm")
    with gateway(upstream) as url:
        for path, table in (("/v1/responses", RESPONSES), ("/v1/messages", MESSAGES)):
            for fields, own in table:
                assert CLIENT.post(url + path, json={"model": MODEL, **fields}).json()["got"] == {"model": MODEL, **own}
        before = len(upstream.requests)
        assert "this API has no budget" in refused(url, "/v1/responses", thinking_budget=7)
        assert "chat completions only" in refused(
            url, "/v1/messages", thinking={"type": "adaptive", "display": "omitted"}
        )
        error = CLIENT.post(f"{url}/v1/messages", json={"think": True, "reasoning_effort": "none"}).json()
        assert error["type"] == "error"
        assert "contradicts" in error["error"]["message"]
        assert len(upstream.requests) == before
    with gateway(Scripted("sglang")) as url:
        assert "sglang has no budget on this API" in refused(url, "/v1/messages", thinking_budget=2000)
        assert "cannot be told only to think" in refused(url, "/v1/responses", think=True)
