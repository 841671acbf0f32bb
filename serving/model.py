"""`PuzzleForCausalLM`: the class vLLM builds for a heterogeneous model.

It reads the list of records, builds each layer as its record says, and passes tokens through. Capability
interfaces are declared in this very file, because vLLM caches them under a hash of this file alone.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import EagleModelMixin, SupportsEagle3, SupportsLoRA, SupportsPP
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    PPMissingLayer,
    WeightsMapper,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
)
from vllm.sequence import IntermediateTensors
from vllm.v1.kv_cache_interface import KVCacheSpec
from vllm_puzzle.model_configs.fused_tensors import places
from vllm_puzzle.serving import vllm_compat
from vllm_puzzle.serving.ffn import choose_ffn_paths
from vllm_puzzle.serving.fused_model import served_model
from vllm_puzzle.serving.fused_weights import FusedWeights
from vllm_puzzle.serving.layers import add_and_norm, build_layer
from vllm_puzzle.serving.moe import PuzzleMoE
from vllm_puzzle.serving.quantized_layers import check_layers, prepare_quantization
from vllm_puzzle.serving.servable import check_servable
from vllm_puzzle.serving.stages import use_partition_by_cost
from vllm_puzzle.serving.weights import TensorAccount, check_shared_scales

logger = logging.getLogger("vllm.puzzle")
EXPERT = re.compile(r"(?P<module>model\.layers\.(?P<layer>\d+)\.(?:.+\.)?mlp)\.experts\.(?P<name>.+)")


@support_torch_compile(dynamic_arg_dims={"input_ids": 0, "positions": 0, "intermediate_tensors": 0, "inputs_embeds": 0})
class PuzzleModel(nn.Module, EagleModelMixin):
    """Embedding, the layers of this pipeline stage, final norm."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        served = served_model(vllm_config)
        check_servable(served.checkpoint)
        self.record = record = served.record
        # vLLM puts a global window on every layer that names none; here the records speak for every layer.
        vllm_config.cache_config.sliding_window = None
        self.quant_config = vllm_config.quant_config
        stage = get_pp_group()
        if stage.is_first_rank or (record.tie_word_embeddings and stage.is_last_rank):
            self.embed_tokens = VocabParallelEmbedding(
                record.vocab_size,
                record.hidden_size,
                quant_config=vllm_config.quant_config,
                prefix=f"{prefix}.embed_tokens",
            )
        else:
            self.embed_tokens = PPMissingLayer()

        def build(prefix: str) -> nn.Module:
            return build_layer(record, int(prefix.rpartition(".")[2]), vllm_config, prefix)

        use_partition_by_cost(record, stage.world_size)
        if not stage.is_first_rank:
            vllm_compat.allocate_stage_inputs_on_demand()
        self.start_layer, self.end_layer, self.layers = make_layers(
            len(record.layers), build, prefix=f"{prefix}.layers"
        )
        self.norm = RMSNorm(record.hidden_size, eps=record.rms_norm_eps) if stage.is_last_rank else PPMissingLayer()
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states", "residual"], record.hidden_size
        )

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """input_ids: [num_tokens] → [num_tokens, hidden_size]."""
        return self.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors | tuple[torch.Tensor, list[torch.Tensor]]:
        """One pass of this stage over [num_tokens] tokens; the last stage returns normed hidden states, and with them
        the layer inputs that an EAGLE-3 draft asked for (`aux_hidden_state_layers`), empty layers' included.
        """
        residual: torch.Tensor | None = None
        if get_pp_group().is_first_rank:
            hidden = self._embed(input_ids, inputs_embeds)
        else:
            assert intermediate_tensors is not None, "vLLM hands a later stage the earlier one's tensors"
            hidden, residual = intermediate_tensors["hidden_states"], intermediate_tensors["residual"]
        auxiliary: list[torch.Tensor] = []
        self._maybe_add_hidden_state(auxiliary, self.start_layer, hidden, residual)  # type: ignore[operator]
        for index, layer in enumerate(islice(self.layers, self.start_layer, self.end_layer), self.start_layer):
            if not layer.is_empty:
                hidden, residual = layer(positions, hidden, residual)
            self._maybe_add_hidden_state(auxiliary, index + 1, hidden, residual)  # type: ignore[operator]
        if not get_pp_group().is_last_rank:
            # A stage of empty layers only has no residual yet; zeros keep the pair's sum.
            residual = torch.zeros_like(hidden) if residual is None else residual
            return IntermediateTensors({"hidden_states": hidden, "residual": residual})
        hidden, _ = add_and_norm(self.norm, hidden, residual)
        return (hidden, auxiliary) if auxiliary else hidden

    def _embed(self, input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor:
        if inputs_embeds is not None:
            return inputs_embeds
        assert input_ids is not None, "vLLM gives the first stage either ids or embeddings"
        return self.embed_input_ids(input_ids)


class PuzzleForCausalLM(nn.Module, SupportsLoRA, SupportsPP, SupportsEagle3):
    """A heterogeneous decoder-only language model: `PuzzleModel` and the output matrix."""

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_stacked={
            ".q_proj": (".qkv_proj", "q"),
            ".k_proj": (".qkv_proj", "k"),
            ".v_proj": (".qkv_proj", "v"),
            ".gate_proj": (".gate_up_proj", 0),
            ".up_proj": (".gate_up_proj", 1),
        }
    )
    packed_modules_mapping = {  # noqa: RUF012 — vLLM reads this class attribute
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    embedding_modules = {"embed_tokens": "input_embeddings", "lm_head": "output_embeddings"}  # noqa: RUF012
    has_expert_lora = False  # see vllm_compat.refuse_unfit_adapters

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        if vllm_config.lora_config is not None:
            vllm_compat.refuse_unfit_adapters()
        self.vllm_config = vllm_config
        self.config = vllm_config.model_config.hf_config
        self.quant_config = vllm_config.quant_config
        self.served = served = served_model(vllm_config)
        if served.requested.ffns:
            logger.info("%s", served.requested.sentence)
        quantization, fused_quantization = prepare_quantization(vllm_config, served)
        self.quantization = quantization
        self.model_dtype = vllm_config.model_config.dtype
        self.model = PuzzleModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.record = record = self.model.record
        self.lm_head = PPMissingLayer()
        if get_pp_group().is_last_rank:
            self.lm_head = ParallelLMHead(
                record.vocab_size,
                record.hidden_size,
                quant_config=vllm_config.quant_config,
                prefix=maybe_prefix(prefix, "lm_head"),
            )
            if record.tie_word_embeddings:
                self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
            self.logits_processor = LogitsProcessor(record.vocab_size)
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors
        check_layers(self, fused_quantization)

    @classmethod
    def get_kv_cache_groups(cls, vllm_config: VllmConfig, kv_cache_spec: dict[str, KVCacheSpec]) -> list[Any]:
        """vLLM 0.33's hook `SupportsKVCacheGrouping`, known by this method's name; 0.32 is patched instead."""
        return vllm_compat.plan_kv_cache_groups(vllm_config, kv_cache_spec)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """input_ids: [num_tokens] → [num_tokens, hidden_size]."""
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors | tuple[torch.Tensor, list[torch.Tensor]]:
        """See PuzzleModel.forward."""
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """hidden_states: [num_tokens, hidden_size] → [num_tokens, vocab_size]."""
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a checkpoint and return vLLM's names of what was loaded. Raises WeightsError (see weights.py)."""
        account = TensorAccount(self.served.checkpoint, self.quantization)
        loaded: set[str] = set()
        weights = account.watch(check_shared_scales(weights, self.quantization))
        layers = self.model.layers
        fused = FusedWeights(
            places(self.served.checkpoint, self.served.plan, self.quantization),
            self.model_dtype,
            lambda index: not isinstance(layers[index], PPMissingLayer),
        )
        rest = self._load_experts(fused.stream(weights), account, loaded)
        return loaded | AutoWeightsLoader(self).load_weights(rest, mapper=self.hf_to_vllm_mapper)

    def process_weights_after_loading(self) -> None:
        """vLLM's hook for when every weight has its final form."""
        choose_ffn_paths(self, self.vllm_config)

    def _load_experts(
        self, weights: Iterable[tuple[str, torch.Tensor]], account: TensorAccount, loaded: set[str]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Load expert tensors into `loaded`, pass the others on."""
        parameters = dict(self.named_parameters())
        for name, tensor in weights:
            match = EXPERT.match(name)
            if match is None:
                parameter = account.parameter_name(name)
                # Scales of a KV cache that is not FP8 have no parameter, and no effect.
                if name not in account.kv_scales or parameter in parameters:
                    yield parameter, tensor
            elif not isinstance(self.model.layers[int(match["layer"])], PPMissingLayer):
                experts = self.get_submodule(match["module"])
                assert isinstance(experts, PuzzleMoE), "the account knows the tensor, so the layer has experts"
                filled = experts.load_expert(match["name"], tensor)
                loaded |= {f"{match['module']}.{filled}"} if filled else set()
