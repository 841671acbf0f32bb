"""Rows of results: one for each case and implementation, written and read as CSV and JSON, every row complete."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, Any

OURS = "vllm_puzzle"
# wrong: computed something else, so that no speed is given. absent: the baseline is not there, or not for this case.
STATUSES = ("ok", "wrong", "failed", "absent", "skipped")


@dataclass(frozen=True, slots=True)
class Row:
    """One implementation of one case. Times in µs; `ratio` is its median over ours; `error` the relative L2 distance
    to the reference on the same inputs (or the number of differing codes), `bound` the most that is allowed.
    """

    case: str
    op: str
    implementation: str
    status: str
    reason: str = ""
    p20_us: float | None = None
    p50_us: float | None = None
    p80_us: float | None = None
    num_samples: int | None = None
    num_sets: int | None = None
    floor_us: float | None = None
    limit: str = ""
    percent_of_limit: float | None = None
    ratio: float | None = None
    tflops: float | None = None
    gbytes_per_second: float | None = None
    launches: int | None = None
    error: float | None = None
    bound: float | None = None
    goals: str = ""
    config: str = ""

    def __post_init__(self) -> None:
        if self.status not in STATUSES:
            raise ValueError(f"row of {self.case}, status: found {self.status!r}, allowed: {', '.join(STATUSES)}")
        if self.status != "ok" and self.p50_us is not None:
            raise ValueError(f"row of {self.case}: found a speed with status {self.status!r}, allowed: only with 'ok'")


COLUMNS = tuple(field.name for field in fields(Row))
_TEXT = frozenset({"case", "op", "implementation", "status", "reason", "limit", "goals", "config"})
_WHOLE = frozenset({"num_samples", "num_sets", "launches"})


def write_csv(file: IO[str], rows: Sequence[Row], setting: Mapping[str, Any]) -> None:
    """One line a row; `setting` (card, versions, commit, ceilings) is repeated on every line."""
    writer = csv.DictWriter(file, [*setting, *COLUMNS], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({**setting, **{key: _rounded(value) for key, value in asdict(row).items()}})


def _rounded(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) else value


def read_csv(path: Path) -> tuple[dict[str, str], list[Row]]:
    """The setting and the rows of a file of `write_csv`."""
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    rows = [Row(**{key: _parsed(key, line[key]) for key in COLUMNS}) for line in lines]
    setting = {key: value for key, value in lines[0].items() if key not in COLUMNS} if lines else {}
    return setting, rows


def _parsed(key: str, text: str) -> Any:
    if key in _TEXT:
        return text
    if text == "":
        return None
    return int(text) if key in _WHOLE else float(text)


def as_json(rows: Sequence[Row], setting: Mapping[str, Any], goals: Sequence[Mapping[str, str]]) -> str:
    """The same as one JSON object with the goals' verdicts."""
    return json.dumps({**setting, "rows": [asdict(row) for row in rows], "goals": list(goals)}, indent=1)
