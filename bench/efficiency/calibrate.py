"""`vllm-puzzle bench calibrate`: measures a model's effort → budget map and writes the file that the server reads.

First unlimited thinking, then the same questions under a ladder of budgets; what was measured already is not measured
again. `vllm-puzzle serve` takes the file as its policy's `budgets`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import yaml
from vllm_puzzle.bench.efficiency.arm import Arm, Load, merged, thinking_fields
from vllm_puzzle.bench.efficiency.calibration import (
    DEFAULT_LEVELS,
    UNLIMITED,
    Natural,
    Rule,
    Rung,
    choose,
    ladder_of,
    natural_of,
    provenance,
    read_rules,
    rung_of,
)
from vllm_puzzle.bench.efficiency.command import arm_of, questions_of, setup_of, with_transport
from vllm_puzzle.bench.efficiency.flags import load_from, make_parser
from vllm_puzzle.bench.efficiency.metrics_request import thinking_tokens
from vllm_puzzle.bench.efficiency.progress import Progress
from vllm_puzzle.bench.efficiency.question import Question
from vllm_puzzle.bench.efficiency.record import RequestRecord, measured, read_records
from vllm_puzzle.bench.efficiency.run import Setup, wait_until_up
from vllm_puzzle.bench.efficiency.run_folder import COMPLETE, REQUESTS
from vllm_puzzle.bench.efficiency.sweep import Plan, Setting, run_sweep
from vllm_puzzle.bench.efficiency.tables import number, percent, points, table
from vllm_puzzle.bench.efficiency.uncertainty import detectable_difference
from vllm_puzzle.model_configs.schema import ConfigError

MAP_NAME = "budgets.yaml"
_HEAD = (
    "# Written by `vllm-puzzle bench calibrate`. A policy of `vllm-puzzle serve --puzzle-reasoning` can name this\n"
    "# file as its `budgets`, or hold these lines.\n"
)


def calibrate(argv: Sequence[str]) -> int:
    """Run the command. Returns the exit status, raises ConfigError."""
    parser = make_parser("calibrate", "which budget each effort is to have: measures, and writes the server's file")
    group = parser.add_argument_group("calibrate")
    group.add_argument("--budgets", help="comma-separated (default: quantiles of the natural length)")
    levels = ", ".join(f"{effort}={text}" for effort, text in DEFAULT_LEVELS.items())
    group.add_argument(
        "--level", action="append", default=[], metavar="EFFORT=RULE",
        help=f"accuracy that may be lost, p50 and the like of natural length, or unlimited (default: {levels})",
    )  # fmt: skip
    group.add_argument("--map", type=Path, help=f"the file (default: {MAP_NAME} in --out); other models in it stay")
    parser.set_defaults(thinking="on")
    options = parser.parse_args(argv)
    if options.budget is not None or options.effort is not None or options.thinking == "off":
        raise ConfigError("calibrate: found --budget, --effort or --thinking off, allowed: none of them; it tries all")
    rules, budgets = read_rules(options.level), _budgets(options.budgets)
    load = load_from(options)
    file: Path = options.map or options.out / MAP_NAME

    async def body(transport: httpx.AsyncBaseTransport) -> str:
        arm = replace(await arm_of(transport, options), name="unlimited")
        await wait_until_up(transport, arm, options.ready_check_timeout_sec)
        questions, warm_up = questions_of(options, load)
        found = Calibration(
            options.out, transport, load, questions[: options.num_prompts], warm_up, setup_of(options, arm)
        )
        status = await found.measure(arm, budgets, options.seed)
        if status == COMPLETE:
            finish(found, arm, rules, options, file)
        return status

    return with_transport(options, body)


class Calibration:
    """The measurements of one model: `natural` and `rungs` once they are there."""

    def __init__(
        self,
        out: Path,
        transport: httpx.AsyncBaseTransport,
        load: Load,
        questions: Sequence[Question],
        warm_up: Sequence[Question],
        setup: Setup,
        progress: Progress | None = None,
    ) -> None:
        self.out, self.transport, self.load = out, transport, load
        # Only answers and lengths count, and those are the same however late the client is.
        self.setup = replace(setup, lag_limit=math.inf)
        self.questions, self.warm_up = tuple(questions), tuple(warm_up)
        self.progress = progress
        self.records: list[RequestRecord] = []
        self.natural: Natural | None = None
        self.rungs: list[Rung] = []

    async def measure(self, arm: Arm, budgets: Sequence[int] = (), seed: int = 0) -> str:
        """All that is to be measured; `complete`, or why it ended early. Raises ConfigError.

        arm: of unlimited thinking. budgets: none for the quantiles of its lengths.
        """
        status = await self._sweep([arm], self.out / "unlimited", seed)
        if status != COMPLETE:
            return status
        self.records = self._read(arm, self.out / "unlimited")
        self.natural = natural_of(self.records)
        arms = [limited(arm, budget) for budget in budgets or ladder_of(self.natural)]
        status = await self._sweep(arms, self.out / "budgets", seed)
        if status == COMPLETE:
            self.rungs = [rung_of(a.budget or 0, self._read(a, self.out / "budgets"), self.records) for a in arms]
        return status

    @property
    def lengths(self) -> list[int]:
        """Tokens of each unlimited thought."""
        return [count for record in measured(self.records) if (count := thinking_tokens(record)) is not None]

    async def _sweep(self, arms: Sequence[Arm], out: Path, seed: int) -> str:
        settings = tuple(Setting(arm, self.load, self.warm_up) for arm in arms)
        plan = Plan(settings, self.questions, len(self.questions), seed, blocks=1)
        show = self.progress or Progress(len(arms) * len(self.questions))
        return await run_sweep(plan, out, self.transport, self.setup, show)

    def _read(self, arm: Arm, out: Path) -> list[RequestRecord]:
        folder = out / Setting(arm, self.load, ()).name
        return list(read_records(folder / REQUESTS))


def limited(arm: Arm, budget: int) -> Arm:
    """The same under a budget."""
    name = f"budget-{budget}"
    return replace(
        arm, name=name, budget=budget, fields=merged(arm.fields, thinking_fields(name, "auto", None, budget))
    )


def _budgets(text: str | None) -> list[int]:
    if not text:
        return []
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and 0 < int(word) < 2**31 for word in words):
        raise ConfigError(f"--budgets: found {text!r}, allowed: token counts above 0, comma-separated")
    return sorted({int(word) for word in words})


def finish(found: Calibration, arm: Arm, rules: Mapping[str, Rule], options: argparse.Namespace, file: Path) -> None:
    """Write the file and print what it says and why. Raises ConfigError where it cannot be written."""
    assert found.natural is not None, "measured"
    budgets = choose(rules, found.natural, found.lengths, found.rungs)
    versions = found.setup.found.get("versions") or {}
    how = {
        "measured_with": f"vllm-puzzle bench calibrate {versions.get('vllm-puzzle', '')}".strip(),
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": versions.get("commit"),
        "task": options.task,
        "seed": options.seed,
        "sampling": dict(arm.sampling),
        "max_tokens": arm.max_tokens,
        **provenance(rules, found.natural, found.rungs),
    }
    write_map(file, arm.model, budgets, how)
    print(summary(arm.model, found.natural, found.rungs, budgets))
    print(f"\n{file}")


def write_map(file: Path, model: str, budgets: Mapping[str, int], how: Mapping[str, Any]) -> None:
    """Put a model's map into the file, beside those of other models. Raises ConfigError."""
    document: dict[str, Any] = {}
    try:
        if file.exists():
            document = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
            keys = (
                [document.get(key, {}) for key in ("budgets", "provenance")] if isinstance(document, dict) else [None]
            )
            if not all(isinstance(part, dict) for part in keys) or not set(document) <= {"budgets", "provenance"}:
                raise ConfigError(f"{file}: found something else, allowed: a map of budgets, or no file")
        document = {
            "budgets": {**document.get("budgets", {}), model: dict(budgets)},
            "provenance": {**document.get("provenance", {}), model: dict(how)},
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=120)
        file.write_text(_HEAD + text, encoding="utf-8")
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{file}: found {' '.join(str(error).split())}, allowed: a YAML file") from None


