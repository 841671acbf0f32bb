"""Bytes of a model's weights on one GPU: by its records and a word for the precision, or by a quantization entry.

The words: `bf16`; `fp8` and `nvfp4`, where the layers' matrices are stored as NVIDIA ModelOpt stores them, while
embeddings, output matrix, norms, routers and biases stay bf16; `mxfp4`, gpt-oss's experts in MXFP4 and the rest bf16.
Two published recipes are kept: NemotronH in FP8 leaves attention, the Mamba layers right before it and the latent
projections in bf16 (Nemotron 3 Nano and Super reports); a mixture of experts in NVFP4 has only the routed experts in
it, the rest as in FP8. A checkpoint's own `quantization_config` is exact and goes before the words. Standard library
only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from itertools import pairwise
from math import ceil, prod

from vllm_puzzle.model_configs import gpt_oss
from vllm_puzzle.model_configs.per_layer import GPT_OSS
from vllm_puzzle.model_configs.quantization import FLOATS, UNQUANTIZED, Quantization, Scheme
from vllm_puzzle.model_configs.quantization_formats import MODELOPT
from vllm_puzzle.model_configs.schema import (
    Attention,
    ConfigError,
    LayerRecord,
    LinearMap,
    Mamba2,
    ModelRecord,
    MoE,
    Shape,
)
from vllm_puzzle.model_configs.tensors import TRUNK, layer_tensors

WEIGHTS = ("bf16", "fp8", "mxfp4", "nvfp4")
PLAIN_BYTES, SCALE_BYTES = 2, 4
ELEMENT_BYTES = {"F8_E4M3": 1, "U8": 1, "I8": 1, "I32": 4, "I64": 8}
LATENT = ("fc1_latent_proj", "fc2_latent_proj")
# Whole on every rank: vLLM's ReplicatedLinear and GateLinear.
REPLICATED = (*(name for name in UNQUANTIZED if not name.startswith("embed")), *LATENT)
NON_GATED_FP8_MULTIPLE = 128

SchemeOf = Callable[[str, Shape], Scheme | None]
Multiples = tuple[int, int]  # of the experts' input size and of their width on a rank


@dataclass(frozen=True, slots=True)
class Part:
    """The weights of one kind: in how many layers, how many parameters in the model, how many bytes on one GPU."""

    name: str
    num_layers: int
    num_parameters: int
    num_bytes: int


def weight_bytes(
    record: ModelRecord,
    weights: str,
    *,
    quantization: Quantization | None = None,
    tensor_parallel_size: int = 1,
    multiples: Multiples = (1, 1),
) -> int:
    """Bytes of the weights on the fullest GPU; with the defaults those of the checkpoint. See `weight_parts`."""
    parts = weight_parts(
        record, weights, quantization=quantization, tensor_parallel_size=tensor_parallel_size, multiples=multiples
    )
    return sum(part.num_bytes for part in parts)


def weight_parts(
    record: ModelRecord,
    weights: str,
    *,
    quantization: Quantization | None = None,
    tensor_parallel_size: int = 1,
    multiples: Multiples = (1, 1),
) -> tuple[Part, ...]:
    """The weights by kind, as vLLM divides them over `tensor_parallel_size` GPUs.

    Matrices are cut, KV heads repeated where they are fewer than ranks, routers, norms and biases whole on every GPU.
    `multiples` is what the experts are padded to (`expert_multiples`). Raises ConfigError for a word that the model
    cannot have.
    """
    check_weights(record, weights)
    tp = tensor_parallel_size
    totals = {"embeddings": [0, *_embeddings(record, quantization, tp)]}
    for layer, num_layers, scheme_of in _distinct_layers(record, weights, quantization):
        found = _layer_totals(record, layer, scheme_of, weights == "mxfp4", tp, multiples)
        for name, (parameters, size) in found.items():
            total = totals.setdefault(name, [0, 0, 0])
            for index, value in enumerate((1, parameters, size)):
                total[index] += num_layers * value
    norm = record.hidden_size
    totals["final norm"] = [0, norm, norm * PLAIN_BYTES]
    return tuple(Part(name, *total) for name, total in totals.items())


def expert_multiples(record: ModelRecord, weights: str, mxfp4_multiples: Multiples) -> Multiples:
    """What vLLM's kernels pad the experts to: MXFP4 as the card wants it, non-gated FP8 experts to 128 columns.

    The latter is FlashInfer's (quantization/utils/flashinfer_utils.py); kernels that take the width as it is exist, so
    it is the upper bound.
    """
    if weights == "mxfp4":
        return mxfp4_multiples
    return (1, NON_GATED_FP8_MULTIPLE) if weights == "fp8" and record.model_type in TRUNK else (1, 1)


def check_weights(record: ModelRecord, weights: str) -> None:
    """Raise ConfigError unless `weights` is a word that this model can have."""
    if weights not in WEIGHTS:
        raise ConfigError(f"weights: found {weights!r}, allowed: {', '.join(WEIGHTS)}")
    allowed = ("bf16", "mxfp4") if record.model_type in GPT_OSS else ("bf16", "fp8", "nvfp4")
    if weights not in allowed:
        raise ConfigError(f"weights of a {record.model_type}: found {weights!r}, allowed: {', '.join(allowed)}")


def kv_heads_of_rank(attention: Attention, tensor_parallel_size: int) -> int:
    """KV heads on one rank: their share, or one whole head where there are fewer heads than ranks."""
    return max(1, attention.num_kv_heads // tensor_parallel_size)


def mamba_sizes(mamba: Mamba2, tensor_parallel_size: int) -> tuple[int, int, int]:
    """(heads, inner channels, B and C channels together) of one rank.

    Where the groups do not divide, vLLM adds as many as make one per rank (mamba_utils.py).
    """
    tp = tensor_parallel_size
    groups = mamba.num_groups if mamba.num_groups % tp == 0 else tp
    heads = ceil(mamba.num_heads / tp)
    return heads, heads * mamba.head_dim, ceil(2 * groups * mamba.state_size / tp)


def round_up(size: int, multiple: int) -> int:
    """The least multiple that is not below `size`."""
    return ceil(size / multiple) * multiple


# --- which layer is stored how -----------------------------------------------------------------------------------


def _distinct_layers(
    record: ModelRecord, weights: str, quantization: Quantization | None
) -> Iterator[tuple[LayerRecord, int, SchemeOf]]:
    """(layer, how many are stored like it, the scheme of each of its matrices)."""
    if quantization is not None:
        trunk = TRUNK.get(record.model_type, ("model",))[0]
        for index, layer in enumerate(record.layers):
            yield layer, 1, _listed(quantization, f"{trunk}.layers.{index}.")
        return
    counts: dict[tuple[LayerRecord, bool], int] = defaultdict(int)
    is_hybrid = record.model_type in TRUNK
    for layer, following in pairwise((*record.layers, LayerRecord(None, None))):
        is_before = isinstance(layer.attention, Mamba2) and isinstance(following.attention, Attention)
        is_kept = is_hybrid and (isinstance(layer.attention, Attention) or is_before)
        counts[layer, is_kept] += 1
    has_experts = any(isinstance(block.ffn, MoE) for layer in record.layers for block in layer.blocks)
    for (layer, is_kept), num_layers in counts.items():
        yield layer, num_layers, _by_word(weights, is_kept, has_experts)


def _listed(quantization: Quantization, prefix: str) -> SchemeOf:
    return lambda name, shape: quantization.schemes.get(prefix + name.removesuffix(".weight"))


def _by_word(weights: str, is_kept: bool, has_experts: bool) -> SchemeOf:
    def scheme(name: str, shape: Shape) -> Scheme | None:
        module = name.split(".")[-2]
        if is_kept or weights in ("bf16", "mxfp4") or len(shape) != 2 or module in REPLICATED:
            return None
        is_wide = weights == "nvfp4" and has_experts and ".experts." not in name
        return MODELOPT["FP8" if weights == "fp8" or is_wide else "NVFP4"]

    return scheme


def _embeddings(record: ModelRecord, quantization: Quantization | None, tp: int) -> tuple[int, int]:
    """Parameters of embedding and output matrix, and their bytes on one rank. The latter alone can be quantized."""
    shape = ceil(record.vocab_size / tp), record.hidden_size
    size = PLAIN_BYTES * prod(shape)
    if record.tie_word_embeddings:
        return record.vocab_size * record.hidden_size, size
    scheme = None if quantization is None else quantization.schemes.get("lm_head")
    output = size if scheme is None else _scheme_bytes(scheme, *shape)
    return 2 * record.vocab_size * record.hidden_size, size + output


# --- bytes of one layer --------------------------------------------------------------------------------------------


def _layer_totals(
    record: ModelRecord, layer: LayerRecord, scheme_of: SchemeOf, is_mxfp4: bool, tp: int, multiples: Multiples
) -> dict[str, tuple[int, int]]:
    """Per kind of weight its parameters in the layer and its bytes on one rank."""
    totals: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for number, block in enumerate(layer.blocks):
        prefix = f"parallel_blocks.{number}." if layer.parallel else ""
        tensors = layer_tensors(record, block)
        for name, shape in tensors.items():
            totals[_kind(block, name)][0] += prod(shape)
        for name, shape in (gpt_oss.mxfp4_tensors(tensors) if is_mxfp4 else tensors).items():
            size = _stored_bytes(prefix + name, shape, scheme_of)
            totals[_kind(block, name)][1] += ceil(size * _share(record, block, name, shape, tp, multiples))
    return {name: (parameters, size) for name, (parameters, size) in totals.items()}


def _stored_bytes(name: str, shape: Shape, scheme_of: SchemeOf) -> int:
    if name.endswith(("_blocks", "_scales")):
        return prod(shape)
    scheme = scheme_of(name, shape) if name.endswith(".weight") else None
    return PLAIN_BYTES * prod(shape) if scheme is None else _scheme_bytes(scheme, *shape)


@cache
def _scheme_bytes(scheme: Scheme, size_out: int, size_in: int) -> int:
    """Bytes of an [out, in] matrix with its scales, which are float32 where the checkpoint may choose."""
    stored = scheme.tensors(size_out, size_in).values()
    return sum(
        prod(entry.shapes[0]) * (SCALE_BYTES if entry.dtypes == FLOATS else ELEMENT_BYTES[entry.dtypes[0]])
        for entry in stored
    )


def _kind(block: LayerRecord, name: str) -> str:
    if ".experts." in name:
        return "experts"
    is_mixer = name.startswith(("self_attn.", "input_layernorm.")) or block.ffn is None
    if is_mixer:
        return {Mamba2: "Mamba", LinearMap: "linear maps"}.get(type(block.attention), "attention")
    if isinstance(block.ffn, MoE):
        return "routers and shared"
    return "linear maps" if isinstance(block.ffn, LinearMap) else "FFN"


def _share(
    record: ModelRecord, block: LayerRecord, name: str, shape: Shape, tp: int, multiples: Multiples
) -> Fraction | int:
    """What part of a tensor one rank holds; more than its part where experts are padded."""
    if isinstance(block.ffn, MoE) and ".experts." in name:
        if name.endswith("down_proj_bias"):
            return 1
        inside, width = block.ffn.latent_size or record.hidden_size, block.ffn.intermediate_size
        padded = round_up(ceil(width / tp), multiples[1]), round_up(inside, multiples[0])
        return Fraction(padded[0] * padded[1], width * inside)
    module = name.split(".")[-2] if "." in name else name
    if tp == 1 or len(shape) == 1 or module in REPLICATED:
        return 1
    if isinstance(block.attention, Attention) and module in ("k_proj", "v_proj"):
        return Fraction(kv_heads_of_rank(block.attention, tp), block.attention.num_kv_heads)
    if isinstance(block.attention, Mamba2) and module == "in_proj":
        heads, inner, state = mamba_sizes(block.attention, tp)
        return Fraction(2 * inner + state + heads, shape[0])
    return Fraction(1, tp)
