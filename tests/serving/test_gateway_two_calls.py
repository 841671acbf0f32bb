"""A budget where the server has none: token-exact over every budget, streamed and whole, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from scripted_upstream import MODEL, THOUGHT, Scripted, answer_to, serving
from vllm_puzzle.serving.gateway.app import Gateway
from vllm_puzzle.serving.gateway.prompt_template import PromptTemplate
from vllm_puzzle.serving.gateway.service import Options
from vllm_puzzle.serving.gateway.upstream import Upstream

CLIENT = httpx.Client()
LENGTH = len(THOUGHT)
PROMPT = 5
# The script's own tokens: one for the end of the thought, one for the end of the text.
WHOLE = LENGTH + 1 + len(answer_to(THOUGHT)) + 1
CHAT: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hello"}]}
WAYS = ("vllm, begun message", "sglang, begun message", "sglang, model opens", "openai, rendered", "vllm, rendered")


@pytest.fixture(scope="module")
def template(request: pytest.FixtureRequest) -> PromptTemplate:
    pocket = Path(str(request.config.rootpath)) / "model_configs" / "pocket" / "puzzle"
    return PromptTemplate(str(pocket))


@contextmanager
def gateway(upstream: Scripted, **options: Any) -> Iterator[str]:
    with serving(upstream) as behind, serving(Gateway(Upstream(behind), Options(**options)), "on") as url:
        yield url


@pytest.fixture(scope="module", params=WAYS)
def pair(request: pytest.FixtureRequest, template: PromptTemplate) -> Iterator[tuple[Scripted, str]]:
    kind, how = request.param.split(", ")
    upstream = Scripted(kind, has_budget=False, opens=how != "model opens", tokenizer=template._tokenizer)
    options: dict[str, Any] = {"template": template} if how == "rendered" else {}
    with gateway(upstream, budget_by="two-calls", **options) as url:
        yield upstream, url


def ask(url: str, **fields: Any) -> dict[str, Any]:
    reply = CLIENT.post(f"{url}/v1/chat/completions", json={**CHAT, **fields})
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found


def stream(url: str, **fields: Any) -> list[dict[str, Any]]:
    body = {**CHAT, **fields, "stream": True}
    lines = CLIENT.post(f"{url}/v1/chat/completions", json=body).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def refused(url: str, **fields: Any) -> str:
    reply = CLIENT.post(f"{url}/v1/chat/completions", json={**CHAT, **fields})
    assert reply.status_code == 400, reply.text
    return str(reply.json()["error"]["message"])


@pytest.mark.parametrize("budget", [1, 2, 9, LENGTH - 1, LENGTH, LENGTH + 1, LENGTH + 9, WHOLE - 1, WHOLE, 900])
def test_the_thought_is_the_models_own_up_to_the_budget_and_the_answer_is_whole(
    pair: tuple[Scripted, str], budget: int, request: pytest.FixtureRequest
) -> None:
    upstream, url = pair
    how = request.node.callspec.params["pair"]
    reply = ask(url, thinking_budget=budget, max_tokens=1000)
    choice, info, usage = reply["choices"][0], reply["reasoning_info"], reply["usage"]
    thought = THOUGHT[:budget]
    assert choice["message"]["reasoning"] == choice["message"]["reasoning_content"] == thought
    assert choice["message"]["content"].removesuffix("end") == answer_to(thought)
    assert choice["finish_reason"] == "stop"
    is_cut = budget <= LENGTH
    assert info["guarantees"]["budget"] == "exact, two calls"
    assert info["calls"] == (1 if budget >= WHOLE else 2)
    assert info["end_reason"] == ("budget" if is_cut else info["end_reason"])
    # Where the server does not tell, a first call that ended before the answer says it: all of it was the thought, with
    # the end that the model may have written as its last token. Else a tokenizer counts, or nobody.
    counted = len(thought) if upstream.kind == "vllm" or "rendered" in how else None
    assert info["thinking_tokens"] == (min(budget, LENGTH + 1) if not counted and budget <= LENGTH + 1 else counted)
    # Generated: thought, its end where the model wrote it, answer, end of text; the prompt counts once.
    generated = len(thought) + (not is_cut) + len(answer_to(thought)) + 1
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (PROMPT, generated)
    assert usage["total_tokens"] == PROMPT + generated
    assert ("second_prefill" in info) == (budget < WHOLE)


@pytest.mark.parametrize("budget", [1, 9, LENGTH, LENGTH + 9, 900])
def test_a_stream_is_the_same_reply(pair: tuple[Scripted, str], budget: int) -> None:
    _, url = pair
    fields = {"thinking_budget": budget, "max_tokens": 1000}
    whole = ask(url, **fields)
    *chunks, last = stream(url, **fields, stream_options={"include_usage": True})
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    message = whole["choices"][0]["message"]
    assert "".join(delta.get("reasoning") or "" for delta in deltas) == message["reasoning"]
    assert "".join(delta.get("reasoning_content") or "" for delta in deltas) == message["reasoning"]
    assert "".join(delta.get("content") or "" for delta in deltas) == message["content"]
    assert [delta for delta in deltas if "role" in delta] == deltas[:1]
    ends = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert ends == [None] * (len(ends) - 1) + ["stop"]
    assert len({(chunk["id"], chunk["object"]) for chunk in chunks}) == 1
    assert last["choices"] == []
    assert (last["usage"], last["reasoning_info"]) == (whole["usage"], whole["reasoning_info"])
    assert "usage" not in stream(url, **fields)[-1]


@pytest.mark.parametrize("limit", ["max_tokens", "max_completion_tokens"])
def test_the_clients_limit_is_for_thought_and_answer_together(pair: tuple[Scripted, str], limit: str) -> None:
    _, url = pair
    reply = ask(url, thinking_budget=9, **{limit: 20})
    message = reply["choices"][0]["message"]
    assert (message["reasoning"], message["content"]) == (THOUGHT[:9], answer_to(THOUGHT[:9])[:11])
    assert (reply["choices"][0]["finish_reason"], reply["usage"]["completion_tokens"]) == ("length", 20)
    inside = ask(url, thinking_budget=9, **{limit: 6})
    assert inside["choices"][0]["message"]["reasoning"] == THOUGHT[:6]
    assert (inside["reasoning_info"]["calls"], inside["reasoning_info"]["end_reason"]) == (1, "length")
    assert "allowed: an integer from 1" in refused(url, thinking_budget=9, **{limit: 0})


def test_sampling_fields_reach_both_calls_and_reasoning_fields_neither(pair: tuple[Scripted, str]) -> None:
    upstream, url = pair
    before = len(upstream.requests)
    ask(url, thinking_budget=3, temperature=0.5, seed=7, max_tokens=1000)
    calls = [body for _, _, body in upstream.requests[before:]][-2:]
    assert [(body["temperature"], body["seed"]) for body in calls] == [(0.5, 7)] * 2
    assert all("budget" not in key for body in calls for key in body)
    assert calls[0].get("max_tokens") == 3


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "`tools`"),
        ({"response_format": {"type": "json_object"}}, "`response_format`"),
        ({"logprobs": True}, "`logprobs`"),
        ({"n": 2}, "`n`"),
        ({"messages": 5}, "`messages`"),
        ({"chat_template": "{{ 7 * 7 }}"}, "`chat_template`"),
    ],
)
def test_what_two_replies_cannot_be_joined_with_is_a_400_by_name(
    pair: tuple[Scripted, str], fields: dict[str, Any], name: str
) -> None:
    _, url = pair
    assert refused(url, thinking_budget=3, **fields).startswith(name)


def test_a_server_that_holds_budgets_takes_tools_beside_them() -> None:
    upstream = Scripted("vllm")
    with gateway(upstream) as url:
        ask(url, thinking_budget=3, tools=[])
    assert upstream.chats()[-1]["tools"] == []


def test_a_server_whose_template_drops_the_thought_is_found_out_before_it_thinks() -> None:
    for drops in (Scripted("vllm", has_budget=False, keeps_thought=False), Silent("sglang", has_budget=False)):
        with gateway(drops) as url:
            assert "whose chat template drops the thought of a begun reply" in refused(url, thinking_budget=3)
            before = len(drops.requests)
            refused(url, thinking_budget=3)
            assert len(drops.requests) - before <= 1, "it is asked once per model"


class Silent(Scripted):
    """Takes a begun reply and renders a prompt without its thought, as some templates do."""

    async def _send(
        self, send: Any, receive: Any, body: Any, tokens: Any, limit: Any, prompt: int, is_chat: bool
    ) -> None:
        await super()._send(send, receive, body, tokens, limit, 11, is_chat)


def test_vllm_without_a_reasoning_configuration_is_found_by_its_refusal() -> None:
    upstream = Scripted("vllm", has_budget=False)
    with gateway(upstream) as url:
        for _ in range(2):
            reply = ask(url, thinking_budget=3)
            assert reply["choices"][0]["message"]["reasoning"] == THOUGHT[:3]
            assert reply["reasoning_info"]["guarantees"]["budget"] == "exact, two calls"
    tries = [body for body in upstream.chats() if "thinking_token_budget" in body]
    assert len(tries) == 1


def test_sglang_without_strict_thinking_is_not_trusted_with_a_budget() -> None:
    upstream = Scripted("sglang", has_budget=False)
    with gateway(upstream) as url:
        assert ask(url, thinking_budget=3)["reasoning_info"]["calls"] == 2
    assert not [body for body in upstream.chats() if "custom_params" in body]


def test_off_without_an_off_state_is_a_thought_closed_at_once(template: PromptTemplate) -> None:
    class Unswitched(PromptTemplate):
        def __init__(self) -> None:
            self._tokenizer, self._names, self.model_type = template._tokenizer, frozenset(), ""
            self.text = "{{ messages }}"

    upstream = Scripted("openai", tokenizer=template._tokenizer)
    with gateway(upstream, template=Unswitched()) as url:
        reply = ask(url, thinking_budget=0, max_tokens=50)
        first, *_, last = stream(url, think=False, max_tokens=50)
    assert reply["choices"][0]["message"]["content"] == answer_to("")
    info = reply["reasoning_info"]
    assert (info["calls"], info["thinking_tokens"], info["effective"]["mode"]) == (1, 0, "off")
    assert first["choices"][0]["delta"]["role"] == "assistant"
    assert last["reasoning_info"]["end_reason"] == "off"
    assert {path for path, _, _ in upstream.requests} == {"/v1/completions"}


def test_without_a_limit_the_context_is_the_limit(template: PromptTemplate) -> None:
    upstream = Scripted("vllm", tokenizer=template._tokenizer)
    with gateway(upstream, template=template, budget_by="two-calls") as url:
        ask(url, thinking_budget=9)
        sent = upstream.requests[-1][2]
        # The pocket tokenizer has one token per byte: <|user|> hello <|end|> <|assistant|> <think>, then </think>.
        assert sent["max_tokens"] == 1024 - (1 + 5 + 1 + 2 + 1) - 9
        assert "leaves no room for an answer in 1024" in refused(url, thinking_budget=1020)
    with gateway(Scripted("openai", tokenizer=template._tokenizer), template=template) as url:
        assert "does not tell its context length" in refused(url, thinking_budget=9)


def test_a_prompt_that_is_no_text_is_refused_and_a_template_of_the_clients_is_never_run(
    template: PromptTemplate,
) -> None:
    upstream = Scripted("vllm", tokenizer=template._tokenizer)
    with gateway(upstream, template=template, budget_by="two-calls") as url:
        image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]
        assert "content part that is no text" in refused(url, thinking_budget=9, messages=image)
        tool = [{"role": "tool", "content": "5"}]
        assert "the chat template refuses them" in refused(url, thinking_budget=9, messages=tool)
        assert "found an entry that is no object" in refused(url, thinking_budget=9, messages=[4])
        ask(url, thinking_budget=9, chat_template_kwargs={"chat_template": "{{ raise_exception('run') }}"})


def test_an_upstream_that_ignores_max_tokens_is_reported() -> None:
    class Endless(Scripted):
        async def _send(
            self, send: Any, receive: Any, body: Any, tokens: Any, limit: Any, prompt: int, is_chat: bool
        ) -> None:
            await super()._send(send, receive, body, tokens, None, prompt, is_chat)

    with gateway(Endless("vllm"), budget_by="two-calls") as url:
        info = ask(url, thinking_budget=9)["reasoning_info"]
    assert (info["guarantees"]["budget"], info["thinking_tokens"]) == ("none", LENGTH)


def test_without_usage_nothing_is_made_up() -> None:
    class Quiet(Scripted):
        """Tells no usage in streams."""

    upstream = Quiet("sglang", has_budget=False, tells_usage=False)
    with gateway(upstream) as url:
        reply = ask(url, thinking_budget=9)
    assert reply["usage"] is None
    info = reply["reasoning_info"]
    # The first call ended at its limit inside the thought: that is the count, whoever tells it.
    assert (info["thinking_tokens"], info["answer_tokens"]) == (9, None)
    assert info["second_prefill"] == {"prompt_tokens": None, "cached_tokens": None}


def test_a_folder_that_names_remote_code_needs_none_of_it(tmp_path: Path, root: Path, template: PromptTemplate) -> None:
    """transformers would ask on the terminal whether to run it."""
    folder = tmp_path / "model"
    shutil.copytree(root / "model_configs" / "pocket" / "puzzle", folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "configuration_decilm.DeciLMConfig"}
    (folder / "config.json").write_text(json.dumps(config))
    assert PromptTemplate(str(folder)).text == template.text
