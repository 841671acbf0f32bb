"""Flags of `run` and `sweep`, by `vllm bench serve`'s names where it has one, and what becomes of them."""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_puzzle.bench.efficiency.arm import (
    CLOSED,
    CONSTANT,
    GAMMA,
    POISSON,
    RAMPS,
    THINKING,
    TIMEOUT_S,
    TRACE,
    Arm,
    Load,
    json_object,
    merged,
    thinking_fields,
)
from vllm_puzzle.bench.efficiency.run import AUTO, CACHES
from vllm_puzzle.bench.efficiency.slo import Slo
from vllm_puzzle.bench.efficiency.summary import Deployment
from vllm_puzzle.bench.efficiency.tasks.registry import TASKS
from vllm_puzzle.model_configs.schema import ConfigError

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty")
DEFAULT_CONCURRENCY = 8
OPEN_WARM_UPS = 16


def make_parser(name: str, purpose: str) -> argparse.ArgumentParser:
    """The parser with every flag that both commands have."""
    parser = argparse.ArgumentParser(prog=f"vllm-puzzle bench {name}", description=purpose)
    _server_flags(parser.add_argument_group("server"))
    _load_flags(parser.add_argument_group("load"))
    _request_flags(parser.add_argument_group("requests"))
    _result_flags(parser.add_argument_group("results"))
    return parser


def _server_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--base-url", default="http://127.0.0.1:8000", help="with or without /v1")
    add("--endpoint", default="/v1/chat/completions")
    add("--model", help="served name (default: the server's first)")
    add("--header", action="append", default=[], metavar="KEY=VALUE", help="OPENAI_API_KEY is sent by itself")
    add("--insecure", action="store_true", help="do not check certificates")
    add("--ready-check-timeout-sec", type=float, default=0.0, help="how long to wait for the server")
    add("--num-gpus", type=int, help="that serve; costs are per GPU-second then")
    add("--num-cores", type=int, help="that serve, where no GPU does")
    add("--gpu-ids", help="of this machine, comma-separated: whose energy is read (default: all)")
    add("--nice", type=int, help="priority of the client beside a server on this machine, such as -10, if permitted")
    add("--idle-power-w", type=float, help="of all devices together, for energy above idle")
    add("--price-per-device-hour", type=float, help="dollars")


def _load_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--num-prompts", type=int, default=200)
    add("--request-rate", type=float, help="open load: requests per second (default: closed load)")
    add("--burstiness", type=float, default=1.0, help="1: Poisson; below: bursts; gamma-distributed gaps as vLLM's")
    add("--constant", action="store_true", help="open load with equal gaps")
    add("--trace", type=Path, help='open load at the times of a file: seconds, or JSON lines with "timestamp" in ms')
    add("--max-concurrency", type=int, help=f"closed load: at a time ({DEFAULT_CONCURRENCY}); open load: at most")
    add("--ramp-up-strategy", choices=RAMPS)
    add("--ramp-up-start-rps", type=float)
    add("--ramp-up-end-rps", type=float)
    add("--num-warmups", type=int, help=f"(default: the concurrency, or {OPEN_WARM_UPS} in an open load)")
    add("--seed", type=int, default=0)


def _request_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--task", default="pocket", help=f"comma-separated, of {', '.join(TASKS)}")
    add("--thinking", choices=THINKING, default="auto")
    add("--effort", help="sent as reasoning_effort")
    add("--budget", type=int, help="sent as thinking_token_budget")
    add("--max-tokens", type=int, help="(default: the server's limit; a truncated reply is a wrong one)")
    for name in SAMPLING:
        add("--" + name.replace("_", "-"), type=int if name == "top_k" else float)
    add("--extra-body", help="JSON object of request fields")
    add("--chat-template-kwargs", help="JSON object")
    add("--timeout", type=float, default=TIMEOUT_S, help="seconds after which a request is given up")
    add("--no-continuous-usage", action="store_true", help="ask for token counts at the end only")
    add("--tokenizer", type=Path, help="tokenizer.json or its folder: counts and checks tokens at the client")
    add("--prefix-cache", choices=CACHES, default=AUTO, help="salted: no run finds another's prompts in the cache")
    add("--ignore-eos", action="store_true", help=argparse.SUPPRESS)


