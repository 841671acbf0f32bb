"""The pocket model under vLLM's V2 model runner, with budgets: in a process of its own (thinking_v2_jobs.py).

On CUDA the V2 runner is vLLM's default. On a CPU vLLM has the same runner, but takes it only when Triton has a backend
named "cpu" (triton-cpu, which no registry has). Triton's interpreter computes the same kernels there in NumPy, so an
empty backend of that name is entered in Triton's table before vLLM looks at it; everything after that is vLLM's own
code and ours. A job: {"runner": "1" | "2", "llm": LLM arguments, "rounds": [[request, …], …]}; a request: {"prompt":
token ids, "budget", "plan", "max_tokens"}; the requests of one round run together. "markers" are sent as the API
process sends them. With "close_after": n, every thought is ended by a user after n steps. Of a job comes: whether
the runner is V2, the budget class, accepted drafts, preemptions, and the tokens of each request.
"""

from __future__ import annotations

import os
from typing import Any


def prepare(runner: str) -> None:
    """Before vLLM is imported."""
    import torch

    os.environ |= {"VLLM_USE_V2_MODEL_RUNNER": str(int(runner) - 1), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "VLLM_PLUGINS": "puzzle"}
    if runner == "2" and not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
        from triton.backends import Backend, backends

        backends["cpu"] = Backend(compiler=None, driver=None)  # type: ignore[arg-type]


def run(job: dict[str, Any]) -> dict[str, Any]:
    import torch
    from vllm import LLM, SamplingParams
    from vllm_puzzle.serving import vllm_compat

    vllm_compat.enforce_thinking_budgets_v2()
    # CUDA graphs where there are any; several engines share one card.
    device = {"gpu_memory_utilization": 0.15} if torch.cuda.is_available() else {"enforce_eager": True}
    engine = LLM(
        dtype="float32", max_model_len=160, reasoning_parser="nemotron_v3",
        enable_prefix_caching=False, disable_log_stats=False, **device, **job["llm"],
    )  # fmt: skip
    if "markers" in job:
        engine.collective_rpc("puzzle_set_markers", args=(job["markers"],))
    runner = engine.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    rounds = []
    for requests in job["rounds"]:
        for number, request in enumerate(requests):
            params = SamplingParams(
                temperature=0, max_tokens=request.get("max_tokens", 60), ignore_eos=request.get("ignore_eos", False),
                thinking_token_budget=request.get("budget"),
                extra_args={"puzzle_thinking": request["plan"]} if "plan" in request else None,
            )  # fmt: skip
            engine.llm_engine.add_request(str(number), {"prompt_token_ids": request["prompt"]}, params)
        rounds.append(drain(engine.llm_engine, len(requests), job.get("close_after")))
    counts = {metric.name: metric.value for metric in engine.get_metrics() if hasattr(metric, "value")}
    return {
        "is_v2": hasattr(runner, "req_states"),
        "budgets": type(getattr(runner.sampler, "thinking_budget_state", None)).__name__,
        "accepted": counts.get("vllm:spec_decode_num_accepted_tokens", 0),
        "preemptions": counts.get("vllm:num_preemptions", 0),
        "rounds": rounds,
    }


def drain(engine: Any, count: int, close_after: int | None) -> list[list[int]]:
    """Step until every request has ended; their tokens."""
    tokens: dict[int, list[int]] = {}
    for step in range(2000):
        if not engine.has_unfinished_requests():
            break
        if step == close_after:
            names = list(engine.output_processor.request_states)
            engine.collective_rpc("puzzle_end_thinking", args=(names,))
        for output in engine.step():
            tokens[int(output.request_id)] = list(output.outputs[0].token_ids)
    return [tokens[number] for number in range(count)]
