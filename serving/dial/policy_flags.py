"""The policy on the command line: `--puzzle-reasoning FILE`, and single keys as `--puzzle-reasoning.KEY=VALUE`.

vLLM's parser must not see these; the server's processes get the whole policy as JSON in VLLM_PUZZLE_REASONING.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from vllm_puzzle.model_configs.schema import ConfigError
from vllm_puzzle.serving.dial.policy import VARIABLE, load_budgets, load_document, policy_from_environment, read_policy
from vllm_puzzle.serving.own_flags import split_flags

FLAG = "--puzzle-reasoning"


def take_policy(argv: Sequence[str]) -> list[str]:
    """The arguments without the policy's; the policy is checked and put into the environment.

    Raises ConfigError naming flag or file, key, found and allowed. A key's flag wins over the file, the file over the
    variable's own file; without any flag the variable stays as it is, checked.
    """
    rest, flags = _split(argv)
    if not flags:
        policy_from_environment()
        return rest
    file = next((value for name, value in reversed(flags) if name is None), None)
    document = _base(file)
    for name, text in flags:
        if name is not None:
            _put(document, name, text)
    read_policy(document, "flag " + FLAG if file is None else f"reasoning policy {file} with flags")
    try:
        os.environ[VARIABLE] = json.dumps(document)
    except TypeError as error:  # a YAML date in `provenance`
        raise ConfigError(f"flag {FLAG}: found {error}, allowed: texts, numbers, lists and objects") from None
    return rest


def _split(argv: Sequence[str]) -> tuple[list[str], list[tuple[str | None, str]]]:
    """(other arguments, [(key, None for the file; value)]). Both `FLAG VALUE` and `FLAG=VALUE` are read."""
    rest, given = split_flags(argv, lambda name: name == FLAG or name.startswith(f"{FLAG}."))
    flags: list[tuple[str | None, str]] = []
    for one in given:
        if one.value is None or one.lacks_value:
            raise ConfigError(f"flag {one.head}: found nothing, allowed: a {'file' if one.name == FLAG else 'value'}")
        # A model's name in a key keeps its spelling; the policy's own keys have underscores only.
        flags.append((None if one.name == FLAG else one.head[len(FLAG) + 1 :], one.value))
    return rest, flags


def _base(file: str | None) -> dict[str, Any]:
    if file is not None:
        return load_document(Path(file))
    value = os.environ.get(VARIABLE, "").strip()
    policy_from_environment(value)
    if not value:
        return {}
    return dict(json.loads(value)) if value.startswith("{") else load_document(Path(value))


def _put(document: dict[str, Any], name: str, text: str) -> None:
    """Set one key; a dot leads into an object: `loop.min_count`, `budgets.low`."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        found = " ".join(str(error).split())
        raise ConfigError(f"flag {FLAG}.{name}: found {found}, allowed: a YAML value") from None
    first, _, inner = name.partition(".")
    key = first.replace("-", "_")
    if not inner:
        if key == "budgets" and isinstance(value, str):
            document.update(load_budgets(Path(value)))
        else:
            document[key] = value
        return
    short = document.get(key)
    # A scalar has no inner keys: `grace: 0.1` and `default: high` are the short spelling of objects.
    entry: dict[str, Any] = dict(short) if isinstance(short, dict) else {}
    if short is not None and not isinstance(short, dict):
        entry = {"share": short} if key == "grace" else {"*": short}
    # A served model's name may hold dots: its effort is what follows the last one.
    model, _, effort = inner.rpartition(".")
    if key == "budgets" and model:
        entry[model] = {**(entry.get(model) or {}), effort: value}
    else:
        entry[inner.replace("-", "_") if key in ("grace", "loop") else inner] = value
    document[key] = entry
