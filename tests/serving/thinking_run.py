"""Run the scripted model offline, step by step: `thinking_run.py JOBS.json`.

One process for many engines, as importing vLLM takes longer than they do; without our plugin when VLLM_PLUGINS names
another. A job has LLM arguments, `reasoning` (vLLM's ReasoningConfig, as keywords) and `rounds`, served one after the
other: maybe `markers` for the workers, and `requests`. Each is a prompt (token ids), sampling parameters, and what
happens to it: `arrives` (the step that it is added before), `close_after` or `abort_after` (its number of tokens).
Output per job: a JSON file with each round's results (tokens, finish reason, log-probabilities of each request) and the
engine's counters.
"""

from __future__ import annotations

import gc
import json
import sys
import traceback
from pathlib import Path
from typing import Any

MAX_STEPS = 5000


def run(job: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM
    from vllm.config.reasoning import ReasoningConfig

    llm = LLM(
        job["model"], load_format="dummy", dtype="float32", enforce_eager=True, disable_log_stats=False,
        kv_cache_memory_bytes=1 << 26, reasoning_config=ReasoningConfig(**job["reasoning"]), **job["llm"],
    )  # fmt: skip
    rounds = []
    for one in job["rounds"]:
        if "markers" in one:
            llm.collective_rpc("puzzle_set_markers", args=(one["markers"],))
        rounds.append(step(llm, one["requests"]))
    counters = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    return {"rounds": rounds, "counters": counters}


def step(llm: Any, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Serve all requests; results in their order, `n` sequences each."""
    engine = llm.llm_engine
    results: list[dict[str, Any]] = [{"events": []} for _ in requests]
    waiting = dict(enumerate(requests))
    for number in range(MAX_STEPS):
        for index in [index for index, request in waiting.items() if request.get("arrives", 0) <= number]:
            request = waiting.pop(index)
            inputs = {"prompt_token_ids": request["prompt"]}
            engine.add_request(str(index), inputs, sampling_params(request["params"]))
        if not waiting and not engine.has_unfinished_requests():
            return results
        for output in engine.step():
            index = int(output.request_id)
            found = results[index].setdefault("sequences", [None] * requests[index]["params"].get("n", 1))
            for one in output.outputs:
                found[one.index] = sequence(one)
            act(llm, requests[index], results[index], str(index))
    raise AssertionError(f"not done after {MAX_STEPS} steps")


def sampling_params(keywords: dict[str, Any]) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RepetitionDetectionParams, StructuredOutputsParams

    keywords = {"temperature": 0, "max_tokens": 40, "skip_special_tokens": False} | keywords
    if "structured_outputs" in keywords:
        keywords["structured_outputs"] = StructuredOutputsParams(**keywords["structured_outputs"])
    if "repetition_detection" in keywords:
        keywords["repetition_detection"] = RepetitionDetectionParams(**keywords["repetition_detection"])
    return SamplingParams(**keywords)


def sequence(output: Any) -> dict[str, Any]:
    found = {"ids": list(output.token_ids), "text": output.text, "finish_reason": output.finish_reason}
    if output.logprobs is not None:
        found["logprobs"] = [{token: entry.logprob for token, entry in at.items()} for at in output.logprobs]
    return found


def act(llm: Any, request: dict[str, Any], result: dict[str, Any], name: str) -> None:
    """End the thought, or abort the request, once it has as many tokens."""
    num_tokens = len(result["sequences"][0]["ids"])
    for event in ("close", "abort"):
        if event in result["events"] or num_tokens < request.get(f"{event}_after", num_tokens + 1):
            continue
        result["events"].append(event)
        if event == "close":
            internal = list(llm.llm_engine.output_processor.external_req_ids[name])
            result["closed"] = llm.collective_rpc("puzzle_end_thinking", args=(internal,))[0] == internal
        else:
            llm.llm_engine.abort_request([name])


def main(jobs_file: str) -> None:
    import scripted_model
    from vllm.distributed import cleanup_dist_env_and_memory

    scripted_model.register()
    for job in json.loads(Path(jobs_file).read_text()):
        try:
            result: Any = run(job)
        except Exception:
            result = traceback.format_exc()
        Path(job["out"]).write_text(json.dumps(result))
        gc.collect()
        cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main(sys.argv[1])
