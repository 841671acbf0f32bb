"""The operator's policy: from a file, flags or the environment; every mistake is one line before anything starts."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import server
import yaml
from vllm_puzzle.kernels.thinking import LoopRule
from vllm_puzzle.model_configs.schema import ConfigError
from vllm_puzzle.serving.dial.policy import (
    READERS,
    VARIABLE,
    Grace,
    ReasoningPolicy,
    load_policy,
    policy_from_environment,
    read_policy,
)
from vllm_puzzle.serving.dial.policy_flags import take_policy

EXAMPLE = Path(__file__).with_name("reasoning_policy.yaml")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    # Set first, so that whatever a test puts there is taken back.
    monkeypatch.setenv(VARIABLE, "")


def test_the_example_file_says_what_its_comments_say() -> None:
    policy = load_policy(EXAMPLE)
    assert policy == ReasoningPolicy(
        default={"gpt-oss": "low", "*": "on"},
        budgets={
            "*": {"low": 512, "medium": 2048, "high": 8192, "max": -1},
            "pocket-puzzle": {"low": 8, "medium": 32, "high": 96},
        },
        ceiling=16384,
        answer_reserve=256,
        grace=Grace(0.1, 128),
        phrase="So the answer is: ",
        loop=LoopRule(1, 64, 4),
        max_body_bytes=2**25,
        provenance={"measured_with": "vllm-puzzle bench", "margin": 0.01},
    )
    assert policy.budgets_of("pocket-puzzle") == {"low": 8, "medium": 32, "high": 96}
    assert policy.budgets_of("other")["max"] == -1
    assert (policy.default_of("gpt-oss"), policy.default_of("other")) == ("low", "on")


def test_every_field_of_a_policy_can_be_written() -> None:
    assert list(READERS) == [entry.name for entry in fields(ReasoningPolicy)]
    assert set(yaml.safe_load(EXAMPLE.read_text())) == set(READERS), "the example shows every key"


def test_an_empty_file_and_null_keys_leave_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_text("")
    assert load_policy(file) == ReasoningPolicy()
    assert read_policy(dict.fromkeys(("ceiling", "loop", "phrase", "budgets", "default")), "x") == ReasoningPolicy()
    assert read_policy({"phrase": ""}, "x").phrase == "", "no phrase is not the profile's phrase"


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({"default": True}, {"default": {"*": "on"}}),
        ({"default": False}, {"default": {"*": "off"}}),
        ({"default": "none"}, {"default": {"*": "off"}}),
        ({"default": "ultra"}, {"default": {"*": "max"}}),
        ({"grace": 0}, {"grace": Grace(0, 128)}),
        ({"grace": {"cap": 5}}, {"grace": Grace(0.1, 5)}),
        ({"names": "reasoning"}, {"names": ("reasoning",)}),
        ({"names": ["reasoning_content", "reasoning"]}, {"names": ("reasoning", "reasoning_content")}),
        ({"loop": {"max_pattern_size": 3, "min_count": 2}}, {"loop": LoopRule(1, 3, 2)}),
        ({"ceiling": 0}, {"ceiling": 0}),
    ],
)
def test_short_spellings_are_read(document: dict[str, Any], expected: dict[str, Any]) -> None:
    assert read_policy(document, "x") == replace(ReasoningPolicy(), **expected)


BAD: list[tuple[Any, str]] = [
    ({"cieling": 5}, "key `cieling`: found 5, allowed: no such key; one of default, budgets, ceiling"),
    ({1: 5}, "key `1`: found 5, allowed: no such key"),
    ({"ceiling": -1}, "key `ceiling`: found -1, allowed: an integer from 0"),
    ({"ceiling": True}, "key `ceiling`: found True"),
    ({"ceiling": 2.5}, "key `ceiling`: found 2.5"),
    ({"ceiling": 2**31}, "key `ceiling`: found 2147483648"),
    ({"answer_reserve": "all"}, "key `answer_reserve`: found 'all', allowed: an integer from 0"),
    ({"default": "huge"}, "key `default`: found 'huge', allowed: on, off, minimal"),
    ({"default": {"m": 3}}, "key `default.m`: found 3, allowed: on, off"),
    ({"default": {3: "on"}}, "key `default`: found 3, allowed: served model names"),
    ({"budgets": {"huge": 5}}, "key `budgets.huge`: found 5, allowed: tokens under one of minimal"),
    ({"budgets": {"low": 0}}, "key `budgets.low`: found 0, allowed: an integer from 1"),
    ({"budgets": {"low": "8"}}, "key `budgets.low`: found '8'"),
    ({"budgets": {"m": {"low": -2}}}, "key `budgets.m.low`: found -2"),
    ({"budgets": {"m": {"none": 2}}}, "key `budgets.m.none`: found 2, allowed: tokens under one of"),
    ({"budgets": {"low": 8, "*": {"low": 9}}}, "key `budgets.*`: found {'low': 9}, allowed: nothing beside"),
    ({"budgets": [1]}, "key `budgets`: found [1], allowed: effort: tokens lines"),
    ({"grace": 1.5}, "key `grace`: found 1.5, allowed: a number from 0 to 1"),
    ({"grace": {"share": float("nan")}}, "key `grace.share`: found nan"),
    ({"grace": {"cap": -1}}, "key `grace.cap`: found -1"),
    ({"grace": {"shar": 1}}, "key `grace.shar`: found 1, allowed: no such key; one of share, cap"),
    ({"phrase": 5}, "key `phrase`: found 5, allowed: a text"),
    ({"strict": "yes please"}, "key `strict`: found 'yes please', allowed: true, false"),
    ({"loop": True}, "key `loop`: found True, allowed: null, or min_pattern_size"),
    ({"loop": {"max_pattern_size": 4}}, "key `loop.min_count`: found nothing, allowed: an integer from 2"),
    ({"loop": {"min_pattern_size": 5, "max_pattern_size": 4, "min_count": 2}}, "allowed: at most max_pattern_size 4"),
    ({"loop": {"max_pattern_size": 9999, "min_count": 2}}, "key `loop.max_pattern_size`: found 9999"),
    ({"names": []}, "key `names`: found [], allowed: a list of one or both of reasoning, reasoning_content"),
    ({"names": ["thought"]}, "key `names`: found ['thought']"),
    ({"names": [["x"]]}, "key `names`: found [['x']]"),
    ({"soft_switches": 1}, "key `soft_switches`: found 1, allowed: true, false"),
    ({"max_body_bytes": 5}, "key `max_body_bytes`: found 5, allowed: an integer from 1024"),
    ({"provenance": "me"}, "key `provenance`: found 'me', allowed: key: value lines"),
    (["default"], "found a YAML list, allowed: key: value lines"),
]


@pytest.mark.parametrize(("document", "message"), BAD)
def test_a_bad_policy_is_one_clear_line_from_a_file_and_from_json(tmp_path: Path, document: Any, message: str) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text(yaml.safe_dump(document))
    with pytest.raises(ConfigError) as caught:
        load_policy(file)
    assert message in str(caught.value)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "message"), [("{", "allowed: a YAML file"), ("\x00", "allowed: a YAML file")])
def test_a_file_that_cannot_be_read_is_one_clear_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text(text)
    for broken in (file, tmp_path / "missing.yaml", tmp_path):
        with pytest.raises(ConfigError, match=message) as caught:
            load_policy(broken)
        assert "\n" not in str(caught.value)


def test_a_measured_map_is_a_file_of_its_own(tmp_path: Path) -> None:
    measured, policy = tmp_path / "measured.yaml", tmp_path / "policy.yaml"
    measured.write_text("budgets: {m: {low: 9}}\nprovenance: {seed: 3, gpu: none}\n")
    policy.write_text("budgets: measured.yaml\nceiling: 50\n")
    expected = ReasoningPolicy(budgets={"m": {"low": 9}}, ceiling=50, provenance={"seed": 3, "gpu": "none"})
    assert load_policy(policy) == expected, "named relative to the policy"
    assert load_policy(measured).budgets_of("m") == {"low": 9}, "it is a policy too"
    assert take_policy([f"--puzzle-reasoning.budgets={measured}", "--puzzle-reasoning.ceiling=50"]) == []
    assert policy_from_environment() == expected
    measured.write_text("budgets: {m: {low: 9}}\nceiling: 3\n")
    with pytest.raises(ConfigError, match="key `ceiling`: found 3, allowed: no such key; one of budgets, provenance"):
        load_policy(policy)
    measured.write_text("provenance: {}\n")
    with pytest.raises(ConfigError, match="key `budgets`: found nothing, allowed: effort: tokens lines"):
        load_policy(policy)


def test_the_variable_names_a_file_or_holds_json() -> None:
    assert policy_from_environment() == policy_from_environment(" ") == ReasoningPolicy()
    assert policy_from_environment(str(EXAMPLE)) == load_policy(EXAMPLE)
    assert policy_from_environment('{"ceiling": 7}').ceiling == 7
    for value, message in (("{", "allowed: a YAML file's name or a JSON object"), ('{"ceiling": -7}', "found -7")):
        with pytest.raises(ConfigError, match=f"variable {VARIABLE}.*{message}"):
            policy_from_environment(value)


def test_flags_are_taken_out_of_the_arguments_and_win_over_the_file() -> None:
    rest = take_policy(
        ["MODEL", "--puzzle-reasoning", str(EXAMPLE), "--port", "0", "--puzzle-reasoning.ceiling=9",
         "--puzzle-reasoning.answer-reserve", "0", "--puzzle_reasoning.loop.min-count=7", "--puzzle-reasoning.phrase=",
         "--puzzle-reasoning.budgets.low=5", "--puzzle-reasoning.budgets.llama-3.1.high=6", "--max-model-len", "9",
         "--puzzle-reasoning.default.llama-3.1=off", "--puzzle-reasoning.grace=0"]
    )  # fmt: skip
    assert rest == ["MODEL", "--port", "0", "--max-model-len", "9"]
    example, policy = load_policy(EXAMPLE), policy_from_environment()
    assert policy == replace(
        example,
        ceiling=9,
        answer_reserve=0,
        loop=LoopRule(1, 64, 7),
        phrase=None,  # as a bare key in YAML: nothing
        budgets={**example.budgets, "*": {**example.budgets["*"], "low": 5}, "llama-3.1": {"high": 6}},
        default={**example.default, "llama-3.1": "off"},
        grace=Grace(0, 128),
    )
    take_policy(["--puzzle-reasoning.phrase=''", "--puzzle-reasoning.default=off", "--puzzle-reasoning.default.m=low"])
    policy = policy_from_environment()
    assert (policy.phrase, policy.default, policy.ceiling) == ("", {"*": "off", "m": "low"}, 9), (
        "the variable is a base"
    )


def test_without_flags_the_variable_stays_and_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(EXAMPLE))
    assert take_policy(["--port", "0"]) == ["--port", "0"]
    assert os.environ[VARIABLE] == str(EXAMPLE)
    take_policy(["--puzzle-reasoning.ceiling=9"])
    assert json.loads(os.environ[VARIABLE])["ceiling"] == 9
    assert policy_from_environment() == replace(load_policy(EXAMPLE), ceiling=9)
    monkeypatch.setenv(VARIABLE, "/nowhere.yaml")
    with pytest.raises(ConfigError, match=r"reasoning policy /nowhere\.yaml: found No such file"):
        take_policy([])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--puzzle-reasoning"], "flag --puzzle-reasoning: found nothing, allowed: a file"),
        (["--puzzle-reasoning.ceiling", "--port"], "flag --puzzle-reasoning.ceiling: found nothing, allowed: a value"),
        (["--puzzle-reasoning=/nowhere.yaml"], "reasoning policy /nowhere.yaml: found"),
        (["--puzzle-reasoning.ceiling=-1"], "flag --puzzle-reasoning, key `ceiling`: found -1, allowed: an integer"),
        (["--puzzle-reasoning.colour=red"], "flag --puzzle-reasoning, key `colour`: found 'red', allowed: no such key"),
        (["--puzzle-reasoning.ceiling.x=1"], "key `ceiling`: found {'x': 1}, allowed: an integer"),
        (["--puzzle-reasoning.names=[a"], "flag --puzzle-reasoning.names: found"),
        (["--puzzle-reasoning.=1"], "key ``: found 1, allowed: no such key"),
        (["--puzzle-reasoning.budgets.low.x=1"], "key `budgets.low.x`: found 1, allowed: tokens under one of"),
        (["--puzzle-reasoning.provenance={day: 2026-01-01}"], "found Object of type date is not JSON serializable"),
    ],
)
def test_a_faulty_flag_is_one_clear_line(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        take_policy(flags)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_serve_refuses_a_bad_policy_before_it_starts(tmp_path: Path) -> None:
    file = tmp_path / "policy.yaml"
    file.write_text("ceiling: -5\n")
    for arguments, environment in ((["--puzzle-reasoning", str(file)], {}), ([], {VARIABLE: str(file)})):
        done = subprocess.run(
            server.command("serve", "--port", "0", *arguments),
            env=os.environ | environment, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 1
        assert done.stderr.startswith("vllm-puzzle: reasoning policy ")
        assert "key `ceiling`: found -5, allowed: an integer from 0" in done.stderr
        assert len(done.stderr.splitlines()) == 1
