"""Which layers share a KV-cache block table: the grouping that needs the fewest pages.

vLLM's model, for layers of several kinds whose pages have one size (layer-outermost layouts): all groups draw block
ids from one pool. An id stands for one page in each of the pool's layer slots, and the pool has as many slots as the
widest group has layers; a narrower group leaves the rest of its blocks' pages unused. So one request takes

    layer_pages = widest group · Σ over groups of blocks(group)

of the pool's `slots · num_blocks` pages, and the concurrency vLLM reports is their quotient. `blocks` is vLLM's own
admission count: ⌈max_model_len / block_size⌉ for full attention, ⌈min(window − 1 + tokens in flight, max_model_len)
/ block_size⌉ + 1 for a window (tokens in flight: `max_num_batched_tokens` times the concurrent batches). No grouping
needs less than the floor Σ over layers of blocks(layer).

vLLM's rule takes the rarest kind's layer count as the width (the commonest's, if less than 1.5 times that), whatever
the blocks cost. Here every width is tried, for one request of `max_model_len`: a kind of n layers makes ⌈n / width⌉
groups. A grouping must need fewer pages than vLLM's at admission, and no more than vLLM's once the request only decodes
(one token in flight, windows trimmed).
Groups cost time at every step, since each has metadata of its own, so an added group must save `SAVING_PER_GROUP` of
the pages. Requests much shorter than `max_model_len` are not counted: where all windows still hold everything, a wider
group's padding can cost more than vLLM's. Block sizes, and with them the grain of prefix-cache hits, stay.

Under pipeline parallelism a stage has as many slots as its widest share of a group, and all stages the blocks of the
one that can afford fewest: its pages count. Where the stages are not known (`stages_of`), vLLM's groups stay.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

DISABLE = "VLLM_PUZZLE_DISABLE_KV_GROUPS"
SAVING_PER_GROUP = 0.05

Groups = list[Any]  # of vLLM's KVCacheGroupSpec


@dataclass(frozen=True, slots=True)
class Stage:
    """One worker: the names of its layers that have a cache, and the bytes it has for them."""

    layer_names: frozenset[str]
    memory: int


_STAGES: ContextVar[tuple[Stage, ...]] = ContextVar("stages", default=())


@contextmanager
def stages_of(kv_cache_specs: Sequence[dict[str, Any]], available_memory: Sequence[int]) -> Iterator[None]:
    """Make the workers' layers and memory [bytes] known to `regroup`, for the time of a plan."""
    token = _STAGES.set(tuple(Stage(frozenset(s), m) for s, m in zip(kv_cache_specs, available_memory, strict=True)))
    try:
        yield
    finally:
        _STAGES.reset(token)


def regroup(vllm_config: Any, stock: Groups, layer_names: Sequence[str]) -> Groups:
    """vLLM's groups, or ours where they need fewer pages (said once at info level).

    stock: what vLLM's `get_kv_cache_groups` returned; layer_names: all layers with a cache, in the model's order.
    """
    if os.environ.get(DISABLE, "0") not in ("", "0") or not _is_ours_to_plan(vllm_config, stock):
        return stock
    stages: tuple[Stage, ...] = (Stage(frozenset(layer_names), 1),)
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        stages = _STAGES.get()
        if not stages or min(stage.memory for stage in stages) <= 0:
            return stock
    groups = plan_groups(vllm_config, stock, layer_names, stages)
    if groups is not stock:
        from vllm.logger import init_logger

        before, after = (layer_pages(vllm_config, g, stages) for g in (stock, groups))
        init_logger("vllm.puzzle").info_once(
            "vllm-puzzle: %s KV-cache groups in place of vLLM's %s: %s layer-pages for a request of %s tokens, "
            "not %s (%s=1 keeps vLLM's)",
            len(groups),
            len(stock),
            f"{after:,.0f}",
            f"{vllm_config.model_config.max_model_len:,}",
            f"{before:,.0f}",
            DISABLE,
        )
    return groups


