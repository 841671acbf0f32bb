"""What a kernel computes with bfloat16 and FP8 under the mended interpreter, against torch: prints JSON.

`interpreter_probe.py mended | stock`: "stock" shows what the interpreter does unmended, as far as it runs.
"""
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
if sys.argv[1] == "mended":
    import interpreter

    interpreter.install()
else:
    os.environ["TRITON_INTERPRET"] = "1"

import torch
import triton
import triton.language as tl

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


@triton.jit
def copy(source, target, N: tl.constexpr):
    steps = tl.arange(0, N)
    tl.store(target + steps, tl.load(source + steps).to(target.dtype.element_ty))


@triton.jit
def arithmetic(x, y, target, flags, N: tl.constexpr):
    steps = tl.arange(0, N)
    a, b = tl.load(x + steps), tl.load(y + steps)
    tl.store(target + steps, -(a * b + a))
    tl.store(flags + steps, (a < b).to(tl.int32))


@triton.jit
def product(x, y, target, N: tl.constexpr):
    rows, columns = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    tl.store(target + rows * N + columns, tl.dot(tl.load(x + rows * N + columns), tl.load(y + rows * N + columns)))


def values() -> torch.Tensor:
    """Every bfloat16, halves between neighbours included where float32 has them; no NaN."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16
    exact = torch.cat((bits, bits + 2**15)).view(torch.float32)
    return exact[~exact.isnan()]


def count_casts(source: torch.dtype, target: torch.dtype) -> int:
    """How many values the kernel casts to other bits than torch does."""
    numbers = values().to(source) if source.itemsize > 1 else torch.arange(256, dtype=torch.uint8).view(source)
    numbers = numbers[~numbers.float().isnan()]
    n = 1 << (len(numbers) - 1).bit_length()
    padded = torch.cat((numbers.float(), torch.zeros(n - len(numbers)))).to(source)
    result = torch.empty(n, dtype=target)
    copy[(1,)](padded, result, N=n)
    wide = padded.float()
    expected = (wide.clamp(-448, 448) if target == torch.float8_e4m3fn else wide).to(target)
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[target.itemsize]
    return int((result.view(kind) != expected.view(kind)).sum())


def is_cast(source: torch.dtype, target: torch.dtype) -> bool:
    """Unmended, some casts raise; the one of every bfloat16 kernel does not."""
    return sys.argv[1] == "mended" or (source, target) == (torch.float32, torch.bfloat16)


def main() -> None:
    outcome = {
        f"{source} to {target}".replace("torch.", ""): count_casts(source, target)
        for source in DTYPES for target in DTYPES if source != target and is_cast(source, target)
    }  # fmt: skip
    if sys.argv[1] == "mended":
        outcome |= compute()
    print(json.dumps(outcome))


def compute() -> dict[str, int]:
    """How many results of bfloat16 arithmetic, comparison and product are not what they must be."""
    torch.manual_seed(0)
    x, y = torch.randn(2, 4096).bfloat16()
    result, flags = torch.empty_like(x), torch.empty(4096, dtype=torch.int32)
    arithmetic[(1,)](x, y, result, flags, N=4096)
    a, b = torch.randn(2, 64, 64).bfloat16()
    total = torch.empty(64, 64)
    product[(1,)](a, b, total, N=64)
    exact = a.double() @ b.double()
    # 64 products, each exact in float32; 64 additions of at most 2^-24 of the absolute sum each.
    bound = 64 * 2**-24 * (a.double().abs() @ b.double().abs())
    return {
        "bfloat16 arithmetic": int((result != -(x * y + x)).sum()),
        "bfloat16 comparison": int((flags.bool() != (x < y)).sum()),
        "bfloat16 product": int(((total - exact).abs() > bound).sum()),
    }


main()
