"""Rows and suites that several tests need."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_puzzle.bench.engine.case import Case, EngineVariant, Load, Shape
from vllm_puzzle.bench.engine.rows import OK, Machine, Results, Row
from vllm_puzzle.bench.engine.session import Run
from vllm_puzzle.bench.engine.suites import CPU, Suite

H100 = "NVIDIA H100 80GB HBM3"


def row(variant: str, shape: Shape, batch: int, rate: float | None, **more: Any) -> Row:
    """A row with an output throughput; None: it was not measured."""
    status = OK if rate is not None else "skipped"
    facts: dict[str, Any] = {
        "suite": "super49", "case": f"{variant} {shape.name} b{batch}", "variant": variant, "model": "llama-h512",
        "is_reconstructed": False, "weights": "bf16", "kv_dtype": "auto", "input_len": shape.input_len,
        "output_len": shape.output_len, "batch": batch, "role": "full", "status": status, "setup": "s", "card": H100,
        "commit": "c0ffee", "output_throughput": rate,
    }  # fmt: skip
    return Row(**(facts | more))


def suite(
    *scripts: dict[str, Any], pairs: bool = False, blocks: int = 2, loads: Sequence[Load] = (), is_evened: bool = False
) -> Suite:
    """A suite of scripted engines, named v0, v1 …"""
    variants = tuple(
        EngineVariant(f"v{index}", "llama-h512", flags={"script": script, "max_num_seqs": 8}, is_evened=is_evened)
        for index, script in enumerate(scripts)
    )
    chosen = tuple(loads) or (Load(Shape(5, 50), (1, 3), waves=1), Load(Shape(7, 20), (2,), waves=1))
    return Suite(
        "trial", "scripted", variants, chosen, device=CPU, pairs=(("v0", "v1"),) if pairs else (), blocks=blocks,
        tolerance=0.01 if pairs else None,
    )  # fmt: skip


def run_of(asked: Suite, folder: Path, command: Sequence[str], deadline: float, **more: Any) -> tuple[Run, list[str]]:
    """A run that writes into `folder`, and the lines that it shows."""
    lines: list[str] = []
    facts: dict[str, Any] = {
        "suite": asked, "machine": Machine("a card", None, {}), "gpu": None, "commit": "c0ffee",
        "results": Results(asked.name, "a card"), "folder": folder / "out", "work": folder / "work",
        "deadline": deadline, "is_again": False, "show": lines.append, "command": tuple(command),
    }  # fmt: skip
    return Run(**(facts | more)), lines


def names(asked: Suite) -> list[str]:
    """All cases of a suite."""
    found: list[Case] = [case for variant in asked.variants for case in asked.cases(variant)]
    return [case.name for case in found]
