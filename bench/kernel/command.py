"""`vllm-puzzle bench kernels`: which cases, in which order, where the results go."""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Any

from vllm_puzzle.bench.kernel import plan, report
from vllm_puzzle.bench.kernel.cases import OPS, Case, FfnCase, parse_case
from vllm_puzzle.bench.kernel.record import OURS, Row, as_json, write_csv
from vllm_puzzle.model_configs.schema import ConfigError

SOURCE_VARIABLE = "VLLM_PUZZLE_VLLM_SOURCE"
BASELINE_CHOICES = ("auto", "all", "goals", "none")


def make_parser() -> argparse.ArgumentParser:
    """The subcommand's flags."""
    parser = argparse.ArgumentParser(
        prog="vllm-puzzle bench kernels",
        allow_abbrev=False,
        description="Speed of our kernels on this machine's GPU: of the measured limits, and against other "
        "implementations on the same inputs. An op that computes something else than its reference gets no speed.",
    )
    parser.add_argument("--op", action="append", choices=OPS, help="only this op (may be repeated)")
    parser.add_argument(
        "--case", action="append", metavar="NAME", help="this case, or those of the list that match a pattern with `*`"
    )
    parser.add_argument(
        "--list", action="store_true", help="print the cases with their floors and goals; no GPU needed"
    )
    parser.add_argument("--quick", action="store_true", help="one or two cases of each kind")
    parser.add_argument("--no-sweep", action="store_true", help="only quick cases and those of goals")
    parser.add_argument(
        "--goal", action="append", metavar="KEY", help="only the cases of this goal: A, B4, B4.2, P5 (may be repeated)"
    )
    parser.add_argument(
        "--baselines",
        choices=BASELINE_CHOICES,
        default="auto",
        help="which others to run; auto: the goals' and vLLM's, for quick cases all that are quick to compile",
    )
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", help="start no further case after this time")
    parser.add_argument("--json", metavar="FILE", help="write all results as JSON (`-`: print nothing else)")
    parser.add_argument("--csv", metavar="FILE", help="write all results as CSV; `{card}` becomes the card's name")
    parser.add_argument("--commit", help="the measured commit, where git cannot tell")
    parser.add_argument(
        "--vllm-source",
        metavar="DIR",
        default=os.environ.get(SOURCE_VARIABLE),
        help=f"vLLM's package folder: its Triton kernels where vLLM is not installed (default: ${SOURCE_VARIABLE})",
    )
    return parser


def kernels(argv: Sequence[str]) -> int:
    """Run; returns the exit status, 1 when one of our ops failed or was wrong. Raises ConfigError without a GPU."""
    args = make_parser().parse_args(list(argv))
    cases = choose(args)
    if args.list:
        print(report.case_list(cases), end="")
        return 0
    import torch

    if not torch.cuda.is_available():
        raise ConfigError(
            "bench kernels, device: found no CUDA device, allowed: an NVIDIA GPU (`--list` shows the cases without one)"
        )
    if args.vllm_source is not None:
        from vllm_puzzle.bench.kernel import stock

        stock.find(args.vllm_source)  # a folder without its files is told now
    show = _printer(sys.stderr if args.json == "-" else sys.stdout)
    setting, rows = measure(cases, args, show)
    verdicts = report.verdicts(rows)
    show(report.goal_table(verdicts))
    if args.json == "-":
        print(as_json(rows, setting, verdicts))
    return int(any(row.status in ("wrong", "failed") for row in rows if row.implementation == OURS))


def _printer(stream: IO[str]) -> Callable[[str], None]:
    return lambda text: print(text, file=stream, flush=True)


