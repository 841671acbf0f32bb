"""Reading what a run left behind: `manifest.json` and `requests.jsonl` of one arm under one load, or a folder of such.

Of the manifest this needs `schema_version`, `status`, `arm` (a name), `fields` (what the request bodies said of
reasoning), `max_tokens`, `sampling`, `load`, `tasks` (one object each), `facts` (`RunFacts.to_object`), and of `config`
what was declared beforehand (`margin`, `reference`); the rest is for people.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_puzzle.bench.efficiency.facts import RunFacts
from vllm_puzzle.bench.efficiency.record import RecordError, RequestRecord, read_records
from vllm_puzzle.model_configs.schema import ConfigError

SCHEMA_VERSION = 1
MANIFEST, REQUESTS = "manifest.json", "requests.jsonl"
COMPLETE = "complete"  # the status of a run that was neither broken off nor found invalid
_KINDS: Mapping[str, type] = {"arm": str, "fields": dict, "sampling": dict, "load": dict, "tasks": list, "facts": dict}


@dataclass(frozen=True, slots=True)
class Run:
    """One arm under one load. manifest: as parsed; records: in the order of the file."""

    path: Path
    manifest: Mapping[str, Any]
    facts: RunFacts
    records: tuple[RequestRecord, ...]

    @property
    def name(self) -> str:
        """The arm's name."""
        return str(self.manifest["arm"])

    @property
    def status(self) -> str:
        """How the run ended."""
        return str(self.manifest.get("status"))

    @property
    def setting(self) -> str:
        """What the arm asked of the model's reasoning, in one spelling: what two models' arms are matched by."""
        return canonical(self.manifest["fields"])

    @property
    def load(self) -> str:
        """The load in one spelling."""
        return canonical(self.manifest["load"])

    @property
    def load_name(self) -> str:
        """The load in short, where it has a name."""
        found = self.manifest["load"]
        return str(found["name"]) if isinstance(found, dict) and found.get("name") else self.load

    @property
    def declared(self) -> Mapping[str, Any]:
        """What was declared before the run."""
        found: Mapping[str, Any] = self.manifest.get("config") or {}
        return found


def canonical(value: Any) -> str:
    """JSON with sorted keys, to compare by."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def is_run(path: Path) -> bool:
    """Whether a folder holds a run."""
    return (path / MANIFEST).is_file() and (path / REQUESTS).is_file()


def read_run(path: Path) -> Run:
    """One run. Raises ConfigError with one line about what is wrong."""
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: found no JSON ({error}), allowed: the manifest of a run") from None
    if not isinstance(manifest, dict) or manifest.get("schema_version") != SCHEMA_VERSION:
        found = manifest.get("schema_version") if isinstance(manifest, dict) else type(manifest).__name__
        raise ConfigError(f"{file}, key `schema_version`: found {found!r}, allowed: {SCHEMA_VERSION}")
    for key, kind in _KINDS.items():
        if not isinstance(manifest.get(key), kind):
            raise ConfigError(f"{file}, key `{key}`: found {manifest.get(key)!r}, allowed: {kind.__name__}")
    facts = RunFacts.from_object(manifest["facts"], f"{file}, key `facts`")
    try:
        records = tuple(read_records(path / REQUESTS))
    except (OSError, RecordError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from None
    strangers = sorted({record.arm for record in records} - {manifest["arm"]})
    if strangers:
        raise ConfigError(f"{path / REQUESTS}: found records of the arms {strangers}, allowed: {manifest['arm']}")
    if not records:
        raise ConfigError(f"{path / REQUESTS}: found no record, allowed: one or more")
    return Run(path, manifest, facts, records)


def read_runs(path: Path) -> list[Run]:
    """The run in a folder, or those in its direct sub-folders by name (a sweep). Raises ConfigError when none is."""
    if is_run(path):
        return [read_run(path)]
    folders = sorted(folder for folder in path.iterdir() if is_run(folder)) if path.is_dir() else []
    if not folders:
        raise ConfigError(f"folder {path}: found no run, allowed: {MANIFEST} and {REQUESTS}, there or one folder down")
    return [read_run(folder) for folder in folders]
