"""One call of the benchmark: what is asked, until when, what is known; engines are started and rows kept here."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_puzzle.bench.engine import rows as record
from vllm_puzzle.bench.engine.case import Case, EngineVariant
from vllm_puzzle.bench.engine.driver import COMMAND, EngineChild, EngineError
from vllm_puzzle.bench.engine.model_folder import configuration, is_reconstructed, served_weights, write_folder
from vllm_puzzle.bench.engine.plan import START_S, memory_plan
from vllm_puzzle.bench.engine.report import case_line
from vllm_puzzle.bench.engine.rows import OK, REFUSED, SKIPPED, Machine, Results, Row
from vllm_puzzle.bench.engine.suites import Suite
from vllm_puzzle.model_configs.memory_plan import Gpu
from vllm_puzzle.serving.servable import OUR_ARCHITECTURES

RESERVE_S = 3.0  # for stopping an engine and writing the rows
OUR_CLASS = "PuzzleForCausalLM"
KV_WORDS = {"bf16": "bfloat16", "fp8": "fp8"}


@dataclass(slots=True)
class Run:
    """One call: what, where, until when (monotonic seconds), and what is known so far. `work` is a folder for models
    and the engines' logs.
    """

    suite: Suite
    machine: Machine
    gpu: Gpu | None
    commit: str
    results: Results
    folder: Path | None
    work: Path
    deadline: float
    is_again: bool
    show: Callable[[str], None]
    command: Sequence[str] = COMMAND
    corrections: dict[str, float] = field(default_factory=dict)

    @property
    def left(self) -> float:
        """Seconds until the limit."""
        return self.deadline - time.monotonic() - RESERVE_S

    def keep(self, row: Row) -> None:
        """Take a row in, write the files, show it. One that no time was left for does not replace a measured one."""
        is_measured = any(old.case == row.case and old.status == OK for old in self.results.rows)
        if row.status != SKIPPED or not is_measured:
            self.results.add(row)
            self.save()
        self.show(case_line(row))

    def save(self) -> None:
        """Write the files that were asked for."""
        if self.folder is not None:
            self.results.save(self.folder)

    def is_known(self, case: Case) -> bool:
        """Whether there is nothing to measure."""
        return not self.is_again and self.results.known(case.name, setup(case), self.commit) is not None

    @property
    def has_time_to_start(self) -> bool:
        """Whether an engine may be up before the limit."""
        return self.left >= 0.5 * START_S[self.machine.has_gpu]

    def give_up(self, cases: Sequence[Case], status: str, reason: str) -> None:
        """Rows without a speed."""
        for case in cases:
            self.keep(row_of(self, case, status, reason=reason))

    def failure(self) -> str:
        """The status of what an engine's error ended: with the time gone, another call measures it."""
        return SKIPPED if self.left <= 0 else record.FAILED


def setup(case: Case) -> str:
    """A fingerprint of everything that a case asks of an engine."""
    variant = case.variant
    asked = [configuration(variant), engine_arguments(variant), dict(variant.env), variant.is_evened]
    asked += [case.name, case.role, case.request(case.batch or 1, 0)]
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:12]


def engine_arguments(variant: EngineVariant) -> dict[str, Any]:
    """Keyword arguments of vLLM's `LLM`."""
    kv = {} if variant.kv_dtype == "auto" else {"kv_cache_dtype": KV_WORDS[variant.kv_dtype]}
    return {**variant.flags, **kv}


def row_of(run: Run, case: Case, status: str, batch: int | None = None, **more: Any) -> Row:
    """A row of a case, its own facts filled in."""
    variant, shape = case.variant, case.shape
    weights = variant.flags.get("dtype") or served_weights(variant)
    return Row(
        run.suite.name, case.name, variant.name, variant.model, is_reconstructed(variant.model), weights,
        variant.kv_dtype, shape.input_len, shape.output_len, batch or case.batch or None, case.role, status,
        setup(case), run.machine.card, run.commit, **more,
    )  # fmt: skip


def start(run: Run, variant: EngineVariant, **changes: Any) -> EngineChild:
    """An engine of a variant, not waited for. `changes` go over its flags."""
    folder = write_folder(variant, run.work / variant.name)
    engine = engine_arguments(variant) | changes
    log = run.work / f"{variant.name}.log"
    return EngineChild(variant.name, folder, engine, variant.env, log, run.command)


def wait(run: Run, variant: EngineVariant, child: EngineChild) -> dict[str, Any]:
    """The engine's first answer, once its weights are as the variant wants them.

    Raises EngineError, also where another class than ours serves what is ours: vLLM has one for DeciLM too, and a
    comparison with it would look like one with us.
    """
    ready = child.ready(max(1.0, run.left))
    found, described = ready.get("model_class"), configuration(variant)["architectures"]
    if set(described) & set(OUR_ARCHITECTURES) and found != OUR_CLASS:
        raise EngineError(f"found {found} serving {described[0]}, allowed: {OUR_CLASS} (is our plugin loaded?)")
    if variant.is_evened:
        child.ask({"weights": "even"}, max(1.0, run.left))
    return ready


def refuse(run: Run, variant: EngineVariant, todo: Sequence[Case]) -> bool:
    """Whether the variant does not fit the card; then its rows say so, and the arithmetic is shown."""
    if run.gpu is None:
        return False
    plan = memory_plan(variant, run.gpu)
    if plan.fits:
        return False
    run.show(f"{variant.name} does not fit {run.gpu.name}:")
    for line in (*plan.lines(), *(f"would fit with {flag}" for flag in plan.advice())):
        run.show(f"  {line}")
    run.give_up(todo, REFUSED, f"does not fit {run.gpu.name}")
    return True


def ok_row(run: Run, case: Case, batch: int, ready: Mapping[str, Any], event: Mapping[str, Any]) -> Row:
    """The row of a measured case."""
    asked = case.request(batch, 0)["num_requests"]
    own = {"num_requests": asked} | record.of_engine(ready) | record.measured(event)
    own["memory_bytes"] = event.get("memory_bytes", own["memory_bytes"])
    return row_of(run, case, OK, batch, **own)


def started_line(variant: EngineVariant, ready: Mapping[str, Any]) -> str:
    """What is shown once an engine runs."""
    facts = [f"{ready.get('model_class')}", f"{ready.get('start_s') or 0:.1f} s to start"]
    if ready.get("kv_capacity_tokens"):
        facts.append(f"KV cache of {ready['kv_capacity_tokens']:,} tokens")
    return f"{variant.name}: {', '.join(facts)}"
