"""Before anything starts: does it fit the card, how many requests does its KV cache hold, how long will it take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm_puzzle.bench.engine.case import FIT, Case, EngineVariant, Shape
from vllm_puzzle.bench.engine.model_folder import record_of, served_weights
from vllm_puzzle.model_configs.memory_plan import GPUS, Gpu, MemoryPlan, plan_memory
from vllm_puzzle.model_configs.request_memory import kv_bytes_of_request
from vllm_puzzle.model_configs.schema import ConfigError, ModelRecord, MoE
from vllm_puzzle.model_configs.tensors import kv_bytes_per_token, num_layer_parameters, num_parameters

# What CUDA calls a card → its name in the memory plan.
CARDS = {
    "NVIDIA H100 80GB HBM3": "H100-80",
    "NVIDIA H200": "H200-141",
    "NVIDIA B200": "B200-192",
    "NVIDIA A100-SXM4-80GB": "A100-80",
    "NVIDIA L40S": "L40S-48",
}
# What the driver keeps of the memory that nvidia-smi shows, where the card is in no list.
DRIVER_BYTES = 2**30
# Memory bytes/s and 16-bit FLOP/s as published for the card (NVIDIA's data sheets, dense); the last is for a CPU's two
# cores. Only for estimates, of which EFFICIENCY is reached.
RATES = {
    "H100": (3.35e12, 989e12),
    "H200": (4.8e12, 989e12),
    "B200": (8.0e12, 2250e12),
    "A100": (2.0e12, 312e12),
    "NVIDIA": (0.9e12, 180e12),
    "": (2.0e10, 5.0e10),
}
EFFICIENCY = 0.5
# Weights, compilation and graph capture on a GPU; imports and weights on a CPU (two cores, two engines at once).
START_S = {True: 150.0, False: 40.0}
STEP_OVERHEAD_S = {True: 15e-6, False: 300e-6}  # per layer
# How full "as many as fit" fills the cache: a request too many would wait, and nothing would be steady.
FILL = 0.97
BITS = {"bf16": 16, "fp8": 8, "mxfp4": 4.25, "nvfp4": 4.5}


@dataclass(frozen=True, slots=True)
class Estimate:
    """What an estimate needs of a variant on a card."""

    record: ModelRecord
    weight_bytes: float
    expert_share: float
    kv_bytes: int
    card: str
    is_gpu: bool

    def case_s(self, case: Case, batch: int) -> float:
        """Seconds of a case, its warm-up included; windows are not counted, so that long contexts come out high."""
        request = case.request(batch, 0)
        waves = request["num_requests"] / batch
        prefill = batch * self.prefill_s(case.shape.input_len)
        context = case.shape.input_len + case.shape.output_len / 2
        decode = (case.shape.output_len - 1) * self.step_s(batch, context)
        return waves * (prefill + decode) + self.prefill_s(case.shape.input_len) + 1.0

    def step_s(self, batch: int, context: float) -> float:
        """Seconds of one step of `batch` decoding requests."""
        bandwidth, _ = self._rates
        touched = self.weight_bytes * (1 - self.expert_share * (1 - self._coverage(batch)))
        read = touched + batch * context * self.kv_bytes
        return read / (EFFICIENCY * bandwidth) + len(self.record.layers) * STEP_OVERHEAD_S[self.is_gpu]

    def prefill_s(self, tokens: int) -> float:
        """Seconds of one prompt."""
        _, flops = self._rates
        active = num_parameters(self.record) * (1 - self.expert_share * (1 - self._coverage(1)))
        return 2 * active * tokens / (EFFICIENCY * flops) + len(self.record.layers) * STEP_OVERHEAD_S[self.is_gpu]

    def _coverage(self, tokens: int) -> float:
        """Share of the experts that so many tokens touch, chosen evenly."""
        kinds = [layer.ffn for layer in self.record.layers if isinstance(layer.ffn, MoE)]
        if not kinds:
            return 1.0
        missed = [(1 - kind.num_experts_per_tok / kind.num_experts) ** tokens for kind in kinds]
        return 1 - sum(missed) / len(missed)

    @property
    def _rates(self) -> tuple[float, float]:
        return next(rates for name, rates in RATES.items() if name in self.card)


def estimate_of(variant: EngineVariant, card: str, is_gpu: bool) -> Estimate:
    """How long a variant's cases will take on a card, roughly."""
    record = record_of(variant)
    total = num_parameters(record)
    experts = sum(num_layer_parameters(record, layer) for layer in record.layers if isinstance(layer.ffn, MoE))
    bits = BITS[served_weights(variant)] if is_gpu else 32
    kv_bytes = kv_bytes_per_token(record, 1 if variant.kv_dtype == "fp8" else 2)
    return Estimate(record, total * bits / 8, experts / total, kv_bytes, card, is_gpu)


