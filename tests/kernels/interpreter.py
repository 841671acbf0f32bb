"""Make Triton's interpreter exact for bfloat16 and FP8, and faster: `install()` before kernels are imported.

As shipped (3.6 to 3.9) it multiplies the raw bits of bfloat16, cuts instead of rounding to bfloat16, and loses carries
when rounding to e4m3. Here every cast is torch's, clamped to ±448 as the device saturates, and bfloat16 is computed in
float32 and rounded once. Reductions over bfloat16 are not mended: kernels reduce float32.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

E4M3_MAX = 448.0
SIGNED = {1: np.uint8, 2: np.int16, 4: np.int32, 8: np.int64}  # torch reads no other unsigned type
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
IN_TORCH = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def install() -> None:
    """Turn the interpreter on for kernels defined from now on, with exact casts and bfloat16."""
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.runtime.interpreter as interpreter

    if getattr(interpreter, "is_exact", False):
        return
    interpreter.is_exact = True  # type: ignore[attr-defined]
    _mend_casts(interpreter)
    _mend_bfloat16(interpreter)
    _speed_up(interpreter)


def _torch_types() -> dict[Any, torch.dtype]:
    import triton.language as tl

    return {
        tl.float64: torch.float64, tl.float32: torch.float32, tl.float16: torch.float16, tl.bfloat16: torch.bfloat16,
        tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2,
    }  # fmt: skip


def cast(values: np.ndarray, source: torch.dtype, target: torch.dtype) -> np.ndarray:
    """Round to nearest even, as bits: an array of `source`'s bits or numbers → unsigned bits of `target`."""
    values = np.ascontiguousarray(values)
    numbers = torch.from_numpy(values.view(SIGNED[values.itemsize]).copy()).view(source)
    numbers = numbers if source == torch.float64 else numbers.float()
    if target == torch.float8_e4m3fn:
        numbers = numbers.clamp(-E4M3_MAX, E4M3_MAX)
    rounded = numbers.to(target)
    bits = rounded.view(IN_TORCH[rounded.element_size()]).numpy()
    return bits.view(UNSIGNED[rounded.element_size()]).reshape(values.shape)


def _mend_casts(interpreter: Any) -> None:
    types, original = _torch_types(), interpreter._convert_float

    def convert(values: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
        if source in types and target in types:
            return cast(values, types[source], types[target])
        return original(values, source, target, rounding)

    interpreter._convert_float = convert


def _mend_bfloat16(interpreter: Any) -> None:
    import triton.language as tl

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle

    def widened(value: Any) -> Any:
        """A bfloat16 operand as float32 numbers, or None."""
        if value.dtype.scalar != tl.bfloat16:
            return None
        return (value.data.astype(np.uint32) << 16).view(np.float32)

    def narrowed(numbers: np.ndarray) -> Any:
        return handle(cast(numbers.astype(np.float32), torch.float32, torch.bfloat16), tl.bfloat16)

    def mend(name: str, replacement: Callable[..., Any]) -> None:
        original = getattr(builder, name)
        setattr(builder, name, lambda self, *operands: replacement(original, self, *operands))

    def binary_op(original: Any, self: Any, left: Any, right: Any, op: Any) -> Any:
        wide_left, wide_right = widened(left), widened(right)
        if wide_left is None and wide_right is None:
            return original(self, left, right, op)
        result = op(left.data if wide_left is None else wide_left, right.data if wide_right is None else wide_right)
        return handle(result, tl.int1) if result.dtype == np.bool_ else narrowed(result)

    def unary_op(original: Any, self: Any, value: Any, op: Any) -> Any:
        wide = widened(value)
        return original(self, value, op) if wide is None else narrowed(op(wide))

    def create_dot(original: Any, self: Any, left: Any, right: Any, total: Any, *rest: Any) -> Any:
        wide_left, wide_right = widened(left), widened(right)
        if wide_left is None or wide_right is None:
            return original(self, left, right, total, *rest)
        return handle(np.matmul(wide_left, wide_right, dtype=np.float32) + total.data, total.dtype.scalar)

    mend("binary_op", binary_op)
    mend("unary_op", unary_op)
    mend("create_dot", create_dot)


def _speed_up(interpreter: Any) -> None:
    """No overflow checks; `triton.language` is patched once per launch and not again in each device function."""
    import triton.language as tl

    options = interpreter.interpreter_builder.options
    interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)
    original, patched = interpreter._patch_lang, set[tuple[int, ...]]()

    class Nothing:
        def restore(self) -> None:
            pass

    def patch(function: Any) -> Any:
        modules = tuple(
            sorted(id(v) for v in function.__globals__.values() if inspect.ismodule(v) and v in (tl, tl.core))
        )
        if modules in patched:
            return Nothing()
        scope = original(function)
        patched.add(modules)
        restore = scope.restore

        def forget() -> None:
            patched.clear()
            restore()

        scope.restore = forget
        return scope

    interpreter._patch_lang = patch
