"""What stands around a thought, as this server's tokens: from the reasoning parser, the profile and the policy.

A marker that is no token of its own is written differently beside different neighbours (`</think>` is three tokens in
Llama 3's vocabulary, and its last one can hold the line break that follows), so each spelling is found by trying.
"""

from __future__ import annotations

from typing import Any

from vllm_puzzle.kernels.thinking import ThinkingMarkers, Tokens
from vllm_puzzle.model_configs.schema import ConfigError
from vllm_puzzle.serving.dial.profile import ModelProfile, known_profiles
from vllm_puzzle.serving.thinking_plan import markers_of

BEFORE = ("", "a", ".", " ", "\n", ".\n", "\n\n", ")")
AFTER = ("", "\n", "\n\n", " ", "a", "\nA", "\n\nA")
# A thought may be cut after a token that ends so: a line's or a sentence's end. The last ones are line breaks as
# byte-level vocabularies (GPT-2's alphabet) and SentencePiece spell them.
BOUNDARY_ENDS = ("\n", ".", "!", "?", "。", "Ċ", "<0x0A>")


def make_markers(
    tokenizer: Any, profile: ModelProfile, phrase: str | None, reasoning_config: Any
) -> ThinkingMarkers | None:
    """The server's markers; None when they are not known, or without a reasoning parser.

    phrase: the operator's, None for the one in --reasoning-config, else the profile's. Raises ConfigError for a phrase
    whose last letters become one token with the marker after it.
    """
    if reasoning_config is None or tokenizer is None:
        return None
    known = markers_of(reasoning_config)
    if known is None and profile.name not in {family.name for family in known_profiles()}:
        return None
    start, end = profile.start, profile.end
    if known is not None:
        start, end = tokenizer.decode(list(known.start)), tokenizer.decode(list(known.ends[0]))
    closing = profile.closing if profile.closing.startswith(end) else end
    if phrase is None and known is not None and known.phrase:
        phrase = tokenizer.decode(list(known.phrase))
    elif phrase is None:
        phrase = profile.phrase
    closing_tokens = encode(tokenizer, closing)
    own_start, *other_starts = spellings(tokenizer, start)
    return ThinkingMarkers(
        start=own_start,
        ends=spellings(tokenizer, end),
        closing=closing_tokens,
        phrase=_phrase(tokenizer, phrase, closing, closing_tokens),
        boundaries=boundaries(tokenizer),
        tool_starts=spellings(tokenizer, profile.tool_start) if profile.tool_start else (),
        other_starts=tuple(other_starts),
        headers=tuple(encode(tokenizer, header) for header in profile.headers),
    )


def encode(tokenizer: Any, text: str) -> Tokens:
    """Token ids of a text by itself."""
    return tuple(tokenizer.encode(text, add_special_tokens=False))


def spellings(tokenizer: Any, text: str) -> tuple[Tokens, ...]:
    """Every token sequence that covers `text` in some surroundings, its own spelling first."""
    own = encode(tokenizer, text)
    found = {own: None}
    if len(own) > 1 and getattr(tokenizer, "is_fast", False):
        for before in BEFORE:
            for after in AFTER:
                found[_covering(tokenizer, before, text, after)] = None
    # One that ends in another is found as that other.
    return tuple(one for one in found if not any(one != other and one[-len(other) :] == other for other in found))


def _covering(tokenizer: Any, before: str, text: str, after: str) -> Tokens:
    coded = tokenizer(before + text + after, add_special_tokens=False, return_offsets_mapping=True)
    start, stop = len(before), len(before) + len(text)
    pairs = zip(coded["input_ids"], coded["offset_mapping"], strict=True)
    return tuple(token for token, (low, high) in pairs if high > start and low < stop)


def _phrase(tokenizer: Any, phrase: str, closing: str, closing_tokens: Tokens) -> Tokens:
    whole = encode(tokenizer, phrase + closing)
    if whole[-len(closing_tokens) :] != closing_tokens:
        raise ConfigError(
            f"reasoning policy, key `phrase`: found {phrase!r}, allowed: a text that shares no token with {closing!r} "
            "after it (a line break at its end helps)"
        )
    return whole[: -len(closing_tokens)]


def boundaries(tokenizer: Any) -> frozenset[int]:
    """The tokens that end a line or a sentence, by their raw spellings: decoding a whole vocabulary takes seconds."""
    return frozenset(
        token for text, token in tokenizer.get_vocab().items() if text.rstrip("\"')").endswith(BOUNDARY_ENDS)
    )
