"""`vllm-puzzle gateway`: flags, and the server process."""

from __future__ import annotations

import argparse
import socket
import sys
from collections.abc import Sequence
from urllib.parse import urlsplit

from vllm_puzzle.model_configs.schema import ConfigError
from vllm_puzzle.serving.gateway.kinds import AUTO, KINDS
from vllm_puzzle.serving.gateway.probe import BUDGET_BY


def make_parser() -> argparse.ArgumentParser:
    """The subcommand's flags."""
    parser = argparse.ArgumentParser(
        prog="vllm-puzzle gateway",
        description="One reasoning dial in front of any OpenAI-compatible server: each client's own field becomes that "
        "server's, and a budget is held in two calls where the server has none.",
    )
    parser.add_argument("--upstream", required=True, metavar="URL", help="the server behind: http://host:port[/v1]")
    parser.add_argument("--upstream-kind", choices=[AUTO, *KINDS], default=AUTO, help="what it is (default: asked)")
    parser.add_argument(
        "--budget-by",
        choices=BUDGET_BY,
        default="auto",
        help="who holds a thinking budget (default: the server if it can)",
    )
    parser.add_argument(
        "--tokenizer", metavar="DIR", help="the model's tokenizer and chat template: exact counts, any server"
    )
    parser.add_argument(
        "--think-markers",
        nargs=2,
        metavar=("START", "END"),
        default=["<think>", "</think>"],
        help="what opens and closes a thought (default: <think> </think>)",
    )
    parser.add_argument("--api-key", help="the key that clients must present; it is passed on")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8001)
    return parser


def gateway(argv: Sequence[str]) -> int:
    """Run until stopped; returns the exit status. Raises ConfigError for a user's mistake."""
    args = make_parser().parse_args(list(argv))
    parts = urlsplit(args.upstream)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ConfigError(f"`--upstream`: found {args.upstream!r}, allowed: http://host:port or https://host")
    if args.budget_by == "server" and args.upstream_kind != AUTO and not KINDS[args.upstream_kind].budget:
        raise ConfigError(f"`--budget-by`: found server with kind {args.upstream_kind}, which has no budget")
    if not all(args.think_markers):
        raise ConfigError("`--think-markers`: found an empty marker, allowed: two texts")
    import uvicorn
    from vllm_puzzle.serving.gateway.app import Gateway
    from vllm_puzzle.serving.gateway.continuation import Markers
    from vllm_puzzle.serving.gateway.prompt_template import PromptTemplate
    from vllm_puzzle.serving.gateway.service import Options
    from vllm_puzzle.serving.gateway.upstream import Upstream

    listener = _listen(args.host, args.port)
    template = PromptTemplate(args.tokenizer) if args.tokenizer else None
    options = Options(args.upstream_kind, args.budget_by, Markers(*args.think_markers), template)
    app = Gateway(Upstream(args.upstream, args.api_key), options, args.api_key)
    config = uvicorn.Config(app, log_level="warning", lifespan="on", timeout_graceful_shutdown=5)
    url = f"http://{args.host}:{listener.getsockname()[1]}"
    print(f"[vllm-puzzle gateway] listening on {url}", file=sys.stderr, flush=True)
    try:
        uvicorn.Server(config).run(sockets=[listener])
    except KeyboardInterrupt:
        return 130
    return 0


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket, or one line about why not."""
    try:
        if not 0 <= port <= 65535:  # the resolver would take it modulo 65536
            raise OverflowError("no such port")
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"`--host`, `--port`: found {host}:{port} ({error}), allowed: a free address") from error
    return listener
