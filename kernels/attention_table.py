"""Where our window attention was measured to be not slower than vLLM's: one JSON file per device in `tables/`.

A file, `tables/window_attention_*.json`:

    {"device": "NVIDIA H100 80GB HBM3", "measured": {"commit": …, "triton": …, …},
     "rows": [{"head_dim": 64, "cache": "e4m3", "max_window": 1024, "max_fused_window": 256}, …]}

A row holds for windows up to `max_window`; up to `max_fused_window` (which may be left out) one launch rotates, stores
and attends. A device without a file, a head size or a cache without a row: vLLM's own backend stays.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent / "tables"
CACHES = ("e4m3", "bfloat16", "float16", "float32")


@dataclass(frozen=True, slots=True)
class Row:
    """One measured configuration."""

    head_dim: int
    cache: str
    max_window: int
    max_fused_window: int | None = None

    def __post_init__(self) -> None:
        sizes = [size for size in (self.head_dim, self.max_window, self.max_fused_window) if size is not None]
        if self.cache not in CACHES or not all(type(size) is int and size > 0 for size in sizes):
            raise ValueError(f"found {self}, allowed: positive integers and a cache of {', '.join(CACHES)}")


def choose(device_name: str, head_dim: int, cache_name: str, window: int, folder: Path = FOLDER) -> Row | None:
    """The row that says our kernel is not slower here; None: vLLM's own. ValueError for a table that cannot be read."""
    rows = _tables(folder).get(device_name, ())
    fitting = (row for row in rows if (row.head_dim, row.cache) == (head_dim, cache_name) and window <= row.max_window)
    return next(fitting, None)


@cache
def _tables(folder: Path) -> dict[str, tuple[Row, ...]]:
    found: dict[str, tuple[Row, ...]] = {}
    for path in sorted(folder.glob("window_attention_*.json")):
        try:
            table = json.loads(path.read_text())
            found[table["device"]] = tuple(Row(**row) for row in table["rows"])
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"kernel table {path.name}: {error}") from None
    return found
