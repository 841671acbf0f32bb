"""`vllm-puzzle bench run` and `vllm-puzzle bench sweep`."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
from vllm_puzzle.bench.efficiency.arm import Arm, Load
from vllm_puzzle.bench.efficiency.energy import find_meter
from vllm_puzzle.bench.efficiency.flags import (
    OPEN_WARM_UPS,
    arm_from,
    config_from,
    deployment_from,
    gpu_ids,
    load_from,
    make_parser,
    tokenizer_from,
    words,
)
from vllm_puzzle.bench.efficiency.machine import describe_machine, describe_versions, raise_file_limit, raise_priority
from vllm_puzzle.bench.efficiency.manifest import INTERRUPTED
from vllm_puzzle.bench.efficiency.progress import Progress
from vllm_puzzle.bench.efficiency.question import Question, warm_up_list, work_list
from vllm_puzzle.bench.efficiency.run import Setup, exit_status, run_arm, wait_until_up
from vllm_puzzle.bench.efficiency.runner import Options
from vllm_puzzle.bench.efficiency.server_facts import first_model
from vllm_puzzle.bench.efficiency.summary import Deployment
from vllm_puzzle.bench.efficiency.sweep import MIN_BLOCKS, RETRIES, Plan, Setting, run_sweep
from vllm_puzzle.bench.efficiency.sweep_config import configured, listed_arms, listed_loads
from vllm_puzzle.bench.efficiency.tasks.registry import find_task
from vllm_puzzle.bench.efficiency.wire import WireTransport
from vllm_puzzle.model_configs.schema import ConfigError

HEADLINES = (
    ("accuracy", "{:.1%}"),
    ("request_throughput", "{:.3g} requests/s"),
    ("tokens_per_request", "{:.1f} tokens per request"),
    ("ttfat_p50", "TTFAT p50 {:.3g} s"),
    ("e2e_p50", "whole p50 {:.3g} s"),
)
Body = Callable[[httpx.AsyncBaseTransport], Coroutine[Any, Any, str]]


def run(argv: Sequence[str]) -> int:
    """One arm under one load. Returns the exit status, raises ConfigError."""
    options = make_parser(
        "run", "one setting of a server under one load: accuracy and cost of the same requests"
    ).parse_args(argv)
    load = load_from(options)

    async def body(transport: httpx.AsyncBaseTransport) -> str:
        arm = await arm_of(transport, options)
        await wait_until_up(transport, arm, options.ready_check_timeout_sec)
        questions, warm_up = questions_of(options, load)
        asks = work_list(questions, options.num_prompts, options.seed)
        show = Progress(len(asks), arm.name)
        setup = setup_of(options, arm)
        setup = replace(setup, options=replace(setup.options, on_record=show.add))
        summary = await run_arm(arm, load, asks, warm_up, options.out, transport, setup)
        show.finish()
        print(headline(summary))
        return str(summary["status"])

    return with_transport(options, body)


def sweep(argv: Sequence[str]) -> int:
    """Arms × loads in blocks. Returns the exit status, raises ConfigError."""
    parser = make_parser(
        "sweep", "settings and loads in interleaved blocks; the same command again goes on after a crash"
    )
    group = parser.add_argument_group("sweep")
    group.add_argument("--config", type=Path, help="YAML: flags by name; `arms`, `loads` are lists of such")
    group.add_argument("--thinkings", default="", help="one arm for each: on,off,auto")
    group.add_argument("--efforts", default="", help="one arm for each, comma-separated")
    group.add_argument("--budgets", default="", help="one arm for each, comma-separated")
    group.add_argument("--concurrencies", default="", help="one closed load for each")
    group.add_argument("--request-rates", default="", help="one open load for each")
    group.add_argument("--blocks", type=int, default=MIN_BLOCKS)
    group.add_argument("--retries", type=int, default=RETRIES, help="of a block for which the client was too slow")
    group.add_argument("--split-questions", action="store_true", help="each block asks its share instead of all")
    arms, loads = configured(parser, argv)
    options = parser.parse_args(argv)
    arms = arms or listed_arms(options)
    loads = loads or listed_loads(options)

    async def body(transport: httpx.AsyncBaseTransport) -> str:
        made = [await arm_of(transport, options, arm) for arm in arms]
        for arm in {arm.root: arm for arm in made}.values():
            await wait_until_up(transport, arm, options.ready_check_timeout_sec)
        deployed = [(arm, deployment_from(_with(options, changes))) for arm, changes in zip(made, arms, strict=True)]
        plan = _plan(options, deployed, [load_from(_with(options, load)) for load in loads])
        show = Progress(plan.blocks * len(plan.settings) * len(plan.asks(0)))
        status = await run_sweep(plan, options.out, transport, setup_of(options, made[0]), show, options.retries)
        show.finish()
        return status

    return with_transport(options, body)


def _plan(options: argparse.Namespace, arms: Sequence[tuple[Arm, Deployment]], loads: Sequence[Load]) -> Plan:
    settings = []
    questions: tuple[Question, ...] = ()
    for load in loads:
        questions, warm_up = questions_of(options, load)
        settings += [Setting(arm, load, warm_up, deployment) for arm, deployment in arms]
    return Plan(tuple(settings), questions, options.num_prompts, options.seed, options.blocks, options.split_questions)


def _with(options: argparse.Namespace, changes: Mapping[str, Any]) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(options), **changes})


def with_transport(options: argparse.Namespace, body: Body) -> int:
    """Run `body` on a connection to the server; the exit status that its run's status means."""

    async def main() -> str:
        transport = WireTransport(asyncio.get_running_loop().time, verify=not options.insecure)
        try:
            return await body(transport)
        finally:
            await transport.aclose()

    raise_file_limit()
    try:
        status = asyncio.run(main())
    except KeyboardInterrupt:  # between two runs of a sweep
        status = INTERRUPTED
    if exit_status(status):
        print(f"vllm-puzzle: run is not to be compared: {status}", file=sys.stderr)
    return exit_status(status)


