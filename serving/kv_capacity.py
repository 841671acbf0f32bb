"""How many tokens and requests a KV cache of given bytes holds: vLLM's own planner on our records, without a GPU.

Each layer with a cache gets the spec that it would have in the engine (`serving/attention.py`; of a Mamba layer what
vLLM's NemotronH class makes), and vLLM's planner does the rest, with our grouping (`kv_cache_groups.py`) or its own.
Its number counts one request of `max_model_len` as admitted: whole blocks, and of a window also the tokens in flight,
`max_num_batched_tokens` for each of the concurrent batches, which are two with async scheduling, the default on a GPU.

Blocks of 16 are vLLM's default on NVIDIA GPUs. vLLM is imported inside the functions; the planner's layout is that of
its attention backends there, layers outermost.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from vllm_puzzle.model_configs.schema import Attention, ConfigError, Mamba2, ModelRecord
from vllm_puzzle.serving import vllm_compat
from vllm_puzzle.serving.kv_cache_groups import DISABLE, num_blocks

KV_BYTES = {"bf16": 2, "fp8": 1}  # per element
LAYOUT = "LBNHC"


@dataclass(frozen=True, slots=True)
class CacheSetup:
    """What, beside the model and the bytes, decides a plan. Lengths in tokens; see the module for `is_async`.

    `has_prefix_caching` counts for Mamba layers only: with it, vLLM keeps two states of a request instead of one.
    """

    max_model_len: int
    max_num_batched_tokens: int
    kv_dtype: str
    block_size: int = 16
    tensor_parallel_size: int = 1
    is_async: bool = True
    has_prefix_caching: bool = True
    mamba_ssm_dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.kv_dtype not in KV_BYTES:
            raise ConfigError(f"KV cache, dtype: found {self.kv_dtype!r}, allowed: {', '.join(KV_BYTES)}")
        for name in ("max_model_len", "max_num_batched_tokens", "block_size", "tensor_parallel_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"KV cache, {name}: found {getattr(self, name)}, allowed: 1 or more")


@dataclass(frozen=True, slots=True)
class Group:
    """Layers that share a block table: what they are, how many, tokens per block, blocks of one request."""

    kind: str
    num_layers: int
    block_size: int
    blocks_per_request: int


@dataclass(frozen=True, slots=True)
class Capacity:
    """What vLLM reports for one GPU's cache, and the bytes behind it.

    tokens, concurrency: vLLM's, at `max_model_len`; bytes_per_request: of such a request as admitted;
    decoding_bytes: of the same, once its windows are trimmed to one token in flight.
    """

    tokens: int
    concurrency: float
    bytes_per_request: int
    decoding_bytes: int
    block_bytes: int
    num_blocks: int
    groups: tuple[Group, ...]


def kv_capacity(
    record: ModelRecord,
    *,
    available_bytes: int,
    max_model_len: int,
    max_num_batched_tokens: int,
    kv_dtype: str,
    block_size: int = 16,
    is_stock: bool = False,
    tensor_parallel_size: int = 1,
    is_async: bool = True,
    has_prefix_caching: bool = True,
    mamba_ssm_dtype: str = "float32",
) -> Capacity:
    """Plan one GPU's cache of `available_bytes`; `is_stock` keeps vLLM's grouping. Other arguments: `CacheSetup`.

    Raises ConfigError where one request does not fit, as vLLM refuses to start then, or where no layer has a cache.
    """
    setup = CacheSetup(
        max_model_len,
        max_num_batched_tokens,
        kv_dtype,
        block_size,
        tensor_parallel_size,
        is_async,
        has_prefix_caching,
        mamba_ssm_dtype,
    )
    config, plan = plan_cache(record, setup, available_bytes, is_stock)
    tokens, concurrency = vllm_compat.kv_cache_planner().get_kv_cache_capacity(config, plan)
    groups = tuple(
        Group(_kind(group.kv_cache_spec), len(group.layer_names), group.kv_cache_spec.block_size, blocks)
        for group, blocks in ((group, num_blocks(config, group.kv_cache_spec)) for group in plan.kv_cache_groups)
    )
    block_bytes = plan.kv_cache_tensors[0].size // plan.num_blocks
    decoding = sum(num_blocks(config, group.kv_cache_spec, decoding=True) for group in plan.kv_cache_groups)
    return Capacity(
        tokens=tokens,
        concurrency=concurrency,
        bytes_per_request=block_bytes * sum(group.blocks_per_request for group in groups),
        decoding_bytes=block_bytes * decoding,
        block_bytes=block_bytes,
        num_blocks=plan.num_blocks,
        groups=groups,
    )


def plan_cache(record: ModelRecord, setup: CacheSetup, available_bytes: int, is_stock: bool) -> tuple[Any, Any]:
    """(VllmConfig, KVCacheConfig) of one GPU. Errors as in `kv_capacity`."""
    config = _config(setup)
    specs = layer_specs(record, setup, config)
    if not specs:
        raise ConfigError(f"KV cache of {record.architecture}: found no layer with a cache, allowed: at least one")
    with _grouping(is_stock):
        try:
            return config, _plan(config, specs, available_bytes)
        except ValueError as error:
            roomy = _plan(config, specs, 1 << 60)
            block_bytes = roomy.kv_cache_tensors[0].size // roomy.num_blocks
            blocks = sum(num_blocks(config, group.kv_cache_spec) for group in roomy.kv_cache_groups)
            needed = block_bytes * (blocks + 1)  # vLLM keeps one block empty
            if available_bytes >= needed:
                raise
            raise ConfigError(
                f"KV cache of {record.architecture}: found {available_bytes:,} bytes, allowed: at least {needed:,}, "
                f"for one request of {setup.max_model_len:,} tokens"
            ) from error


def layer_specs(record: ModelRecord, setup: CacheSetup, config: Any) -> dict[str, Any]:
    """vLLM's spec of every layer with a cache, by layer name, on one of the tensor-parallel ranks.

    For a model with Mamba layers, sets the sizes of `config` (a VllmConfig of one's own) as vLLM does for NemotronH.
    """
    blocks = [(f"{i}.{j}", block) for i, layer in enumerate(record.layers) for j, block in enumerate(layer.blocks)]
    mambas = [block.attention for _, block in blocks if isinstance(block.attention, Mamba2)]
    if mambas:
        _fit_pages(record, setup, config, mambas)
    specs: dict[str, Any] = {}
    for name, block in blocks:
        if isinstance(block.attention, Attention):
            specs[f"layers.{name}"] = _attention_spec(block.attention, setup, config.cache_config.block_size)
        elif isinstance(block.attention, Mamba2):
            specs[f"layers.{name}"] = _mamba_spec(block.attention, setup, config.cache_config)
    return specs


def least_bytes(record: ModelRecord, setup: CacheSetup) -> int:
    """Bytes that one decoding request of `max_model_len` cannot do without on one GPU: no blocks, no padding, no tokens
    in flight; of a Mamba layer one state."""
    total = 0
    for spec in (block.attention for layer in record.layers for block in layer.blocks):
        if isinstance(spec, Attention):
            window = None if spec.num_sink_tokens else spec.sliding_window
            total += min(window or setup.max_model_len, setup.max_model_len) * _token_bytes(spec, setup)
        elif isinstance(spec, Mamba2):
            total += _mamba_state_spec(spec, setup, 1, None).page_size_bytes
    return total


def _token_bytes(spec: Attention, setup: CacheSetup) -> int:
    """Keys and values of one token in one layer, on one rank."""
    num_kv_heads = max(1, spec.num_kv_heads // setup.tensor_parallel_size)
    return 2 * num_kv_heads * spec.head_dim * KV_BYTES[setup.kv_dtype]


def _attention_spec(spec: Attention, setup: CacheSetup, block_size: int) -> Any:
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

    sizes: dict[str, Any] = {
        "block_size": block_size,
        "num_kv_heads": max(1, spec.num_kv_heads // setup.tensor_parallel_size),
        "head_size": spec.head_dim,
        "dtype": {"bf16": torch.bfloat16, "fp8": torch.uint8}[setup.kv_dtype],  # vLLM keeps FP8 as bytes
    }
    # Sink tokens stay in view for ever: vLLM's cache keeps every page where it knows of no window.
    if spec.sliding_window is None or spec.num_sink_tokens:
        return FullAttentionSpec(**sizes)
    return SlidingWindowSpec(**sizes, sliding_window=spec.sliding_window)


def _mamba_spec(spec: Mamba2, setup: CacheSetup, cache_config: Any) -> Any:
    return _mamba_state_spec(spec, setup, cache_config.mamba_block_size, cache_config.mamba_page_size_padded)


def _mamba_state_spec(spec: Mamba2, setup: CacheSetup, block_size: int, page_size: int | None) -> Any:
    """A page is the state of one sequence: the last inputs of the convolution in bf16, and the SSM state."""
    import torch
    from vllm.v1.kv_cache_interface import MambaSpec

    shape = vllm_compat.resolve(
        "vllm.model_executor.layers.mamba.mamba_utils:MambaStateShapeCalculator.mamba2_state_shape"
    )
    shapes = shape(
        tp_world_size=setup.tensor_parallel_size,
        intermediate_size=spec.num_heads * spec.head_dim,
        n_groups=spec.num_groups,
        num_heads=spec.num_heads,
        head_dim=spec.head_dim,
        state_size=spec.state_size,
        conv_kernel=spec.conv_kernel,
    )
    return MambaSpec(
        block_size=block_size,
        shapes=shapes,
        dtypes=(torch.bfloat16, getattr(torch, setup.mamba_ssm_dtype)),
        page_size_padded=page_size,
        mamba_cache_mode="align" if setup.has_prefix_caching else "none",
    )


def _fit_pages(record: ModelRecord, setup: CacheSetup, config: Any, mambas: list[Mamba2]) -> None:
    """As vLLM's Platform does: an attention block grows until its page holds a Mamba state, which is padded to it."""
    cache = config.cache_config
    cache.mamba_cache_mode = "align" if setup.has_prefix_caching else "none"
    state = max(_mamba_state_spec(spec, setup, 1, None).page_size_bytes for spec in mambas)
    tokens = [_token_bytes(spec, setup) for spec in record.attentions]
    if tokens:
        page = setup.block_size * max(tokens)
        cache.block_size = setup.block_size * -(-state // page)
        cache.mamba_page_size_padded = cache.block_size * max(tokens)
    cache.mamba_block_size = cache.block_size if setup.has_prefix_caching else setup.max_model_len


def _plan(config: Any, specs: dict[str, Any], available_bytes: int) -> Any:
    """KVCacheConfig of one worker. Raises vLLM's ValueError where one request does not fit."""
    vllm_compat.use_fewest_kv_cache_pages()
    (plan,) = vllm_compat.kv_cache_planner().get_kv_cache_configs(config, [dict(specs)], [available_bytes])
    return plan


def _kind(spec: Any) -> str:
    window = getattr(spec, "sliding_window", None)
    if window is not None:
        return f"window {window}"
    return "mamba" if hasattr(spec, "shapes") else "full"


@contextmanager
def _grouping(is_stock: bool) -> Iterator[None]:
    """vLLM's grouping or ours, whatever the user's environment says."""
    before = os.environ.get(DISABLE)
    os.environ[DISABLE] = "1" if is_stock else "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[DISABLE]
        else:
            os.environ[DISABLE] = before


@lru_cache(maxsize=1)
def _any_config() -> Any:
    """A VllmConfig of the pocket model: the planner reads lengths and options of it, nothing of the model."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm_puzzle.serving import plugin
    from vllm_puzzle.serving.preflight import POCKET

    plugin.register_classes()
    return EngineArgs(str(POCKET / "puzzle"), skip_tokenizer_init=True, enforce_eager=True).create_engine_config()


def _config(setup: CacheSetup) -> Any:
    config = copy(_any_config())
    config.model_config, config.scheduler_config = copy(config.model_config), copy(config.scheduler_config)
    config.cache_config = copy(config.cache_config)
    config.model_config.max_model_len = setup.max_model_len
    config.scheduler_config.max_num_batched_tokens = setup.max_num_batched_tokens
    config.scheduler_config.async_scheduling = setup.is_async
    config.cache_config.kv_cache_layout = LAYOUT
    config.cache_config.block_size = setup.block_size
    return config
