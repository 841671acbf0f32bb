"""Experts: vLLM's fused MoE per layer, with the expert count, width and top-k of that layer's record.

Three families differ in names and arithmetic only: Qwen3-MoE (one tensor per expert), gpt-oss (stacked tensors,
biases, clamped activation, MXFP4) and DeciLM (a shared expert, sigmoid routing on the input).
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import get_ep_group, get_tp_group, tensor_model_parallel_all_gather
from vllm.model_executor.layers.fused_moe import FusedMoEFactory, GateLinear
from vllm.model_executor.models.gpt_oss import GptOssRoutedExperts
from vllm.model_executor.models.utils import sequence_parallel_chunk
from vllm.platforms import current_platform
from vllm_puzzle.kernels.reference import mxfp4_dequantize
from vllm_puzzle.model_configs.per_layer import GPT_OSS
from vllm_puzzle.model_configs.schema import ConfigError, GatedFFN, ModelRecord, MoE, check_experts
from vllm_puzzle.serving.ffn import PuzzleFFN

# Checkpoint projection → (vLLM's fused parameter, its part): gate and up lie in one matrix.
PER_EXPERT = {"gate_proj": ("w13", "w1"), "up_proj": ("w13", "w3"), "down_proj": ("w2", "w2")}
STACKED = {"gate_up_proj": ("w13", "gpt_oss_w13"), "down_proj": ("w2", "gpt_oss_w2")}
# The tail of a stacked tensor's name → of vLLM's parameter.
STACKED_TAILS = {"": "weight", "bias": "bias", "blocks": "weight", "scales": "weight_scale"}


class PuzzleMoE(nn.Module):
    """Router and experts, [num_tokens, hidden_size] → the same shape.

    Raises ConfigError when the experts cannot be split over the tensor- or expert-parallel ranks.
    """

    def __init__(self, model: ModelRecord, spec: MoE, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        parallel = vllm_config.parallel_config
        _check_split(spec, parallel.enable_expert_parallel, prefix)
        is_gpt_oss, on_input = model.model_type in GPT_OSS, spec.routing == "sigmoid_on_input"
        self.is_sequence_parallel = parallel.use_sequence_parallel_moe and vllm_config.lora_config is None
        self.router_name = "router" if is_gpt_oss or on_input else "gate"
        router = GateLinear(
            model.hidden_size,
            spec.num_experts,
            bias=is_gpt_oss,
            prefix=f"{prefix}.{self.router_name}",
            return_bias=False,
        )
        self.add_module(self.router_name, router)
        self.is_dequantised = model.is_mxfp4 and not _runs_mxfp4()
        self._waiting: dict[str, torch.Tensor] = {}
        with _without_lora(vllm_config):
            self.experts = FusedMoEFactory(
                num_experts=spec.num_experts,
                top_k=spec.num_experts_per_tok,
                hidden_size=model.hidden_size,
                intermediate_size=spec.intermediate_size,
                renormalize=spec.routing == "renormalize",
                quant_config=None if self.is_dequantised else vllm_config.quant_config,
                prefix=f"{prefix}.experts",
                apply_router_weight_on_input=on_input,
                custom_routing_function=_sigmoid_of_top if on_input else None,
                has_bias=is_gpt_oss,
                activation="swigluoai" if is_gpt_oss else "silu",
                is_sequence_parallel=self.is_sequence_parallel,
                routed_experts_cls=GptOssRoutedExperts if is_gpt_oss else None,
            )
        if spec.shared_intermediate_size:
            shared = GatedFFN(spec.shared_intermediate_size)
            self.shared_expert = PuzzleFFN(model, shared, vllm_config, f"{prefix}.shared_expert")
        self.has_shared_expert = bool(spec.shared_intermediate_size)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Route each token, run its experts, add the shared one."""
        num_tokens, hidden_size = hidden.shape
        x = sequence_parallel_chunk(hidden) if self.is_sequence_parallel else hidden
        logits = getattr(self, self.router_name)(x)
        # Some MXFP4 kernels return rows padded to their tile.
        output = self.experts(hidden_states=x, router_logits=logits)[:, :hidden_size]
        if self.is_sequence_parallel:
            output = tensor_model_parallel_all_gather(output.contiguous(), 0)[:num_tokens]
        return output + self.shared_expert(hidden) if self.has_shared_expert else output

    def load_expert(self, name: str, tensor: torch.Tensor) -> str | None:
        """Load one checkpoint tensor, named relative to `mlp.experts.`; returns the parameter that it went to, relative
        to this module, or None while a part of an MXFP4 matrix waits for the other one.
        """
        head, _, rest = name.partition(".")
        if head.isdigit():
            projection, _, tail = rest.partition(".")
            fused, part = PER_EXPERT[projection]
            return self._load(f"{fused}_{tail}", part, {int(head): tensor})
        projection = next(key for key in STACKED if name.startswith(key))
        tail = name.removeprefix(projection).removeprefix("_")
        if self.is_dequantised and tail in ("blocks", "scales"):
            matrix = self._dequantise(projection, tail, tensor)
            if matrix is None:
                return None
            tensor, tail = matrix, ""
        fused, part = STACKED[projection]
        return self._load(f"{fused}_{STACKED_TAILS[tail]}", part, dict(enumerate(tensor)))

    def _load(self, parameter: str, part: str, experts: dict[int, torch.Tensor]) -> str:
        name = f"experts.routed_experts.{parameter}"
        target: Any = self.get_parameter(name)
        for expert, tensor in experts.items():
            # Returns False for an expert that lives on another rank.
            target.weight_loader(target, tensor, name, shard_id=part, expert_id=expert, return_success=True)
        return name

    def _dequantise(self, projection: str, tail: str, tensor: torch.Tensor) -> torch.Tensor | None:
        """[E, in, out] once both halves of the projection are there."""
        other = self._waiting.pop(projection, None)
        if other is None:
            self._waiting[projection] = tensor
            return None
        blocks, scales = (tensor, other) if tail == "blocks" else (other, tensor)
        return mxfp4_dequantize(blocks, scales, torch.get_default_dtype()).transpose(1, 2)


