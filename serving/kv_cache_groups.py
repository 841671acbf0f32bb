"""Which layers share a KV-cache block table: the grouping that needs the fewest pages.

vLLM's model, for layers of several kinds whose pages have one size (layer-outermost layouts): all groups draw block
ids from one pool. An id stands for one page in each of the pool's layer slots, and the pool has as many slots as the
widest group has layers; a narrower group leaves the rest of its blocks' pages unused. So one request takes

    layer_pages = widest group · Σ over groups of blocks(group)

of the pool's `slots · num_blocks` pages, and the concurrency vLLM reports is their quotient. `blocks` is vLLM's own
admission count: ⌈max_model_len / block_size⌉ for full attention, ⌈min(window − 1 + tokens in flight, max_model_len)
/ block_size⌉ + 1 for a window (tokens in flight: `max_num_batched_tokens` times the concurrent batches). No grouping
needs less than the floor Σ over layers of blocks(layer).

vLLM's rule takes the rarest kind's layer count as the width, whatever its blocks cost. Here every width is tried, for
one request of `max_model_len`: a kind of n layers makes ⌈n / width⌉ groups. A grouping must need fewer pages than
vLLM's at admission, and no more than vLLM's once the request only decodes (one token in flight, windows trimmed).
Groups cost time at every step, since each has metadata of its own, so an added group must save `SAVING_PER_GROUP` of
the pages. Requests much shorter than `max_model_len` are not counted: where all windows still hold everything, a wider
group's padding can cost more than vLLM's. Block sizes, and with them the grain of prefix-cache hits, stay.

Under pipeline parallelism a stage has as many slots as its widest share of a group. Where stages begin is not known
here; they are taken to hold equally many attention layers.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

DISABLE = "VLLM_PUZZLE_DISABLE_KV_GROUPS"
SAVING_PER_GROUP = 0.05

Groups = list[Any]  # of vLLM's KVCacheGroupSpec


def regroup(vllm_config: Any, stock: Groups, layer_names: Sequence[str]) -> Groups:
    """vLLM's groups, or ours where they need fewer pages (said once at info level).

    stock: what vLLM's `get_kv_cache_groups` returned; layer_names: all layers with a cache, in the model's order.
    """
    if os.environ.get(DISABLE, "0") not in ("", "0") or not _is_ours_to_plan(vllm_config, stock):
        return stock
    groups = plan_groups(vllm_config, stock, layer_names)
    if groups is not stock:
        from vllm.logger import init_logger

        before, after = (layer_pages(vllm_config, g, _stages(vllm_config, layer_names)) for g in (stock, groups))
        init_logger("vllm.puzzle").info_once(
            "vllm-puzzle: %s KV-cache groups in place of vLLM's %s: %s layer-pages for a request of %s tokens, "
            "not %s (%s=1 keeps vLLM's)",
            len(groups),
            len(stock),
            f"{after:,}",
            f"{vllm_config.model_config.max_model_len:,}",
            f"{before:,}",
            DISABLE,
        )
    return groups


def plan_groups(vllm_config: Any, stock: Groups, layer_names: Sequence[str]) -> Groups:
    """The grouping of the module's rule; `stock` itself where none is better. Arguments as in `regroup`."""
    stages = _stages(vllm_config, layer_names)

    def pages(groups: Groups, decoding: bool = False) -> int:
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
    vllm_config: Any, groups: Groups, stages: Sequence[Sequence[str]] | None = None, *, decoding: bool = False
) -> int:
    """Pages that one request of max_model_len takes; with `stages` (their layers' names), on the widest stage."""
    stages = stages or [[name for group in groups for name in group.layer_names]]
    widest = max(len(set(stage).intersection(group.layer_names)) for stage in stages for group in groups)
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
    itself), HiSparse, KV connectors (both ends must group alike, and their settings may differ).
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


def _stages(vllm_config: Any, layer_names: Sequence[str]) -> list[Sequence[str]]:
    count, total = vllm_config.parallel_config.pipeline_parallel_size, len(layer_names)
    return [layer_names[i * total // count : (i + 1) * total // count] for i in range(count)]
