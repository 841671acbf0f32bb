"""`vllm-puzzle bench compare A B`: is B as accurate as the baseline A, and what does it cost?

Exit codes, for CI: 0 better or non-inferior, 1 a mistake in use (which raises ConfigError), 3 inconclusive, 4 worse.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from vllm_puzzle.bench.efficiency.comparison import SHOWN, Comparison, Cost, Frontier, Pair, compare_runs
from vllm_puzzle.bench.efficiency.metrics import BY_NAME, compute
from vllm_puzzle.bench.efficiency.resampling import Interval
from vllm_puzzle.bench.efficiency.run_folder import Run, read_runs
from vllm_puzzle.bench.efficiency.tables import factor, number, percent, points, table
from vllm_puzzle.bench.efficiency.uncertainty import BETTER, INCONCLUSIVE, MARGIN, NON_INFERIOR, WORSE
from vllm_puzzle.model_configs.schema import ConfigError

EXIT_CODES = {BETTER: 0, NON_INFERIOR: 0, INCONCLUSIVE: 3, WORSE: 4}
_EPILOG = "exit codes: 0 better or non-inferior, 1 mistake in use, 3 inconclusive, 4 worse"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # 2 is what a shell and pytest use for their own mistakes, and CI must tell those from a verdict.
        raise ConfigError(f"{self.prog}: {message}")


def make_parser() -> argparse.ArgumentParser:
    """The subcommand's flags."""
    parser = _Parser(
        prog="vllm-puzzle bench compare",
        allow_abbrev=False,
        description="B against the baseline A by question: accuracy, cost, and speed-up at equal accuracy. Each is the "
        "folder of a run or of a sweep.",
        epilog=_EPILOG,
    )
    parser.add_argument("a", metavar="A", type=Path, help="the baseline")
    parser.add_argument("b", metavar="B", type=Path, help="what is held against it")
    parser.add_argument(
        "--margin",
        type=float,
        help=f"how much less accurate B may be, as a share (default: what both runs declared, else {MARGIN})",
    )
    parser.add_argument(
        "--cost-margin",
        type=float,
        metavar="SHARE",
        help="judge cost as well: B may cost this share more, and the worse verdict decides the exit code",
    )
    parser.add_argument("--allow-mismatch", action="store_true", help="compare although task, sampling or load differ")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of tables")
    return parser


def compare(argv: Sequence[str]) -> int:
    """Run the command. Returns an exit code of EXIT_CODES; raises ConfigError for a mistake in use."""
    options = make_parser().parse_args(list(argv))
    for flag, value in (("--margin", options.margin), ("--cost-margin", options.cost_margin)):
        if value is not None and not 0 <= value < 1:
            raise ConfigError(f"bench compare, {flag}: found {value:g}, allowed: a share from 0 to below 1")
    a, b = read_runs(options.a), read_runs(options.b)
    declared = declared_margin([*a, *b])
    margin = declared if options.margin is None else options.margin
    found = compare_runs(a, b, margin, cost_margin=options.cost_margin, allow_mismatch=options.allow_mismatch)
    if options.json:
        print(json.dumps(found.to_object(), ensure_ascii=False, allow_nan=False))
    else:
        print(as_text(found, declared))
    return exit_code(found)


def exit_code(found: Comparison) -> int:
    """The worse of the verdicts that were asked for."""
    verdicts = [found.verdict] + ([found.cost_verdict] if found.cost_verdict is not None else [])
    return max(EXIT_CODES[one] for one in verdicts)


def declared_margin(runs: Sequence[Run]) -> float:
    """The margin that all runs declared beforehand, MARGIN where they declared none or several."""
    margins = {run.declared.get("margin") for run in runs}
    only = margins.pop() if len(margins) == 1 else None
    return float(only) if isinstance(only, int | float) and not isinstance(only, bool) else MARGIN


def as_text(found: Comparison, declared: float) -> str:
    """All tables, the verdict last."""
    parts = [f"mismatch allowed: {line}" for line in found.mismatches]
    if len(found.pairs) == 1:
        parts.append(pair_text(found.pairs[0]))
    else:
        parts.append(pairs_text(found))
    parts += [frontier_text(one) for one in found.frontiers]
    note = "" if found.margin == declared else f" (declared beforehand: {points(declared).lstrip('+')})"
    verdicts = [f"accuracy: {found.verdict} at a margin of {points(found.margin).lstrip('+')} points{note}"]
    if found.cost_verdict is not None:
        verdicts.append(f"cost: {found.cost_verdict} at a margin of {percent(found.cost_margin)}")
    return "\n\n".join([*parts, "\n".join(verdicts)])


