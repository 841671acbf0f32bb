"""Where a batch's tokens go: how many experts of each MoE layer a decoding step reads, and how evenly they are loaded.

A step's time in an MoE layer is that of the expert weights that it reads, so a measured speed holds for its routing
only. vLLM's own `enable_return_routed_experts` needs the same top-k in every layer, which heterogeneous models do not
have; here each router tells its choice (`vllm_measurement.capture_routing`), in a run that is not timed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from vllm_puzzle.model_configs.schema import MAX_SIZE, ConfigError
from vllm_puzzle.serving.engine_load import Load, StepRecorder, run_load
from vllm_puzzle.serving.vllm_measurement import capture_routing

PROMPT_LEN, NUM_STEPS = 16, 8


@dataclass(slots=True)
class LayerRouting:
    """What was seen of one MoE layer in the steps of `num_tokens` tokens: the distinct experts of each step, and the
    tokens that each expert got, [num_experts], in all of them."""

    top_k: int
    load: torch.Tensor
    touched: list[int] = field(default_factory=list)

    def described(self, name: str, num_tokens: int) -> dict[str, Any]:
        """The layer's figures by name.

        `coverage` is the mean share of the experts that a step reads; `coverage_if_uniform` what it would be if each
        token took top_k of them at random: 1 - (1 - top_k / num_experts) ^ num_tokens. `load_entropy` is 1 when all
        experts get the same, 0 when one gets all; `max_load_share` is the busiest expert's share of all choices.
        """
        num_experts, picks = len(self.load), self.load.sum().item()
        shares = self.load[self.load > 0].double() / picks
        entropy = -(shares * shares.log()).sum().item() / math.log(num_experts) if num_experts > 1 else 1.0
        touched = sum(self.touched) / len(self.touched)
        return {
            "layer": name,
            "num_experts": num_experts,
            "experts_per_token": self.top_k,
            "num_steps": len(self.touched),
            "experts_touched": touched,
            "coverage": touched / num_experts,
            "coverage_if_uniform": 1 - (1 - self.top_k / num_experts) ** num_tokens,
            "load_entropy": entropy,
            "max_load_share": self.load.max().item() / picks,
        }


class RoutingWatch:
    """In a worker: counts the choices of every MoE layer in forward passes of exactly `num_tokens` tokens."""

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens
        self.layers: dict[str, LayerRouting] = {}

    def start(self, model: nn.Module) -> None:
        """Watch the routers of `model`."""
        capture_routing(model, self.see)

    def see(self, name: str, num_experts: int, chosen: torch.Tensor) -> None:
        """One pass of one layer: `chosen` expert numbers, [num_tokens, top_k]."""
        if len(chosen) != self.num_tokens:
            return
        counts = torch.bincount(chosen.flatten().long().cpu(), minlength=num_experts)[:num_experts]
        layer = self.layers.setdefault(name, LayerRouting(chosen.shape[1], torch.zeros(num_experts, dtype=torch.long)))
        layer.load += counts
        layer.touched.append(int((counts > 0).sum()))

    def described(self) -> list[dict[str, Any]]:
        """One row per MoE layer that computed such a pass, in the model's order."""
        return [layer.described(name, self.num_tokens) for name, layer in self.layers.items()]


def run_routing(engine: Any, recorder: StepRecorder, request: Any) -> dict[str, Any]:
    """Decode `num_tokens` requests at once (random prompts, temperature 1) and report each MoE layer's routing.

    `request` is {"num_tokens", "seed"}. ConfigError when it is not, for an engine with CUDA graphs or a compiled model,
    and for a model without experts.
    """
    num_tokens, seed = _checked(request)
    config = engine.vllm_config
    if not config.model_config.enforce_eager:
        raise ConfigError("routing: found a compiled model, allowed: enforce_eager, a compiled one calls no Python")
    free = max(1, config.scheduler_config.max_num_batched_tokens - num_tokens)
    ramp = -(-num_tokens * PROMPT_LEN // free)  # the first requests decode while the last prompts are read
    load = Load(PROMPT_LEN, NUM_STEPS + ramp + 1, num_tokens, num_tokens, seed=seed, temperature=1.0)
    load.check_fits(config)
    engine.collective_rpc("puzzle_watch_routing", args=(num_tokens,))
    run_load(engine, recorder, load)
    layers: dict[str, Any] = {}
    for rows in engine.collective_rpc("puzzle_routing"):  # ranks of one stage say the same
        layers |= {row["layer"]: row for row in rows}
    if not layers:
        raise ConfigError(
            f"routing: found no experts in steps of {num_tokens} tokens, allowed: a model with MoE layers"
        )
    return {"num_tokens": num_tokens, "seed": seed, "layers": list(layers.values())}


def _checked(request: Any) -> tuple[int, int]:
    if not isinstance(request, dict) or not {"num_tokens"} <= set(request) <= {"num_tokens", "seed"}:
        raise ConfigError(f"routing: found {request!r}, allowed: an object with num_tokens and seed")
    num_tokens, seed = request["num_tokens"], request.get("seed", 0)
    if type(num_tokens) is not int or not 1 <= num_tokens <= MAX_SIZE:
        raise ConfigError(f"routing, key `num_tokens`: found {num_tokens!r}, allowed: an integer from 1 to {MAX_SIZE}")
    return num_tokens, seed
