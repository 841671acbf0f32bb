"""The text that the matrix is a mean over: a JSONL or plain text file as sequences of token ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from vllm_puzzle.model_configs.json_values import MAX_SHOWN, shown
from vllm_puzzle.model_configs.schema import ConfigError

JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
LINE = 'an object with "text", "messages", or "prompt" (and "completion")'


class Tokenizer(Protocol):
    """What is used of transformers' tokenizers."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        ...

    def apply_chat_template(self, conversation: Sequence[Any], *, tokenize: bool) -> Any:
        """The text of a conversation."""
        ...


@dataclass(frozen=True, slots=True)
class Data:
    """Sequences of token ids, and where they come from."""

    sequences: tuple[tuple[int, ...], ...]
    name: str
    sha256: str

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(map(len, self.sequences))


def read_data(file: Path, tokenizer: Tokenizer, max_tokens: int, sequence_length: int, vocab_size: int) -> Data:
    """The first `max_tokens` tokens of a file, cut into sequences of at most `sequence_length`.

    A .jsonl file has one document per line; any other file is one document of plain text. Conversations go through the
    model's chat template; plain text gets the special tokens that the tokenizer adds by itself. Raises ConfigError
    naming file and line.
    """
    try:
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise ConfigError(f"flag --data: found {file} ({error.strerror}), allowed: a JSONL or text file") from None
    sequences: list[tuple[int, ...]] = []
    left = max_tokens
    try:
        for where, document in _documents(file):
            ids = _encode(where, document, tokenizer)[:left]
            if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
                raise ConfigError(f"{where}: found token {max(ids)}, allowed: below the model's {vocab_size}")
            sequences += [tuple(ids[at : at + sequence_length]) for at in range(0, len(ids), sequence_length)]
            left -= len(ids)
            if not left:
                break
    except UnicodeDecodeError:
        raise ConfigError(f"flag --data: found {file}, which is not UTF-8, allowed: a JSONL or text file") from None
    if not sequences:
        raise ConfigError(f"flag --data: found no text in {file}, allowed: a JSONL or text file")
    return Data(tuple(sequences), file.name, digest)


def _documents(file: Path) -> Iterator[tuple[str, Any]]:
    if file.suffix not in JSON_SUFFIXES:
        yield str(file), {"text": file.read_text(encoding="utf-8")}
        return
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{file}, line {number}"
            if not line.strip():
                continue
            try:
                yield where, json.loads(line)
            except ValueError:
                raise ConfigError(f"{where}: found {shown(line.strip())}, allowed: {LINE}") from None


def _encode(where: str, document: Any, tokenizer: Tokenizer) -> list[int]:
    found: Any = document if isinstance(document, dict) else {}
    text, messages, prompt = found.get("text"), found.get("messages"), found.get("prompt")
    if isinstance(prompt, list):  # the conversational form of prompt and completion
        completion = found.get("completion") or []
        messages = prompt + completion if isinstance(completion, list) else None
    elif isinstance(prompt, str):
        completion = found.get("completion") or ""
        text = prompt + completion if isinstance(completion, str) else None
    if isinstance(text, str):
        return list(tokenizer.encode(text))
    if not isinstance(messages, list) or not messages:
        held = f"keys {', '.join(found)[:MAX_SHOWN]}" if found else shown(document)
        raise ConfigError(f"{where}: found {held}, allowed: {LINE}")
    try:
        rendered = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # a template is a program and may raise anything
        what = " ".join(str(error).split())[:200]
        raise ConfigError(f"{where}: found messages that the chat template refuses ({what}), allowed: {LINE}") from None
    return list(tokenizer.encode(rendered, add_special_tokens=False))
