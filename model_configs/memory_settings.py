"""What an engine is started with that decides its memory, and which flags would make it fit. Standard library only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from vllm_puzzle.model_configs.gpus import Gpu
from vllm_puzzle.model_configs.quantization import Quantization
from vllm_puzzle.model_configs.request_memory import BLOCK_SIZE, KV_BYTES, STATE_BYTES
from vllm_puzzle.model_configs.schema import ConfigError

MAX_UTILIZATION = 0.97  # above it nothing is left for other programs' contexts and for fragmentation
RANKS = (2, 4, 8, 16)
FLAGS = {
    "weights": "--quantization",
    "kv_dtype": "--kv-cache-dtype",
    "max_model_len": "--max-model-len",
    "max_num_seqs": "--max-num-seqs",
    "max_num_batched_tokens": "--max-num-batched-tokens",
    "gpu_memory_utilization": "--gpu-memory-utilization",
    "tensor_parallel_size": "--tensor-parallel-size",
}
SIZES = ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "tensor_parallel_size")

Changes = dict[str, Any]  # new values by the settings' names


@dataclass(frozen=True, slots=True)
class MemorySettings:
    """vLLM's flags under their names; `weights` is a word of `weight_memory.WEIGHTS`, `quantization` goes before it.

    Raises ConfigError for values that vLLM refuses.
    """

    weights: str
    kv_dtype: str
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    gpu: Gpu
    gpu_memory_utilization: float = 0.9
    tensor_parallel_size: int = 1
    mamba_ssm_cache_dtype: str = "float32"
    quantization: Quantization | None = None

    def __post_init__(self) -> None:
        for name in SIZES:
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ConfigError(f"flag {FLAGS[name]}: found {value!r}, allowed: an integer from 1")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(
                f"flag {FLAGS['gpu_memory_utilization']}: found {self.gpu_memory_utilization!r}, allowed: above 0, at "
                "most 1"
            )
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"flag {FLAGS['max_num_batched_tokens']}: found {self.max_num_batched_tokens}, allowed: at least the "
                f"{self.max_num_seqs} of {FLAGS['max_num_seqs']}"
            )
        for flag, value, allowed in (
            (FLAGS["kv_dtype"], self.kv_dtype, KV_BYTES),
            ("--mamba-ssm-cache-dtype", self.mamba_ssm_cache_dtype, STATE_BYTES),
        ):
            if value not in allowed:
                raise ConfigError(f"flag {flag}: found {value!r}, allowed: {', '.join(allowed)}")


Fits = Callable[[MemorySettings], bool]  # False too where the model cannot be served with the settings


def flags_that_fit(settings: MemorySettings, fits: Fits) -> tuple[str, ...]:
    """Flags each of which makes the engine fit, with the least change that does; where none does alone, several in one
    string, none of them idle. Empty where the settings fit already, or nothing helps.
    """
    if fits(settings):
        return ()
    alone = tuple(_text(change) for change in _single_changes(settings, fits))
    if alone:
        return alone
    together = _joined_changes(settings, fits)
    return (_text(together),) if together else ()


def changed(settings: MemorySettings, changes: Changes) -> MemorySettings:
    """The settings with `changes`; a new word for the weights replaces a quantization entry."""
    return replace(settings, **changes)


def _text(changes: Changes) -> str:
    return " ".join(f"{FLAGS[name]} {value}" for name, value in changes.items())


def _single_changes(settings: MemorySettings, fits: Fits) -> Iterator[Changes]:
    for name, least, step in (
        ("max_model_len", BLOCK_SIZE, BLOCK_SIZE),
        ("max_num_seqs", 1, 1),
        ("max_num_batched_tokens", max(settings.max_num_seqs, BLOCK_SIZE), BLOCK_SIZE),
    ):
        largest = _largest(settings, fits, name, least, step)
        if largest is not None:
            yield {name: largest}
    for name, values in _stepwise(settings):
        change = next(({name: value} for value in values if _fits(settings, fits, {name: value})), None)
        if change is not None:
            yield change


def _stepwise(settings: MemorySettings) -> Iterator[tuple[str, list[Any]]]:
    """Settings that change in steps: the values that could help, the mildest first."""
    percent = range(1, round(100 * MAX_UTILIZATION) + 1)
    yield "gpu_memory_utilization", [p / 100 for p in percent if p / 100 > settings.gpu_memory_utilization]
    if KV_BYTES[settings.kv_dtype] > 1:
        yield "kv_dtype", ["fp8"]
    if settings.weights == "bf16" and settings.quantization is None:
        yield "weights", ["fp8"]
    yield "tensor_parallel_size", [size for size in RANKS if size > settings.tensor_parallel_size]


def _largest(settings: MemorySettings, fits: Fits, name: str, least: int, step: int) -> int | None:
    """The largest multiple of `step` from `least` up, below the present value, that fits. Less never fits worse."""
    low, high = -(-least // step), (getattr(settings, name) - 1) // step
    if low > high or not _fits(settings, fits, {name: low * step}):
        return None
    while low < high:
        middle = (low + high + 1) // 2
        if _fits(settings, fits, {name: middle * step}):
            low = middle
        else:
            high = middle - 1
    return low * step


def _joined_changes(settings: MemorySettings, fits: Fits) -> Changes:
    """Several changes that fit together, from what costs least to what costs most; those not needed are taken out."""
    together: Changes = {}
    for name, value in _harsh(settings):
        together[name] = value
        if _fits(settings, fits, together):
            break
    else:
        return {}
    for name in list(together):
        fewer = {other: value for other, value in together.items() if other != name}
        if _fits(settings, fits, fewer):
            together = fewer
    return together


def _harsh(settings: MemorySettings) -> Iterator[tuple[str, Any]]:
    if settings.gpu_memory_utilization < 0.95:
        yield "gpu_memory_utilization", 0.95
    if settings.max_num_seqs > 16:
        yield "max_num_seqs", 16
    if settings.max_num_batched_tokens > 2048:
        yield "max_num_batched_tokens", 2048
    if KV_BYTES[settings.kv_dtype] > 1:
        yield "kv_dtype", "fp8"
    if settings.max_model_len > 8192:
        yield "max_model_len", 8192
    if settings.weights == "bf16" and settings.quantization is None:
        yield "weights", "fp8"
    for size in RANKS:
        if size > settings.tensor_parallel_size:
            yield "tensor_parallel_size", size


def _fits(settings: MemorySettings, fits: Fits, changes: Changes) -> bool:
    try:
        return fits(changed(settings, changes))
    except ConfigError:  # vLLM would refuse these
        return False