def summary(model: str, natural: Natural, rungs: Sequence[Rung], budgets: Mapping[str, int]) -> str:
    """For the terminal."""
    rows = [["unlimited", percent(natural.accuracy), "", number(natural.mean_thinking_tokens)]]
    for rung in sorted(rungs, key=lambda one: one.budget, reverse=True):
        bounds = f"{points(rung.difference.low)} … {points(rung.difference.high)}"
        rows.append([str(rung.budget), percent(rung.accuracy), bounds, number(rung.mean_thinking_tokens)])
    lengths = ", ".join(f"p{part} {tokens}" for part, tokens in natural.quantiles.items())
    chosen = [f"{effort}: {'no limit' if tokens == UNLIMITED else tokens}" for effort, tokens in budgets.items()]
    seen = detectable_difference(0.1, natural.requests)
    cut = f"{percent(natural.truncated)} were cut by max_tokens: natural lengths are longer than seen"
    lines = [
        f"{model}, {natural.requests} questions; thoughts of {lengths} tokens",
        table(["budget", "accuracy", "lost or won, points (95 %)", "mean thought"], rows),
        f"where one question in ten tells two settings apart, so many find a difference of {percent(seen)}",
        *([cut] if natural.truncated else []),
        "; ".join(chosen),
    ]  # fmt: skip
    return "\n".join(lines)
