"""A reply is read alike whole and streamed, and a turn is judged by itself.

vLLM's parsers look at the prompt only when they stream: where the prompt has closed the thought, the whole reply's
answer becomes a thought. Some take a `</think>` of an earlier turn for this turn's end, so that a grammar starts at
the first token. Both are settled here, over vLLM's own parser class; what a parser finds in the text stays its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.parser import HarmonyParser
from vllm.parser.abstract_parser import DelegatingParser
from vllm_puzzle.kernels.thinking import ThinkingMarkers, opens_thought
from vllm_puzzle.serving import vllm_compat

HEADER_STARTS, HEADER_END = ("<|start|>", "<|channel|>"), "<|message|>"


class ConsistentParser(DelegatingParser):
    """To be mixed into a parser class; `markers` and `boundaries` are the server's."""

    markers: ThinkingMarkers
    boundaries: frozenset[int]  # tokens that begin or end a turn
    _is_answer_only = False

    def set_prompt_token_ids(self, prompt_token_ids: Sequence[int]) -> None:
        """Called before a whole reply is parsed; a stream hands the prompt to `parse_delta`."""
        super().set_prompt_token_ids(prompt_token_ids)
        self._is_answer_only = self.is_reasoning_end(list(prompt_token_ids))

    def is_reasoning_end(self, input_ids: list[int]) -> bool:
        """Whether the prompt has closed this turn's thought. Earlier turns say nothing about it."""
        return super().is_reasoning_end(this_turn(self.markers, self.boundaries, input_ids))

    def extract_reasoning(self, model_output: str, request: Any) -> tuple[str | None, str | None]:
        """(thought, answer) of a whole reply."""
        if not self._is_answer_only:
            return super().extract_reasoning(model_output, request)
        return None, self._without_ends(model_output)

    def parse_delta(self, *args: Any, **kwargs: Any) -> Any:
        """As of a whole reply: parsers that drop a second end marker there drop it here."""
        delta = super().parse_delta(*args, **kwargs)
        if delta is not None and delta.content:
            delta.content = self._without_ends(delta.content)
            if delta.content is None and not delta.reasoning and not delta.tool_calls:
                return None
        return delta

    def _without_ends(self, answer: str) -> str | None:
        end = getattr(self.reasoning_parser, "reasoning_end_str", None)
        if end and getattr(self.reasoning_parser, "engine_based_streaming", False):
            answer = answer.replace(end, "")
        return answer or None


class ConsistentHarmonyParser(ConsistentParser):
    """Harmony's messages of one kind stand on lines of their own, streamed as in a whole reply.

    A reply that ends within a message's header has no text of it, where vLLM takes the header for the answer's text.
    """

    _is_streamed = False
    _is_within = False  # a message whose text has begun
    _begun: frozenset[str] = frozenset()  # the kinds of text that the stream has so far

    def parse_delta(self, *args: Any, **kwargs: Any) -> Any:
        """Only here are segments put together; the Responses API makes an item of each message."""
        self._is_streamed = True
        try:
            return super().parse_delta(*args, **kwargs)
        finally:
            self._is_streamed = False

    def process_chunk(self, token_ids: Sequence[int]) -> Any:
        """The segments of these tokens."""
        result = super().process_chunk(token_ids)
        result.segments[:] = self._on_lines(result.segments)
        return result

    def flush(self) -> list[Any]:
        """The segments left at the end."""
        left = super().flush()
        if left and left[0].delta.startswith(HEADER_STARTS) and HEADER_END not in left[0].delta:
            return []
        return self._on_lines(left)

    def _on_lines(self, segments: list[Any]) -> list[Any]:
        return [self._on_line(segment) for segment in segments] if self._is_streamed else segments

    def _on_line(self, segment: Any) -> Any:
        if segment.completed_message is not None:
            self._is_within = False
        elif segment.delta and not self._is_within:
            self._is_within = True
            kind = vllm_compat.harmony_kind(segment.channel, segment.recipient)
            if kind in self._begun:
                return segment._replace(delta=f"\n{segment.delta}")
            if kind in vllm_compat.HARMONY_TEXTS:
                self._begun |= {kind}
        return segment


def consistent(parser_cls: Any, markers: ThinkingMarkers | None, tokenizer: Any) -> Any:
    """The parser class to use in place of vLLM's; the same where nothing is known, or one parser does it all."""
    if markers is None or parser_cls is None or not issubclass(parser_cls, DelegatingParser):
        return parser_cls
    own = {token for marker in (markers.start, markers.closing, *markers.ends) for token in marker}
    added = getattr(tokenizer, "added_tokens_decoder", {})
    boundaries = frozenset(token for token, entry in added.items() if entry.special) - own
    base = ConsistentHarmonyParser if issubclass(parser_cls, HarmonyParser) else ConsistentParser
    return type(parser_cls.__name__, (base, parser_cls), {"markers": markers, "boundaries": boundaries})


def this_turn(markers: ThinkingMarkers, boundaries: frozenset[int], prompt: Sequence[int]) -> list[int]:
    """The prompt's end from its last turn's beginning on, if its last thought was closed before; else all of it."""
    if not opens_thought(markers, prompt):
        for position in range(len(prompt) - 1, -1, -1):
            if any(tuple(prompt[position : position + len(end)]) == end for end in markers.ends):
                break  # closed in this turn, maybe before the beginning of an answer
            if prompt[position] in boundaries:
                return list(prompt[position + 1 :])
    return list(prompt)
