"""The card at hand and what it can do at most: copy, read, bf16 and FP8 matrix products, measured in the same run."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from vllm_puzzle.bench.commit import found_commit
from vllm_puzzle.bench.kernel.timing import Timer, summarize

COPY_BYTES = 1 << 30
MATRIX_SIDE = 8192


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Measured rates: bytes/s (a copy counts both directions) and FLOP/s; `matmul_fp8` is None where the card has no
    FP8 matrix units, with the reason in `notes`.
    """

    copy: float
    read: float
    matmul_bf16: float
    matmul_fp8: float | None
    notes: str = ""

    def as_row(self) -> dict[str, Any]:
        """Columns of every row of results: TB/s and TFLOP/s."""
        rates = {
            "copy_tbs": self.copy,
            "read_tbs": self.read,
            "matmul_bf16_tflops": self.matmul_bf16,
            "matmul_fp8_tflops": self.matmul_fp8,
        }
        return {key: None if value is None else round(value / 1e12, 3) for key, value in rates.items()}

    def flops(self, matmul: str) -> float:
        """FLOP/s of "bf16" or "fp8" products. Raises ValueError where FP8 was not measured."""
        if matmul == "bf16":
            return self.matmul_bf16
        if self.matmul_fp8 is None:
            raise ValueError(f"FP8 matrix rate: found none ({self.notes}), allowed: a measured one")
        return self.matmul_fp8


@dataclass(frozen=True, slots=True)
class Card:
    """What a row of results was measured on and with."""

    name: str
    l2_bytes: int
    memory_bytes: int
    commit: str
    torch: str
    triton: str
    cuda: str
    vllm: str

    @property
    def slug(self) -> str:
        """The name as part of a file name."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")

    def as_row(self) -> dict[str, Any]:
        """Columns of every row of results."""
        return asdict(self) | {"slug": self.slug}


def find_card() -> Card:
    """The current CUDA device. The caller has checked that there is one."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return Card(
        name=properties.name,
        l2_bytes=properties.L2_cache_size,
        memory_bytes=properties.total_memory,
        commit=found_commit(),
        torch=torch.__version__,
        triton=version_of("triton"),
        cuda=torch.version.cuda or "none",
        vllm=version_of("vllm"),
    )


def version_of(package: str) -> str:
    """The installed version of a distribution, or "none"."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def measure_ceilings(timer: Timer, device: str, copy_bytes: int = COPY_BYTES, side: int = MATRIX_SIDE) -> Ceilings:
    """Measure all four. Random contents: products of zeros draw less power and run faster than any real one."""
    source = torch.randn(copy_bytes // 4, device=device)
    target = torch.empty_like(source)
    copy = 2 * copy_bytes / _seconds(timer, partial(target.copy_, source))
    read = copy_bytes / _seconds(timer, source.sum)
    left, right = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    flops = 2 * side**3
    bf16 = flops / _seconds(timer, partial(torch.matmul, left, right.t()))
    left8, right8 = (matrix.to(torch.float8_e4m3fn) for matrix in (left, right))
    one = torch.ones((), device=device)
    fp8, notes = None, ""
    try:
        fp8 = flops / _seconds(timer, partial(_fp8_product, left8, right8, one))
    except (RuntimeError, ValueError) as error:
        notes = f"FP8 products: {str(error).splitlines()[0]}"
    return Ceilings(copy, read, bf16, fp8, notes)


def _fp8_product(left: torch.Tensor, right: torch.Tensor, one: torch.Tensor) -> torch.Tensor:
    # Fast accumulation is cuBLAS's best on Hopper, and what vLLM uses.
    return torch._scaled_mm(left, right.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)


def _seconds(timer: Timer, call: Callable[[], Any]) -> float:
    samples, _ = timer([call])
    return summarize(samples).p50 / 1e6
