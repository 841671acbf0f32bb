"""What a kernel family ships: every compile-time configuration that a launcher may ever choose, as data.

CI compiles them all for Hopper without a GPU and reads the machine code (tests/kernels/test_cross_compile.py), so that
a spill, a lost tensor-core instruction or a compiler crash on either Triton version is found before a user finds it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# What a configuration may promise of its machine code: warp-group matrix instructions, loads by the tensor memory
# accelerator.
CLAIMS = frozenset({"wgmma", "tma"})


@dataclass(frozen=True, slots=True)
class Variant:
    """One compiled form of one kernel.

    `signature` gives the type of each run-time argument in Triton's words ("*bf16", "i32", "fp32"), `constexprs` the
    value of every other one; `aligned` names the arguments that are divisible by 16 (pointers and strides), without
    which Triton does not vectorise. `claims` is a part of CLAIMS; `options` are more of the compiler's.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int
    claims: frozenset[str] = frozenset()
    aligned: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = set(self.kernel.arg_names)
        given = set(self.signature) | set(self.constexprs)
        if names != given or set(self.signature) & set(self.constexprs):
            raise ValueError(
                f"{self.name}: found arguments {sorted(names ^ given)}, allowed: each of the kernel's once"
            )
        if not self.claims <= CLAIMS:
            raise ValueError(f"{self.name}, claims: found {sorted(self.claims)}, allowed: {sorted(CLAIMS)}")
        if surplus := set(self.aligned) - set(self.signature):
            raise ValueError(f"{self.name}, aligned: found {sorted(surplus)}, allowed: run-time arguments")


def shipped() -> tuple[Variant, ...]:
    """Every configuration of every kernel in this package."""
    from vllm_puzzle.kernels import ffn_triton, fused_decode, kv_write, thinking_triton, window_attention_plan

    modules = (thinking_triton, ffn_triton, kv_write, fused_decode, window_attention_plan)
    return tuple(variant for module in modules for variant in module.variants())
