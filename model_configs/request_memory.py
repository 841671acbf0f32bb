"""Bytes that requests hold on one GPU: KV cache by layer and window, Mamba states. Standard library only.

As vLLM 0.32 counts them (v1/kv_cache_interface.py, layers/mamba/mamba_utils.py), layer by layer: full attention holds
every token; a window of w its last w − 1 and the tokens in flight, in one more block than they fill. What vLLM's groups
of layers pad beyond that is in `serving/kv_cache_groups.py`.
"""

from __future__ import annotations

from collections import Counter

from vllm_puzzle.model_configs.schema import Attention, ConfigError, Mamba2, ModelRecord
from vllm_puzzle.model_configs.weight_memory import kv_heads_of_rank, mamba_sizes, round_up

BLOCK_SIZE = 16  # vLLM's tokens per KV block
KV_BYTES = {"float32": 4, "bf16": 2, "bfloat16": 2, "float16": 2, "fp8": 1, "fp8_e4m3": 1}
STATE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
CONV_BYTES = 2  # the convolution's window is kept in the model's dtype


def kv_bytes_of_request(
    record: ModelRecord,
    kv_dtype: str,
    num_tokens: int,
    *,
    tokens_in_flight: int = 1,
    tensor_parallel_size: int = 1,
) -> int:
    """KV-cache bytes of one sequence of `num_tokens` while steps of `tokens_in_flight` tokens run."""
    groups = kv_groups(
        record, kv_dtype, num_tokens, tokens_in_flight=tokens_in_flight, tensor_parallel_size=tensor_parallel_size
    )
    return sum(num_layers * held * size for (held, size), num_layers in groups.items())


def kv_groups(
    record: ModelRecord, kv_dtype: str, num_tokens: int, *, tokens_in_flight: int, tensor_parallel_size: int
) -> Counter[tuple[int, int]]:
    """(tokens held, bytes per token on one GPU) → how many layers hold that."""
    element = _bytes_of("--kv-cache-dtype", kv_dtype, KV_BYTES)
    return Counter(
        (
            tokens_held(spec, num_tokens, tokens_in_flight),
            2 * kv_heads_of_rank(spec, tensor_parallel_size) * spec.head_dim * element,
        )
        for spec in record.attentions
    )


def tokens_held(attention: Attention, num_tokens: int, tokens_in_flight: int) -> int:
    """Tokens whose blocks one layer holds for a sequence. One that keeps the first tokens keeps all of them."""
    if attention.sliding_window is None or attention.num_sink_tokens:
        return round_up(num_tokens, BLOCK_SIZE)
    inside = min(attention.sliding_window - 1 + tokens_in_flight, num_tokens)
    return round_up(inside, BLOCK_SIZE) + BLOCK_SIZE


def state_bytes_of_request(record: ModelRecord, ssm_dtype: str = "float32", tensor_parallel_size: int = 1) -> int:
    """Bytes of one sequence's Mamba states on one GPU, all layers: SSM states in `ssm_dtype`, convolution windows."""
    element = _bytes_of("--mamba-ssm-cache-dtype", ssm_dtype, STATE_BYTES)
    total = 0
    for mamba in mambas(record):
        heads, inner, state = mamba_sizes(mamba, tensor_parallel_size)
        total += heads * mamba.head_dim * mamba.state_size * element
        total += (mamba.conv_kernel - 1) * (inner + state) * CONV_BYTES
    return total


def mambas(record: ModelRecord) -> list[Mamba2]:
    """The Mamba mixers, in layer order."""
    blocks = (block for layer in record.layers for block in layer.blocks)
    return [block.attention for block in blocks if isinstance(block.attention, Mamba2)]


def _bytes_of(flag: str, dtype: str, allowed: dict[str, int]) -> int:
    if dtype not in allowed:
        raise ConfigError(f"flag {flag}: found {dtype!r}, allowed: {', '.join(allowed)}")
    return allowed[dtype]
