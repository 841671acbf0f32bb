"""Run what `test_capabilities.py` compares, all in one process: `capability_run.py JOBS.json`.

As engine_run.py, for what plain generation does not show. A job names a model folder, LLM arguments and what to do:
`generate` (also from `embeds`, a file with an embedding table, or with an `adapter`), or `embed`. With `hidden_states`
the first prompt is run once alone, and what the model hands to an EAGLE-3 draft is kept. Output per job: one .pt file
with a dict, or the error as text.
"""

from __future__ import annotations

import gc
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def run(job: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM

    engine = LLM(job["model"], **job["llm"])
    result: dict[str, Any] = {"tasks": list(engine.supported_tasks)}
    if job.get("hidden_states"):
        result["hidden_states"] = hidden_states(engine, job["prompts"][0])
    inputs: list[Any] = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    if job["do"] == "embed":
        outputs = engine.embed(inputs, use_tqdm=False)
        return result | {"embeddings": [torch.tensor(output.outputs.embedding) for output in outputs]}
    if "embeds" in job:
        table = torch.load(job["embeds"])
        inputs = [{"prompt_embeds": table[torch.tensor(prompt)]} for prompt in job["prompts"]]
    result |= generate(engine, inputs, job)
    if "refused_adapter" in job:  # last, as the engine may not survive it
        refused = {"adapter": job["refused_adapter"], "adapter_id": 2, "max_tokens": 1}
        result["refusal"] = refusal(lambda: generate(engine, inputs[:1], refused))
    result["embed"] = refusal(lambda: engine.embed(inputs, use_tqdm=False))
    metrics = [] if job["llm"].get("disable_log_stats", True) else engine.get_metrics()
    return result | {metric.name: metric.value for metric in metrics if hasattr(metric, "value")}


def refusal(attempt: Callable[[], object]) -> str:
    """The error's text; empty when there was none."""
    try:
        attempt()
    except ValueError as error:
        return str(error)
    return ""


def generate(engine: Any, inputs: list[Any], job: dict[str, Any]) -> dict[str, Any]:
    """Generated ids and the log-probabilities [num_generated, vocab_size] of each prompt."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    params = SamplingParams(max_tokens=job["max_tokens"], temperature=0, logprobs=-1, ignore_eos=True, detokenize=False)
    adapter = LoRARequest("adapter", job.get("adapter_id", 1), job["adapter"]) if "adapter" in job else None
    outputs = engine.generate(inputs, params, lora_request=adapter, use_tqdm=False)
    tables = [[[step[k].logprob for k in range(len(step))] for step in o.outputs[0].logprobs] for o in outputs]
    return {
        "ids": [list(output.outputs[0].token_ids) for output in outputs],
        "logprobs": [torch.tensor(table) for table in tables],
    }


def hidden_states(engine: Any, prompt: list[int]) -> list[torch.Tensor]:
    """What the model's forward returns beside its output, for one prompt alone: [num_tokens, hidden_size] each."""
    from vllm import SamplingParams

    kept: list[list[torch.Tensor]] = []

    def keep(model: torch.nn.Module, arguments: object, output: tuple[torch.Tensor, list[torch.Tensor]]) -> None:
        kept.append([tensor[: len(prompt)].clone() for tensor in output[1]])

    (hook,) = engine.apply_model(lambda model: model.register_forward_hook(keep))
    engine.generate([{"prompt_token_ids": prompt}], SamplingParams(max_tokens=1, detokenize=False), use_tqdm=False)
    hook.remove()
    return kept[0]


def main(jobs_file: str) -> None:
    from vllm import ModelRegistry
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.model_executor.models.llama_eagle3 import Eagle3LlamaForCausalLM
    from vllm_puzzle.serving.plugin import register_classes

    # By class: vLLM looks into a class known by name in a process of its own, which imports vLLM again.
    register_classes()
    ModelRegistry.register_model("LlamaForCausalLMEagle3", Eagle3LlamaForCausalLM)
    for job in json.loads(Path(jobs_file).read_text()):
        try:
            torch.save(run(job), job["out"])
        except Exception:
            torch.save(traceback.format_exc(), job["out"])
        gc.collect()
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main(sys.argv[1])
