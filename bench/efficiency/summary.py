"""What a run came to: `summary.json` and `summary.csv`, and the facts that its metrics need."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_puzzle.bench.efficiency.facts import RunFacts, Window
from vllm_puzzle.bench.efficiency.metrics import METRICS, as_json, summarise, summarise_by
from vllm_puzzle.bench.efficiency.record import WARM_UP, RequestRecord
from vllm_puzzle.bench.efficiency.server_facts import PREFIX_HITS, PREFIX_QUERIES, Sample, total
from vllm_puzzle.bench.efficiency.slo import Slo

SCHEMA_VERSION = 1
JSON_NAME, CSV_NAME = "summary.json", "summary.csv"


@dataclass(frozen=True, slots=True)
class Deployment:
    """What serves, as far as the user says, and the limits that requests are held to."""

    num_gpus: int | None = None
    num_cores: int | None = None
    idle_power_w: float | None = None
    price_per_device_hour: float | None = None
    slo: Slo | None = None
    slo_by_task: Mapping[str, Slo] = field(default_factory=dict)

    def facts(self, windows: Sequence[Window]) -> RunFacts:
        """With the windows that were measured."""
        return RunFacts(
            tuple(windows),
            self.num_gpus,
            self.num_cores,
            self.idle_power_w,
            self.price_per_device_hour,
            self.slo,
            self.slo_by_task,
        )


def whole_span(records: Sequence[RequestRecord]) -> tuple[float, float] | None:
    """From the first measured request's start to the last one's end, for a run without a steady window."""
    measured = [record for record in records if record.phase != WARM_UP]
    if not measured:
        return None
    start, end = min(record.start for record in measured), max(record.done for record in measured)
    return (start, end) if start < end else None


def cache_hits(
    records: Sequence[RequestRecord], before: Sequence[Sample], after: Sequence[Sample]
) -> dict[str, float | str | None]:
    """Part of the prompt tokens that the server had in its prefix cache: by its usage, else by its counters."""
    told = [record for record in records if record.cached_tokens is not None and record.prompt_tokens]
    if told:
        cached = float(sum(record.cached_tokens or 0 for record in told))
        prompt = float(sum(record.prompt_tokens or 0 for record in told))
        return {"source": "usage", "prompt_tokens": prompt, "cached_tokens": cached, "share": cached / prompt}
    readings = [total(list(found), name) for found in (before, after) for name in (PREFIX_QUERIES, PREFIX_HITS)]
    if None in readings:
        return {"source": None, "prompt_tokens": None, "cached_tokens": None, "share": None}
    queries_before, hits_before, queries, hits = (value or 0.0 for value in readings)
    asked, found = queries - queries_before, hits - hits_before
    share = found / asked if asked > 0 else None
    return {"source": "metrics", "prompt_tokens": asked, "cached_tokens": found, "share": share}


def summary_of(records: Sequence[RequestRecord], facts: RunFacts | None, rest: Mapping[str, Any]) -> dict[str, Any]:
    """The summary: every metric, over all and by task, after what else is to be said of the run."""
    whole: dict[str, Any] = {}
    by_task: dict[str, dict[str, Any]] = {}
    if facts is not None and records:
        whole = as_json(summarise(records, facts))
        parts = summarise_by(records, facts, lambda record: record.task)
        by_task = {task: as_json(values) for task, values in parts.items()}
    return {"schema_version": SCHEMA_VERSION, **rest, "metrics": whole, "by_task": by_task}


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """Both files. Raises OSError."""
    text = json.dumps(summary, indent=1, ensure_ascii=False) + "\n"
    (folder / JSON_NAME).write_text(text, encoding="utf-8")
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["metric", "value", "unit", "formula"])
    for metric in METRICS:
        value = summary["metrics"].get(metric.name)
        writer.writerow([metric.name, "" if value is None else value, metric.unit, metric.formula])
    (folder / CSV_NAME).write_text(table.getvalue(), encoding="utf-8")
