"""Run vLLM offline and save every log-probability: `engine_run.py JOBS.json`.

A process of its own, because vLLM's distributed state and our environment last as long as it; several jobs share it,
because importing vLLM takes longer than a small model's run. A job names a model folder, LLM arguments and rounds of
prompts (token ids); the prompts of one round are served together. Its "environment" also holds for later jobs.
Every parameter is NaN until a weight fills it. Output per job: one .pt file with, per prompt, the token ids (prompt +
generated) and the log-probabilities [num_positions, vocab_size] that predicted each of them but the first, or the
error as text.
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
    outputs_of_layers = layer_outputs(engine, job["rounds"][0][-1]) if job.get("layer_outputs") else None
    results = []
    for prompts in job["rounds"]:
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        for output in engine.generate(inputs, params, lora_request=adapter, use_tqdm=False):
            ids = [*output.prompt_token_ids, *output.outputs[0].token_ids]
            steps = [*(output.prompt_logprobs or [])[1:], *output.outputs[0].logprobs]
            table = torch.stack([torch.tensor([step[k].logprob for k in range(len(step))]) for step in steps])
            results.append({"ids": ids, "logprobs": table, "num_cached": output.num_cached_tokens})
            results[-1] |= {} if layers is None else {"layers": layers}
            results[-1] |= {} if outputs_of_layers is None else {"layer_outputs": outputs_of_layers}
    return results


def layer_outputs(engine: Any, prompt: list[int]) -> dict[int, torch.Tensor]:
    """The residual stream after each layer that computes anything, [num_tokens, hidden_size], for one prompt alone."""
    from vllm import SamplingParams

    kept: dict[int, torch.Tensor] = {}

    def watch(model: torch.nn.Module) -> list[Any]:
        def keep(index: int, output: tuple[torch.Tensor, torch.Tensor]) -> None:
            kept.setdefault(index, (output[0] + output[1])[: len(prompt)].clone())

        return [
            layer.register_forward_hook(lambda module, inputs, output, index=index: keep(index, output))
            for index, layer in enumerate(model.model.layers)  # type: ignore[arg-type, union-attr]
        ]

    (hooks,) = engine.apply_model(watch)
    engine.generate([{"prompt_token_ids": prompt}], SamplingParams(max_tokens=1, detokenize=False), use_tqdm=False)
    for hook in hooks:
        hook.remove()
    return kept


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


def poison_parameters() -> None:
    """Fill every parameter with NaN before the weights come, and fail when one of them keeps any."""
    from vllm_puzzle.serving.model import PuzzleForCausalLM

    load = PuzzleForCausalLM.load_weights

    def load_over_poison(self: Any, weights: Any) -> Any:
        # vLLM fills a KV cache's scales itself where a checkpoint has none.
        needed = {name: p for name, p in self.named_parameters() if ".self_attn.attn." not in name}
        # Those that vLLM quantizes as they come have no memory yet.
        floating = {name: p for name, p in needed.items() if p.is_floating_point() and not p.is_meta}
        for parameter in floating.values():
            parameter.data.fill_(float("nan"))
        loaded = load(self, weights)
        unfilled = [name for name, parameter in floating.items() if parameter.isnan().any()]
        assert not unfilled, f"no weight was loaded into {unfilled}"
        return loaded

    PuzzleForCausalLM.load_weights = load_over_poison  # type: ignore[method-assign]


def fork_workers() -> None:
    """Workers inherit the imported vLLM: on two cores each job would otherwise import it twice more (20 s).

    Safe here: this process computes nothing itself, so that no thread pool and no process group exists yet.
    """
    import multiprocessing

    from vllm.v1.executor import multiproc_executor

    multiproc_executor.get_mp_context = lambda: multiprocessing.get_context("fork")


def main(jobs_file: str) -> None:
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm_puzzle.serving.plugin import register_classes

    poison_parameters()
    register_classes()  # as `serve` does; a name alone would be inspected in a process of its own
    jobs = json.loads(Path(jobs_file).read_text())
    if any(job.get("fork") for job in jobs):
        fork_workers()
    # vLLM collects garbage nine times per engine, each time through all that importing it has made (0.3 s). Once is
    # enough.
    unfreeze, gc.unfreeze = gc.unfreeze, lambda: None
    gc.freeze()
    for job in jobs:
        own = job.get("environment", {})
        os.environ.update(own)
        try:
            torch.save(run(job), job["out"])
        except Exception:
            torch.save(traceback.format_exc(), job["out"])
        for name in own:
            del os.environ[name]
        cleanup_dist_env_and_memory()
        unfreeze()
        gc.collect()
        gc.freeze()


if __name__ == "__main__":
    main(sys.argv[1])
