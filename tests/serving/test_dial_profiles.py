"""Each family is recognised and described; an unknown model's profile is what its template does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import dial_models
import pytest
import yaml
from dial_models import FAMILIES, POCKETS, dial, wish
from hypothesis import given
from hypothesis import strategies as st
from vllm_puzzle.model_configs.schema import ConfigError
from vllm_puzzle.serving.dial.capabilities import capabilities
from vllm_puzzle.serving.dial.derive import derive, preset
from vllm_puzzle.serving.dial.policy import ReasoningPolicy, read_policy
from vllm_puzzle.serving.dial.profile import FOLDER, ModelProfile, known_profiles, load_profile, profile_of
from vllm_puzzle.serving.dial.resolve import resolve
from vllm_puzzle.serving.dial.template import Template

EXPECTED = {
    "49B v1": "detailed-thinking",
    "253B": "detailed-thinking",
    "Nano 8B": "detailed-thinking",
    "49B v1.5": "llama-nemotron-super-49b-v1.5",
    "Nano v2": "nemotron-nano-v2",
    "3 Nano": "nemotron-3",
    "3 Super": "nemotron-3",
    "3 Ultra": "nemotron-3",
    "Puzzle 75B": "nemotron-3",
    "gpt-oss": "gpt-oss",
    "gpt-oss-puzzle": "gpt-oss-puzzle",
    "pocket": "pocket",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_is_recognised_as_one_family_or_derived(family: str) -> None:
    model_type, name, template = FAMILIES[family]
    ways = [(p.name, way) for p in known_profiles() for way in p.recognise if way.matches(model_type, name, template)]
    assert {found for found, _ in ways} <= {EXPECTED.get(family)}
    assert profile_of(model_type, name, template).name == EXPECTED.get(family, "derived")


def test_both_pocket_models_have_their_own_profile() -> None:
    for template in POCKETS:
        assert profile_of("llama", "anything", template).name == "pocket"


def test_every_family_but_the_generic_one_is_recognised_by_something_and_has_a_source() -> None:
    for profile in known_profiles():
        assert bool(profile.recognise) is (profile.name != "generic-think")
        assert profile.source
        assert (FOLDER / f"{profile.name}.yaml").is_file()
    assert len(known_profiles()) == 8


def test_a_member_has_the_levels_that_its_template_reads() -> None:
    levels = {family: profile_of(*FAMILIES[family]).levels for family in ("3 Nano", "3 Super", "3 Ultra")}
    assert levels == {
        "3 Nano": {},
        "3 Super": {"low": {"low_effort": True}, "high": {}},
        "3 Ultra": {"medium": {"medium_effort": True}, "high": {}},
    }
    assert profile_of(*FAMILIES["3 Ultra"]).budget_argument == "reasoning_budget"
    assert profile_of(*FAMILIES["3 Super"]).budget_argument is None
    # vLLM renders gpt-oss without its template, so that the template takes nothing away.
    for model_type in ("gpt_oss", "gpt_oss_puzzle"):
        assert list(profile_of(model_type, "x", dial_models.NO_SWITCH).levels) == ["low", "medium", "high"]


def test_the_family_profiles_say_what_their_own_templates_do() -> None:
    """The profile of a file against the one derived from the same template, where both can know."""
    for family in ("3 Nano", "3 Super", "3 Ultra", "pocket"):
        known, derived = profile_of(*FAMILIES[family]), derive(FAMILIES[family][2])
        for what in ("switch", "arguments", "off_state", "default", "opened_by", "levels", "history"):
            assert getattr(known, what) == getattr(derived, what), (family, what)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("QWEN", {"switch": "argument", "arguments": ("enable_thinking",), "default": "on", "opened_by": "model"}),
        ("SWITCHED", {"switch": "argument", "default": "on", "opened_by": "prompt", "levels": {}}),
        ("KIMI", {"arguments": ("thinking",), "default": "on", "opened_by": "prompt"}),
        ("ON_DEMAND", {"arguments": ("thinking",), "default": "off", "opened_by": "prompt"}),
        ("BY_LEVEL", {"switch": "level", "default": "on", "levels": {"high": {"reasoning_effort": "high"}}}),
        ("NO_SWITCH", {"switch": "none", "off_state": "closed", "default": "on", "opened_by": "model"}),
        ("OSS", {"switch": "none", "off_state": "closed"}),
    ],
)
def test_a_switch_is_what_changes_the_prompt(template: str, expected: dict[str, Any]) -> None:
    found = derive(getattr(dial_models, template))
    assert {key: getattr(found, key) for key in expected} == expected


def test_levels_are_what_the_template_tells_apart() -> None:
    every = ["minimal", "low", "medium", "high", "xhigh", "max"]
    assert list(derive(dial_models.KIMI).levels) == list(derive(dial_models.OSS).levels) == every
    assert list(derive(dial_models.THREE_LEVELS).levels) == ["low", "medium", "xhigh"]
    # `low` must not become the strongest level because it is in the template's `else`.
    assert list(derive(dial_models.HIGH_OR_MAX).levels) == ["high", "max"]
    assert derive(dial_models.HIGH_OR_MAX).levels["max"] == {"reasoning_effort": "max"}
    assert list(derive("{{ 'Most' if reasoning_effort == 'max' }}" + dial_models.SWITCHED).levels) == ["high", "max"]
    assert derive("{% if reasoning_effort %}{% endif %}" + dial_models.SWITCHED).levels == {}
    only_on = "{% if enable_thinking %}{{ reasoning_effort }}{% endif %}" + dial_models.SWITCHED
    assert list(derive(only_on).levels) == every


def test_a_servers_own_template_variables_are_the_default() -> None:
    qwen, demand = (profile_of(*FAMILIES[family]) for family in ("Qwen", "on demand"))
    assert preset(qwen, {"enable_thinking": False}).default == "off"
    assert preset(demand, {"thinking": True}).default == "on"
    for nothing in ({}, {"other": 1}, {"enable_thinking": None}):
        assert preset(qwen, nothing) is qwen
    silent = resolve(wish(), replace(dial("Qwen"), profile=preset(qwen, {"enable_thinking": False})))
    assert silent.template_arguments == {"enable_thinking": False}, "vLLM's parser must know what the prompt says"


def test_the_servers_own_markers_are_looked_for() -> None:
    template = dial_models.SWITCHED.replace("think>", "seed:think>")
    found = derive(template, "<seed:think>", "</seed:think>")
    assert (found.start, found.end, found.opened_by) == ("<seed:think>", "</seed:think>", "prompt")
    assert derive(template).opened_by == "model"


@pytest.mark.parametrize(
    "template",
    ["", "{{", "{% if %}", "{{ raise_exception('no') }}", "{{ messages[9].content.x }}", "{% nosuchtag %}",
     "{{ 1 // 0 }}", "{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ x.y.z }}"],
)  # fmt: skip
def test_a_template_that_cannot_be_rendered_gives_no_switch(template: str) -> None:
    found = derive(template)
    assert (found.name, found.switch, found.levels) == ("generic-think", "none", {})


def test_a_template_without_a_system_role_is_rendered_without_one() -> None:
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    assert derive(refusing + dial_models.SWITCHED).switch == "argument"


def test_templates_are_rendered_as_transformers_renders_them() -> None:
    source = (
        "{% for m in messages %}\n  {% if loop.index > 1 %}{% break %}{% endif %}\n{{ m | tojson }}\n{% endfor %}"
        "{% generation %}x{% endgeneration %}{{ strftime_now('%Y') | length }}"
    )
    messages = [{"role": "user", "content": "é<"}, {"role": "user", "content": "2"}]
    from transformers.utils.chat_template_utils import render_jinja_template

    (expected,), _ = render_jinja_template([messages], chat_template=source, add_generation_prompt=True)
    assert Template(source).render(messages) == expected
    assert Template("a {{ x }}{{ y }}").arguments == {"x", "y"}
    assert Template("{% for m in messages %}{{ m.enable_thinking }}{% endfor %} low_effort").arguments == {"messages"}


@given(st.text(alphabet="{}%#-'\"<>/ tihnkrsofmaeg.()[]|=_", max_size=60))
def test_deriving_never_fails(template: str) -> None:
    assert isinstance(derive(template), ModelProfile)


BAD: list[tuple[dict[str, Any] | str, str]] = [
    ({"colour": 1}, "key `colour`: found 1, allowed: no such key; one of name, source"),
    ({"switch": "lever"}, "key `switch`: found 'lever', allowed: argument, level, text, none"),
    ({"source": 3}, "key `source`: found 3, allowed: a text"),
    ({"off_state": "gone"}, "key `off_state`: found 'gone', allowed: trained, closed, hidden"),
    ({"switch": "none"}, "key `arguments`: found ('enable_thinking',), allowed: names with switch argument"),
    ({"switch": "text", "arguments": []}, "key `text`: found nothing, allowed: system_line"),
    ({"off_state": "closed"}, "key `off_state`: found 'closed', allowed: trained with a switch"),
    ({"levels": {"huge": {}}}, "key `levels.huge`: found {}, allowed: key: value lines under one of minimal"),
    ({"levels": ["low"]}, "key `levels`: found ('low',), allowed: key: value lines"),
    ({"default": "maybe"}, "key `default`: found 'maybe', allowed: on, off"),
    ({"default_level": "low"}, "key `default_level`: found 'low', allowed: nothing"),
    ({"start": ""}, "key `start`: found '', allowed: a text"),
    ({"sampling_on": {"temperature": "hot"}}, "key `sampling_on.temperature`: found 'hot', allowed: a number"),
    ({"min_budget": -1}, "key `min_budget`: found -1, allowed: an integer of at least 0"),
    ({"headers": "x"}, "key `headers`: found 'x', allowed: a list of texts"),
    ({"is_harmony": "yes please"}, "key `is_harmony`: found 'yes please', allowed: true, false"),
    ({"recognise": {"names": ["x"]}}, "key `recognise`: found {'names': ['x']}, allowed: a list"),
    ({"recognise": [{"name": ["x"]}]}, "key `recognise.name`: found ['x'], allowed: a list of texts under one of"),
    ({"recognise": [{"names": "x"}]}, "key `recognise.names`: found 'x', allowed: a list of texts"),
    ("just text", "found a YAML str, allowed: key: value lines"),
    ("{", "allowed: a YAML file"),
]
GOOD = {
    "name": "test",
    "source": "here",
    "switch": "argument",
    "arguments": ["enable_thinking"],
    "off_state": "trained",
    "default": True,
}


@pytest.mark.parametrize(("change", "message"), BAD)
def test_a_bad_profile_is_one_clear_line(tmp_path: Path, change: dict[str, Any] | str, message: str) -> None:
    file = tmp_path / "test.yaml"
    file.write_text(change if isinstance(change, str) else yaml.safe_dump(GOOD | change))
    with pytest.raises(ConfigError) as caught:
        load_profile(file)
    assert message in str(caught.value)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_good_profile_is_read_and_a_missing_file_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "test.yaml"
    file.write_text(yaml.safe_dump(GOOD))
    assert load_profile(file).default == "on"
    with pytest.raises(ConfigError, match="allowed: a YAML file"):
        load_profile(tmp_path / "none.yaml")


# --- capabilities --------------------------------------------------------------------------------------------------


def can(family: str, has_budget: bool = True, **document: Any) -> dict[str, Any]:
    policy = read_policy(document, "test") if document else ReasoningPolicy()
    return capabilities(profile_of(*FAMILIES[family]), policy, family, has_budget)


def test_a_model_tells_what_it_can() -> None:
    assert can("3 Super", budgets={"low": 100, "max": -1}, ceiling=5000) == {
        "profile": "nemotron-3",
        "modes": ["on", "off"],
        "can_disable": True,
        "off": "the off state that the model was trained on",
        "switch": "template argument enable_thinking",
        "efforts": [
            {"effort": "low", "budget": 100},
            {"effort": "high", "budget": 5000},
            {"effort": "max", "budget": 5000},
        ],
        "budget": {"min": 0, "max": 5000},
        "default": {"mode": "on", "effort": "high", "budget": 5000},
    }
    oss = can("gpt-oss-puzzle", default="low")
    assert (oss["can_disable"], oss["modes"]) == (False, ["on", "off"])
    assert oss["off"] == "short hidden reasoning, as the model always reasons"
    assert oss["budget"] == {"min": 1, "max": None}
    assert oss["default"] == {"mode": "on", "effort": "low", "budget": None}
    assert [entry["effort"] for entry in oss["efforts"]] == ["low", "medium", "high"]


def test_without_counting_a_model_promises_no_budget_and_no_off_that_needs_one() -> None:
    for family, modes in (("no switch", ["on"]), ("gpt-oss", ["on"]), ("Qwen", ["on", "off"])):
        told = can(family, has_budget=False)
        assert (told["modes"], told["budget"]) == (modes, None)
        assert told["can_disable"] is (family == "Qwen")
        assert (told["off"] is None) is (family != "Qwen")


def test_the_switch_is_told_in_words() -> None:
    words = {family: can(family)["switch"] for family in ("49B v1", "49B v1.5", "Nano v2", "by level", "no switch")}
    assert words == {
        "49B v1": "system line `detailed thinking on|off`",
        "49B v1.5": "`/think`, `/no_think` in the system message",
        "Nano v2": "`/think`, `/no_think` in a system or user message",
        "by level": "effort none",
        "no switch": None,
    }
    assert can("on demand")["default"] == {"mode": "off", "effort": None, "budget": 0}
    assert can("gpt-oss", default={"gpt-oss": "off"})["default"] == {"mode": "off", "effort": None, "budget": 512}


def test_a_ceiling_of_0_leaves_off_alone() -> None:
    told = can("Qwen", ceiling=0, budgets={"low": 5}, default="low")
    assert (told["modes"], told["efforts"], told["budget"]) == (["off"], [], {"min": 0, "max": 0})
    assert told["default"] == {"mode": "off", "effort": None, "budget": 0}


def test_what_is_told_is_what_is_done() -> None:
    """Every effort of every family, with and without a map: the budget told is the one that a request gets."""
    for document in (
        {},
        {"budgets": {"low": 5, "max": -1}},
        {"budgets": {"medium": 50}, "ceiling": 40, "default": "low"},
    ):
        for family in FAMILIES:
            policy = read_policy(document, "test")
            for entry in can(family, **document)["efforts"]:
                done = resolve(wish(is_on=True, effort=entry["effort"]), dial(family, policy))
                assert done.budget == entry["budget"], (family, entry)
            silent, told = resolve(wish(), dial(family, policy)), can(family, **document)["default"]
            assert told["mode"] == ("off" if silent.is_on is False else "on")
            assert silent.is_on is False or told["budget"] == silent.budget
