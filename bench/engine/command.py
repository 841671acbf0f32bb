"""`vllm-puzzle bench engine SUITE`: real shapes with random weights through vLLM's engine, held against the papers."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from vllm_puzzle.bench.engine import report
from vllm_puzzle.bench.engine.case import FIT, Shape, parse_shape
from vllm_puzzle.bench.engine.plan import find_gpu
from vllm_puzzle.bench.engine.rows import FAILED, REFUSED, Machine, find_commit, find_machine, load, open_results
from vllm_puzzle.bench.engine.runner import run_suite
from vllm_puzzle.bench.engine.session import Run
from vllm_puzzle.bench.engine.suites import CPU, GPU, SUITES, Suite, find_suite
from vllm_puzzle.model_configs.schema import ConfigError
from vllm_puzzle.serving.cpu_defaults import is_cpu_engine

DEFAULT_LIMIT_S = 3600.0


def make_parser() -> argparse.ArgumentParser:
    """The subcommand's flags."""
    suites = "\n".join(f"  {name:<10} {purpose}" for name, purpose in SUITES.items())
    parser = argparse.ArgumentParser(
        prog="vllm-puzzle bench engine",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Throughput of published shapes in vLLM's engine, with random weights, beside the papers' figures.",
        epilog=f"suites:\n{suites}",
    )
    parser.add_argument("suite", nargs="?", metavar="SUITE", help="one of those below")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="write engine-SUITE-CARD.json and .csv there, and go on"
    )
    parser.add_argument("--time-limit", type=float, default=DEFAULT_LIMIT_S, metavar="SECONDS", help="for all of it")
    parser.add_argument("--plan", action="store_true", help="print memory, cases and seconds; start nothing")
    parser.add_argument("--gpu", metavar="NAME", help="plan for this card instead of the one that is here")
    parser.add_argument("--only", metavar="VARIANT,…", help="only these variants")
    parser.add_argument("--shapes", metavar="IN/OUT,…", help="only these lengths")
    parser.add_argument("--batches", metavar="N,…", help="only these batches (`fit`: as many as fit)")
    parser.add_argument(
        "--blocks", type=int, metavar="N", help="of a comparison of two engines (an even number is best)"
    )
    parser.add_argument("--again", action="store_true", help="measure also what is in --out already")
    parser.add_argument("--commit", help="the measured commit, where git cannot tell")
    parser.add_argument(
        "--report", action="store_true", help="print what is in --out; without SUITE a short table of all"
    )
    return parser


def engine(argv: Sequence[str]) -> int:
    """Run; returns the exit status: 1 when a case failed or does not fit. Raises ConfigError for a mistake."""
    args = make_parser().parse_args(list(argv))
    if args.report:
        return _report(args)
    if args.suite is None:
        raise ConfigError(f"bench engine: found no suite, allowed: {', '.join(SUITES)}")
    machine = find_machine()
    computes_on_gpu = machine.has_gpu and not is_cpu_engine()
    suite = _chosen(args, find_suite(args.suite, computes_on_gpu or args.gpu is not None))
    gpu, card = find_gpu(args.gpu, machine.card, machine.gpu_bytes)
    if args.plan:
        text, fits = report.plan_text(suite, gpu, card)
        print(text)
        return 0 if fits else 1
    _check_engine(suite, computes_on_gpu)
    if suite.device == CPU:
        machine, gpu = Machine(str(machine.about["processor"]), None, machine.about), None
    results = open_results(args.out, suite.name, machine.card)
    results.machine = dict(machine.about)
    deadline = time.monotonic() + args.time_limit
    commit = find_commit(args.commit)
    with tempfile.TemporaryDirectory(prefix="engine-") as work:
        run_suite(Run(suite, machine, gpu, commit, results, args.out, Path(work), deadline, args.again, _show))
    text = report.summary(results)
    if args.out is not None:
        results.save(args.out)
    _show(f"\n{text}")
    asked = {case.name for variant in suite.variants for case in suite.cases(variant)}
    return int(any(row.status in (FAILED, REFUSED) for row in results.rows if row.case in asked))


def _check_engine(suite: Suite, computes_on_gpu: bool) -> None:
    """Raises ConfigError where the vLLM that is installed does not compute on what the suite is for."""
    where = f"bench engine {suite.name}"
    if find_spec("vllm") is None:
        raise ConfigError(f"{where}: found no vLLM in this Python, allowed: one with it (--plan needs none)")
    if suite.device == GPU and not computes_on_gpu:
        raise ConfigError(f"{where}: found no GPU that this vLLM computes on, allowed: one (--plan --gpu NAME without)")
    if suite.device == CPU and not is_cpu_engine():
        raise ConfigError(f"{where}: found a vLLM that computes on a GPU, allowed: its CPU build")


def _chosen(args: argparse.Namespace, suite: Suite) -> Suite:
    """The part of the suite that the flags ask for. Raises ConfigError."""
    only = tuple(_split(args.only))
    shapes: tuple[Shape, ...] = tuple(parse_shape(text) for text in _split(args.shapes))
    batches = tuple(_batch(text) for text in _split(args.batches))
    suite = suite.choose(only, shapes, batches)
    if args.blocks is None:
        return suite
    if not suite.pairs or not 1 <= args.blocks <= 1000:
        raise ConfigError(
            f"bench engine {suite.name}, `--blocks`: found {args.blocks}, allowed: 1 to 1000, in a suite that compares"
        )
    return replace(suite, blocks=args.blocks)


def _report(args: argparse.Namespace) -> int:
    """Print what was measured; the exit status is 0."""
    if args.out is None or not args.out.is_dir():
        raise ConfigError(f"bench engine, `--report`: found --out {args.out}, allowed: a folder of results")
    pattern = f"engine-{args.suite or '*'}-*.json"
    found = [load(path) for path in sorted(args.out.glob(pattern)) if not path.name.startswith("engine-kv-capacity")]
    if args.suite is not None:
        found = [results for results in found if results.suite == args.suite]
        for results in found:
            print(report.summary(results))
    else:
        print(report.short_table(found))
    return 0


def _split(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def _batch(text: str) -> int:
    if text == "fit":
        return FIT
    if not text.isdigit() or int(text) < 1:
        raise ConfigError(f"bench engine, `--batches`: found {text!r}, allowed: whole numbers from 1, or `fit`")
    return int(text)


def _show(text: str) -> None:
    print(text, file=sys.stdout, flush=True)
