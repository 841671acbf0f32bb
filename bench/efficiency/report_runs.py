"""Runs as a report shows them, read leniently: a run that is broken off, empty or of an odd shape is shown as that.

Metrics are those of `summary.json`, so that the page and the file say the same; they are computed from the records only
where that file is missing. What a reader must know before believing a number comes as warnings.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from vllm_puzzle.bench.efficiency.facts import RunFacts
from vllm_puzzle.bench.efficiency.lag import LIMIT_S
from vllm_puzzle.bench.efficiency.manifest import INVALID, chance, read_manifest
from vllm_puzzle.bench.efficiency.metrics import from_json, summarise
from vllm_puzzle.bench.efficiency.metrics_outcome import is_completed
from vllm_puzzle.bench.efficiency.pairing import CACHE_TOLERANCE
from vllm_puzzle.bench.efficiency.record import ERROR, TIMEOUT, RecordError, RequestRecord, measured, read_records
from vllm_puzzle.bench.efficiency.resampling import Interval
from vllm_puzzle.bench.efficiency.run_folder import COMPLETE, MANIFEST, REQUESTS
from vllm_puzzle.bench.efficiency.stationarity import DRIFTING
from vllm_puzzle.bench.efficiency.uncertainty import MIN_BLOCKS, block_interval, wilson
from vllm_puzzle.model_configs.schema import ConfigError

SUMMARY = "summary.json"
_DRAWS = 2000  # of a bootstrap that ends as an error bar of a few pixels


@dataclass(eq=False)
class ReportRun:
    """One run. group: the model, and whose it is where that is not enough. metrics: None unknown, +∞ never."""

    path: Path
    manifest: Mapping[str, Any]
    summary: Mapping[str, Any]
    records: tuple[RequestRecord, ...]
    facts: RunFacts | None
    metrics: Mapping[str, float | None]
    faults: list[str] = field(default_factory=list)
    group: str = ""

    @property
    def arm(self) -> str:
        """The setting's name."""
        return str(self.manifest.get("arm", self.path.name))

    @property
    def load(self) -> str:
        """The load's short name."""
        found = self.manifest.get("load")
        return str(found.get("name") or found.get("kind")) if isinstance(found, dict) else "?"

    @property
    def title(self) -> str:
        """Model, arm and load."""
        return f"{self.group}, {self.arm}, {self.load}"

    @property
    def status(self) -> str:
        """How it ended."""
        return str(self.manifest.get("status"))

    @property
    def device(self) -> str:
        """What costs are counted in: GPU, core, or endpoint."""
        return "endpoint" if self.facts is None else self.facts.devices[1]

    @property
    def cost(self) -> float | None:
        """Device-seconds per whole answer, in the steady windows."""
        of_device = self.metrics.get({"GPU": "gpu_s_per_request", "core": "core_s_per_request"}.get(self.device, ""))
        rate = self.metrics.get("request_throughput")
        return 1 / rate if of_device is None and rate else of_device

    @property
    def chance(self) -> float | None:
        """What blind guessing gets, over all questions; None where the manifest does not say."""
        return chance(self.manifest)

    @cached_property
    def measured(self) -> list[RequestRecord]:
        """All but the warm-up."""
        return measured(self.records)

    @cached_property
    def accuracy(self) -> Interval | None:
        """With 95 % bounds, Wilson's, of as many independent requests as would spread as the questions do: repeats of
        one question are hardly news (Rao & Scott 1992).
        """
        asked = Counter(record.key for record in self.measured)
        right = Counter(record.key for record in self.measured if record.is_correct)
        if not asked:
            return None
        share = right.total() / asked.total()
        spread = sum((right[key] - share * count) ** 2 for key, count in asked.items()) / asked.total() ** 2
        alone = share * (1 - share) / spread if spread else len(asked)
        units = round(min(max(alone, len(asked)), asked.total()))
        bounds = wilson(round(share * units), units)
        return Interval(share, min(bounds.low, share), max(bounds.high, share))

    @cached_property
    def cost_bounds(self) -> Interval | None:
        """Of `cost`, by blocks of time; None with fewer than three."""
        if self.facts is None or len(self.facts.windows) < MIN_BLOCKS:
            return None
        done = Counter(r.block for r in self.facts.ended_inside(self.records) if is_completed(r))
        columns = [[window.duration * self.facts.devices[0], done[window.block]] for window in self.facts.windows]
        if not all(count for _, count in columns):
            return None
        return block_interval(np.array(columns, dtype=np.float64), draws=_DRAWS)

    @cached_property
    def warnings(self) -> list[str]:
        """What must be known before any number is believed."""
        return [*self.faults, *_warnings(self)]


def read_reports(folders: Sequence[Path]) -> list[ReportRun]:
    """All runs of these folders, each the folder of a run or of a sweep. Raises ConfigError where one has none."""
    runs: list[ReportRun] = []
    homes: list[Path] = []
    for folder in folders:
        found = [folder] if (folder / MANIFEST).is_file() else []
        if not found and folder.is_dir():
            found = sorted(path for path in folder.iterdir() if (path / MANIFEST).is_file())
        if not found:
            raise ConfigError(f"folder {folder}: found no run, allowed: {MANIFEST} there or one folder down")
        runs += [read_report(path) for path in found]
        homes += [folder] * len(found)
    _group(runs, homes)
    return sorted(runs, key=lambda run: (run.group, natural(run.load), run.cost is None, run.cost or 0.0, run.arm))


