"""What we touch of vLLM to measure its engine: `vllm_compat.py` goes on here, in the same ledger."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

# (name of the layer's experts, their number, the chosen ones [num_tokens, top_k]).
Capture = Callable[[str, int, torch.Tensor], None]


def record_steps(engine: Any, recorder: Any) -> None:
    """Give an LLMEngine `recorder` as its only statistics logger. No argument does: from_engine_args drops it,
    and Prometheus stays."""
    engine.logger_manager.stat_loggers[:] = [recorder]


def capture_routing(model: nn.Module, capture: Capture) -> None:
    """Call `capture` in every forward pass of every MoE layer of `model` from now on, in place of an earlier one.

    A CUDA graph calls nothing when it is replayed. A kernel that routes by itself (monolithic) does not say where to:
    there vLLM's router chooses once more, from the same logits.
    """
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    for module in model.modules():
        if not isinstance(module, MoERunner):
            continue
        experts = module.routed_experts
        module.router.set_capture_fn(partial(capture, module.layer_name, module.moe_config.num_logical_experts))
        if module.is_monolithic and "forward_monolithic" not in vars(experts):
            experts.forward_monolithic = _routing_first(module.router, experts.forward_monolithic)


def _routing_first(router: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
    def routed(x: torch.Tensor, router_logits: torch.Tensor, input_ids: torch.Tensor | None = None) -> Any:
        router.select_experts(hidden_states=x, router_logits=router_logits, input_ids=input_ids)
        return forward(x=x, router_logits=router_logits, input_ids=input_ids)

    return routed
