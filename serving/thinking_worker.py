"""What the API process asks of workers, by collective_rpc: the thinking markers, and the end of a thought now.

Bound to vLLM's WorkerBase as methods (`vllm_compat.add_worker_methods`). The V1 runner keeps its machines in the input
batch, the V2 runner its tensors in the sampler.
"""

from __future__ import annotations

from copy import copy
from typing import Any

from vllm_puzzle.kernels.thinking import ThinkingLimits
from vllm_puzzle.serving import vllm_compat
from vllm_puzzle.serving.thinking_plan import markers_from_wire
from vllm_puzzle.serving.thinking_v1 import CLOSED_KEY, limits_or_none


def set_markers(worker: Any, wire: dict[str, Any]) -> None:
    """Use these markers for requests from now on. `wire`: see thinking_plan.markers_to_wire."""
    markers, runner = markers_from_wire(wire), worker.model_runner
    if hasattr(runner, "input_batch"):
        runner.input_batch.thinking_budget_state_holder.markers = markers
    elif (sampler := getattr(runner, "sampler", None)) is not None:
        sampler.thinking_budget_state.set_markers(markers)


def end_thinking(worker: Any, request_ids: list[str]) -> list[str]:
    """End the open thoughts of these running requests from their next token on; returns those that are running."""
    runner = worker.model_runner
    if hasattr(runner, "input_batch"):
        return [request_id for request_id in request_ids if _end_v1(runner.input_batch, runner.requests, request_id)]
    sampler = getattr(runner, "sampler", None)
    if sampler is None:
        return []
    slots = {name: runner.req_states.req_id_to_index.get(name) for name in request_ids}
    for slot in slots.values():
        if slot is not None:
            sampler.thinking_budget_state.close(slot)
            sampler.needs_logits_processing[slot] = True
    return [name for name, slot in slots.items() if slot is not None]


def _end_v1(batch: Any, requests: dict[str, Any], request_id: str) -> bool:
    index, holder = batch.req_id_to_index.get(request_id), batch.thinking_budget_state_holder
    if index is None or holder.markers is None:
        return False
    request = requests[request_id]
    row = holder.rows.get(index)
    is_new = row is None
    if row is None:
        limits = limits_or_none(request.sampling_params) or ThinkingLimits()
        row = holder.track(index, limits, request.prompt_token_ids, request.output_token_ids)
    row.close(holder.markers, request.output_token_ids)
    params = copy(request.sampling_params)  # n sequences of one request may share theirs
    params.extra_args = {**(params.extra_args or {}), CLOSED_KEY: row.closed_at}
    request.sampling_params = params
    if is_new:
        vllm_compat.refresh_sampling(batch)
    return True
