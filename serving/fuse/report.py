"""A plan as a table for people and as JSON for programs, and an earlier plan's matrix read back."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm_puzzle.model_configs.ffn_fusion import FusedFFN, FusionPlan, attention_free_runs, ffn_bytes
from vllm_puzzle.model_configs.json_values import read_object
from vllm_puzzle.model_configs.schema import ConfigError, ModelRecord
from vllm_puzzle.serving.fuse.dependency import Matrix
from vllm_puzzle.serving.fuse.plan import LAUNCHES_PER_FFN, Gain, Rates, distances_inside

COLUMNS = ("layers", "FFNs", "width", "GiB", "max distance", "between", "sum")


@dataclass(frozen=True, slots=True)
class Report:
    """All that was measured and decided. `provenance` is what the matrix was measured on, JSON-ready."""

    record: ModelRecord
    matrix: Matrix
    fusion: FusionPlan
    norm: str
    cap_bytes: int
    gain: Gain
    rates: Rates
    provenance: Mapping[str, Any]

    @property
    def flags(self) -> str:
        """What to give to `vllm-puzzle serve`."""
        norm = f" --puzzle-ffn-fusion-norm {self.norm}" if self.norm != "own" and self.fusion.ffns else ""
        return f"--puzzle-ffn-fusion {self.fusion.text}{norm}"

    @property
    def left_alone(self) -> dict[int, str]:
        """Layers of attention-free runs whose FFN stays as it is, and why."""
        fused = {layer for ffn in self.fusion.ffns for layer in ffn.layers}
        found = {}
        for run in attention_free_runs(self.record):
            for layer in run:
                if layer not in fused:
                    found[layer] = "last of its run" if layer == run[-1] else "no partner under the cap"
        return found

    def to_json(self) -> dict[str, Any]:
        """JSON-ready: distances with 6 significant digits, null where there is no pair."""
        gain = asdict(self.gain)
        gain |= {"launches_removed": self.gain.launches_removed, "all_reduces_removed": self.gain.all_reduces_removed}
        saved, weights = self.rates.saved_us(self.gain), self.rates.weights_us(self.gain)
        return {
            "puzzle_ffn_fusion": {"runs": self.fusion.text, "norm": self.norm},
            "runs": [self._run(ffn) for ffn in self.fusion.ffns],
            "left_alone": {str(layer): why for layer, why in self.left_alone.items()},
            "parameters": {"max_gib": self.cap_bytes / 2**30, "norm": self.norm, **asdict(self.rates)},
            "gain": gain,
            "estimate": {"saved_us": saved, "weights_us": weights, "speedup_at_most": _speedup(saved, weights)},
            "provenance": dict(self.provenance),
            "matrix": [[None if d is None else float(f"{d:.6g}") for d in row] for row in self.matrix],
        }

    def _run(self, ffn: FusedFFN) -> dict[str, Any]:
        inside = distances_inside(self.matrix, ffn.layers)
        return {
            "layers": list(ffn.layers),
            "widths": list(ffn.widths),
            "gib": ffn_bytes(self.record, ffn.width) / 2**30,
            "max_distance": inside.max,
            "max_between": list(inside.pair),
            "sum_distance": inside.sum,
        }


def format_report(report: Report) -> str:
    """The report as text: the fused FFNs, what stays, the gain, and last the flags to serve it with."""
    data, gain = report.provenance, report.gain
    lines = [
        f"{data['model']}: {len(report.record.layers)} layers, {data['num_tokens']:,} tokens of {data['data']}, "
        f"{data['dtype']}",
        "",
        *_table(report),
    ]
    for layer, why in report.left_alone.items():
        lines.append(f"layer {layer} stays as it is: {why}")
    pairs = [(d, (i, j)) for i, row in enumerate(report.matrix) for j, d in enumerate(row) if d is not None]
    if pairs:
        greatest, (i, j) = max(pairs)
        middle = statistics.median(distance for distance, _ in pairs)
        lines.append(f"distances over all pairs: median {middle:.4f}, greatest {greatest:.4f} ({i} to {j})")
    share = gain.fused_ffn_bytes / gain.ffn_bytes if gain.ffn_bytes else 0.0
    lines += [
        "",
        f"FFN steps one after the other  {gain.ffn_steps} before, {gain.ffn_steps - gain.steps_removed} after",
        f"kernel launches removed        {gain.launches_removed} per step ({LAUNCHES_PER_FFN} for each FFN step: norm, "
        "gate and up, activation, down)",
        f"all-reduces removed            {gain.all_reduces_removed} per step under tensor parallelism, 0 without",
        f"FFN weights in fused FFNs      {share:.1%} of the FFN bytes that a token reads",
        *_estimate(report),
        "",
        report.flags,
    ]
    return "\n".join(lines)


def read_matrix(file: Path, num_layers: int, config_sha256: str) -> tuple[Matrix, dict[str, Any]]:
    """Matrix and provenance of an earlier plan of the same config.json. Raises ConfigError for anything else."""
    if not file.is_file():
        raise ConfigError(f"flag --matrix: found no file {file}, allowed: a file of --out")
    found = read_object(file)
    matrix, provenance = found.get("matrix"), found.get("provenance")
    rows = matrix if isinstance(matrix, list) else []
    is_square = len(rows) == num_layers and all(isinstance(row, list) and len(row) == num_layers for row in rows)
    is_filled = is_square and all(d is None or isinstance(d, int | float) for row in rows for d in row)
    if not is_filled or not isinstance(provenance, dict):
        raise ConfigError(f"flag --matrix: found no plan of {num_layers} layers in {file}, allowed: a file of --out")
    if provenance.get("config_sha256") != config_sha256:
        raise ConfigError(f"flag --matrix: found the plan of another config.json in {file}, allowed: one of this model")
    return rows, provenance


def _table(report: Report) -> list[str]:
    if not report.fusion.ffns:
        return [
            "nothing to fuse: no run of attention-free layers has two FFNs under the cap "
            f"({report.cap_bytes / 2**30:.3g} GiB) beside its last one"
        ]
    rows: list[tuple[str, ...]] = [COLUMNS]
    for ffn in report.fusion.ffns:
        inside = distances_inside(report.matrix, ffn.layers)
        gib = ffn_bytes(report.record, ffn.width) / 2**30
        rows.append(
            (f"{ffn.layers[0]}-{ffn.layers[-1]}", str(len(ffn.parts)), f"{ffn.width:,}", f"{gib:.3g}",
             f"{inside.max:.4f}", f"{inside.pair[0]} to {inside.pair[1]}", f"{inside.sum:.4f}")
        )  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _estimate(report: Report) -> list[str]:
    """Only from rates that the user gave, with the formula; an upper bound, as nothing else of a step is counted."""
    gain, rates = report.gain, report.rates
    saved, weights = rates.saved_us(gain), rates.weights_us(gain)
    if saved is None:
        return []
    all_reduces = gain.all_reduces_removed if rates.tensor_parallel_size > 1 else 0
    lines = [
        f"estimate, not measured         {saved:.1f} µs less per step = {gain.launches_removed} launches · "
        f"{rates.launch_us or 0:g} µs + {all_reduces} all-reduces · {rates.all_reduce_us or 0:g} µs"
    ]
    speedup = _speedup(saved, weights)
    if weights is not None and speedup is not None:
        indent = " " * 31
        lines += [
            f"{indent}at most {speedup:.3f} times as fast = 1 + {saved:.1f} µs / {weights:.1f} µs",
            f"{indent}{weights:.1f} µs = {gain.weight_bytes:,} bytes of weights / {rates.tensor_parallel_size} GPU / "
            f"{rates.bandwidth_gbs:g} GB/s; all else in a step makes the gain less",
        ]
    return lines


def _speedup(saved: float | None, weights: float | None) -> float | None:
    return None if saved is None or not weights else 1 + saved / weights