def choose(args: argparse.Namespace) -> list[Case]:
    """The cases that the flags ask for. Raises ConfigError when there are none."""
    cases = plan.cases(args.quick, not args.no_sweep)
    if args.case:
        named: dict[str, Case] = {}
        for text in args.case:
            found = [case for case in cases if fnmatchcase(case.name, text)] if "*" in text else [parse_case(text)]
            named |= {case.name: case for case in found}
        cases = list(named.values())
    if args.goal:
        wanted = {case.name for goal in plan.find_goals(args.goal) for case in goal.quantity.cases}
        cases = [case for case in cases if case.name in wanted]
    if args.op:
        cases = [case for case in cases if case.op in args.op]
    if not cases:
        found_flags = f"--op {args.op} --case {args.case} --goal {args.goal}"
        raise ConfigError(f"bench kernels: found no case for {found_flags}, allowed: see `--list`")
    return cases


def measure(
    cases: Sequence[Case], args: argparse.Namespace, show: Callable[[str], None]
) -> tuple[dict[str, Any], list[Row]]:
    """The setting (card, versions, ceilings) and all rows."""
    from vllm_puzzle.bench.kernel import card as cards
    from vllm_puzzle.bench.kernel.runner import Runner
    from vllm_puzzle.bench.kernel.timing import count_launches, cuda_graph_timer

    start = time.monotonic()
    card = cards.find_card()
    card = replace(card, commit=args.commit) if args.commit else card
    ceilings = cards.measure_ceilings(cuda_graph_timer, "cuda")
    setting = card.as_row() | ceilings.as_row()
    show(report.heading(card, ceilings))
    rows: list[Row] = []
    for number, case in enumerate(cases):
        goals = " ".join(goal.key for goal in plan.goals_of(case))
        if args.time_limit is not None and time.monotonic() - start > args.time_limit:
            reason = f"time limit of {args.time_limit:g} s"
            rows += [Row(other.name, other.op, OURS, "skipped", reason) for other in cases[number:]]
            show(f"{len(cases) - number} cases skipped: {reason}")
            break
        counts = count_launches if case.op == "rope_kv_write" else None
        runner = Runner(cuda_graph_timer, ceilings, card.l2_bytes, counts)
        rows += runner.run(make_problem(case, args.vllm_source), goals, wanted_baselines(case, args.baselines))
        show(report.case_block([row for row in rows if row.case == case.name]))
        save(args, setting, rows)
        release()
    save(args, setting, rows)
    return setting, rows


def make_problem(case: Case, vllm_source: str | None, device: str = "cuda") -> Any:
    """The case with data, drawn from a fixed seed."""
    import torch
    from vllm_puzzle.bench.kernel.attention import AttentionProblem
    from vllm_puzzle.bench.kernel.ffn import FfnProblem

    torch.manual_seed(0)
    if isinstance(case, FfnCase):
        return FfnProblem(case, device, vllm_source)
    return AttentionProblem(case, device, vllm_source)


def wanted_baselines(case: Case, which: str) -> set[str] | None:
    """Names of baselines to run, None for all: `which` is one of BASELINE_CHOICES."""
    named = {name for goal in plan.goals_of(case) for name in goal.quantity.baselines}
    if which in ("all", "none"):
        return None if which == "all" else set()
    if which == "goals":
        return named
    is_quick = any(case.name == other.name for other in plan.QUICK)
    more = set(plan.BASELINES) - plan.SLOW_TO_COMPILE if is_quick else plan.VLLM_BASELINES
    return named | more | (plan.SLOW_TO_COMPILE if case in plan.WITH_COMPILED else set())


def release() -> None:
    """Give back a case's memory: tensors, CUDA graphs and what the allocator keeps."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()


def save(args: argparse.Namespace, setting: dict[str, Any], rows: Sequence[Row]) -> None:
    """Write the files that were asked for: after each case, so that a hang costs that case only."""
    if args.json and args.json != "-":
        text = as_json(rows, setting, report.verdicts(rows))
        Path(args.json.format(card=setting["slug"])).write_text(text + "\n")
    if args.csv:
        with Path(args.csv.format(card=setting["slug"])).open("w", newline="") as file:
            write_csv(file, rows, setting)
