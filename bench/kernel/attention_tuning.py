"""Write the table by which serving chooses between our window attention and vLLM's, from rows that were measured.

    python -m vllm_puzzle.bench.kernel.attention_tuning --out kernels/tables bench/results/kernels-*.csv

The files are `vllm-puzzle bench kernels --csv`'s. Every case that attends within a window and has our median and one of
vLLM's (the least of its Triton attention, with either query, and FlashAttention 3) becomes an entry; both times are of
attending alone, so that `fused_us` is null. Prefill and verification count beside decode, since a layer's choice holds
for every batch, but only at windows where decode was measured too.

Where one of the ops that serving would run failed or was wrong, nothing of that head size and cache is written: without
its row, the rows around it would speak for it. The first file says which device, versions and commit the table is of;
files of another measurement are left out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vllm_puzzle.bench.kernel.batch import format_batch
from vllm_puzzle.bench.kernel.cases import AttentionCase, parse_case
from vllm_puzzle.bench.kernel.record import OURS, Row, read_csv
from vllm_puzzle.kernels.attention_table import Entry, write_table
from vllm_puzzle.model_configs.schema import ConfigError

STOCK = ("vllm_triton", "vllm_triton_bf16q", "flash_attention_3")
ATTENDING = ("decode", "verify", "prefill")
SERVED = (*ATTENDING, "kv_write", "rope_kv_write")
CACHES = {"fp8": "e4m3", "bf16": "bfloat16"}
VERSIONS = ("triton", "torch", "cuda", "vllm")
MEASUREMENT = ("name", "commit", *VERSIONS)
CARD = ("memory_bytes", "l2_bytes")
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Measured:
    """One case of an op that serving runs: our row, and vLLM's by name."""

    case: AttentionCase
    ours: Row
    stock: Mapping[str, Row]

    @property
    def kind(self) -> tuple[int, str]:
        """Head size and cache, as the table names them."""
        return self.case.head_dim, CACHES[self.case.cache]

    @property
    def window(self) -> int:
        """Keys that a token sees; 0 for full attention and for writes."""
        return 0 if self.case.window is None else self.case.window + self.case.num_sink_tokens

    @property
    def attends(self) -> bool:
        """Whether the case can be an entry."""
        return self.case.op in ATTENDING and self.window > 0

    @property
    def stock_medians(self) -> dict[str, float]:
        """µs of each of vLLM's that was timed."""
        return {name: row.p50_us for name, row in self.stock.items() if row.p50_us is not None}


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line. Status 1 where rows were measured and none of them could be an entry."""
    parser = argparse.ArgumentParser(
        prog="python -m vllm_puzzle.bench.kernel.attention_tuning",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the tables")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="CSV files of `bench kernels`")
    args = parser.parse_args(argv)
    try:
        return tune(args.files, args.out, lambda text: print(f"attention_tuning: {text}", flush=True))
    except ConfigError as error:
        print(f"attention_tuning: {error}", file=sys.stderr)
        return 1


def tune(files: Sequence[Path], folder: Path, say: Say) -> int:
    """Read, choose, write; the exit status. Raises ConfigError for a file that holds something else."""
    setting, measured = read(files, say)
    broken = {found.kind for found in measured if found.ours.p50_us is None}
    if not broken and not any(found.attends for found in measured):
        say("no table written: found no measured row of window attention")
        return 0
    chosen = choose_rows(measured, broken, say)
    if not chosen and not broken:
        say("no table written: found no row with a median of ours and one of vLLM's")
        return 1
    # Also without an entry where an op is broken: an older table would go on enabling it.
    counts = {name: sum(name in found.stock_medians for found in chosen) for name in STOCK}
    path = write_table(
        folder,
        setting["name"],
        {key: setting[key] for key in VERSIONS},
        [_entry(found) for found in chosen],
        commit=setting["commit"],
        card={key: int(setting[key]) for key in CARD},
        baselines=counts,
    )
    shares = ", ".join(f"{name} in {count}" for name, count in counts.items())
    say(f"{path.name}: {len(chosen)} entries; vLLM's measured: {shares}")
    return 0 if chosen else 1


def read(files: Sequence[Path], say: Say) -> tuple[dict[str, str], list[Measured]]:
    """The first file's setting, and the cases of all files of the same measurement; of a case in several, the first."""
    setting: dict[str, str] = {}
    found: dict[str, Measured] = {}
    for path in files:
        own, rows = _read_file(path)
        if setting and own and any(own[key] != setting[key] for key in MEASUREMENT):
            say(f"{path.name}: left out, of another measurement ({own['name']}, commit {own['commit']})")
            continue
        setting = setting or own
        for one in _measured(rows):
            # A case that is wrong in one file is wrong.
            if one.case.name not in found or one.ours.p50_us is None:
                found[one.case.name] = one
    return setting, list(found.values())


def _read_file(path: Path) -> tuple[dict[str, str], list[Row]]:
    allowed = "allowed: a file of `bench kernels --csv`"
    try:
        setting, rows = read_csv(path)
    except OSError as error:
        raise ConfigError(f"{path}: found {error.strerror}, {allowed}") from None
    except (KeyError, ValueError, TypeError) as error:
        raise ConfigError(f"{path}: found a line that is no row ({error}), {allowed}") from None
    if rows and (missing := [key for key in (*MEASUREMENT, *CARD) if not setting.get(key)]):
        raise ConfigError(f"{path}: found no {', '.join(missing)}, {allowed}")
    return setting, rows


def _measured(rows: Sequence[Row]) -> list[Measured]:
    """The cases of ops that serving runs, without those that a time limit skipped."""
    ours = [row for row in rows if row.implementation == OURS and row.op in SERVED and row.status != "skipped"]
    stock: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row.implementation in STOCK:
            stock.setdefault(row.case, {})[row.implementation] = row
    cases = [(parse_case(row.case), row) for row in ours]
    return [Measured(case, row, stock.get(case.name, {})) for case, row in cases if isinstance(case, AttentionCase)]


def choose_rows(measured: Sequence[Measured], broken: set[tuple[int, str]], say: Say) -> list[Measured]:
    """What becomes an entry, by head size, cache and window; a line for every other that attends within a window."""
    timed = [found for found in measured if found.attends and found.ours.p50_us is not None]
    decoded = {(found.kind, found.window) for found in timed if found.case.op == "decode" and found.stock_medians}
    chosen = []
    for found in measured:
        name = found.case.name
        if found.ours.p50_us is None:
            say(
                f"{name}: ours {found.ours.status} ({found.ours.reason}): nothing of D {found.kind[0]}, {found.kind[1]}"
            )
        elif not found.attends or found.kind in broken:
            continue
        elif not found.stock_medians:
            reasons = "; ".join(f"{other} {row.status}: {row.reason}" for other, row in found.stock.items())
            say(f"{name}: left out, no median of vLLM's ({reasons or 'not run'})")
        elif (found.kind, found.window) not in decoded:
            say(f"{name}: left out, decode was not measured at this window")
        else:
            chosen.append(found)
    return sorted(chosen, key=lambda found: (*found.kind, found.window, found.case.op, found.case.batch))


def _entry(found: Measured) -> Entry:
    assert found.ours.p50_us is not None
    best = min(found.stock_medians.values())
    return Entry(*found.kind, found.window, format_batch(found.case.batch), found.ours.p50_us, best)


if __name__ == "__main__":
    sys.exit(main())
