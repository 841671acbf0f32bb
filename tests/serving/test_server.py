"""The real server with the shipped model, asked by the official client: reasoning on, off, streamed, and refused."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import server
from vllm_puzzle.bench.pocket_eval import evaluate, format_summary
from vllm_puzzle.serving.startup_measurement import NAMES, Start, starting

pytestmark = pytest.mark.slow

QUESTION, ANSWER = "3+4-2+9", "14"
OFF: list[tuple[str, dict[str, Any]]] = [
    ("enable_thinking", {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}}),
    ("effort none", {"reasoning_effort": "none"}),
    ("system line", {"messages": [{"role": "system", "content": "detailed thinking off"}]}),
]
ON: list[tuple[str, dict[str, Any]]] = [
    ("default", {}),
    ("enable_thinking", {"extra_body": {"chat_template_kwargs": {"enable_thinking": True}}}),
    ("effort high", {"reasoning_effort": "high"}),
    ("system line", {"messages": [{"role": "system", "content": "detailed thinking on"}]}),
]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("server") / "log.txt"


@pytest.fixture(scope="module")
def start(log: Path) -> Iterator[Start]:
    with starting(server.command("serve"), log) as found:
        yield found


@pytest.fixture(scope="module")
def client(start: Start) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{start.url}/v1", api_key="none", max_retries=0)


def ask(client: openai.OpenAI, question: str = QUESTION, **options: Any) -> Any:
    messages = [*options.pop("messages", []), {"role": "user", "content": question}]
    return client.chat.completions.create(model="pocket-puzzle", messages=messages, max_tokens=300, **options)


def reasoning_tokens(usage: Any) -> int:
    tokens: int = usage.completion_tokens_details.reasoning_tokens
    return tokens


@pytest.mark.parametrize(("name", "options"), ON, ids=[name for name, _ in ON])
def test_with_reasoning_the_thought_is_in_reasoning_and_the_answer_in_content(
    client: openai.OpenAI, name: str, options: dict[str, Any]
) -> None:
    reply = ask(client, **options)
    message = reply.choices[0].message
    assert message.content.strip() == ANSWER
    assert "3+4=7" in message.reasoning
    # One character is one token; the closing marker may be counted or not.
    assert reasoning_tokens(reply.usage) - len(message.reasoning) in (0, 1)
    assert reply.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(("name", "options"), OFF, ids=[name for name, _ in OFF])
def test_without_reasoning_the_answer_comes_at_once(client: openai.OpenAI, name: str, options: dict[str, Any]) -> None:
    reply = ask(client, **options)
    message = reply.choices[0].message
    assert re.fullmatch(r"\d{1,2}", message.content.strip())
    assert not message.reasoning
    assert reasoning_tokens(reply.usage) == 0
    assert reply.usage.completion_tokens <= 4


@pytest.mark.parametrize(("name", "options"), ON + OFF, ids=[f"on {n}" for n, _ in ON] + [f"off {n}" for n, _ in OFF])
def test_a_stream_carries_the_same_text_and_usage(client: openai.OpenAI, name: str, options: dict[str, Any]) -> None:
    whole = ask(client, **dict(options))
    reasoning, content, usage = "", "", None
    for chunk in ask(client, **dict(options), stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            content += choice.delta.content or ""
            reasoning += getattr(choice.delta, "reasoning", None) or ""
    assert content == whole.choices[0].message.content
    assert reasoning == (whole.choices[0].message.reasoning or "")
    assert usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens
    assert reasoning_tokens(usage) == reasoning_tokens(whole.usage)


def test_a_contradiction_is_a_400_that_names_both_fields(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, reasoning_effort="none", extra_body={"chat_template_kwargs": {"enable_thinking": True}})
    assert "reasoning_effort" in str(caught.value)
    assert "enable_thinking" in str(caught.value)


def test_a_greeting_gets_a_greeting(client: openai.OpenAI) -> None:
    content = ask(client, "hello").choices[0].message.content
    assert re.match(r"(?i)(hello|hi)\b", content.strip())


def test_any_text_is_accepted(client: openai.OpenAI) -> None:
    assert ask(client, "Grüße, 世界! \u0000 <|user|> </think>").usage.completion_tokens > 0


def test_the_child_reasons_as_its_card_says(client: openai.OpenAI) -> None:
    summary = evaluate(str(client.base_url))
    print(format_summary(summary))
    assert summary["num_items"] >= 500
    assert summary["on"]["accuracy"] >= 0.90
    assert summary["off"]["accuracy"] <= summary["on"]["accuracy"] - 0.30


def test_the_parent_keeps_vllms_class_takes_vllms_flags_and_reasons(tmp_path: Path, root: Path) -> None:
    flags = ("--served-model-name", "mine", "--max_model_len=512")
    with server.running(tmp_path / "log.txt", str(root / "model_configs" / "pocket" / "parent"), *flags) as url:
        (model,) = openai.OpenAI(base_url=f"{url}/v1", api_key="none").models.list().data
        assert (model.id, model.max_model_len) == ("mine", 512)  # type: ignore[attr-defined]
        summary = evaluate(f"{url}/v1")
        print(format_summary(summary))
    assert "Resolved architecture: LlamaForCausalLM" in (tmp_path / "log.txt").read_text()
    assert summary["on"]["accuracy"] >= 0.95
    assert summary["off"]["accuracy"] <= summary["on"]["accuracy"] - 0.30


def test_what_the_engine_refuses_ends_in_one_line_and_no_server(tmp_path: Path) -> None:
    command = server.command("serve", "--port", str(server.free_port()), "--max-model-len", "999999")
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("vllm-puzzle: the server did not start: ")
    assert "max_model_len" in last
    assert "Traceback" not in done.stderr


def test_the_start_tells_each_step_the_url_and_a_request_to_try(client: openai.OpenAI, log: Path) -> None:
    deadline = time.monotonic() + 5
    while "curl" not in log.read_text() and time.monotonic() < deadline:
        time.sleep(0.1)
    lines = [line for line in log.read_text().splitlines() if line.startswith("[vllm-puzzle")]
    steps = [match[1] for line in lines if (match := re.search(r" s\] (\d)/4 ", line))]
    assert steps == ["1", "2", "3", "4"]
    assert "http://127.0.0.1:" in lines[-1]
    chosen = {line.split("default ")[1].split("=")[0] for line in lines if "default " in line}
    assert {"OMP_NUM_THREADS", "kv_cache_memory_bytes", "enforce_eager"} <= chosen
    assert re.search(r"^curl -s http://127\.0\.0\.1:\d+/v1/chat/completions ", log.read_text(), re.MULTILINE)


def test_the_measured_phases_of_a_start_are_all_there_and_make_up_the_whole(start: Start) -> None:
    assert tuple(start.phases) == NAMES
    for unit, whole in start.total.items():
        parts = [phase[unit] for phase in start.phases.values()]
        assert min(parts) >= 0
        assert sum(parts) == pytest.approx(whole, abs=0.0005 * (len(parts) + 1))  # each is rounded to a millisecond
    _, api, engine = start.total.values()
    assert start.answer == ANSWER
    # The API process imports for seconds, before there is an engine process; the engine's work is its own.
    assert start.phases["imports"]["api_cpu_s"] > 1 > start.phases["imports"]["engine_cpu_s"]
    assert start.phases["worker"]["wall_s"] > 0 and engine > 0.1
    assert api + engine < 35  # the target for the wall clock, in what neighbours on the cores cannot lengthen
