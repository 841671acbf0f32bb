"""A reply is read alike whole and streamed, and a turn is judged by itself.

vLLM's parsers look at the prompt only when they stream: where the prompt has closed the thought, the whole reply's
answer becomes a thought. Some take a `</think>` of an earlier turn for this turn's end, so that a grammar starts at
the first token. Both are settled here, over vLLM's own parser class; what a parser finds in the text stays its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.parser.abstract_parser import DelegatingParser
from vllm_puzzle.kernels.thinking import ThinkingMarkers, opens_thought


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


def consistent(parser_cls: Any, markers: ThinkingMarkers | None, tokenizer: Any) -> Any:
    """The parser class to use in place of vLLM's; the same where nothing is known, or one parser does it all."""
    if markers is None or parser_cls is None or not issubclass(parser_cls, DelegatingParser):
        return parser_cls
    own = {token for marker in (markers.start, markers.closing, *markers.ends) for token in marker}
    added = getattr(tokenizer, "added_tokens_decoder", {})
    boundaries = frozenset(token for token, entry in added.items() if entry.special) - own
    return type(parser_cls.__name__, (ConsistentParser, parser_cls), {"markers": markers, "boundaries": boundaries})


def this_turn(markers: ThinkingMarkers, boundaries: frozenset[int], prompt: Sequence[int]) -> list[int]:
    """The prompt's end from its last turn's beginning on, if its last thought was closed before; else all of it."""
    if not opens_thought(markers, prompt):
        for position in range(len(prompt) - 1, -1, -1):
            if any(tuple(prompt[position : position + len(end)]) == end for end in markers.ends):
                break  # closed in this turn, maybe before the beginning of an answer
            if prompt[position] in boundaries:
                return list(prompt[position + 1 :])
    return list(prompt)