def difference_text(interval: Interval) -> str:
    """An accuracy difference in points."""
    return f"{points(interval.estimate)} ({points(interval.low)} … {points(interval.high)}) points"


def ratio_text(interval: Interval) -> str:
    """A ratio with its bounds."""
    return f"{factor(interval.estimate)} ({number(interval.low)} … {number(interval.high)})"


def _cost_lines(cost: Cost) -> list[str]:
    lines = [f"device-seconds per request, by question: {ratio_text(cost.by_question)}"]
    if cost.by_block is None or cost.spread is None:
        return [*lines, "noise in time is not known: fewer than three blocks"]
    spread = f"spread between blocks: A {percent(cost.spread[0])}, B {percent(cost.spread[1])}"
    return [*lines, f"device-seconds per request, by block: {ratio_text(cost.by_block)}, {spread}"]


def pair_text(pair: Pair) -> str:
    """Two runs side by side, then what is known of their differences."""
    rows = []
    for name in SHOWN:
        values = [compute(name, run.records, run.facts) for run in (pair.a, pair.b)]
        if values == [None, None]:
            continue
        unit = BY_NAME[name].unit
        cells = [percent(value) if unit == "1" else number(value) for value in values]
        quotient = values[1] / values[0] if values[0] and values[1] is not None and unit != "1" else None
        rows.append([name, *cells, "" if unit == "1" else unit, factor(quotient) if quotient is not None else ""])
    rate = pair.rate
    lines = [
        f"A  {pair.a.path}  {pair.a.name}",
        f"B  {pair.b.path}  {pair.b.name}",
        "",
        table(["", "A", "B", "unit", "B / A"], rows, align="<>><>"),
        "",
        f"B against A, {pair.accuracy.confidence:.0%} intervals:",
        f"accuracy: {difference_text(pair.accuracy)}",
        *_cost_lines(pair.cost),
        f"relative request rate: {factor(rate.quotient)} as throughput / tokens, {factor(rate.direct)} measured",
        f"tokens per request: {factor(rate.verbosity)} of all, {factor(rate.verbosity_by_task)} as mean over tasks",
    ]
    return "\n".join(lines)


def pairs_text(found: Comparison) -> str:
    """One row per setting that both sweeps have, then all together."""
    rows = [
        [
            pair.a.name,
            pair.a.load_name,
            percent(compute("accuracy", pair.a.records, pair.a.facts)),
            percent(compute("accuracy", pair.b.records, pair.b.facts)),
            difference_text(pair.accuracy),
            ratio_text(pair.cost.by_question),
            pair.verdict,
        ]
        for pair in found.pairs
    ]
    header = ["setting of A", "load", "A", "B", "accuracy, B - A", "cost, B / A", "alone"]
    lines = [table(header, rows, align="<<>>>><"), "", f"all {len(rows)} settings together:"]
    return "\n".join([*lines, f"accuracy: {difference_text(found.accuracy)}", *_cost_lines(found.cost)])


def frontier_text(found: Frontier) -> str:
    """All settings under one load by cost, and the speed-up at equal accuracy."""
    settings = sorted([("A", *one) for one in found.a] + [("B", *one) for one in found.b], key=lambda one: one[2])
    rows = [[side, name, number(cost), percent(accuracy)] for side, name, cost, accuracy in settings]
    volume = found.hypervolume
    corner = found.reference
    return "\n".join(
        [
            f"load {found.load}",
            table(["", "setting", "cost", "accuracy"], rows, align="<<>>"),
            f"speed-up of B at A's best accuracy less the margin: {found.speed_up.text}",
            f"geometric mean over the accuracies of both: {factor(found.mean_speed_up)}",
            f"hypervolume: A {number(volume[0])}, B {number(volume[1])}, from cost {number(corner.cost)} and accuracy "
            f"{percent(corner.accuracy)} to cost {number(corner.best_cost)}",
            "accuracy is interpolated in log cost between neighbouring settings",
        ]
    )
