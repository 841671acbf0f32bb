"""Rows of results: one per case, in JSON (read back) and CSV (for people). No path of the machine stands in either."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from vllm_puzzle.bench.commit import CHANGED, UNKNOWN, found_commit
from vllm_puzzle.bench.efficiency.machine import describe_gpus, describe_machine
from vllm_puzzle.model_configs.schema import ConfigError

SCHEMA = 1
OK, FAILED, SKIPPED, REFUSED = "ok", "failed", "skipped", "refused"
# skipped: no time was left, so that a later call measures it. refused: it does not fit this card.
STATUSES = (OK, FAILED, SKIPPED, REFUSED)


@dataclass(frozen=True, slots=True)
class Row:
    """One case on one machine. Seconds, bytes, tokens per second; `setup` is a fingerprint of all that was asked for;
    a number that the engine did not tell is None.
    """

    suite: str
    case: str
    variant: str
    model: str
    is_reconstructed: bool
    weights: str
    kv_dtype: str
    input_len: int
    output_len: int
    batch: int | None
    role: str
    status: str
    setup: str
    card: str
    commit: str
    reason: str = ""
    num_requests: int | None = None
    duration_s: float | None = None
    output_tokens: int | None = None
    output_throughput: float | None = None
    request_throughput: float | None = None
    total_token_throughput: float | None = None
    steady_output_throughput: float | None = None
    ttft_mean_s: float | None = None
    ttft_p50_s: float | None = None
    ttft_p99_s: float | None = None
    tpot_mean_s: float | None = None
    tpot_p50_s: float | None = None
    tpot_p99_s: float | None = None
    num_preempted: int | None = None
    kv_capacity_tokens: int | None = None
    max_concurrency: float | None = None
    weights_bytes: int | None = None
    memory_bytes: int | None = None
    start_s: float | None = None
    load_s: float | None = None
    model_class: str = ""
    attention_backends: str = ""
    versions: str = ""

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"row {self.case}, status: found {self.status!r}, allowed: {', '.join(STATUSES)}")
        if self.status != OK and self.output_throughput is not None:
            raise ValueError(f"row {self.case}: found a speed with status {self.status!r}, allowed: only with 'ok'")


COLUMNS = tuple(field.name for field in fields(Row))
_PLAIN = ("duration_s", "output_tokens", "output_throughput", "request_throughput", "total_token_throughput",
          "steady_output_throughput", "num_preempted")  # fmt: skip
_OF_ENGINE = ("kv_capacity_tokens", "max_concurrency", "weights_bytes", "memory_bytes", "start_s", "load_s",
              "model_class")  # fmt: skip


def measured(event: Mapping[str, Any]) -> dict[str, Any]:
    """Columns of a case's answer (serving/engine_measurement.py)."""
    found = {key: event.get(key) for key in _PLAIN}
    for name in ("ttft", "tpot"):
        parts = event.get(f"{name}_s") or {}
        found |= {f"{name}_{part}_s": parts.get(part) for part in ("mean", "p50", "p99")}
    return found


def of_engine(ready: Mapping[str, Any]) -> dict[str, Any]:
    """Columns of an engine's first answer."""
    found = {key: ready.get(key) for key in _OF_ENGINE}
    found["model_class"] = found["model_class"] or ""
    backends = ready.get("attention_backends") or {}
    found["attention_backends"] = " + ".join(f"{count} {name}" for name, count in backends.items())
    versions = ready.get("versions") or {}
    found["versions"] = ", ".join(f"{name} {versions[name]}" for name in sorted(versions) if versions[name])
    return found


