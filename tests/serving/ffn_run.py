"""Engine runs whose FFNs compute with our kernels under Triton's interpreter: `ffn_run.py JOBS.json`, as engine_run.py.

Per job the first result says how often each operator's kernel ran, by number of tokens. With "describe_layers" it also
has what a compiler and torch's own checks say of the operators of one layer. "table" is a folder of tuning tables.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "kernels")]


def count_calls(calls: Counter[str]) -> None:
    """Note each call of the kernels, and what it was given."""
    from vllm_puzzle.kernels import ffn

    def counted(name: str, function: Any) -> Any:
        def call(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            calls[f"{name} {x.shape[0]}"] += 1
            return function(x, *args, **kwargs)

        return call

    ffn.gate_up_silu = counted("gate_up", ffn.gate_up_silu)  # type: ignore[assignment]
    ffn.down = counted("down", ffn.down)  # type: ignore[assignment]


def inspect_operators(model: Any) -> dict[str, Any]:
    """One layer's operators: torch's checks, one graph for every number of tokens, row scales, and the cache key."""
    from vllm.forward_context import set_forward_context
    from vllm_puzzle.serving import ffn_kernels, vllm_linear
    from vllm_puzzle.serving.ffn import PuzzleFFN

    layer = next(module for module in model.modules() if isinstance(module, PuzzleFFN))
    width, hidden_size = layer.sizes
    config, name = model.vllm_config, vllm_linear.encode_layer_name(layer.prefix)
    x, h, found = torch.randn(5, hidden_size), torch.randn(5, width), {}
    with set_forward_context(None, config), torch.inference_mode(False), torch.no_grad():
        operators = torch.ops.vllm_puzzle
        (x8, x_scale), (h8, h_scale) = layer.fused.first.quantized(x), layer.fused.second.quantized(h)
        gate_up = (x8, x_scale, torch.rand(5), name, width, torch.float32)
        down = (h8, h_scale, name, hidden_size, torch.float32)
        checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
        checks += [] if x8.itemsize == 1 else ["test_schema"]  # which cannot compare FP8
        found["gate_up"] = torch.library.opcheck(operators.ffn_gate_up.default, gate_up, test_utils=checks)
        found["down"] = torch.library.opcheck(operators.ffn_down.default, down, test_utils=checks)
        compiled = torch.compile(layer.fused, fullgraph=True, dynamic=True, backend="aot_eager")
        batches = [torch.randn(m, hidden_size) for m in (70, 7, 3)]
        first = compiled(batches[0])
        with torch.compiler.set_stance("fail_on_recompile"):  # vLLM has one graph, and no guards
            results = [first, *map(compiled, batches[1:])]
        found["compiled"] = [torch.equal(*pair) for pair in zip(results, map(layer.fused, batches), strict=True)]
        scale = torch.rand(5) + 0.5
        scaled, expected = layer.fused(x, row_scale=scale), layer.fused(x * scale[:, None])
        found["row scale error"] = float((scaled - expected).abs().max() / expected.abs().max())
    with_kernels = config.compute_hash()
    del config.additional_config[ffn_kernels.FACTOR]
    found["hashes differ"] = config.compute_hash() != with_kernels
    return found


def main(jobs_file: str) -> None:
    import interpreter

    interpreter.install()
    import engine_run
    from vllm_puzzle.kernels import ffn_table

    calls: Counter[str] = Counter()
    count_calls(calls)
    run, folder = engine_run.run, ffn_table.FOLDER

    def run_and_count(job: dict[str, Any]) -> list[dict[str, Any]]:
        calls.clear()
        ffn_table.FOLDER = Path(job["table"]) if "table" in job else folder
        ffn_table.table_of.cache_clear()
        results = run(job)
        results[0]["calls"] = dict(calls)
        return results

    engine_run.run = run_and_count
    engine_run.describe_layers = inspect_operators
    engine_run.main(jobs_file)


if __name__ == "__main__":
    main(sys.argv[1])
