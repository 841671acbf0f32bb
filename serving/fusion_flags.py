"""FFN Fusion on the command line: `--puzzle-ffn-fusion off|auto|RUNS` and `--puzzle-ffn-fusion-norm own|last`.

vLLM's parser must not see these; they become the config key `puzzle_ffn_fusion`, as `--hf-overrides` would set it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from vllm_puzzle.model_configs.ffn_fusion import ALLOWED, KEY, NORMS, read_fusion
from vllm_puzzle.model_configs.schema import ConfigError
from vllm_puzzle.serving.own_flags import split_flags

FLAG, NORM_FLAG = "--puzzle-ffn-fusion", "--puzzle-ffn-fusion-norm"
VALUES = {FLAG: ALLOWED, NORM_FLAG: ", ".join(NORMS)}


def take_fusion(argv: Sequence[str]) -> tuple[list[str], Any]:
    """(the arguments without these flags, the value of the config key that they stand for; None without them).

    Both `FLAG VALUE` and `FLAG=VALUE` are read; of several the last counts. Raises ConfigError for a value that is no
    wish at all.
    """
    rest, given = split_flags(argv, VALUES.__contains__)
    found: dict[str, str] = {}
    for one in given:
        if one.value is None or one.lacks_value:
            raise ConfigError(f"flag {one.name}: found nothing, allowed: {VALUES[one.name]}")
        found[one.name] = one.value
    if not found:
        return rest, None
    if FLAG not in found:
        raise ConfigError(f"flag {NORM_FLAG}: found without {FLAG}, allowed: beside it")
    asked = found[FLAG] if NORM_FLAG not in found else {"runs": found[FLAG], "norm": found[NORM_FLAG]}
    read_fusion(asked, f"flag {FLAG}")
    return rest, asked


def asked_fusion(flag: Any, hf_overrides: str | None, config: Mapping[str, Any]) -> Any:
    """What a start asks for: the flag, else vLLM's `--hf-overrides` (JSON), else config.json."""
    if flag is not None:
        return flag
    try:
        overrides = json.loads(hf_overrides or "{}")
    except ValueError:
        overrides = {}  # vLLM's to complain about
    return overrides[KEY] if isinstance(overrides, dict) and KEY in overrides else config.get(KEY)
