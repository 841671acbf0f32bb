"""`vllm-puzzle bench`: the benchmarks by name. The command finds this through the entry points `vllm_puzzle.commands`,
so that what serves never imports what measures.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from vllm_puzzle.model_configs.schema import ConfigError

# name → (where its function lies, what it measures); imported when asked for.
EFFICIENCY = "vllm_puzzle.bench.efficiency"
BENCHMARKS = {
    "run": (f"{EFFICIENCY}.command:run", "one setting: accuracy and cost from the same requests"),
    "sweep": (f"{EFFICIENCY}.command:sweep", "several settings under several loads, interleaved, resumable"),
    "compare": (f"{EFFICIENCY}.compare:compare", "two runs, paired by question: a verdict and an exit status for CI"),
    "report": (f"{EFFICIENCY}.report:report", "one HTML page of runs"),
    "calibrate": (f"{EFFICIENCY}.calibrate:calibrate", "a model's map of effort to thinking budget, for the server"),
    "tasks": (f"{EFFICIENCY}.tasks.command:tasks", "the questions that can be asked, offline"),
    "mock": (f"{EFFICIENCY}.mock:mock", "a server of known behaviour, to check the benchmark with"),
    "kernels": ("vllm_puzzle.bench.kernel.command:kernels", "our kernels on a GPU, against its limits and others'"),
    "engine": ("vllm_puzzle.bench.engine.command:engine", "published shapes through vLLM, beside the papers' figures"),
}


def bench(argv: Sequence[str]) -> int:
    """Run one benchmark; without a name, list them. Returns the exit status, raises ConfigError for a mistake."""
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: vllm-puzzle bench NAME [--help]\n")
        for name, (_, purpose) in BENCHMARKS.items():
            print(f"  {name:<10} {purpose}")
        return 0
    if argv[0] not in BENCHMARKS:
        raise ConfigError(f"bench: found {argv[0]!r}, allowed: {', '.join(BENCHMARKS)}")
    module, _, function = BENCHMARKS[argv[0]][0].partition(":")
    run: Callable[[Sequence[str]], int] = getattr(import_module(module), function)
    return run(argv[1:])


def main() -> int:
    """As `vllm-puzzle bench`, for a machine on which the package is not installed."""
    try:
        return bench(sys.argv[1:])
    except ConfigError as error:
        print(f"vllm-puzzle: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
