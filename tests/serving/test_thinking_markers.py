"""Markers as tokens: every spelling in a byte-level BPE, phrases, boundaries, and models without markers."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from vllm_puzzle.kernels.thinking import THINKING, ThinkingLimits, ThinkingMachine
from vllm_puzzle.model_configs.schema import ConfigError
from vllm_puzzle.serving.dial.profile import ModelProfile, known_profiles
from vllm_puzzle.serving.thinking_markers import boundaries, make_markers

TEXTS = [
    "<think>\nA thought. It goes on\n</think>\n\nThe answer is 4.",
    "x<think>y</think>z",
    "</think>\n",
    "a > b >\n\n",
]
PROFILES = {profile.name: profile for profile in known_profiles()}
DETAILED = PROFILES["detailed-thinking"]


@pytest.fixture(scope="module")
def bpe() -> Any:
    """A vocabulary like Llama 3's: `<think>` is ordinary text, and its last token can hold the line break after it."""
    tokenizer = Tokenizer(models.BPE())
    # Llama 3's cut: a run of punctuation takes the line breaks after it along.
    cut = pre_tokenizers.Split(Regex(r" ?[^\s\p{L}\p{N}]+[\r\n]*|[\p{L}\p{N} ]+|\s+"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXTS * 50, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def config(tokenizer: Any, start: str = "<think>", end: str = "</think>", forced: str = "") -> Any:
    def ids(text: str) -> list[int]:
        found: list[int] = tokenizer.encode(text, add_special_tokens=False)
        return found

    return SimpleNamespace(
        reasoning_start_token_ids=ids(start),
        reasoning_end_token_ids=ids(forced or end),
        natural_reasoning_end_token_ids=ids(end),
    )


@pytest.mark.parametrize("after_end", ["", "\n", "\n\n", " ", "\n\nThe answer", "x"])
@pytest.mark.parametrize("before_end", ["on", "on\n", "on.\n", "b >"])
@pytest.mark.parametrize("after_start", ["", "\n", "A"])
def test_a_thought_is_seen_whatever_its_markers_stand_beside(
    bpe: Any, after_start: str, before_end: str, after_end: str
) -> None:
    markers = make_markers(bpe, DETAILED, None, config(bpe))
    assert markers is not None
    assert len(markers.starts) > 1
    assert len(markers.ends) > 1
    machine = ThinkingMachine.after_prompt(markers, ThinkingLimits(), [])
    machine.feed(bpe.encode(f"<think>{after_start}A thought", add_special_tokens=False))
    assert machine.mode == THINKING
    machine = ThinkingMachine.after_prompt(markers, ThinkingLimits(), [])
    machine.feed(bpe.encode(f"<think>{after_start}A{before_end}</think>{after_end}", add_special_tokens=False))
    assert machine.reason == "natural"


def test_a_marker_that_is_a_token_has_one_spelling(bpe: Any) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe.backend_tokenizer)
    tokenizer.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
    markers = make_markers(tokenizer, PROFILES["nemotron-3"], "", config(tokenizer))
    assert markers is not None
    assert (len(markers.start), markers.other_starts, len(markers.ends)) == (1, (), 1)


def test_the_phrase_is_the_operators_else_the_configurations_else_the_profiles(bpe: Any) -> None:
    profile = replace(DETAILED, phrase="Time is up.\n")

    def said(phrase: str | None, forced: str = "") -> str:
        markers = make_markers(bpe, profile, phrase, config(bpe, forced=forced))
        assert markers is not None
        text: str = bpe.decode(list(markers.phrase))
        return text

    assert said(None) == "Time is up.\n"
    assert said("") == ""
    assert said("Enough.\n") == "Enough.\n"
    assert said(None, forced="Stop.\n</think>") == "Stop.\n"
    assert said("Enough.\n", forced="Stop.\n</think>") == "Enough.\n"


def test_a_phrase_that_melts_into_the_marker_is_refused_by_key(bpe: Any) -> None:
    tokenizer = Tokenizer(models.BPE({"a": 0, "<": 1, "a<": 2, ">": 3}, [("a", "<")]))
    melting = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    profile = replace(DETAILED, start=">", end="<")
    with pytest.raises(ConfigError, match="key `phrase`: found 'a', allowed: a text that shares no token"):
        make_markers(melting, profile, "a", config(melting, ">", "<"))


def test_boundaries_are_line_and_sentence_ends(bpe: Any) -> None:
    found = {bpe.decode([token]) for token in boundaries(bpe)}
    assert {"\n", ".", "!", "?"} <= found
    assert all(text.rstrip("\"')")[-1:] in "\n.!?" or "�" in text for text in found), sorted(found)
    assert len(found) < len(bpe.get_vocab()) / 4


def test_without_a_reasoning_parser_or_known_markers_there_are_none(bpe: Any) -> None:
    unknown = SimpleNamespace()
    derived = ModelProfile(name="derived", source="its template")
    assert make_markers(bpe, DETAILED, None, None) is None
    assert make_markers(bpe, derived, None, unknown) is None
    assert make_markers(None, DETAILED, None, unknown) is None


def test_defect_2_2_gpt_oss_has_markers_though_vllms_parser_has_none(bpe: Any) -> None:
    from vllm.reasoning import ReasoningParserManager

    stock = ReasoningParserManager.get_reasoning_parser("openai_gptoss")
    assert stock.reasoning_start_str.fget(object.__new__(stock)) is None, "vLLM has mended it"
    markers = make_markers(bpe, PROFILES["gpt-oss"], None, SimpleNamespace())
    assert markers is not None
    assert bpe.decode(list(markers.start)) == "<|channel|>analysis<|message|>"
    assert bpe.decode(list(markers.closing)) == "<|end|><|start|>assistant<|channel|>final"
    assert bpe.decode(list(markers.headers[1])) == "<|channel|>final<|message|>"
    assert bpe.decode(list(markers.ends[0])) == "<|end|>"
