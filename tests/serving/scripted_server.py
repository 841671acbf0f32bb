"""Serve a scripted model: `scripted_server.py ours|stock MODEL [flags]`.

`ours` is `vllm-puzzle serve`; `stock` is `vllm serve` without any plugin. Both fork the engine process, which saves
importing vLLM again and hands the model's class on.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

FLAGS = ("--load-format", "dummy", "--dtype", "float32", "--enforce-eager", "--max-model-len", "4096")


def serve_stock(argv: list[str]) -> None:
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm_puzzle.serving import vllm_compat

    command, cli_env_setup = vllm_compat.serve_command()
    cli_env_setup()
    parser = FlexibleArgumentParser()
    command.subparser_init(parser.add_subparsers(dest="subparser"))
    args = parser.parse_args(["serve", *argv, "--host", "127.0.0.1", "--kv-cache-memory-bytes", str(1 << 26)])
    command.validate(args)
    vllm_compat.fork_engine_core()
    command.cmd(args)


def main(kind: str, argv: list[str]) -> None:
    os.environ |= {"OMP_NUM_THREADS": "1", "VLLM_CPU_CI_ENV": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    if kind == "stock":
        os.environ |= {"VLLM_PLUGINS": "none", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    sys.path.insert(0, str(Path(__file__).parent))  # PYTHONSAFEPATH, which CI sets, leaves it out
    import harmony_model
    import scripted_model

    scripted_model.register()
    harmony_model.register()
    argv = [*argv, *FLAGS]
    if kind == "stock":
        serve_stock(argv)
    else:
        from vllm_puzzle.serving.cli import main as cli

        sys.exit(cli(["serve", *argv]))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
