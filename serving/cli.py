"""The `vllm-puzzle` command. Each subcommand imports only what it needs; `inspect` needs neither torch nor vLLM."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

USAGE = """\
usage: vllm-puzzle serve [MODEL] [any flag of `vllm serve`]
       vllm-puzzle inspect MODEL_CONFIG_OR_NAME [--json]
       vllm-puzzle models [--json]
       vllm-puzzle convert SRC DST --to {per_layer_config,anymodel,deci}
       vllm-puzzle gateway --upstream URL [--upstream-kind KIND] [--tokenizer DIR]
       vllm-puzzle fuse plan MODEL --data FILE [--max-gib N] [--out plan.json]
       vllm-puzzle bench [NAME]

  serve    start an OpenAI-compatible server; without MODEL, the pocket model that the package ships
           (`vllm-puzzle serve --help` lists vLLM's flags)
  inspect  show a model's layers, parameters and KV-cache bytes, from its config.json alone
  models   list the published models that are known by name: sizes, how reasoning is switched, smallest GPU
  convert  write the same model under another description; weights are linked, not changed
  gateway  the reasoning dial in front of any OpenAI-compatible server (`vllm-puzzle gateway --help`)
  fuse     measure which FFNs of a model can become one, and plan it (`vllm-puzzle fuse --help`)
  bench    measure on this machine; without NAME, list what can be measured
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status. A user's mistake is one line on stderr and status 1."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    command, rest = arguments[0], arguments[1:]
    from vllm_puzzle.model_configs.schema import ConfigError

    try:
        if command == "serve":
            from vllm_puzzle.serving.serve import serve

            return serve(rest)
        if command == "inspect":
            from vllm_puzzle.model_configs.inspect_model import inspect

            status = inspect(rest)
            sys.stdout.flush()
            return status
        if command == "models":
            from vllm_puzzle.model_configs.models_command import models

            status = models(rest)
            sys.stdout.flush()
            return status
        if command == "convert":
            from vllm_puzzle.model_configs.convert import convert

            return convert(rest)
        if command == "gateway":
            from vllm_puzzle.serving.gateway.command import gateway

            return gateway(rest)
        if command == "fuse":
            from vllm_puzzle.serving.fuse.command import fuse

            return fuse(rest)
        # `bench` lies above serving and is found by name, as any other package's subcommand would be.
        from importlib.metadata import entry_points

        others = entry_points(group="vllm_puzzle.commands")
        if command in others.names:
            status = others[command].load()(rest)
            sys.stdout.flush()
            return status
    except BrokenPipeError:  # `… | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ConfigError as error:
        print(f"vllm-puzzle: {error}", file=sys.stderr)
        return 1
    allowed = ", ".join(["serve", "inspect", "models", "convert", "gateway", "fuse", *sorted(others.names)])
    print(f"vllm-puzzle: found subcommand {command!r}, allowed: {allowed}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
