"""What a run was: `manifest.json`, written before the first request and once more at the end."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vllm_puzzle.bench.efficiency.arm import Arm, Load
from vllm_puzzle.bench.efficiency.question import Ask, Question
from vllm_puzzle.bench.efficiency.run_folder import COMPLETE, MANIFEST, SCHEMA_VERSION
from vllm_puzzle.model_configs.schema import ConfigError

# How a run ended. Results are kept, whatever it was; nothing but `complete` is to be compared.
RUNNING = "running"  # or its process was killed
INTERRUPTED = "interrupted"  # Ctrl-C, SIGTERM
SERVER_LOST = "server lost"  # no connection, many times in a row
REFUSED = "refused"  # HTTP errors such as 429, many times in a row
DISK_FULL = "disk full"
FAILED = "failed"  # an error of ours
INVALID = "invalid"  # to its end, by a client that was too slow to measure
STATUSES = (RUNNING, COMPLETE, INTERRUPTED, SERVER_LOST, REFUSED, DISK_FULL, FAILED, INVALID)
# Room for the last state, so that a full disk does not keep it out.
_RESERVE = 4096


def new_manifest(
    arm: Arm,
    load: Load,
    asks: Sequence[Ask],
    warm_up: Sequence[Question],
    *,
    seed: int,
    block: int = 0,
    config: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
    found: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The manifest of a run that begins now.

    config: what was declared beforehand: margin, reference, limits. metadata: the user's own. found: versions, machine,
    server and the like, as they were read.
    """
    questions = list({ask.question.digest: ask.question for ask in asks}.values())
    listed = [{"task": q.task, "id": q.id, "digest": q.digest, "level": q.level} for q in questions]
    work = ",".join(f"{ask.question.digest}/{ask.repeat}" for ask in asks)
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "run",
        "status": RUNNING,
        "started_at": datetime.now(UTC).isoformat(timespec="seconds"),
        **arm.described(),
        "load": asdict(load) | {"name": load.name},
        "block": block,
        "seed": seed,
        "planned": len(asks),
        "warm_up": len(warm_up),
        "tasks": _tasks(questions),
        "work_list": _digest(work),
        "config": dict(config or {}),
        "metadata": dict(metadata or {}),
        **dict(found or {}),
        "questions": listed,
    }


def _tasks(questions: Sequence[Question]) -> list[dict[str, Any]]:
    """Each task with a digest of what was asked of it, in which order does not matter, and its chance level."""
    names = sorted({question.task for question in questions})
    groups = {name: [question for question in questions if question.task == name] for name in names}
    return [
        {
            "name": name,
            "questions": len(group),
            "digest": _digest(",".join(sorted(question.digest for question in group))),
            "chance": sum(question.chance for question in group) / len(group),
        }
        for name, group in groups.items()
    ]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write it whole or not at all; on a full disk, over the last one, which has room. Raises OSError if both fail."""
    text = json.dumps(manifest, indent=1, ensure_ascii=False, default=str) + "\n"
    path, fresh = folder / MANIFEST, folder / (MANIFEST + ".new")
    try:
        with fresh.open("w", encoding="utf-8") as file:
            file.write(text + " " * _RESERVE + "\n")
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    except OSError:
        fresh.unlink(missing_ok=True)
        _overwrite(path, text.encode())


def _overwrite(path: Path, data: bytes) -> None:
    """In place: takes no new block of the disk as long as the text fits."""
    with path.open("r+b") as file:
        size = os.fstat(file.fileno()).st_size
        if len(data) > size:
            raise OSError(f"{path.name}: found {len(data)} bytes to write on a full disk, allowed: {size}")
        file.write(data + b" " * (size - len(data) - 1) + b"\n" if len(data) < size else data)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a run folder. Raises ConfigError when it is missing or of another schema."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder}: found no readable {MANIFEST} ({error}), allowed: the folder of a run") from None
    version = manifest.get("schema_version") if isinstance(manifest, dict) else None
    if version != SCHEMA_VERSION:
        raise ConfigError(f"{folder / MANIFEST}, key `schema_version`: found {version!r}, allowed: {SCHEMA_VERSION}")
    return dict(manifest)


def chance(manifest: Mapping[str, Any]) -> float | None:
    """What blind guessing gets, over all questions; None where the manifest does not say."""
    found = manifest.get("tasks")
    tasks = [task for task in found if isinstance(task, dict)] if isinstance(found, list) else []
    pairs = [(task.get("chance"), task.get("questions", 1)) for task in tasks]
    known = [(c, n) for c, n in pairs if isinstance(c, int | float) and isinstance(n, int) and n > 0]
    return sum(c * n for c, n in known) / sum(n for _, n in known) if known and len(known) == len(tasks) else None
