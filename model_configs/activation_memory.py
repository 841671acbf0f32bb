"""Bytes that a step needs beside weights and caches, estimated from the records. Standard library only.

    activations = max_num_batched_tokens × the largest block's bytes per token
                + max_num_seqs × vocabulary × LOGIT_BYTES
                + RUNTIME_BYTES

A block's bytes per token: four rows of the hidden size (residual, input, normed input, output), and what is between its
matrices at its widest, as vLLM allocates it, divided over the ranks:

    attention   q, k, v and the attention's output              2 q + 2 kv
    FFN         gate and up side by side, their product         3 width (relu²: 2 width)
    MoE         per chosen expert two workspaces (modular_kernel.py, triton_moe.py), the shared expert, router logits
                top_k (max(width, in) + max(2 width, in)) + 3 shared_width (relu²: width for 2 width, 2 for 3)
    Mamba       in_proj's output, the convolution's, the scan's; chunk states, products and time steps in float32

all of 2 bytes but the last three; with FP8 weights one byte more for each element of the widest matrix product's input,
which is quantized first. The parts follow one another, so their sum is an upper bound of the peak. Measured against:
Llama-3-8B, 8,192 tokens, 256 sequences, 1.26 GiB (vLLM's profile in vllm#10511); the formula without RUNTIME_BYTES
gives 1.21.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from vllm_puzzle.model_configs.schema import (
    Attention,
    GatedFFN,
    LayerRecord,
    LinearMap,
    Mamba2,
    ModelRecord,
    MoE,
    PlainFFN,
)
from vllm_puzzle.model_configs.tensors import TRUNK
from vllm_puzzle.model_configs.weight_memory import kv_heads_of_rank, mamba_sizes

HIDDEN_ROWS = 4
ACTIVATION_BYTES, FLOAT_BYTES = 2, 4
# Per sequence and vocabulary entry: logits in bf16 and float32, probabilities in float32 (v1/sample).
LOGIT_BYTES = 10
# CUDA context, graphs, communication buffers, the allocator's slack. The KV capacities of the papers leave 2.5 GiB for
# these and the activations together; a 49B's activations at 4,096 tokens take half of that.
RUNTIME_BYTES = 5 * 2**28
CHUNK_SIZE = 128  # tokens per chunk of the Mamba scan, in every published NemotronH configuration


@dataclass(frozen=True, slots=True)
class LayerPeak:
    """The layer that needs most: its number, what of it, bytes per token on one GPU."""

    layer: int
    kind: str
    bytes_per_token: int


def activation_bytes(
    record: ModelRecord, weights: str, *, max_num_batched_tokens: int, max_num_seqs: int, tensor_parallel_size: int = 1
) -> int:
    """The estimate above for one GPU, in bytes."""
    peak = largest_layer(record, weights, tensor_parallel_size)
    return max_num_batched_tokens * peak.bytes_per_token + logit_bytes(record, max_num_seqs) + RUNTIME_BYTES


def logit_bytes(record: ModelRecord, max_num_seqs: int) -> int:
    """Bytes of the last step's logits and probabilities, which every rank holds whole."""
    return max_num_seqs * record.vocab_size * LOGIT_BYTES


def largest_layer(record: ModelRecord, weights: str, tensor_parallel_size: int = 1) -> LayerPeak:
    """The layer whose widest sub-block needs most bytes per token; the first of equals."""
    base = HIDDEN_ROWS * record.hidden_size * ACTIVATION_BYTES
    peaks = [LayerPeak(0, "hidden states", base)]
    for index, layer in enumerate(record.layers):
        for block in layer.blocks:
            for kind, inner in _inner_bytes(record, block, weights == "fp8", tensor_parallel_size):
                peaks.append(LayerPeak(index, kind, base + inner))
    return max(peaks, key=lambda peak: peak.bytes_per_token)


def _inner_bytes(record: ModelRecord, block: LayerRecord, is_fp8: bool, tp: int) -> list[tuple[str, int]]:
    """(sub-block, bytes per token between its matrices) of both sub-blocks."""
    found: list[tuple[str, int]] = []
    for kind in (block.attention, block.ffn):
        if isinstance(kind, Attention):
            query, keys = ceil(kind.q_size / tp), kv_heads_of_rank(kind, tp) * kind.head_dim
            entry = ("attention", 2 * query + 2 * keys, max(query, record.hidden_size), 0)
        elif isinstance(kind, Mamba2):
            entry = _mamba(kind, record.hidden_size, tp)
        elif isinstance(kind, GatedFFN | PlainFFN):
            width = ceil(kind.intermediate_size / tp)
            rows = 3 if isinstance(kind, GatedFFN) else 2
            entry = ("FFN", rows * width, max(width, record.hidden_size), 0)
        elif isinstance(kind, MoE):
            entry = _moe(kind, record, tp)
        elif isinstance(kind, LinearMap):
            entry = ("linear map", record.hidden_size, record.hidden_size, 0)
        else:
            continue
        name, elements, quantized, floats = entry
        found.append((name, ACTIVATION_BYTES * elements + (quantized if is_fp8 else 0) + FLOAT_BYTES * floats))
    return found


def _moe(moe: MoE, record: ModelRecord, tp: int) -> tuple[str, int, int, int]:
    rows = 1 if record.model_type in TRUNK else 2  # NemotronH's experts are not gated
    inside, width = moe.latent_size or record.hidden_size, ceil(moe.intermediate_size / tp)
    shared = ceil(moe.shared_intermediate_size / tp)
    routed = moe.num_experts_per_tok * (max(width, inside) + max(rows * width, inside))
    quantized = max(moe.num_experts_per_tok * width, record.hidden_size)
    return "experts", routed + (rows + 1) * shared, quantized, moe.num_experts


def _mamba(mamba: Mamba2, hidden: int, tp: int) -> tuple[str, int, int, int]:
    heads, inner, state = mamba_sizes(mamba, tp)
    states = 2 * heads * mamba.head_dim * mamba.state_size  # of every chunk, and passed on to the next
    products = ceil(mamba.num_groups / tp) * CHUNK_SIZE**2
    floats = ceil((states + products) / CHUNK_SIZE) + 2 * heads
    return "Mamba", (2 * inner + state + heads) + (inner + state) + inner, max(inner, hidden), floats