async def arm_of(transport: httpx.AsyncBaseTransport, options: argparse.Namespace, changes: Any = None) -> Arm:
    """The arm; its model's name is the server's first where none is given."""
    changes = dict(changes or {})
    model = changes.get("model", options.model)
    arm = arm_from(options, model or "", **changes)
    if not model:
        await wait_until_up(transport, arm, options.ready_check_timeout_sec)
        model = await first_model(transport, arm.root, arm.headers)
        if model is None:
            raise ConfigError(f"--model: found none, and no list at {arm.root}/v1/models, allowed: a served name")
    return replace(arm, model=model)


def questions_of(options: argparse.Namespace, load: Load) -> tuple[tuple[Question, ...], tuple[Question, ...]]:
    """What is measured, and what warms up: others of the same tasks."""
    if options.num_prompts < 1:
        raise ConfigError(f"--num-prompts: found {options.num_prompts}, allowed: 1 or more")
    default = OPEN_WARM_UPS if load.is_open else load.concurrency or 0
    warm_ups = default if options.num_warmups is None else options.num_warmups
    tasks = [find_task(name.strip()) for name in options.task.split(",")]
    share = -(-options.num_prompts // len(tasks))
    measured: list[Question] = []
    spare: list[Question] = []
    for task in tasks:
        found = task.questions(share + warm_ups, options.seed)
        measured += found[:share]
        spare += found[share:]
    return tuple(measured), warm_up_list(spare, measured, warm_ups, options.seed)


def setup_of(options: argparse.Namespace, arm: Arm) -> Setup:
    """What a run needs beside its arm, load and questions. The server's meters are read where it is on this machine."""
    meter = None
    if _is_local(arm):
        meter = find_meter(gpu_ids(options))
        if options.nice is not None:
            raise_priority(options.nice)
    return Setup(
        seed=options.seed,
        cache=options.prefix_cache,
        deployment=deployment_from(options),
        config=config_from(options),
        metadata=words(options.metadata, "--metadata"),
        found={"machine": describe_machine(), "versions": describe_versions(), "task": options.task},
        per_task=options.speculation_per_task,
        options=Options(tokenizer=tokenizer_from(options.tokenizer), keeps_text=options.save_detailed, meter=meter),
    )


def _is_local(arm: Arm) -> bool:
    """Whether the server is on this machine, so that its meters are the server's."""
    host = urlsplit(arm.root).hostname or ""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def headline(summary: Mapping[str, Any]) -> str:
    """A run in one line, and another for each thing that is wrong with it."""
    metrics = summary["metrics"]
    parts = [f"{summary['arm']} {summary['load']} {summary['status']}, {summary['stationarity']['label']}"]
    for name, form in HEADLINES:
        value = metrics.get(name)
        if value is not None:
            parts.append(form.format(float(value)))
    lines = [": ".join([parts[0], ", ".join(parts[1:])])]
    lines += [f"  {reason}" for reason in summary["invalid_because"]]
    lines += [f"  {times} times {error}" for error, times in summary["errors"].items()]
    return "\n".join(lines)
