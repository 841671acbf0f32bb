"""How many requests of full length are in a KV cache at once: vLLM's own KVCacheManager, fed as its scheduler does.

The concurrency that vLLM reports charges every request what it takes at its largest, while it is being prefilled. The
scheduler does not: it admits a request when that much is free at the time, and gives back the blocks that have left
the windows at every step. So more requests than reported run at once, and this counts them. A test holds the count to
vLLM's whole scheduler.
"""

from __future__ import annotations

from math import lcm
from typing import Any

from vllm_puzzle.model_configs.schema import ModelRecord
from vllm_puzzle.serving.kv_capacity import CacheSetup, plan_cache
from vllm_puzzle.serving.vllm_compat import resolve


def held_requests(record: ModelRecord, setup: CacheSetup, available_bytes: int, is_stock: bool = False) -> int:
    """Requests that come to `max_model_len` tokens and stay, until one is not admitted or does not get to its end.

    One after the other is prefilled, in chunks of `max_num_batched_tokens`; none shares a prefix. Errors as in
    `kv_capacity`.
    """
    from vllm import SamplingParams

    config, plan = plan_cache(record, setup, available_bytes, is_stock)
    # The scheduler's block size is the least common multiple of the groups'.
    block_size = lcm(*(group.kv_cache_spec.block_size for group in plan.kv_cache_groups))
    manager = resolve("vllm.v1.core.kv_cache_manager:KVCacheManager")(
        plan,
        setup.max_model_len,
        scheduler_block_size=block_size,
        hash_block_size=block_size,
        max_in_flight_tokens=config.max_in_flight_tokens,
        enable_caching=False,
    )
    make_request = resolve("vllm.v1.request:Request")
    prompt, params = [0] * (setup.max_model_len - 1), SamplingParams(max_tokens=1)
    for number in range(plan.num_blocks):  # none takes less than a block
        if not _comes_to_its_end(manager, make_request(str(number), prompt, params, None), setup):
            return number
    return plan.num_blocks


def _comes_to_its_end(manager: Any, request: Any, setup: CacheSetup) -> bool:
    """Prefill and the first output token. With async scheduling, blocks leave a window one step later."""
    num_prompt_tokens, in_flight = request.num_tokens, 0
    sizes = [setup.max_num_batched_tokens] * (num_prompt_tokens // setup.max_num_batched_tokens)
    rest = num_prompt_tokens - sum(sizes)
    for size in [*sizes, *([rest] if rest else []), 1]:
        request.num_in_flight_tokens = in_flight
        if manager.allocate_slots(request, size, full_sequence_must_fit=request.num_computed_tokens == 0) is None:
            return False
        request.num_computed_tokens += size
        in_flight = size if setup.is_async else 0
    # What the next step would do first: give back what the last chunk held.
    manager.remove_skipped_blocks(request.request_id, num_prompt_tokens)
    return True
