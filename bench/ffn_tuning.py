"""Measure which configuration computes each FFN half fastest on this GPU, and write the table that serving reads.

    python -m vllm_puzzle.bench.ffn_tuning --out kernels/tables

For each op, kind, shape and number of tokens: every configuration that could win is compared with float32 arithmetic
first (one that fails is left out), then timed by CUDA-graph replay over rotating inputs that exceed the L2 five times,
next to the fastest library call with a compiled activation. An existing table is added to, so that shapes can be
measured in parts. Under Triton's interpreter `--device cpu` times by the clock, which is good for a test of this file.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from vllm_puzzle.bench.ffn_chains import Chains, Product
from vllm_puzzle.bench.kernel.timing import Call, number_of_sets
from vllm_puzzle.kernels import ffn
from vllm_puzzle.kernels.ffn_table import (
    KINDS,
    OPS,
    Config,
    Entry,
    Table,
    candidates,
    read_table,
    table_path,
    write_table,
)

# I, d: Nemotron 49B's and 51B's FFNs, 253B's fused ones over eight ranks, one narrow shard.
SHAPES = ((704, 8192), (2816, 8192), (5632, 8192), (7168, 8192), (17920, 8192), (37632, 16384), (53248, 16384))
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
MIN_REPLAYS, MAX_REPLAYS, SECONDS = 5, 40, 0.03  # of one configuration: there are many
Timer = Callable[[Sequence[Call]], float]


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m vllm_puzzle.bench.ffn_tuning", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the tables")
    parser.add_argument("--shape", action="append", metavar="I,d", help="default: all")
    parser.add_argument("--tokens", metavar="M,M,…", help="default: 1 to 8192 by powers of two")
    parser.add_argument("--op", action="append", choices=OPS)
    parser.add_argument("--kind", action="append", choices=KINDS)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    found = parser.parse_args(argv)
    device = torch.device(found.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("ffn_tuning, device: found no CUDA device, allowed: one NVIDIA GPU", file=sys.stderr)
        return 1
    if (reason := ffn.why_unsupported(device)) is not None:
        print(f"ffn_tuning, device: {reason}", file=sys.stderr)
        return 1
    shapes = [tuple(map(int, text.split(","))) for text in found.shape or ()] or SHAPES
    tokens = [int(text) for text in (found.tokens or "").split(",") if text] or TOKENS
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    path = found.out / table_path(name).name
    for width, hidden in shapes:
        for op in found.op or OPS:
            for kind in found.kind or KINDS:
                entries = [entry for m in tokens if (entry := measure(op, kind, m, width, hidden, device)) is not None]
                write_table(path, merged(path, name, entries))
    return 0


def measure(op: str, kind: str, m: int, width: int, hidden: int, device: torch.device) -> Entry | None:
    """One case; None, and a line that says why, where nothing could be measured."""
    n, k = (width, hidden) if op == "gate_up" else (hidden, width)
    weight_bytes = n * k * (2 if op == "gate_up" else 1) * (2 if kind == "bf16" else 1)
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    chains = Chains(op, kind, m, width, hidden, device.type, number_of_sets(weight_bytes, l2_bytes))
    timer = graph_time if device.type == "cuda" else clock_time
    where, products = f"{op} {kind} M {m} I {width} d {hidden}", chains.products()
    stock = fastest(where, {name: partial(stock_time, chains, product, timer) for name, product in products.items()})
    if stock is None:
        return None
    fallback = stock[1] if op == "down" else timer(chains.fallback(products[stock[0]]))
    runs: dict[Any, Callable[[], float]] = {}
    for config in candidates(op, kind, m, k):
        if ffn.is_usable(config, *chains.matrices, op == "gate_up", chains.out_type):
            runs[config] = partial(checked_time, chains, config, timer)
    ours = fastest(where, runs)
    if ours is None:
        return None
    config, microseconds = ours
    print(
        f"{where}: {config.tile} in {config.splits} {microseconds:.2f} µs, stock ({stock[0]}) {stock[1]:.2f}, "
        f"one by one {fallback:.2f}",
        flush=True,
    )
    return Entry(op, kind, m, n, k, config, *(round(value, 3) for value in (microseconds, stock[1], fallback)))


def stock_time(chains: Chains, product: Product, timer: Timer) -> float:
    """The time of a library's product and everything after it, compiled."""
    return timer(chains.stock(product))


def checked_time(chains: Chains, config: Config, timer: Timer) -> float:
    """The time of a configuration that computes the right thing. Raises ValueError for another."""
    check = chains.check(config)
    if not check.is_passed:
        raise ValueError(f"found an error of {check.error:.2e}, allowed: {check.bound:.2e}")
    return timer(chains.ours(config))


def fastest(where: str, runs: dict[Any, Callable[[], float]]) -> tuple[Any, float] | None:
    """(key, µs) of the fastest run. A run that fails is told in one line and left out."""
    found: list[tuple[float, Any]] = []
    for key, run in runs.items():
        try:
            found.append((run(), key))
        except Exception as error:
            text = " ".join(str(error).split())[:300]
            print(f"{where}, {key}: {type(error).__name__}: {text}", file=sys.stderr, flush=True)
    if not found:
        return None
    best = min(found, key=lambda pair: pair[0])
    return best[1], best[0]


def graph_time(calls: Sequence[Call]) -> float:
    """Median µs of one call: replays of a CUDA graph that runs every call once."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compile and allocate before the capture
        for call in (*calls[:2], calls[-1]):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    (first,) = _replays(graph, 1)
    count = max(MIN_REPLAYS, min(MAX_REPLAYS, int(1e6 * SECONDS / first)))
    return statistics.median(_replays(graph, count)) / len(calls)


def _replays(graph: Any, count: int) -> list[float]:
    """µs of each of `count` replays, after one that does not count."""
    graph.replay()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    for start, stop in events:
        start.record()
        graph.replay()
        stop.record()
    torch.cuda.synchronize()
    return [max(float(start.elapsed_time(stop)) * 1e3, 1e-3) for start, stop in events]


def clock_time(calls: Sequence[Call]) -> float:
    """Median µs of one call by the clock."""
    samples = []
    for _ in range(3):
        start = time.perf_counter()
        for call in calls:
            call()
        samples.append((time.perf_counter() - start) * 1e6 / len(calls))
    return statistics.median(samples)


def merged(path: Path, device_name: str, entries: Sequence[Entry]) -> Table:
    """The table in a file with these entries added; measured anew under other versions, the old ones go."""
    versions = {"torch": torch.__version__, "triton": metadata.version("triton"), "cuda": str(torch.version.cuda)}
    old: tuple[Entry, ...] = ()
    if path.is_file() and (table := read_table(path)).versions == versions and table.device == device_name:
        old = table.entries
    found = {(entry.op, entry.kind, entry.n, entry.k, entry.m): entry for entry in (*old, *entries)}
    return Table(device_name, versions, tuple(found[key] for key in sorted(found)))


if __name__ == "__main__":
    sys.exit(main())