def natural(text: str) -> list[tuple[int, str]]:
    """A key that sorts c4 before c16."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text)]


def read_report(path: Path) -> ReportRun:
    """One run. Raises ConfigError for a manifest that is not one, or of another schema."""
    manifest = read_manifest(path)
    faults: list[str] = []
    records: tuple[RequestRecord, ...] = ()
    try:
        records = tuple(read_records(path / REQUESTS))
    except (OSError, RecordError, UnicodeDecodeError) as error:
        faults.append(f"{REQUESTS} could not be read: {error}")
    facts = None
    if isinstance(manifest.get("facts"), dict) and manifest["facts"].get("windows"):
        try:
            facts = RunFacts.from_object(manifest["facts"], f"{path / MANIFEST}, key `facts`")
        except ConfigError as error:
            faults.append(str(error))
    summary = _summary(path, faults)
    metrics: Mapping[str, float | None] = from_json(summary.get("metrics") or {})
    if not metrics and facts is not None and records:
        metrics = summarise(records, facts)
    return ReportRun(path, manifest, summary, records, facts, metrics, faults)


def _summary(path: Path, faults: list[str]) -> dict[str, Any]:
    try:
        found = json.loads((path / SUMMARY).read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
        faults.append(f"{SUMMARY} is no object; metrics are computed from the records")
    except FileNotFoundError:
        faults.append(f"{SUMMARY} is missing; metrics are computed from the records")
    except (OSError, ValueError) as error:
        faults.append(f"{SUMMARY} could not be read ({error}); metrics are computed from the records")
    return {}


def _group(runs: Sequence[ReportRun], homes: Sequence[Path]) -> None:
    """By model; by model and folder where two folders measured the same model."""
    models = [str(run.manifest.get("model") or "model") for run in runs]
    for run, model, home in zip(runs, models, homes, strict=True):
        others = {str(other) for name, other in zip(models, homes, strict=True) if name == model}
        run.group = model if len(others) == 1 else f"{model} ({home.name})"


def _warnings(run: ReportRun) -> list[str]:
    found = [str(reason) for reason in run.summary.get("invalid_because") or ()] + _late_blocks(run.summary)
    if run.status == INVALID:
        found.append("invalid: its numbers are not to be compared")
    elif run.status != COMPLETE:
        planned = run.manifest.get("planned")
        kept = f"{len(run.measured)}" + (f" of {planned}" if planned else "")
        found.append(f"{run.status}: {kept} requests are kept; not to be compared")
    elif not run.measured:
        found.append("no request was measured")
    if run.manifest.get("is_steady") is False:
        found.append("no steady window: rates are over the whole run, ramp and drain included")
    labels = run.manifest.get("stationarity")
    drifting = [label for label in (labels if isinstance(labels, list) else [labels]) if label == DRIFTING]
    if drifting:
        found.append(f"not stationary: requests in flight or latency drift in {len(drifting)} block(s)")
    if run.facts is not None and len(run.facts.windows) < MIN_BLOCKS:
        found.append(f"noise in time is unknown: {len(run.facts.windows)} block(s), {MIN_BLOCKS} tell it")
    return found + _metric_warnings(run)


def _late_blocks(summary: Mapping[str, Any]) -> list[str]:
    """Of pooled blocks, those in which the client was too slow to measure."""
    lags = []
    for part in summary.get("by_block") or ():
        lag = (part.get("client") or {}).get("lag") or {}
        if isinstance(late := lag.get("p99_s"), int | float) and late > LIMIT_S:
            lags.append(float(late))
    if not lags:
        return []
    worst, allowed = max(lags) * 1000, LIMIT_S * 1000
    return [f"client: event loop late by up to {worst:.1f} ms at p99 in {len(lags)} block(s), allowed: {allowed:g} ms"]


def _metric_warnings(run: ReportRun) -> list[str]:
    found = []
    metrics = run.metrics
    cached = metrics.get("cache_hit_share")
    if cached is not None and cached > CACHE_TOLERANCE:
        found.append(f"prefix cache: {cached:.1%} of the prompt tokens came from it")
    known = metrics.get("tokens_known")
    if known is not None and known < 1:
        found.append(f"tokens of {1 - known:.1%} of the requests are not known")
    counted = sum(record.token_source == "client" for record in run.measured)
    if counted:
        found.append(f"tokens of {counted} requests were counted by the client, not believing the server")
    over = metrics.get("budget_over")
    if over:
        found.append(f"budget: exceeded by {over:.1%} of the thoughts")
    failed = [record for record in run.measured if record.outcome in (ERROR, TIMEOUT)]
    if failed:
        (said, _), *_ = Counter(str(record.error or record.outcome) for record in failed).most_common(1)
        found.append(
            f"{len(failed)} of {len(run.measured)} requests failed and count as wrong, most often: {said[:200]}"
        )
    odd = [name for name, value in metrics.items() if isinstance(value, float) and math.isnan(value)]
    if odd:
        found.append(f"no number: {', '.join(odd)}")
    return found
