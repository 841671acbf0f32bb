"""What the catalogue says of a model's reasoning is what the dial's profile of it does."""

from __future__ import annotations

import pytest
from dial_models import FAMILIES, NO_SWITCH
from vllm_puzzle.model_configs.catalogue import NAMES, Published, find
from vllm_puzzle.serving.dial import text_switch
from vllm_puzzle.serving.dial.profile import ARGUMENT, SYSTEM_LINE, TEXT, ModelProfile, known_profiles, profile_of

# Name → template in the shape of the model's own: what it reads decides which levels it has.
ALWAYS = f"{NO_SWITCH}<think>\n"
TEMPLATES = {
    "llama-3.3-nemotron-super-49b-v1": FAMILIES["49B v1"][2],
    "llama-3.3-70b-instruct": NO_SWITCH,
    "llama-3.1-nemotron-ultra-253b-v1": FAMILIES["253B"][2],
    "gpt-oss-puzzle-88b": FAMILIES["gpt-oss-puzzle"][2],
    "gpt-oss-120b": FAMILIES["gpt-oss"][2],
    "gpt-oss-20b": FAMILIES["gpt-oss"][2],
    "nemotron-3-nano-30b-a3b": FAMILIES["3 Nano"][2],
    "nemotron-3-nano-30b-a3b-nvfp4": FAMILIES["3 Nano"][2],
    "nemotron-3-super-120b-a12b-fp8": FAMILIES["3 Super"][2],
    "nemotron-3-super-120b-a12b-nvfp4": FAMILIES["3 Super"][2],
    "nemotron-3-ultra-550b-a55b": FAMILIES["3 Ultra"][2],
    "nemotron-3.5-lightning-30b-a3b-nvfp4": FAMILIES["3 Ultra"][2],
    "qwen3-30b-a3b-thinking-2507": ALWAYS,
}
UNKNOWN = ("llama-3.3-70b-instruct", "qwen3-30b-a3b-thinking-2507")


def words(profile: ModelProfile) -> str:
    """The catalogue's line for a profile: its switch, what off is where it has none, its levels."""
    parts = [] if profile.has_off else ["no off"]
    if profile.switch == ARGUMENT:
        parts.append(f"chat_template_kwargs {', '.join(profile.arguments)}, default {profile.default}")
    elif profile.switch == TEXT:
        assert profile.text == SYSTEM_LINE
        line = text_switch.ON_LINE.removesuffix(" on")
        assert f"{line} off" == text_switch.OFF_LINE
        parts.append(f"system line `{line} on|off`, default {profile.default}")
    efforts = [level for level, wanted in profile.levels.items() if wanted == {"reasoning_effort": level}]
    if efforts:
        parts += [f"reasoning_effort {'|'.join(efforts)}", f"default {profile.default_level}"]
    for level, wanted in profile.levels.items():
        if wanted and level not in efforts:
            assert set(wanted.values()) == {True}
            parts.append(f"{level} by {', '.join(wanted)}")
    return ", ".join(parts)


def profile(published: Published) -> ModelProfile:
    return profile_of(published.record().model_type, published.hub, TEMPLATES[published.name])


@pytest.mark.parametrize("name", [name for name in NAMES if name not in UNKNOWN])
def test_the_catalogue_says_of_a_known_family_what_its_profile_does(name: str) -> None:
    found = profile(find(name))
    assert found.name in {each.name for each in known_profiles()}
    assert find(name).reasoning == words(found)


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_model_without_a_switch_has_no_profile_and_derives_none(name: str) -> None:
    found = profile(find(name))
    assert found.name == "derived"
    assert words(found) == "no off"
    # Who opens the thought tells a model that always reasons from one that never does.
    expected = {"prompt": "no off: it always reasons", "model": "none: it does not reason"}
    assert find(name).reasoning == expected[found.opened_by]


def test_every_published_model_has_a_template_here() -> None:
    assert set(TEMPLATES) == set(NAMES)
