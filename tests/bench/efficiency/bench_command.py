"""One benchmark as a command of its own: `python bench_command.py module:function [flag …]`.

A stand-in for `vllm-puzzle bench NAME` that does not depend on its list of names.
"""

from __future__ import annotations

import sys
from importlib import import_module

from vllm_puzzle.model_configs.schema import ConfigError


def main() -> int:
    module, _, function = sys.argv[1].partition(":")
    try:
        status: int = getattr(import_module(f"vllm_puzzle.bench.efficiency.{module}"), function)(sys.argv[2:])
    except ConfigError as error:
        print(f"vllm-puzzle: {error}", file=sys.stderr)
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main())
