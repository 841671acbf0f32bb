"""Pipeline stages of equal cost instead of equal layer count: a heterogeneous model's layers differ tenfold and more.

vLLM gives every stage the same number of layers; Ultra-253B, with 81 empty layers of 162, ran out of memory that way
(vllm#16318). Standard library only.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import accumulate

from vllm_puzzle.model_configs.schema import Attention, ConfigError, LayerRecord, ModelRecord
from vllm_puzzle.model_configs.tensors import num_layer_parameters

WEIGHT_BYTES = KV_BYTES = 2


def layer_bytes(model: ModelRecord, layer: LayerRecord, num_tokens: int) -> int:
    """Bytes that one layer holds and reads: bf16 weights, and the bf16 KV cache of one sequence of `num_tokens`.

    One number stands for memory, decode time (which reads these bytes once per step) and prefill FLOPs (proportional
    to the weights).
    """
    total = WEIGHT_BYTES * num_layer_parameters(model, layer)
    for block in layer.blocks:
        if isinstance(block.attention, Attention):
            # A cache that keeps the first tokens keeps all of them (serving/attention.py).
            window = None if block.attention.num_sink_tokens else block.attention.sliding_window
            seen = min(num_tokens, window or num_tokens)
            total += KV_BYTES * 2 * block.attention.kv_size * seen
    return total


def split_layers(model: ModelRecord, num_stages: int, num_tokens: int | None = None) -> tuple[int, ...]:
    """Layers per stage such that the costliest stage costs least; the embedding is the first stage's, the output
    matrix the last one's. `num_tokens` is the sequence length to weigh the KV cache with (default: the longest).
    """
    num_layers = len(model.layers)
    if not 1 <= num_stages <= num_layers:
        raise ConfigError(f"flag --pipeline-parallel-size: found {num_stages}, allowed: 1 to {num_layers} (the layers)")
    tokens = model.max_position_embeddings if num_tokens is None else num_tokens
    costs = [layer_bytes(model, layer, tokens) for layer in model.layers]
    matrix = WEIGHT_BYTES * model.vocab_size * model.hidden_size
    costs[0] += matrix
    costs[-1] += matrix
    return split_costs(costs, num_stages)


def split_costs(costs: Sequence[int], num_stages: int) -> tuple[int, ...]:
    """Consecutive, non-empty parts of `costs`, the largest sum as small as possible, then the sums as even as possible.

    Dynamic programme over (stages left, first layer): compares the largest sum first, the sum of squares second.
    """
    total = [0, *accumulate(costs)]

    @cache
    def best(stages: int, first: int) -> tuple[int, int, tuple[int, ...]]:
        if stages == 1:
            rest = total[-1] - total[first]
            return rest, rest * rest, (len(costs) - first,)
        options = []
        for last in range(first + 1, len(costs) - stages + 2):
            cost = total[last] - total[first]
            largest, squares, sizes = best(stages - 1, last)
            options.append((max(cost, largest), cost * cost + squares, (last - first, *sizes)))
        return min(options)

    return best(num_stages, 0)[2]