@dataclass(slots=True)
class Results:
    """All that is known of one suite on one card; `pairs`, `routing` and `derived` are plain objects."""

    suite: str
    card: str
    rows: list[Row] = field(default_factory=list)
    pairs: list[dict[str, Any]] = field(default_factory=list)
    routing: list[dict[str, Any]] = field(default_factory=list)
    derived: list[dict[str, Any]] = field(default_factory=list)
    anchors: list[dict[str, Any]] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=dict)

    def add(self, row: Row) -> None:
        """Put a row in the place of an older one of the same case."""
        self.rows = [old for old in self.rows if old.case != row.case] + [row]

    def add_pair(self, pair: dict[str, Any]) -> None:
        """Put a comparison in the place of an older one."""
        keys = ("case", "a", "b")
        self.pairs = [old for old in self.pairs if any(old[key] != pair[key] for key in keys)] + [pair]

    def known(self, case: str, setup: str, commit: str) -> Row | None:
        """The row of a case that was measured with this very set-up and commit; a tree with changes has no name."""
        if not is_named(commit):
            return None
        rows = (row for row in self.rows if row.case == case and row.status == OK)
        return next((row for row in rows if (row.setup, row.commit) == (setup, commit)), None)

    def as_object(self) -> dict[str, Any]:
        """For JSON."""
        plain: dict[str, Any] = {"schema": SCHEMA, "suite": self.suite, "card": self.card, "machine": self.machine}
        lists = {name: getattr(self, name) for name in ("pairs", "routing", "derived", "anchors")}
        return plain | {"rows": [asdict(row) for row in self.rows]} | lists

    def save(self, folder: Path) -> Path:
        """Write both files, each as a whole or not at all; returns the JSON's path."""
        folder.mkdir(parents=True, exist_ok=True)
        path = results_path(folder, self.suite, self.card)
        _replace(path, json.dumps(self.as_object(), indent=1) + "\n")
        other = path.with_suffix(".csv")
        with (temporary := other.with_suffix(".csv.new")).open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows({key: _rounded(value) for key, value in asdict(row).items()} for row in self.rows)
        temporary.replace(other)
        return path


def load(path: Path) -> Results:
    """What `save` wrote. Raises ConfigError for another schema or a file that is none of ours."""
    try:
        found = json.loads(path.read_text())
        schema = found["schema"]
        if schema != SCHEMA:
            raise ConfigError(
                f"{path.name}, key `schema`: found {schema!r}, allowed: {SCHEMA} (write to another --out)"
            )
        rows = [Row(**row) for row in found["rows"]]
        lists = {name: list(found[name]) for name in ("pairs", "routing", "derived", "anchors")}
        return Results(found["suite"], found["card"], rows, **lists, machine=dict(found["machine"]))
    except ConfigError:
        raise
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{path.name}: found {error!r}, allowed: results of `bench engine`") from None


def results_path(folder: Path, suite: str, card: str) -> Path:
    """One file per suite and card."""
    return folder / f"engine-{suite}-{slug(card)}.json"


def slug(card: str) -> str:
    """A card's name as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")


def open_results(folder: Path | None, suite: str, card: str) -> Results:
    """The results so far, or none yet."""
    if folder is not None:
        path = results_path(folder, suite, card)
        if path.is_file():
            return load(path)
    return Results(suite, card)


@dataclass(frozen=True, slots=True)
class Machine:
    """Where it is measured. card: the GPU's name, else the processor's; gpu_bytes: its memory as nvidia-smi shows it,
    None on a machine without a GPU; about: what else is recorded.
    """

    card: str
    gpu_bytes: int | None
    about: Mapping[str, Any]

    @property
    def has_gpu(self) -> bool:
        """Whether there is one."""
        return self.gpu_bytes is not None


def find_machine() -> Machine:
    """This machine; a GPU that CUDA_VISIBLE_DEVICES hides is not there."""
    gpus, found = describe_gpus(), describe_machine()
    about = {key: found[key] for key in ("processor", "cores", "memory_bytes", "governor")}
    if not gpus or os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return Machine(str(found["processor"] or "unknown processor"), None, about)
    gpu = gpus[0]
    memory = int(float(gpu["memory.total"]) * 2**20)
    return Machine(gpu["name"], memory, about | {"driver_version": gpu["driver_version"]})


def find_commit(given: str | None) -> str:
    """The measured commit: as given, else as git tells, with `-dirty` where the tree has changes; else `unknown`."""
    return given or found_commit()


def is_named(commit: str) -> bool:
    """Whether the commit says what was measured."""
    return bool(commit) and commit != UNKNOWN and not commit.endswith(CHANGED)


def without_paths(text: str, *folders: Path) -> str:
    """One line without the folders' names, for a row."""
    for folder in folders:
        text = text.replace(str(folder), "MODEL")
    text = re.sub(r"(?<![\w.])/(?:[\w.+-]+/)+", "…/", text)
    return " ".join(text.split())[:300]


def _rounded(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


def _replace(path: Path, text: str) -> None:
    temporary = path.with_suffix(path.suffix + ".new")
    temporary.write_text(text)
    temporary.replace(path)
