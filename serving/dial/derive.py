"""An unknown model's profile, read off its chat template by rendering one conversation under every setting.

What changes the text is a switch; what the prompt ends with tells who opens the thought and what the default is; a
level at which the template raises is none of its levels. A template that cannot be rendered gives no switch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from vllm_puzzle.serving.dial.profile import ARGUMENT, LEVEL, NONE, TRAINED, ModelProfile, known_profiles, with_markers
from vllm_puzzle.serving.dial.request import EFFORTS
from vllm_puzzle.serving.dial.template import Template

CONVERSATION = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Two."},
    {"role": "user", "content": "Three?"},
)
WITHOUT_SYSTEM = CONVERSATION[1:]
SWITCH_ARGUMENTS = ("enable_thinking", "thinking")
LEVEL_ARGUMENTS = ("reasoning_effort", "thinking_effort")
LEVEL_FLAGS = {"low_effort": "low", "medium_effort": "medium"}
HISTORY_ARGUMENTS = {"truncate_history_thinking": False, "clear_thinking": False, "preserve_thinking": True}
BUDGET_ARGUMENTS = ("reasoning_budget", "thinking_budget")
# A word that no template can know: how it treats this one is its `else`.
NONSENSE = "quixotic"


def narrowed(profile: ModelProfile, template: str) -> ModelProfile:
    """A family's profile with only those levels and variables that this member's template reads."""
    arguments = Template(template).arguments
    if profile.is_harmony or not arguments:
        return profile
    levels = {level: wanted for level, wanted in profile.levels.items() if arguments.issuperset(wanted)}
    if not any(levels.values()):
        levels = {}
    return replace(
        profile,
        levels=levels,
        default_level=profile.default_level if profile.default_level in levels else None,
        history={name: value for name, value in profile.history.items() if name in arguments},
        budget_argument=profile.budget_argument if profile.budget_argument in arguments else None,
    )


def preset(profile: ModelProfile, defaults: Mapping[str, Any]) -> ModelProfile:
    """The profile of a server whose own template variables (--default-chat-template-kwargs) switch the model."""
    states = {bool(defaults[name]) for name in profile.arguments if defaults.get(name) is not None}
    if len(states) != 1:
        return profile
    return replace(profile, default="on" if states.pop() else "off")


def derive(template: str, start: str = "", end: str = "") -> ModelProfile:
    """The profile of a model of no known family. `start`, `end`: its markers where the server knows them."""
    base = with_markers(next(each for each in known_profiles() if each.name == "generic-think"), start, end)
    probe = _Probe(Template(template))
    silent = probe.render()
    if not silent:
        return base
    names = tuple(name for name in SWITCH_ARGUMENTS if probe.changes(name, (True, False)))
    by_level = not names and _knows_none(probe)
    on = probe.render(**dict.fromkeys(names, True)) or silent
    off = probe.render(**(dict.fromkeys(names, False) if names else {"reasoning_effort": "none"} if by_level else {}))
    has_switch = bool(names) or by_level
    # A template that says nothing of its own accord thinks, unless saying nothing is the same as saying off.
    is_off = silent != on and silent == off if names else silent == off if by_level else _is_closed(silent, base)
    known = probe.template.arguments
    return replace(
        base,
        name="derived",
        source="the model's chat template, rendered under every setting",
        switch=ARGUMENT if names else LEVEL if by_level else NONE,
        arguments=names,
        off_state=TRAINED if has_switch else base.off_state,
        levels=_levels(probe, dict.fromkeys(names, True)),
        default="off" if is_off else "on",
        opened_by="prompt" if on.rstrip().endswith(base.start) else "model",
        tool_start=base.tool_start if base.tool_start in template else "",
        history={name: kept for name, kept in HISTORY_ARGUMENTS.items() if name in known},
        budget_argument=next((name for name in BUDGET_ARGUMENTS if name in known), None),
        sampling_on={},
    )


@dataclass(frozen=True, slots=True)
class _Probe:
    """Renders the conversation; without its system message where the template knows none."""

    template: Template

    def render(self, **variables: Any) -> str | None:
        text = self.template.render(CONVERSATION, **variables)
        return text if text is not None else self.template.render(WITHOUT_SYSTEM, **variables)

    def changes(self, name: str, values: tuple[Any, ...], **others: Any) -> bool:
        """Whether the values of a variable give two different prompts."""
        if name not in self.template.arguments:
            return False
        return len({self.render(**{name: value}, **others) for value in values} - {None}) > 1


def _is_closed(prompt: str, profile: ModelProfile) -> bool:
    """Whether a prompt ends in a thought that is over."""
    return prompt.rstrip().endswith(profile.end)


def _knows_none(probe: _Probe) -> bool:
    """Whether the level `none` is something that the template knows, not a word that it repeats or passes over."""
    if "reasoning_effort" not in probe.template.arguments:
        return False
    none, other = probe.render(reasoning_effort="none"), probe.render(reasoning_effort=NONSENSE)
    return none is not None and (other is None or none.replace("none", NONSENSE) != other)


def _levels(probe: _Probe, on: Mapping[str, bool]) -> Mapping[str, Mapping[str, Any]]:
    """Effort → variables, seen with thinking on: some templates look at the level only then."""
    for name in LEVEL_ARGUMENTS:
        found = _levels_of(probe, name, on) if name in probe.template.arguments else {}
        if found:
            return found
    flags = {level: {name: True} for name, level in LEVEL_FLAGS.items() if probe.changes(name, (True, False), **on)}
    return {**flags, "high": {}} if flags else {}


def _levels_of(probe: _Probe, name: str, on: Mapping[str, bool]) -> dict[str, dict[str, Any]]:
    """The words that a template tells apart, and one name for all that it treats as any other word."""
    found = {level: probe.render(**{name: level}, **on) for level in EFFORTS}
    prompts = {level: prompt for level, prompt in found.items() if prompt is not None}
    none = probe.render(**{name: "none"}, **on) if not on else None
    if len({*prompts.values(), none} - {None}) < 2:
        return {}
    other = probe.render(**{name: NONSENSE}, **on)
    rest = [level for level in prompts if prompts[level] == other]
    # Not "minimal", say, for what everything unknown gets: the model's normal thinking is no weak level.
    alias = ("high" if "high" in rest else rest[-1]) if rest else None
    return {level: {name: level} for level in prompts if level not in rest or level == alias}
