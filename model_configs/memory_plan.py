"""The memory plan of one engine before it starts: weights, Mamba states, activations and KV cache against the card.

    card × utilisation − weights − states of max_num_seqs − activations = left for KV ≥ one request of max_model_len

`lines` shows the arithmetic, `advice` names flags that would make it fit. All bytes are those of one GPU. A model with
fused FFNs is planned as its fused record (`ffn_fusion.fuse`). vLLM draws Mamba states from the same pool as the KV
cache, so fewer running sequences leave more than is said here; its groups of unlike layers can pad the KV cache
(`serving/kv_cache_groups.py`), so a mixed model can hold less. Standard library only.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from math import ceil

from vllm_puzzle.model_configs.activation_memory import (
    LOGIT_BYTES,
    RUNTIME_BYTES,
    LayerPeak,
    activation_bytes,
    largest_layer,
    logit_bytes,
)
from vllm_puzzle.model_configs.gpus import GIB, GPUS, Gpu
from vllm_puzzle.model_configs.memory_settings import MemorySettings, flags_that_fit
from vllm_puzzle.model_configs.quantization import Quantization
from vllm_puzzle.model_configs.request_memory import kv_groups, mambas, state_bytes_of_request
from vllm_puzzle.model_configs.schema import ConfigError, ModelRecord, check_tensor_parallel
from vllm_puzzle.model_configs.weight_memory import Part, expert_multiples, weight_bytes, weight_parts

__all__ = ["GPUS", "Gpu", "MemoryPlan", "MemorySettings", "plan_memory", "smallest_gpu", "weight_bytes"]

SMALLEST_TOKENS, SMALLEST_BATCHED_TOKENS = 32_768, 2048


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes on one GPU, and what they were computed from."""

    record: ModelRecord
    settings: MemorySettings
    parts: tuple[Part, ...]  # the weights by kind, without what kernels pad
    padding_bytes: int  # what kernels pad the experts with
    kv_groups: Counter[tuple[int, int]]  # (tokens held of one request, bytes per token) → layers
    peak: LayerPeak
    state_bytes_per_request: int
    activation_bytes: int

    @property
    def weights_bytes(self) -> int:
        """The weights with their padding."""
        return sum(part.num_bytes for part in self.parts) + self.padding_bytes

    @property
    def state_bytes(self) -> int:
        """The Mamba states of `max_num_seqs` sequences."""
        return self.settings.max_num_seqs * self.state_bytes_per_request

    @property
    def available_bytes(self) -> int:
        """What vLLM takes of the card: its total times the utilisation, rounded up (v1/worker/utils.py)."""
        return ceil(self.settings.gpu.memory_bytes * self.settings.gpu_memory_utilization)

    @property
    def kv_bytes_left(self) -> int:
        """What is left for the KV cache; below 0 where the rest does not fit."""
        return self.available_bytes - self.weights_bytes - self.state_bytes - self.activation_bytes

    @property
    def kv_bytes_of_one_request(self) -> int:
        """KV cache of one request of `max_model_len` at the chunk of its prefill that needs most."""
        return sum(num_layers * held * size for (held, size), num_layers in self.kv_groups.items())

    @property
    def fits(self) -> bool:
        """Whether one request of `max_model_len` fits."""
        return self.kv_bytes_left >= self.kv_bytes_of_one_request

    def lines(self) -> list[str]:
        """The arithmetic, a term a line, and the verdict."""
        return _lines(self)

    def advice(self) -> tuple[str, ...]:
        """Flags that would make it fit, each tried by planning again with it (`memory_settings.flags_that_fit`)."""
        return flags_that_fit(self.settings, lambda settings: _plan(self.record, settings, self).fits)


def plan_memory(
    record: ModelRecord,
    *,
    weights: str,
    kv_dtype: str,
    max_model_len: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    gpu: Gpu,
    gpu_memory_utilization: float = 0.9,
    tensor_parallel_size: int = 1,
    mamba_ssm_cache_dtype: str = "float32",
    quantization: Quantization | None = None,
) -> MemoryPlan:
    """Plan one engine. Raises ConfigError for settings that vLLM refuses, or that the model cannot be served with."""
    settings = MemorySettings(
        weights,
        kv_dtype,
        max_model_len,
        max_num_seqs,
        max_num_batched_tokens,
        gpu,
        gpu_memory_utilization,
        tensor_parallel_size,
        mamba_ssm_cache_dtype,
        quantization,
    )
    return _plan(record, settings)


def smallest_gpu(record: ModelRecord, weights: str, kv_dtype: str, *, quantization: Quantization | None = None) -> str:
    """The fewest cards, and of these the smallest (`gpus.GPUS`), that serve one request: "H200-141", "2 x H100-80".

    The request has 32,768 tokens, or as many as the model allows; one sequence at a time, chunks of 2,048 tokens, 0.9
    of the memory, tensor parallelism. "more than 8 x B200-192" where a node is not enough.
    """
    cards = sorted(GPUS.values(), key=lambda gpu: gpu.memory_bytes)
    settings = MemorySettings(
        weights,
        kv_dtype,
        min(SMALLEST_TOKENS, record.max_position_embeddings),
        1,
        SMALLEST_BATCHED_TOKENS,
        cards[0],
        quantization=quantization,
    )
    for count in (1, 2, 4, 8):
        known: MemoryPlan | None = None
        for gpu in cards:
            try:
                known = _plan(record, replace(settings, gpu=gpu, tensor_parallel_size=count), known)
            except ConfigError:
                if count == 1:
                    raise
                break
            if known.fits:
                return gpu.name if count == 1 else f"{count} x {gpu.name}"
    return f"more than 8 x {cards[-1].name}"


