"""The model's tokenizer and chat template, where the user has them here: prompts as token ids, and counts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_puzzle.model_configs.schema import ConfigError
from vllm_puzzle.serving.dial.template import Template
from vllm_puzzle.serving.gateway.errors import GatewayError
from vllm_puzzle.serving.tokenizer_folder import load_tokenizer

# What only we say to the tokenizer.
OWN_NAMES = {"messages", "conversation", "chat_template", "tokenize", "add_generation_prompt", "tools", "documents"}


class PromptTemplate:
    """`--tokenizer DIR`. Raises ConfigError for a folder without a tokenizer or a chat template."""

    def __init__(self, folder: str) -> None:
        if not Path(folder).is_dir():
            raise ConfigError(f"`--tokenizer`: found {folder!r}, allowed: a folder with tokenizer files")
        self._tokenizer = load_tokenizer(Path(folder), "`--tokenizer`")
        text = self._tokenizer.chat_template
        if not isinstance(text, str):
            raise ConfigError(f"`--tokenizer`: found {folder!r} without a chat template, allowed: with one")
        self.text = text
        self._names = Template(text).arguments - OWN_NAMES
        self.model_type = _model_type(Path(folder))

    def render(self, messages: Sequence[Any], arguments: Mapping[str, Any]) -> str:
        """The prompt up to where the reply begins. Raises GatewayError 400 for what the template refuses."""
        try:
            plain = [_plain(message) for message in messages]
            # Only what the template reads: a client's `chat_template` among them would be run.
            read = {name: value for name, value in arguments.items() if name in self._names}
            text = self._tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True, **read)
        except GatewayError:
            raise
        except Exception as error:  # a template may raise anything
            what = " ".join(str(error).split())[:300]
            raise GatewayError(400, f"`messages`: the chat template refuses them ({what})", "messages") from error
        return str(text)

    def ids(self, text: str) -> list[int]:
        """Token ids of a piece of text, markers as their own tokens, nothing added."""
        return list(self._tokenizer.encode(text, add_special_tokens=False)) if text else []


def _plain(message: Any) -> dict[str, Any]:
    """A message whose content is text. Other parts cannot go into a prompt of token ids."""
    if not isinstance(message, Mapping):
        raise GatewayError(400, "`messages`: found an entry that is no object, allowed: objects", "messages")
    content = message.get("content")
    if not isinstance(content, list):
        return {**message, "content": content or ""}
    texts = [part.get("text") for part in content if isinstance(part, Mapping) and part.get("type") == "text"]
    if len(texts) != len(content):
        raise GatewayError(
            400, "`messages`: found a content part that is no text beside a budget in two calls", "messages"
        )
    return {**message, "content": "\n".join(map(str, texts))}


def _model_type(folder: Path) -> str:
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return ""
    return str(config.get("model_type", "")) if isinstance(config, dict) else ""
