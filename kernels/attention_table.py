"""Where our window attention was measured to be no slower than vLLM's: one JSON file per device in `tables/`.

`tables/window-attention-*.json`, with the device's name as `torch.cuda.get_device_name` says it:

    {"device": "NVIDIA H100 80GB HBM3", "versions": {"triton": "3.6.0", …}, "entries": [
      {"head_dim": 64, "cache": "e4m3", "window": 128, "batch": "64q1s8k", "ours_us": …, "fused_us": …, "stock_us": …}]}

An entry is one batch, medians in µs of the same work by both: rotating, storing and attending by our two launches, by
our one (null where the batch is not one token per sequence) and by vLLM's best, or, as `bench.kernel.attention_tuning`
writes it, attending alone (`fused_us` null). A layer's choice holds for every batch, so that all entries of the two
measured windows around its own count. Without them, on another device or under another Triton: vLLM's own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from vllm_puzzle.kernels.device_tables import FOLDER, file_name, is_this_triton

CACHES = ("e4m3", "bfloat16", "float16", "float32")


@dataclass(frozen=True, slots=True)
class Entry:
    """One measured batch."""

    head_dim: int
    cache: str
    window: int
    batch: str
    ours_us: float
    stock_us: float
    fused_us: float | None = None

    def __post_init__(self) -> None:
        times = [time for time in (self.ours_us, self.stock_us, self.fused_us) if time is not None]
        if self.cache not in CACHES or not all(isinstance(time, int | float) and time > 0 for time in times):
            raise ValueError(f"found {self}, allowed: times above 0 and a cache of {', '.join(CACHES)}")


@dataclass(frozen=True, slots=True)
class Choice:
    """Our kernels; `fused`: a step of one token per sequence in one launch."""

    fused: bool


def choose(device_name: str, head_dim: int, cache: str, window: int, folder: Path = FOLDER) -> Choice | None:
    """Our kernels where no measured batch is slower than vLLM's, else None. ValueError for a table that is broken."""
    entries = [e for e in _entries(device_name, folder) if (e.head_dim, e.cache) == (head_dim, cache)]
    below = max((e.window for e in entries if e.window <= window), default=None)
    above = min((e.window for e in entries if e.window >= window), default=None)
    if below is None or above is None:
        return None
    around = [e for e in entries if e.window in (below, above)]
    decodes = [e for e in around if e.fused_us is not None]
    fused = bool(decodes) and all((e.fused_us or 0) <= e.ours_us for e in decodes)
    times = [(e.fused_us if fused and e.fused_us is not None else e.ours_us, e.stock_us) for e in around]
    return Choice(fused) if all(ours <= stock for ours, stock in times) else None


def table_path(device_name: str, folder: Path = FOLDER) -> Path:
    """`NVIDIA H100 80GB HBM3` → window-attention-nvidia-h100-80gb-hbm3.json."""
    return folder / file_name("window-attention", device_name)


def write_table(
    folder: Path, device_name: str, versions: Mapping[str, str], entries: Sequence[Entry], **about: Any
) -> Path:
    """Write a device's table, one entry a line; `about` is for people. Returns the file."""
    path = table_path(device_name, folder)
    head = json.dumps({"device": device_name, "versions": versions, **about}, indent=1).removesuffix("\n}")
    lines = ",\n".join(f"  {json.dumps(asdict(entry))}" for entry in entries)
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{head},\n "entries": [\n{lines}\n]}}\n')
    _entries.cache_clear()
    return path


@lru_cache(maxsize=8)
def _entries(device_name: str, folder: Path) -> tuple[Entry, ...]:
    path = table_path(device_name, folder)
    if not path.is_file():
        return ()
    try:
        table = json.loads(path.read_text())
        entries = tuple(Entry(**entry) for entry in table["entries"])
        device, version = table["device"], table["versions"]["triton"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"kernel table {path.name}: {error}") from None
    return entries if device == device_name and is_this_triton(version) else ()
