"""vLLM's own Triton kernels as the benchmark calls them, from vLLM's source files without vLLM, beside the reference:
`stock_ops.py VLLM_FOLDER` prints JSON, case → relative error. In a process of its own: it runs under Triton's
interpreter, and stand-ins take vLLM's place.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "kernels"))
import interpreter

interpreter.install()

CASES = {
    "decode-2q1s50-w17-h4kv2d32-fp8": ("vllm_triton", "vllm_triton_bf16q"),
    "decode-2q1s33-full-h4kv2d32-bf16-sinks": ("vllm_triton",),
    "prefill-q20s33-w16-h4kv2d32-fp8": ("vllm_triton_bf16q",),
    "kv_write-2q5s21-h4kv2d32-fp8": ("vllm_write",),
    "kv_write-2q5s21-h4kv2d32-bf16": ("vllm_write",),
}


def main(folder: str) -> None:
    from vllm_puzzle.bench.kernel import stock
    from vllm_puzzle.bench.kernel.cases import FfnCase, parse_case
    from vllm_puzzle.bench.kernel.command import make_problem

    # What their host sides ask a card for.
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.cuda.get_device_name = lambda *_: "NVIDIA H100 80GB HBM3"
    stock.is_installed = lambda: False
    found = {}
    for name, baselines in CASES.items():
        problem = make_problem(parse_case(name), folder, "cpu")
        problem.make(2)
        for baseline in baselines:
            problem.poison(None)
            calls = problem.baselines()[baseline]()
            found[f"{name} {baseline}"] = problem.check_baseline(calls[0]()).error
    problem = make_problem(FfnCase("gate_up", 3, 256, 128, "fp8_block"), folder, "cpu")
    problem.make(1)
    found["block"] = problem.check_baseline(problem.baselines()["vllm_block"]()[0]()).error
    print(json.dumps({"origin": stock.find(folder).origin, "errors": found}))


if __name__ == "__main__":
    main(sys.argv[1])
