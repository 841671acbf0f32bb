"""Our kernels and vLLM's own, called as the benchmark calls them, beside the reference: `interpreted_ops.py
VLLM_FOLDER` prints JSON, case → error and bound. In a process of its own: it runs under Triton's interpreter, and
stand-ins take vLLM's place (its kernels come from its source files).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "kernels"))
import interpreter

interpreter.install()

OURS = (
    "decode-2q1s40-w17-h4kv2d32-fp8",
    "verify-2q3s40-w17-h4kv2d32-bf16-sinks-sink4",
    "prefill-q20s33-w16-h4kv2d32-fp8-perhead",
    "kv_write-2q5s21-h4kv2d32-fp8",
    "rope_kv_write-2q5s21-h4kv2d32-fp8-perhead",
    "fused_decode-3q1s40-w17-h4kv2d32-fp8",
    "gate_up-m3-d256-i128-bf16",
    "gate_up-m3-d256-i128-fp8_tensor",
    "gate_up-m3-d256-i128-fp8_channel",
    "gate_up-m3-d256-i128-fp8_block",
    "down-m3-d256-i128-bf16",
    "down-m3-d256-i128-fp8_channel",
    "ffn-m3-d256-i2x128-bf16",
)
OTHERS = {
    "decode-2q1s50-w17-h4kv2d32-fp8": ("vllm_triton", "vllm_triton_bf16q"),
    "decode-2q1s33-full-h4kv2d32-bf16-sinks": ("vllm_triton",),
    "prefill-q20s33-w16-h4kv2d32-fp8": ("vllm_triton_bf16q",),
    "kv_write-2q5s21-h4kv2d32-fp8": ("vllm_write",),
    "kv_write-2q5s21-h4kv2d32-bf16": ("vllm_write",),
    "gate_up-m3-d256-i128-fp8_block": ("vllm_block",),
    "fused_decode-3q1s40-w17-h4kv2d32-fp8": ("two_launches",),
    "ffn-m3-d256-i2x128-bf16": ("one_by_one",),
}


def main(folder: str) -> None:
    from vllm_puzzle.bench.kernel import stock
    from vllm_puzzle.bench.kernel.cases import parse_case
    from vllm_puzzle.bench.kernel.command import make_problem

    # What the host sides of vLLM's kernels ask a card for.
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.cuda.get_device_name = lambda *_: "NVIDIA H100 80GB HBM3"
    stock.is_installed = lambda: False
    ours, others = {}, {}
    for name in dict.fromkeys([*OURS, *OTHERS]):
        problem = make_problem(parse_case(name), folder, "cpu")
        problem.make(2)
        if name in OURS:
            problem.poison(None)
            check = problem.check(problem.ours()[0]())
            ours[name] = (check.error, check.bound)
        for baseline in OTHERS.get(name, ()):
            problem.poison(None)
            others[f"{name} {baseline}"] = problem.check_baseline(problem.baselines()[baseline]()[0]()).error
    print(json.dumps({"origin": stock.find(folder).origin, "ours": ours, "others": others}))


if __name__ == "__main__":
    main(sys.argv[1])
