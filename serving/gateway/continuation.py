"""How the second of two calls goes on from a closed thought: a begun chat message, or a rendered prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from vllm_puzzle.serving.gateway.chat import CHAT_PATH
from vllm_puzzle.serving.gateway.kinds import CONTINUES_APPENDED, Kind
from vllm_puzzle.serving.gateway.prompt_template import PromptTemplate

COMPLETIONS_PATH = "/v1/completions"
# What a chat request has and a completion request does not.
CHAT_ONLY: tuple[str, ...] = (
    *("messages", "chat_template_kwargs", "reasoning_effort", "add_generation_prompt", "max_completion_tokens"),
    *("tools", "tool_choice", "parallel_tool_calls", "response_format", "modalities", "store"),
)


@dataclass(frozen=True, slots=True)
class Markers:
    """The text that opens and closes a thought."""

    start: str = "<think>"
    end: str = "</think>"


class Continuation(Protocol):
    """The second call."""

    path: str

    def body(self, chat: Mapping[str, Any], thought: str, answer: str, is_closed: bool) -> dict[str, Any]:
        """The request: `chat` as it was, then what has been said. is_closed: the thought is closed even if empty."""

    def text(self, choice: Mapping[str, Any]) -> str:
        """The text of one streamed choice."""


class BegunMessage:
    """`continue_final_message`. What comes back is answer whatever field it is in: a reasoning parser that does not see
    the closed thought in the prompt takes the answer for a thought.
    """

    path = CHAT_PATH

    def __init__(self, kind: Kind, markers: Markers, is_opened: bool) -> None:
        """is_opened: the generation prompt opens the thought, and the begun text comes after it."""
        self._kind, self._markers = kind, markers
        self._start = "" if is_opened and kind.continues == CONTINUES_APPENDED else markers.start

    def body(self, chat: Mapping[str, Any], thought: str, answer: str, is_closed: bool) -> dict[str, Any]:
        """The chat request with the reply's beginning as its last message."""
        begun = f"{self._start}{thought}{self._markers.end}" if thought or is_closed else ""
        message = {"role": "assistant", "content": begun + answer}
        options = {"continue_final_message": True, "add_generation_prompt": False}
        if self._kind.continues == CONTINUES_APPENDED:
            del options["add_generation_prompt"]
        return {**chat, **options, **self._kind.answer_fields, "messages": [*chat["messages"], message]}

    def text(self, choice: Mapping[str, Any]) -> str:
        """Content, or what was taken for a thought."""
        delta = choice.get("delta") or {}
        return str(delta.get("content") or delta.get("reasoning") or delta.get("reasoning_content") or "")


class RenderedPrompt:
    """`/v1/completions` with token ids: the same tokens in every server."""

    path = COMPLETIONS_PATH

    def __init__(self, template: PromptTemplate, markers: Markers) -> None:
        self._template, self._markers = template, markers

    def body(self, chat: Mapping[str, Any], thought: str, answer: str, is_closed: bool) -> dict[str, Any]:
        """A completion request; sampling fields as they were."""
        kept = {key: value for key, value in chat.items() if key not in CHAT_ONLY}
        return {**kept, "prompt": self.prompt(chat, thought, answer, is_closed)}

    def prompt(self, chat: Mapping[str, Any], thought: str, answer: str, is_closed: bool) -> list[int]:
        """Token ids of prompt, thought, its end, and the answer so far."""
        arguments = dict(chat.get("chat_template_kwargs") or {})
        if "reasoning_effort" in chat:
            arguments.setdefault("reasoning_effort", chat["reasoning_effort"])
        rendered = self._template.render(chat["messages"], arguments)
        is_opened = rendered.rstrip().endswith(self._markers.start)
        pieces = [rendered]
        if thought or is_closed or is_opened:
            pieces += [] if is_opened else [self._markers.start]
            pieces += [thought, self._markers.end]
        return [token for piece in [*pieces, answer] for token in self._template.ids(piece)]

    def text(self, choice: Mapping[str, Any]) -> str:
        """The completion's text."""
        return str(choice.get("text") or "")
