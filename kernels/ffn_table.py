"""Which configuration computes an FFN half fastest, from tables measured offline, and where vLLM's own path is faster.

One JSON file per device in `tables/`, made by `python -m vllm_puzzle.bench.ffn_tuning`. Nothing is measured while
serving. The rule is never to be slower than stock: without an entry, on another device, under another Triton or far
from every measured shape the answer is None, vLLM's own path.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from vllm_puzzle.kernels.device_tables import FOLDER, file_name, is_this_triton

OPS = ("gate_up", "down")
# What is multiplied: bfloat16, or e4m3 with inputs scaled by one number (and a hidden vector written as e4m3), by one
# for each token, or by one for each 128 of a token.
KINDS = ("bf16", "fp8", "fp8-token", "fp8-block")
TILES = ("skinny-16", "skinny-64", "wide", "wide-exact", "unaligned")
MAX_SPLITS = 16
MAX_SPLIT_TOKENS = 64  # partial sums of more tokens cost more than they bring
# Ours is taken where it was measured at most this part of stock's time: on the shape itself, and on a neighbour of it.
MARGIN, NEIGHBOUR_MARGIN = 0.98, 0.95
MAX_SHAPE_RATIO = 1.5  # a neighbour differs by at most this factor in N and in K


@dataclass(frozen=True, slots=True)
class Config:
    """One of TILES, and the number of parts into which K is split (skinny tiles only)."""

    tile: str
    splits: int = 1


@dataclass(frozen=True, slots=True)
class Entry:
    """One measured case: medians in µs of our best configuration, of stock, and of stock inside our operator."""

    op: str
    kind: str
    m: int
    n: int
    k: int
    config: Config
    ours_us: float
    stock_us: float
    fallback_us: float


@dataclass(frozen=True, slots=True)
class Table:
    """All entries of one device, and the software that they were measured with."""

    device: str
    versions: dict[str, str]
    entries: tuple[Entry, ...]

    def choose(self, op: str, kind: str, m: int, n: int, k: int) -> Config | None:
        """The configuration of the next larger M at the nearest shape, or None: stock."""
        shape = self._nearest(op, kind, n, k)
        larger = [entry for entry in self._at(op, kind, shape) if entry.m >= m] if shape else []
        if not larger:
            return None
        entry = min(larger, key=lambda entry: entry.m)
        margin = MARGIN if shape == (n, k) else NEIGHBOUR_MARGIN
        return entry.config if entry.ours_us <= margin * entry.stock_us else None

    def is_never_slower(self, op: str, kind: str, n: int, k: int) -> bool:
        """Whether a layer of this shape gains at some M and loses at none, its stock calls inside our operator too.

        There they miss what a compiler fuses across them; 2 % is what one measurement differs from the next.
        """
        shape = self._nearest(op, kind, n, k)
        entries = self._at(op, kind, shape) if shape else []
        chosen = [self.choose(op, kind, entry.m, n, k) is not None for entry in entries]
        kept = [entry for entry, is_ours in zip(entries, chosen, strict=True) if not is_ours]
        return any(chosen) and all(entry.fallback_us <= entry.stock_us / MARGIN for entry in kept)

    def _at(self, op: str, kind: str, shape: tuple[int, int] | None) -> list[Entry]:
        return [entry for entry in self.entries if (entry.op, entry.kind, (entry.n, entry.k)) == (op, kind, shape)]

    def _nearest(self, op: str, kind: str, n: int, k: int) -> tuple[int, int] | None:
        shapes = {(entry.n, entry.k) for entry in self.entries if (entry.op, entry.kind) == (op, kind)}

        def distance(shape: tuple[int, int]) -> float:
            return max(abs(math.log(shape[0] / n)), abs(math.log(shape[1] / k)))

        nearest = min(shapes, key=lambda shape: (distance(shape), shape), default=None)
        return nearest if nearest is not None and distance(nearest) <= math.log(MAX_SHAPE_RATIO) else None


def choose(op: str, device_name: str, dtype: str, m: int, n: int, k: int) -> Config | None:
    """The fastest configuration of one FFN half, or None for vLLM's own path.

    op: one of OPS, dtype: one of KINDS, device_name: as `torch.cuda.get_device_name` says. m tokens; n = I for
    gate_up, d for down; k = d for gate_up, I for down.
    """
    table = table_of(device_name)
    return None if table is None else table.choose(op, dtype, m, n, k)


def table_path(device_name: str) -> Path:
    """Where the table of a device is: `NVIDIA H100 80GB HBM3` → ffn-nvidia-h100-80gb-hbm3.json."""
    return FOLDER / file_name("ffn", device_name)


@lru_cache(maxsize=8)
def table_of(device_name: str) -> Table | None:
    """The table that ships for a device, None where there is none or this Triton is not the one measured."""
    path = table_path(device_name)
    if not path.is_file():
        return None
    table = read_table(path)
    return table if is_this_triton(table.versions["triton"]) and table.device == device_name else None


def read_table(path: Path) -> Table:
    """Read a file that `write_table` wrote. ValueError names file, entry and field."""
    document = json.loads(path.read_text())
    for key in ("device", "versions", "entries"):
        if key not in document:
            raise ValueError(f"{path}: found no {key!r}, allowed: device, versions and entries")
    return Table(document["device"], document["versions"], tuple(_entries(path, document["entries"])))


def _entries(path: Path, found: list[dict[str, Any]]) -> Iterator[Entry]:
    for index, fields in enumerate(found):
        where = f"{path}, entry {index}"
        for key, allowed in (("op", OPS), ("kind", KINDS), ("tile", TILES)):
            if fields.get(key) not in allowed:
                raise ValueError(f"{where}, {key}: found {fields.get(key)!r}, allowed: {', '.join(allowed)}")
        numbers = dict(fields)
        config = Config(numbers.pop("tile"), numbers.pop("splits", 1))
        try:
            yield Entry(config=config, **numbers)
        except TypeError as error:
            raise ValueError(f"{where}: {error}") from None


def write_table(path: Path, table: Table) -> None:
    """Write a table as JSON, one entry a line, so that two measurements can be compared."""
    lines = []
    for entry in table.entries:
        fields = {key: getattr(entry, key) for key in ("op", "kind", "m", "n", "k")}
        fields |= {"tile": entry.config.tile, "splits": entry.config.splits}
        fields |= {key: getattr(entry, key) for key in ("ours_us", "stock_us", "fallback_us")}
        lines.append("  " + json.dumps(fields))
    head = f'{{"device": {json.dumps(table.device)},\n "versions": {json.dumps(table.versions)},\n "entries": [\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(head + ",\n".join(lines) + "\n]}\n")


def default_config(op: str, kind: str, m: int, n: int, k: int, num_sms: int) -> Config:
    """A reasonable configuration without a measurement, for aligned matrices: what `on` and the tests run.

    FP8 sums exactly here (`wide-exact`); whether the tensor core's shorter sums pay is for a table to say.
    """
    if m > MAX_SPLIT_TOKENS:
        return Config("wide" if kind == "bf16" else "wide-exact")
    tile = "skinny-16" if m <= 16 else "skinny-64"
    rows = 64 if op == "gate_up" else 128
    num_tiles = math.ceil(n / rows)
    if op == "gate_up" and 2 * num_tiles >= num_sms:
        return Config(tile)  # half the SMs already have enough loads in flight; a second launch costs more
    wanted = math.ceil(2 * num_sms / num_tiles)
    most = max(1, math.ceil(k / 128) // 4)  # at least four steps of K each, or filling the pipeline dominates
    return Config(tile, max(1, min(wanted, most, MAX_SPLITS)))


def candidates(op: str, kind: str, m: int, k: int) -> list[Config]:
    """Every configuration worth measuring."""
    found = [Config(tile) for tile in ("skinny-16", "skinny-64") if tile == "skinny-64" or m <= 64]
    if m <= MAX_SPLIT_TOKENS:
        most = min(MAX_SPLITS, max(1, math.ceil(k / 128) // 2))
        found += [Config(tile.tile, splits) for tile in tuple(found) for splits in (2, 4, 8, 16) if splits <= most]
    if m > 16 and op == "gate_up" and kind != "fp8-block":
        found.append(Config("wide"))
    if m > 16 and kind != "bf16" and (op, kind) != ("gate_up", "fp8"):  # that form writes no e4m3
        found.append(Config("wide-exact"))
    return found