def _plan(record: ModelRecord, settings: MemorySettings, known: MemoryPlan | None = None) -> MemoryPlan:
    """`known` is a plan of the same model, whose weights are taken where nothing that decides them differs."""
    tp, weights = settings.tensor_parallel_size, settings.weights
    check_tensor_parallel(record, tp)
    parts, padding = _weights(record, settings, known)
    return MemoryPlan(
        record,
        settings,
        parts,
        padding,
        kv_groups(
            record,
            settings.kv_dtype,
            settings.max_model_len,
            tokens_in_flight=settings.max_num_batched_tokens,
            tensor_parallel_size=tp,
        ),
        largest_layer(record, weights, tp),
        state_bytes_of_request(record, settings.mamba_ssm_cache_dtype, tp),
        activation_bytes(
            record,
            weights,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            max_num_seqs=settings.max_num_seqs,
            tensor_parallel_size=tp,
        ),
    )


def _weights(record: ModelRecord, settings: MemorySettings, known: MemoryPlan | None) -> tuple[tuple[Part, ...], int]:
    """The weights by kind, and what their kernels pad."""
    weights, tp, quantization = settings.weights, settings.tensor_parallel_size, settings.quantization
    if known is not None and _decisive(known.settings) == _decisive(settings):
        return known.parts, known.padding_bytes
    parts = weight_parts(record, weights, quantization=quantization, tensor_parallel_size=tp)
    multiples = expert_multiples(record, weights, settings.gpu.mxfp4_multiples)
    if multiples == (1, 1):
        return parts, 0
    padded = weight_bytes(record, weights, quantization=quantization, tensor_parallel_size=tp, multiples=multiples)
    return parts, padded - sum(part.num_bytes for part in parts)


def _decisive(settings: MemorySettings) -> tuple[object, ...]:
    return settings.weights, settings.tensor_parallel_size, settings.gpu.mxfp4_multiples


# --- the arithmetic as text ----------------------------------------------------------------------------------------


def _lines(plan: MemoryPlan) -> list[str]:
    settings, tp = plan.settings, plan.settings.tensor_parallel_size
    cards = settings.gpu.name if tp == 1 else f"{tp} x {settings.gpu.name}, each"
    total = settings.gpu.memory_bytes
    lines = [
        _line("available", f"{cards}: {_gib(total)} x {settings.gpu_memory_utilization}", plan.available_bytes),
        _line("weights", _weights_word(settings), plan.weights_bytes),
    ]
    for part in plan.parts:
        layers = f"{part.num_layers} layers, " if part.num_layers else ""
        lines.append(_line(f"  {part.name}", f"{layers}{part.num_parameters:,} parameters", part.num_bytes))
    if plan.padding_bytes:
        lines.append(_line("  padding", "what the kernels round the experts up to", plan.padding_bytes))
    if plan.state_bytes:
        states = f"{settings.max_num_seqs} sequences x {plan.state_bytes_per_request:,} B"
        kind = f"({len(mambas(plan.record))} Mamba layers, {settings.mamba_ssm_cache_dtype})"
        lines.append(_line("states", f"{states} {kind}", plan.state_bytes))
    lines += _activation_lines(plan)
    lines.append(_line("left for KV", "available - weights - states - activations", plan.kv_bytes_left))
    request = [f"{n} x {held:,} x {size:,} B" for (held, size), n in plan.kv_groups.items()]
    lines.append(
        _line(
            "one request",
            f"{settings.max_model_len:,} tokens, layers x tokens held x {settings.kv_dtype}: "
            + (" + ".join(request) or "no attention"),
            plan.kv_bytes_of_one_request,
        )
    )
    missing = plan.kv_bytes_of_one_request - plan.kv_bytes_left
    if missing > 0:
        return [*lines, f"does not fit: {_gib(missing)} missing"]
    requests = plan.kv_bytes_left / plan.kv_bytes_of_one_request if plan.kv_bytes_of_one_request else None
    return [*lines, "fits" if requests is None else f"fits: KV cache for {requests:.2f} such requests"]


def _activation_lines(plan: MemoryPlan) -> list[str]:
    settings, peak = plan.settings, plan.peak
    logits = logit_bytes(plan.record, settings.max_num_seqs)
    tokens = settings.max_num_batched_tokens
    return [
        _line("activations", "an estimate", plan.activation_bytes),
        _line(
            f"  in layer {peak.layer}",
            f"{tokens:,} tokens x {peak.bytes_per_token:,} B ({peak.kind})",
            tokens * peak.bytes_per_token,
        ),
        _line("  logits", f"{settings.max_num_seqs} x {plan.record.vocab_size:,} x {LOGIT_BYTES} B", logits),
        _line("  runtime", "CUDA context and graphs", RUNTIME_BYTES),
    ]


def _weights_word(settings: MemorySettings) -> str:
    found = settings.weights if settings.quantization is None else f"{settings.quantization.method}, as listed"
    return found if settings.tensor_parallel_size == 1 else f"{found}, one of {settings.tensor_parallel_size} ranks"


def _line(name: str, arithmetic: str, num_bytes: int) -> str:
    return f"{name:<22}{arithmetic} = {_gib(num_bytes)}"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:,.2f} GiB"