def find_gpu(name: str | None, card: str, memory_bytes: int | None) -> tuple[Gpu | None, str]:
    """(the card to plan for, what CUDA calls it): as named, else the one that is here; None on a machine without.

    memory_bytes: what nvidia-smi shows of the card that is here. Raises ConfigError for an unknown name.
    """
    if name is not None:
        if name not in GPUS:
            raise ConfigError(f"bench engine, `--gpu`: found {name!r}, allowed: {', '.join(GPUS)}")
        return GPUS[name], next((cuda for cuda, known in CARDS.items() if known == name), f"NVIDIA {name}")
    if card in CARDS:
        return GPUS[CARDS[card]], card
    return (None if memory_bytes is None else Gpu(card, memory_bytes - DRIVER_BYTES)), card


def memory_plan(variant: EngineVariant, gpu: Gpu, max_model_len: int | None = None) -> MemoryPlan:
    """The arithmetic for a variant's flags on a card, for its longest or for a given length."""
    flags = variant.flags
    return plan_memory(
        record_of(variant),
        weights=served_weights(variant),
        kv_dtype="fp8" if variant.kv_dtype == "fp8" else "bf16",
        max_model_len=max_model_len or flags["max_model_len"],
        max_num_seqs=flags["max_num_seqs"],
        max_num_batched_tokens=flags["max_num_batched_tokens"],
        gpu=gpu,
        gpu_memory_utilization=flags.get("gpu_memory_utilization", 0.9),
        tensor_parallel_size=flags.get("tensor_parallel_size", 1),
    )


def fitting_batch(variant: EngineVariant, shape: Shape, gpu: Gpu, pool: float | None = None) -> int:
    """How many requests of a shape decode at once in the KV cache, at least 1 and at most `max_num_seqs`.

    pool: the cache's bytes where the engine has told them; else the plan's. One of the requests may still read its
    prompt, and then holds a chunk more of each window.
    """
    plan = memory_plan(variant, gpu, shape.total)
    state = plan.state_bytes_per_request
    decoding = state + kv_bytes_of_request(plan.record, plan.settings.kv_dtype, shape.total)
    reading = plan.kv_bytes_of_one_request + state - decoding
    available = plan.kv_bytes_left + plan.state_bytes if pool is None else pool
    held = int((FILL * available - reading) // decoding)
    return max(1, min(held, int(variant.flags["max_num_seqs"])))


def cache_bytes(variant: EngineVariant, ready: dict[str, Any], gpu: Gpu) -> float | None:
    """Bytes of a started engine's cache, less what its groups of layers pad: its own concurrency at max_model_len times
    the plan's bytes of one such request. None where the engine does not tell it.
    """
    concurrency = ready.get("max_concurrency")
    plan = memory_plan(variant, gpu)
    return None if not concurrency else concurrency * (plan.kv_bytes_of_one_request + plan.state_bytes_per_request)


def planned_batch(case: Case, gpu: Gpu | None, pool: float | None = None) -> int:
    """The number behind a case's batch."""
    if case.batch != FIT:
        return case.batch
    if gpu is None:
        raise ConfigError(f"case {case.name}: found no card, allowed: one of {', '.join(GPUS)} (`--gpu`)")
    return fitting_batch(case.variant, case.shape, gpu, pool)
