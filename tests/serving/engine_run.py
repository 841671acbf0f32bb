"""Run vLLM offline on one checkpoint and save every log-probability: `engine_run.py JOB.json`.

A process of its own, because vLLM's distributed state lives as long as its process. The job names a model folder,
LLM arguments and rounds of prompts (token ids); the prompts of one round are served together. Output: one .pt file
with, per prompt, the token ids (prompt + generated) and the log-probabilities [num_positions, vocab_size] that
predicted each of them but the first.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch


def main(job_file: str) -> None:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    job = json.loads(Path(job_file).read_text())
    engine = LLM(job["model"], skip_tokenizer_init=True, max_logprobs=-1, **job["llm"])
    params = SamplingParams(
        max_tokens=job["max_tokens"], temperature=0, logprobs=-1, prompt_logprobs=job.get("prompt_logprobs", -1),
        ignore_eos=True, detokenize=False,
    )  # fmt: skip
    adapter = LoRARequest("adapter", 1, job["adapter"]) if "adapter" in job else None
    results = []
    for prompts in job["rounds"]:
        outputs = engine.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts], params, lora_request=adapter, use_tqdm=False
        )
        for output in outputs:
            ids = [*output.prompt_token_ids, *output.outputs[0].token_ids]
            steps = [*(output.prompt_logprobs or [])[1:], *output.outputs[0].logprobs]
            table = torch.stack([torch.tensor([step[k].logprob for k in range(len(step))]) for step in steps])
            results.append({"ids": ids, "logprobs": table, "num_cached": output.num_cached_tokens})
    torch.save(results, job["out"])


if __name__ == "__main__":
    main(sys.argv[1])
