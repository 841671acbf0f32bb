"""What is known about a model family's thinking, as data: one file per family in `profiles/`, read and checked here.

A profile says how the family is recognised, how it is switched, which levels it was trained on, and what stands around
a thought. A model of no known family gets a profile that is derived from its chat template (`derive.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from vllm_puzzle.model_configs.json_values import refuse
from vllm_puzzle.model_configs.schema import ConfigError
from vllm_puzzle.serving.dial.request import EFFORTS
from vllm_puzzle.serving.dial.yaml_file import load_yaml

FOLDER = Path(__file__).with_name("profiles")
ARGUMENT, LEVEL, TEXT, NONE = "argument", "level", "text", "none"
SYSTEM_LINE, SYSTEM_TAG, MESSAGE_TAG = "system_line", "system_tag", "message_tag"
TRAINED, CLOSED, HIDDEN = "trained", "closed", "hidden"
CHOICES: dict[str, tuple[Any, ...]] = {
    "switch": (ARGUMENT, LEVEL, TEXT, NONE),
    "text": (None, SYSTEM_LINE, SYSTEM_TAG, MESSAGE_TAG),
    "off_state": (TRAINED, CLOSED, HIDDEN),
    "default": ("on", "off"),
    "opened_by": ("prompt", "model"),
}


@dataclass(frozen=True, slots=True)
class Recognition:
    """One way to recognise a family: everything that it names must hold.

    model_types, names: one of them is config.json's, or is part of the model's name (lower case). template: each is in
    the chat template; template_lacks: none is.
    """

    model_types: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    template: tuple[str, ...] = ()
    template_lacks: tuple[str, ...] = ()

    def matches(self, model_type: str, name: str, template: str) -> bool:
        """Whether a model is of this family."""
        return (
            (not self.model_types or model_type in self.model_types)
            and (not self.names or any(part in name.lower() for part in self.names))
            and all(part in template for part in self.template)
            and not any(part in template for part in self.template_lacks)
        )


@dataclass(frozen=True, slots=True)
class ModelProfile:
    """One model's thinking.

    switch: how it is set on or off: template variables (`arguments`), the level `none`, text, or not at all. text:
    the convention for switches in messages that the model was trained on, or None. off_state: what off means: a state
    that it was trained on, a thought closed at once, or short hidden reasoning. levels: effort → the template
    variables that ask for it. opened_by: who writes `start` when thinking is on. start, end: texts around a thought;
    closing: what is forced in the end's place where that is another text; phrase: said before a forced end.
    tool_start: opens a tool call. headers: what stands before an answer and is none of it. history: template variable →
    its value when earlier thoughts stay in the prompt. budget_argument: the template variable that tells the model its
    budget. sampling_on, sampling_off: published advice. min_budget: the smallest budget that it answers well after.
    is_harmony: vLLM renders its prompts without the template.
    """

    name: str
    source: str
    recognise: tuple[Recognition, ...] = ()
    switch: str = NONE
    arguments: tuple[str, ...] = ()
    text: str | None = None
    off_state: str = CLOSED
    levels: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    default: str = "on"
    default_level: str | None = None
    opened_by: str = "model"
    start: str = "<think>"
    end: str = "</think>"
    closing: str = ""
    phrase: str = ""
    tool_start: str = ""
    headers: tuple[str, ...] = ()
    history: Mapping[str, bool] = field(default_factory=dict)
    budget_argument: str | None = None
    sampling_on: Mapping[str, float] = field(default_factory=dict)
    sampling_off: Mapping[str, float] = field(default_factory=dict)
    min_budget: int = 0
    is_harmony: bool = False

    def __post_init__(self) -> None:
        _check(self)

    @property
    def has_off(self) -> bool:
        """Whether the model was trained on an off state."""
        return self.off_state == TRAINED

    @property
    def forced_closing(self) -> str:
        """The text that ends a thought by force."""
        return self.closing or self.end


def profile_of(model_type: str, name: str, template: str, start: str = "", end: str = "") -> ModelProfile:
    """The profile of a model: its family's as far as the template has it, else one derived from the template.

    `start` and `end` are the markers of the server's reasoning parser, for a model of no known family. Never fails.
    """
    from vllm_puzzle.serving.dial.derive import derive, narrowed  # late: they need this module's types

    for profile in known_profiles():
        if any(way.matches(model_type, name, template) for way in profile.recognise):
            return narrowed(profile, template)
    return derive(template, start, end)


@cache
def known_profiles() -> tuple[ModelProfile, ...]:
    """All families, each file read once."""
    return tuple(load_profile(file) for file in sorted(FOLDER.glob("*.yaml")))


def load_profile(file: Path) -> ModelProfile:
    """Read and check one file. Raises ConfigError: file, key, found, allowed."""
    where = f"profile {file}"
    return read_profile(load_yaml(file, where), where)


def read_profile(found: Any, where: str) -> ModelProfile:
    """The profile that a parsed file describes."""
    if not isinstance(found, dict):
        raise ConfigError(f"{where}: found a YAML {type(found).__name__}, allowed: key: value lines")
    known = {entry.name: entry for entry in fields(ModelProfile)}
    for key, value in found.items():
        if key not in known:
            raise refuse(where, str(key), value, f"no such key; one of {', '.join(known)}")
    for key in ("name", "source"):
        if not isinstance(found.get(key), str):
            raise refuse(where, key, found.get(key), "a text")
    values: dict[str, Any] = {key: tuple(each) if isinstance(each, list) else each for key, each in found.items()}
    # YAML reads a bare `on` as true.
    if type(values.get("default")) is bool:
        values["default"] = "on" if values["default"] else "off"
    if "recognise" in values:
        values["recognise"] = _recognitions(values["recognise"], where)
    try:
        return ModelProfile(**values)
    except ConfigError as error:
        raise ConfigError(f"{where}, {str(error).partition(', ')[2]}") from None


def _recognitions(found: Any, where: str) -> tuple[Recognition, ...]:
    if not isinstance(found, tuple) or not all(isinstance(way, dict) and way for way in found):
        raise refuse(where, "recognise", found, "a list of key: value lines")
    ways = []
    for way in found:
        for key, value in way.items():
            if key not in Recognition.__dataclass_fields__ or not _is_texts(value):
                allowed = f"a list of texts under one of {', '.join(Recognition.__dataclass_fields__)}"
                raise refuse(where, f"recognise.{key}", value, allowed)
        ways.append(Recognition(**{key: tuple(value) for key, value in way.items()}))
    return tuple(ways)


def _check(profile: ModelProfile) -> None:
    where = f"profile {profile.name}"
    for key, allowed in CHOICES.items():
        if getattr(profile, key) not in allowed:
            raise refuse(where, key, getattr(profile, key), ", ".join(str(choice) for choice in allowed))
    for entry in fields(profile):
        value, kind = getattr(profile, entry.name), str(entry.type)
        if kind == "str" and not isinstance(value, str):
            raise refuse(where, entry.name, value, "a text")
        if kind == "bool" and type(value) is not bool:
            raise refuse(where, entry.name, value, "true, false")
        if kind.startswith("Mapping") and not _is_mapping(value):
            raise refuse(where, entry.name, value, "key: value lines")
    for key in ("arguments", "headers"):
        if not _is_texts(getattr(profile, key)):
            raise refuse(where, key, getattr(profile, key), "a list of texts")
    if type(profile.min_budget) is not int or profile.min_budget < 0:
        raise refuse(where, "min_budget", profile.min_budget, "an integer of at least 0")
    if profile.budget_argument is not None and not isinstance(profile.budget_argument, str):
        raise refuse(where, "budget_argument", profile.budget_argument, "a text")
    for level, arguments in profile.levels.items():
        if level not in EFFORTS or not _is_mapping(arguments):
            raise refuse(where, f"levels.{level}", arguments, f"key: value lines under one of {', '.join(EFFORTS)}")
    if profile.default_level not in (None, *profile.levels):
        raise refuse(where, "default_level", profile.default_level, ", ".join(profile.levels) or "nothing")
    for key in ("sampling_on", "sampling_off"):
        for name, value in getattr(profile, key).items():
            if type(value) not in (int, float):
                raise refuse(where, f"{key}.{name}", value, "a number")
    _check_switch(profile, where)


def _check_switch(profile: ModelProfile, where: str) -> None:
    """What must agree: a switch has what it needs, and a model with one has a trained off state."""
    if bool(profile.arguments) != (profile.switch == ARGUMENT):
        raise refuse(where, "arguments", profile.arguments, f"names with switch {ARGUMENT}, none with another")
    if profile.switch == TEXT and profile.text is None:
        raise refuse(where, "text", None, ", ".join(CHOICES["text"][1:]))
    if (profile.switch == NONE) == profile.has_off:
        raise refuse(
            where, "off_state", profile.off_state, f"{TRAINED} with a switch, {CLOSED} or {HIDDEN} without one"
        )
    if profile.off_state == HIDDEN and not profile.levels:
        raise refuse(where, "levels", {}, f"at least one level with off_state {HIDDEN}")
    if not profile.start or not profile.end:
        raise refuse(where, "start" if not profile.start else "end", "", "a text")


def _is_texts(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(part, str) for part in value)


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)


def with_markers(profile: ModelProfile, start: str, end: str) -> ModelProfile:
    """The profile with a server's own markers; empty ones change nothing."""
    return replace(profile, start=start or profile.start, end=end or profile.end)
