"""Switches in the messages' text: read where they count, and rewritten so that the prompt says what is done."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from dial_models import FAMILIES, dial, wish
from hypothesis import given
from hypothesis import strategies as st
from vllm_puzzle.serving.dial.policy import ReasoningPolicy
from vllm_puzzle.serving.dial.resolve import Effective, resolve, settled_messages, text_state
from vllm_puzzle.serving.dial.responses_text import as_messages, write_back
from vllm_puzzle.serving.dial.template import Template
from vllm_puzzle.serving.dial.text_switch import read_switches, without_switches, write_switch

USER = {"role": "user", "content": "3+4"}


def system(text: Any) -> dict[str, Any]:
    return {"role": "system", "content": text}


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([USER], []),
        ([system("detailed thinking off"), USER], [False]),
        ([system("Be brief.\n Detailed Thinking ON "), USER], [True]),
        ([system([part("detailed thinking off")]), USER], [False]),
        ([system("please use detailed thinking on this"), USER], []),
        ([user("detailed thinking off")], []),
        ([system("detailed thinking on\ndetailed thinking off"), USER], [True, False]),
        ([system("/no_think"), USER], []),
    ],
)
def test_the_system_line_is_read_where_it_counts(messages: list[Any], expected: list[bool]) -> None:
    assert read_switches(messages, "system_line") == expected


@pytest.mark.parametrize(
    ("messages", "in_system", "anywhere"),
    [
        ([USER], [], []),
        ([system("/no_think"), USER], [False], [False]),
        ([system("Be brief. /think"), user("x /no_think")], [True], [True, False]),
        ([user("/no_think"), {"role": "assistant", "content": "/think"}, user("go")], [], [False]),
        ([user([part("see"), part("/no_think /think")])], [], [False, True]),
        ([USER, system("/no_think")], [], [False]),
        ([system("detailed thinking off"), user("x")], [], []),
        ([{"role": "user", "content": None}, "no message", user([{"type": "image_url"}])], [], []),
    ],
)
def test_tags_are_read_where_they_count(messages: list[Any], in_system: list[bool], anywhere: list[bool]) -> None:
    assert read_switches(messages, "system_tag") == in_system
    assert read_switches(messages, "message_tag") == anywhere


@pytest.mark.parametrize("is_on", [True, False])
def test_what_is_written_is_read_once_and_what_says_it_already_stays(is_on: bool) -> None:
    conversations: list[list[Any]] = [
        [USER],
        [system("Be brief."), USER],
        [
            system([part("a /think"), part("detailed thinking on\nb")]),
            user([part("c /no_think"), {"type": "image_url"}]),
        ],
        [system("detailed thinking off\n/no_think /think"), user("/think /no_think"), USER],
        [{"role": "assistant", "content": "hello"}],
    ]
    for convention in ("system_line", "system_tag", "message_tag"):
        for messages in conversations:
            written = write_switch(messages, convention, is_on)
            assert read_switches(written, convention) == [is_on]
            assert write_switch(written, convention, is_on) == written
            assert read_switches(without_switches(written, convention), convention) == []


def test_a_switch_joins_the_message_that_it_belongs_to() -> None:
    assert write_switch([USER], "system_line", False) == [system("detailed thinking off"), USER]
    brief = [system("Be brief."), USER]
    assert write_switch(brief, "system_line", True) == [system("detailed thinking on\nBe brief."), USER]
    assert write_switch(brief, "system_tag", False) == [system("/no_think\nBe brief."), USER]
    # At the end of the prompt, where it costs no prefix cache.
    assert write_switch(brief, "message_tag", False) == [system("Be brief."), user("3+4 /no_think")]
    picture = {"type": "image_url"}
    assert write_switch([user([part("a"), picture])], "message_tag", True) == [user([part("a /think"), picture])]
    assert brief == [system("Be brief."), {"role": "user", "content": "3+4"}], "the client's own list is left alone"


TEXTS = st.lists(
    st.sampled_from(("hi", "/think", "/no_think", "detailed thinking on", "detailed thinking off", "a /think b", "")),
    max_size=3,
).map("\n".join)
MESSAGES = st.tuples(
    st.none() | TEXTS, st.lists(st.tuples(st.sampled_from(("user", "assistant")), TEXTS), max_size=3), TEXTS
).map(
    lambda parts: (
        ([system(parts[0])] if parts[0] is not None else [])
        + [{"role": role, "content": text} for role, text in parts[1]]
        + [user(parts[2])]
    )
)
# What the end of each family's prompt says about thinking, off then on.
ENDS = {"49B v1.5": ("</think>\n\n", "[assistant]"), "Nano v2": ("<think></think>", "<think>\n")}


@given(family=st.sampled_from(sorted(ENDS)), messages=MESSAGES, asked=st.sampled_from((None, True, False)))
def test_the_prompt_ends_as_the_parser_is_told(family: str, messages: list[Any], asked: bool | None) -> None:
    """Fields, text in any position, several that contradict: the rendered prompt agrees with enable_thinking."""
    model = dial(family)
    done = resolve(wish(is_on=asked), model, text_state(messages, model))
    prompt = Template(FAMILIES[family][2]).render(settled_messages(messages, done, model))
    assert prompt is not None
    is_on = done.template_arguments.get("enable_thinking", True)
    assert prompt.endswith(ENDS[family][is_on])
    assert is_on is (asked if asked is not None else (text_state(messages, model) or [True])[-1])


@given(messages=MESSAGES, asked=st.sampled_from((None, True, False)), default=st.sampled_from(("on", "off")))
def test_a_system_line_says_what_is_done(messages: list[Any], asked: bool | None, default: str) -> None:
    model = dial("49B v1", ReasoningPolicy(default={"*": default}))
    done = resolve(wish(is_on=asked), model, text_state(messages, model))
    said = text_state(settled_messages(messages, done, model), model)
    assert set(said) == {done.template_arguments["enable_thinking"]}


def test_messages_that_mean_it_already_go_on_unchanged() -> None:
    for family, messages, asked in (
        ("49B v1", [USER], None),
        ("49B v1", [system("detailed thinking on\nx"), USER], True),
        ("49B v1.5", [system("x"), USER], True),
        ("Nano v2", [user("x /no_think")], False),
        ("pocket", [USER], False),
        ("pocket", [system("detailed thinking off")], None),
        ("Qwen", [user("/no_think")], True),
        ("gpt-oss", [user("/no_think")], False),
    ):
        model = dial(family)
        done = resolve(wish(is_on=asked), model, text_state(messages, model))
        assert settled_messages(messages, done, model) == messages, family


def test_a_model_with_an_argument_has_its_text_agree_with_the_field() -> None:
    model, messages = dial("pocket"), [system("detailed thinking on\nBe brief."), USER]
    done = resolve(wish(is_on=False), model, text_state(messages, model))
    assert settled_messages(messages, done, model)[0] == system("detailed thinking off\nBe brief.")
    assert len(done.notes) == 1


def test_text_that_does_not_count_here_is_taken_out() -> None:
    model = dial("Nano v2", ReasoningPolicy(soft_switches=False))
    messages = [user("3+4 /no_think")]
    done = resolve(wish(), model, text_state(messages, model))
    assert settled_messages(messages, done, model) == [user("3+4")]
    assert done.template_arguments == {}


def test_part_of_a_conversation_says_its_state_for_the_unseen_part() -> None:
    done = Effective(is_on=True)
    assert settled_messages([USER], done, dial("Nano v2"), is_whole=False) == [user("3+4 /think")]
    assert settled_messages([USER], done, dial("49B v1.5"), is_whole=False) == [USER]


@pytest.mark.parametrize(
    ("instructions", "given", "convention", "expected"),
    [
        (None, "3+4", "system_line", ("detailed thinking off", "3+4")),
        ("Be brief.", "3+4", "system_line", ("detailed thinking off\nBe brief.", "3+4")),
        (None, "3+4 /think", "message_tag", (None, "3+4 /no_think")),
        ("x /think", [USER, {"type": "r"}], "message_tag", ("x", [user("3+4 /no_think"), {"type": "r"}])),
        (None, [system("/think"), USER], "system_tag", (None, [system("/no_think"), USER])),
        (None, [user([{"type": "input_text", "text": "a"}])], "message_tag",
         (None, [user([{"type": "input_text", "text": "a /no_think"}])])),
    ],
)  # fmt: skip
def test_a_responses_request_is_edited_in_instructions_and_input(
    instructions: str | None, given: Any, convention: str, expected: tuple[Any, Any]
) -> None:
    request = SimpleNamespace(instructions=instructions, input=given)
    write_back(request, write_switch(as_messages(request), convention, False))
    assert (request.instructions, request.input) == expected