def plan_groups(vllm_config: Any, stock: Groups, layer_names: Sequence[str], stages: Sequence[Stage]) -> Groups:
    """The grouping of the module's rule; `stock` itself where none is better. Arguments as in `regroup`."""

    def pages(groups: Groups, decoding: bool = False) -> float:
        return layer_pages(vllm_config, groups, stages, decoding=decoding)

    limit, decoding_limit = pages(stock), pages(stock, decoding=True)
    kinds = _layers_by_spec(stock, layer_names)
    candidates = [stock]
    for width in range(1, max(len(names) for names in kinds.values()) + 1):
        groups = _split(kinds, width)
        if pages(groups) < limit and pages(groups, decoding=True) <= decoding_limit:
            candidates.append(groups)
    candidates.sort(key=lambda groups: (len(groups), pages(groups)))
    best = candidates[0]
    for groups in candidates[1:]:
        if pages(groups) < pages(best) * (1 - SAVING_PER_GROUP) ** (len(groups) - len(best)):
            best = groups
    return best


def layer_pages(
    vllm_config: Any, groups: Groups, stages: Sequence[Stage] | None = None, *, decoding: bool = False
) -> float:
    """Pages that one request of max_model_len takes (of the whole model, if no stages are given).

    With stages: of the stage that can afford fewest requests, its pages scaled to the largest stage's memory.
    """
    stages = stages or [Stage(frozenset(name for group in groups for name in group.layer_names), 1)]
    most = max(stage.memory for stage in stages)
    widest = max(
        len(stage.layer_names.intersection(group.layer_names)) * (most / stage.memory)
        for stage in stages
        for group in groups
    )
    return widest * sum(num_blocks(vllm_config, group.kv_cache_spec, decoding=decoding) for group in groups)


def floor_pages(vllm_config: Any, groups: Groups) -> int:
    """Pages that one request of max_model_len takes if no page is left unused."""
    return sum(len(group.layer_names) * num_blocks(vllm_config, group.kv_cache_spec) for group in groups)


def num_blocks(vllm_config: Any, spec: Any, *, decoding: bool = False) -> int:
    """Blocks that a group of this spec holds for one request: as admitted, or with one token in flight."""
    if decoding and hasattr(spec, "max_admission_blocks_per_request"):
        max_model_len = vllm_config.model_config.max_model_len
        return spec.max_admission_blocks_per_request(max_in_flight_tokens=1, max_model_len=max_model_len)
    return -(-spec.max_memory_usage_bytes(vllm_config) // spec.page_size_bytes)


def _is_ours_to_plan(vllm_config: Any, stock: Groups) -> bool:
    """Whether the groups are full, windowed and chunked attention only, in the layout the module describes.

    Left to vLLM: one group, Mamba and MLA states, groups of mixed page sizes, draft models (vLLM looks for their groups
    itself), HiSparse, KV connectors (both ends must group alike, and their settings may differ), a number of blocks
    set by the user (a wider group's blocks are larger).
    """
    from vllm.v1.kv_cache_interface import (
        ChunkedLocalAttentionSpec,
        FullAttentionSpec,
        KVCacheGroupSpec,
        SlidingWindowSpec,
    )

    others = (
        vllm_config.speculative_config,
        vllm_config.kv_transfer_config,
        vllm_config.attention_config.hisparse_config,
        vllm_config.cache_config.num_gpu_blocks_override,
    )
    if len(stock) < 2 or any(other is not None for other in others):
        return False
    for group in stock:
        spec = group.kv_cache_spec
        if type(spec) not in (FullAttentionSpec, SlidingWindowSpec, ChunkedLocalAttentionSpec):
            return False
        if type(spec) is FullAttentionSpec and (spec.sliding_window or spec.attention_chunk_size):
            return False  # merged from differing layers: its parts are not interchangeable
        if group != KVCacheGroupSpec(group.layer_names, spec):
            return False  # a role of its own
    return not vllm_config.cache_config.get_resolved_kv_cache_layout().is_block_outermost


def _layers_by_spec(stock: Groups, layer_names: Sequence[str]) -> dict[Any, list[str]]:
    spec_of = {name: group.kv_cache_spec for group in stock for name in group.layer_names}
    kinds: dict[Any, list[str]] = {}
    for name in layer_names:
        kinds.setdefault(spec_of[name], []).append(name)
    return kinds


def _split(kinds: dict[Any, list[str]], width: int) -> Groups:
    """Groups of at most `width` layers; a kind's layers are dealt out in turn, for equal shares in pipeline stages."""
    from vllm.v1.kv_cache_interface import KVCacheGroupSpec

    groups = []
    for spec, names in kinds.items():
        count = -(-len(names) // width)
        groups += [KVCacheGroupSpec(names[i::count], spec) for i in range(count)]
    return groups