def _without_lora(vllm_config: VllmConfig) -> AbstractContextManager[Any]:
    """The configuration that vLLM's experts read, without LoRA: they take no adapters here
    (vllm_compat.refuse_unfit_adapters), and with it they would need Triton's kernels, which a CPU lacks.
    """
    if vllm_config.lora_config is None:
        return nullcontext()
    view = copy.copy(vllm_config)
    view.lora_config = None
    return set_current_vllm_config(view)


def _runs_mxfp4() -> bool:
    """vLLM's CPU build multiplies MXFP4 with AMX only; without it the experts are dequantised while they load."""
    return not current_platform.is_cpu() or torch.cpu._is_amx_tile_supported()


def _check_split(spec: MoE, is_expert_parallel: bool, where: str) -> None:
    group = get_ep_group() if is_expert_parallel else get_tp_group()
    check_experts(spec, group.world_size, is_expert_parallel, where)
    if is_expert_parallel and group.world_size > 1 and current_platform.is_cpu():
        # vLLM 0.32's CPU kernel takes global expert numbers as local ones, and its worker dies.
        raise ConfigError("flag --enable-expert-parallel: found on CPU, allowed: on GPUs")


def _sigmoid_of_top(
    hidden_states: torch.Tensor, gating_output: torch.Tensor, topk: int, renormalize: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """DeciLM's routing as vLLM's custom function: [num_tokens, num_experts] logits → weights and experts [.., topk]."""
    logits, experts = torch.topk(gating_output, topk, dim=-1)
    return torch.sigmoid(logits.float()), experts.to(torch.int32)
