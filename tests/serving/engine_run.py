"""Run vLLM offline and save every log-probability: `engine_run.py JOBS.json`.

A process of its own, because vLLM's distributed state and our environment last as long as it; several jobs share it,
because importing vLLM takes longer than a small model's run. A job names a model folder, LLM arguments and rounds of
prompts (token ids); the prompts of one round are served together. Its "environment" also holds for later jobs.
Output per job: one .pt file with, per prompt, the token ids (prompt + generated) and the log-probabilities
[num_positions, vocab_size] that predicted each of them but the first, or the error as text.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch


def run(job: dict[str, Any]) -> list[dict[str, Any]]:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    os.environ.update(job.get("environment", {}))
    engine = LLM(job["model"], skip_tokenizer_init=True, max_logprobs=-1, **job["llm"])
    params = SamplingParams(
        max_tokens=job["max_tokens"], temperature=0, logprobs=-1, prompt_logprobs=job.get("prompt_logprobs", -1),
        ignore_eos=True, detokenize=False,
    )  # fmt: skip
    adapter = LoRARequest("adapter", 1, job["adapter"]) if "adapter" in job else None
    # Reported on request only: a worker in another process would have to be sent the function.
    layers = engine.apply_model(describe_layers)[0] if job.get("describe_layers") else None
    results = []
    for prompts in job["rounds"]:
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        for output in engine.generate(inputs, params, lora_request=adapter, use_tqdm=False):
            ids = [*output.prompt_token_ids, *output.outputs[0].token_ids]
            steps = [*(output.prompt_logprobs or [])[1:], *output.outputs[0].logprobs]
            table = torch.stack([torch.tensor([step[k].logprob for k in range(len(step))]) for step in steps])
            results.append({"ids": ids, "logprobs": table, "num_cached": output.num_cached_tokens})
            results[-1] |= {} if layers is None else {"layers": layers}
    return results


def describe_layers(model: torch.nn.Module) -> dict[str, Any]:
    """The class that computes each linear layer, and each attention's (k, v) scales, by module name."""
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.layers.linear import LinearBase

    layers: dict[str, Any] = {}
    for name, module in model.named_modules():
        if isinstance(module, LinearBase):
            layers[name] = type(getattr(module, "scheme", module.quant_method)).__name__
        elif isinstance(module, Attention):
            layers[name] = (module._k_scale_float, module._v_scale_float)
    return layers


def main(jobs_file: str) -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    for job in json.loads(Path(jobs_file).read_text()):
        try:
            torch.save(run(job), job["out"])
        except Exception:
            torch.save(traceback.format_exc(), job["out"])
        gc.collect()
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main(sys.argv[1])
