"""The gateway in front of a real, plain vLLM server: the official client gets its budget from the server, in two calls
by a begun message, and in two calls by a rendered prompt: the same reply each time.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from plain_vllm import NAME, plain_vllm
from scripted_upstream import serving
from vllm_puzzle.serving.gateway.app import Gateway
from vllm_puzzle.serving.gateway.prompt_template import PromptTemplate
from vllm_puzzle.serving.gateway.service import Options
from vllm_puzzle.serving.gateway.upstream import Upstream

pytestmark = pytest.mark.slow

CHAT: list[Any] = [{"role": "user", "content": "12+30-5"}]
# The pocket model's template drops earlier thoughts, as most do; this one keeps them, so that a reply can be begun.
DROPS = "<|assistant|><think></think>{{ text.split('</think>')[-1].strip() }}<|end|>"
KEEPS = "<|assistant|>{{ text }}<|end|>"
WAYS = ("server", "begun message", "rendered prompt", "rendered prompt, unknown server")


@pytest.fixture(scope="module")
def pocket(request: pytest.FixtureRequest) -> Path:
    return Path(str(request.config.rootpath)) / "model_configs" / "pocket" / "puzzle"


@pytest.fixture(scope="module")
def upstream(pocket: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("plain")
    (template,) = pocket.glob("*.jinja")
    text = template.read_text()
    assert DROPS in text
    (folder / "keeps.jinja").write_text(text.replace(DROPS, KEEPS))
    flags = ("--reasoning-parser", "nemotron_v3", "--chat-template", str(folder / "keeps.jinja"))
    with plain_vllm(folder / "log.txt", pocket, *flags) as url:
        yield url


def options(way: str, pocket: Path) -> Options:
    if way == "server":
        return Options()
    template = PromptTemplate(str(pocket)) if way.startswith("rendered") else None
    return Options(kind="openai" if "unknown" in way else "vllm", budget_by="two-calls", template=template)


@pytest.fixture(scope="module", params=WAYS)
def client(request: pytest.FixtureRequest, upstream: str, pocket: Path) -> Iterator[tuple[str, openai.OpenAI]]:
    with serving(Gateway(Upstream(upstream), options(request.param, pocket)), "on") as url:
        yield request.param, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def direct(upstream: str) -> Any:
    """(thought, answer) of the plain server for a budget of its own; None for none."""
    plain = openai.OpenAI(base_url=f"{upstream}/v1", api_key="none")

    def ask(budget: int | None) -> tuple[str, str]:
        extra = {} if budget is None else {"thinking_token_budget": budget}
        reply: Any = plain.chat.completions.create(model=NAME, messages=CHAT, temperature=0, extra_body=extra)
        return reply.choices[0].message.reasoning, reply.choices[0].message.content

    return ask


def budgets(free: str) -> tuple[int, ...]:
    """One character is one token."""
    return (1, 8, len(free) - 1, len(free), len(free) + 1, len(free) + 3)


def test_a_budget_is_held_and_the_reply_is_the_servers_own(client: tuple[str, openai.OpenAI], direct: Any) -> None:
    way, api = client
    free = direct(None)[0]
    for budget in budgets(free):
        reply: Any = api.chat.completions.create(
            model=NAME,
            messages=CHAT,
            temperature=0,
            max_tokens=500,
            extra_body={"thinking": {"type": "enabled", "budget_tokens": budget}},
        )
        message, info = reply.choices[0].message, reply.reasoning_info
        assert (message.reasoning, message.content) == direct(budget)
        assert message.reasoning == message.reasoning_content == free[:budget]
        assert (
            info["thinking_tokens"] == reply.usage.completion_tokens_details.reasoning_tokens == min(budget, len(free))
        )
        assert info["guarantees"]["budget"] == ("exact by server" if way == "server" else "exact, two calls")
        # A whole reply, with the tokens that end the thought and the text, may fit into the first call.
        is_one = way == "server" or budget >= len(free) + 1 + len(message.content) + 1
        assert info["calls"] == (1 if is_one else 2)
        if budget <= len(free):
            assert info["end_reason"] == "budget"
        if not is_one:
            assert info["second_prefill"]["prompt_tokens"] > reply.usage.prompt_tokens + len(message.reasoning)


def test_a_stream_is_the_same_text_and_info(client: tuple[str, openai.OpenAI], direct: Any) -> None:
    _, api = client
    request: dict[str, Any] = {"model": NAME, "messages": CHAT, "temperature": 0, "max_tokens": 500}
    for budget in budgets(direct(None)[0]):
        fields = {"thinking_budget": budget}
        whole: Any = api.chat.completions.create(**request, extra_body=fields)
        thought = answer = ""
        last: Any = None
        for last in api.chat.completions.create(**request, extra_body=fields, stream=True):
            for choice in last.choices:
                thought += getattr(choice.delta, "reasoning_content", None) or ""
                answer += choice.delta.content or ""
        assert (thought, answer) == direct(budget)
        assert last.reasoning_info == whole.reasoning_info


def test_off_and_a_level_reach_the_model(client: tuple[str, openai.OpenAI], direct: Any) -> None:
    _, api = client
    off: Any = api.chat.completions.create(model=NAME, messages=CHAT, temperature=0, reasoning_effort="none")
    assert off.choices[0].message.content.strip().isdigit()
    free: Any = api.chat.completions.create(model=NAME, messages=CHAT, temperature=0, reasoning_effort="low")
    assert (free.choices[0].message.reasoning, free.choices[0].message.content) == direct(None)