def _result_flags(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--out", type=Path, required=True, help="folder of the results")
    add("--label", help="name of the arm")
    add("--goodput", nargs="+", default=[], metavar="NAME:MS", help="limits on ttft, ttfat, tpot, e2el")
    add("--margin", type=float, help="of accuracy, that `compare` is to hold arms to: declared before the run")
    add("--reference", help="name of the arm that others are compared with")
    add("--save-detailed", action="store_true", help="keep the texts of answers and thoughts")
    add("--metadata", nargs="+", default=[], metavar="KEY=VALUE")
    add("--speculation-per-task", type=int, default=0, help="questions per task for its own acceptance")


def load_from(options: argparse.Namespace) -> Load:
    """The load that the flags describe. Raises ConfigError."""
    limit = options.max_concurrency
    if options.trace is not None:
        return Load(TRACE, concurrency=limit, times=read_trace(options.trace))
    rate = options.request_rate
    if options.ramp_up_strategy is None and (rate is None or math.isinf(rate)):
        return Load(CLOSED, concurrency=DEFAULT_CONCURRENCY if limit is None else limit)
    kind = CONSTANT if options.constant else POISSON if options.burstiness == 1 else GAMMA
    return Load(
        kind,
        limit,
        rate,
        options.burstiness,
        options.ramp_up_strategy,
        options.ramp_up_start_rps,
        options.ramp_up_end_rps,
    )


def read_trace(path: Path) -> tuple[float, ...]:
    """Times in seconds. Raises ConfigError."""
    times = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: found {error}, allowed: a file of times") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
            time = float(found["timestamp"]) / 1000 if isinstance(found, dict) else float(found)
        except (ValueError, KeyError, TypeError):
            time = math.nan
        if not math.isfinite(time):
            raise ConfigError(f"{path}, line {number}: found {line[:40]!r}, allowed: seconds or a JSON timestamp")
        times.append(time)
    return tuple(times)


def arm_from(options: argparse.Namespace, model: str, **changes: Any) -> Arm:
    """The arm that the flags describe; `changes` are an arm's own settings in a sweep, by the flags' names."""
    chosen = argparse.Namespace(**{**vars(options), **changes})
    if chosen.ignore_eos:
        raise ConfigError("ignore_eos: found true, allowed: false; a reply of fixed length hides what thinking saves")
    name = chosen.label or setting_name(chosen.thinking, chosen.effort, chosen.budget)
    template = _object(chosen.chat_template_kwargs, "--chat-template-kwargs")
    fields = merged(
        _object(chosen.extra_body, "--extra-body"),
        {"chat_template_kwargs": template} if template else {},
        thinking_fields(name, chosen.thinking, chosen.effort, chosen.budget),
    )
    return Arm(
        name=name,
        base_url=chosen.base_url,
        model=model,
        endpoint=chosen.endpoint,
        fields=fields,
        sampling={key: getattr(chosen, key) for key in SAMPLING if getattr(chosen, key) is not None},
        max_tokens=chosen.max_tokens,
        budget=chosen.budget,
        headers=_headers(chosen.header),
        timeout_s=chosen.timeout,
        is_continuous=not chosen.no_continuous_usage,
    )


def setting_name(thinking: str, effort: str | None, budget: int | None) -> str:
    """A name for a mode: off, on, auto, effort-low, budget-32, effort-low-budget-32."""
    parts = [f"effort-{effort}" if effort is not None else "", f"budget-{budget}" if budget is not None else ""]
    return "-".join(part for part in parts if part) or thinking


def deployment_from(options: argparse.Namespace) -> Deployment:
    """What serves, and the limits. GPUs that are named are those that serve."""
    slo = Slo.parse(options.goodput) if options.goodput else None
    ids = gpu_ids(options)
    num_gpus = len(ids) if ids and options.num_gpus is None else options.num_gpus
    return Deployment(num_gpus, options.num_cores, options.idle_power_w, options.price_per_device_hour, slo)


def gpu_ids(options: argparse.Namespace) -> list[int] | None:
    """GPUs of this machine whose energy is to be read; None for all. Raises ConfigError."""
    try:
        return [int(part) for part in options.gpu_ids.split(",")] if options.gpu_ids else None
    except ValueError:
        raise ConfigError(f"--gpu-ids: found {options.gpu_ids!r}, allowed: numbers, comma-separated") from None


def config_from(options: argparse.Namespace) -> dict[str, Any]:
    """What is declared before the run."""
    return {"margin": options.margin, "reference": options.reference, "goodput": options.goodput}


def tokenizer_from(path: Path | None) -> Callable[[str], int] | None:
    """A counter of a text's tokens. Raises ConfigError."""
    if path is None:
        return None
    file = path / "tokenizer.json" if path.is_dir() else path
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # of the library's own kind, whatever is wrong
        raise ConfigError(f"tokenizer {file}: found {error}, allowed: a tokenizer.json") from None
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)


def words(items: Sequence[str], where: str) -> dict[str, str]:
    """KEY=VALUE words. Raises ConfigError."""
    found = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise ConfigError(f"{where}: found {item!r}, allowed: KEY=VALUE")
        found[key] = value
    return found


def _headers(items: Sequence[str]) -> dict[str, str]:
    key = os.environ.get("OPENAI_API_KEY")
    return ({"authorization": f"Bearer {key}"} if key else {}) | words(items, "--header")


def _object(found: str | Mapping[str, Any] | None, where: str) -> dict[str, Any]:
    """A flag's text, or what a sweep's file holds under the same name."""
    if isinstance(found, Mapping):
        return dict(found)
    return {} if found is None else json_object(found, where)
