"""vLLM's batch grammar: `64q1s4k` is 64 sequences with one query token each, 4,096 tokens long, the query included.

A batch is one or more groups joined by `_`: `[count]q<tokens>[k][s<tokens>[k]]`. Without `s` the whole sequence is the
query (`q8k`: a prefill of 8,192 tokens without context). `2q2k_32q1s1k`: two prefills beside 32 decodes.
"""

from __future__ import annotations

import re

from vllm_puzzle.model_configs.schema import ConfigError

Batch = tuple[tuple[int, int], ...]
GROUP = re.compile(r"(?P<count>\d+)?q(?P<query>\d+k?)(?:s(?P<seq>\d+k?))?")
MAX_SEQUENCES = 65536


def parse_batch(text: str) -> Batch:
    """(query_len, seq_len) of each sequence. Raises ConfigError for what is no batch."""
    sequences: list[tuple[int, int]] = []
    for group in text.split("_"):
        match = GROUP.fullmatch(group)
        if match is None:
            raise ConfigError(f"batch {text!r}: found group {group!r}, allowed: [count]q<n>[k][s<n>[k]], as 64q1s4k")
        count = int(match["count"] or 1)
        query = parse_number(match["query"])
        seq = parse_number(match["seq"]) if match["seq"] else query
        if not 1 <= query <= seq or not 1 <= count <= MAX_SEQUENCES:
            raise ConfigError(
                f"batch {text!r}, group {group!r}: found {count} sequences of {query} queries and {seq} tokens, "
                f"allowed: 1 to {MAX_SEQUENCES} sequences, 1 <= queries <= tokens"
            )
        sequences += [(query, seq)] * count
    return tuple(sequences)


def format_batch(batch: Batch) -> str:
    """The shortest name of a batch, order kept."""
    groups: list[tuple[int, tuple[int, int]]] = []
    for sequence in batch:
        if groups and groups[-1][1] == sequence:
            groups[-1] = (groups[-1][0] + 1, sequence)
        else:
            groups.append((1, sequence))
    return "_".join(_format_group(count, *sequence) for count, sequence in groups)


def _format_group(count: int, query: int, seq: int) -> str:
    context = "" if query == seq else f"s{short(seq)}"
    return f"{count if count > 1 else ''}q{short(query)}{context}"


def parse_number(text: str) -> int:
    """8k → 8192, 1000 → 1000."""
    return int(text.removesuffix("k")) * (1024 if text.endswith("k") else 1)


def short(number: int) -> str:
    """8192 → 8k, 1000 → 1000."""
    return f"{number // 1024}k" if number and number % 1024 == 0 else str(number)
