"""Every private symbol of vLLM that we touch; nothing else reaches below vLLM's surface.

Each has an entry in the ledger (`vllm_ledger.py`): why, what upstream says, when our use can go.
"""

from __future__ import annotations

import sys
from typing import Any

from vllm_puzzle.model_configs.schema import ConfigError
from vllm_puzzle.serving.late_import import when_imported

INDUCTOR_LOWERING = "torch._inductor.lowering"
SUPPORTED_VLLM = ((0, 32), (0, 34))


def check_vllm_version() -> None:
    """Raise RuntimeError when the installed vLLM is outside the supported range."""
    import vllm

    found = vllm.__version__
    low, high = SUPPORTED_VLLM
    try:
        version = tuple(int(part) for part in found.split(".")[:2])
    except ValueError:
        return  # a development build of vLLM without a number: the user knows
    if not low <= version < high:
        allowed = f">={low[0]}.{low[1]},<{high[0]}.{high[1]}"
        raise RuntimeError(f"vllm-puzzle: found vLLM {found}, allowed: {allowed}")


def use_record_sizes(model_type: str) -> None:
    """Make vLLM take the whole-model KV-head count of `model_type` from our records (the largest layer's)."""
    from vllm.transformers_utils import model_arch_config_convertor as module
    from vllm_puzzle.serving.hf_config import model_record

    class RecordSizesConvertor(module.ModelArchConfigConvertorBase):
        def get_total_num_kv_heads(self) -> int:
            # vLLM divides by this number; a model without any attention has no KV heads to shard.
            return max((a.num_kv_heads for a in model_record(self.hf_text_config).attentions), default=1)

    module.MODEL_ARCH_CONFIG_CONVERTORS[model_type] = RecordSizesConvertor


HARMONY_CALL = 200012  # <|call|>, ends a turn that calls a tool
HARMONY_VOCABULARY = 201088
HARMONY_TEXTS = ("REASONING", "CONTENT")


def use_gpt_oss_defaults(architecture: str) -> None:
    """Give `architecture` vLLM's defaults for gpt-oss."""
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, GptOssForCausalLMConfig

    MODELS_CONFIG_MAP[architecture] = GptOssForCausalLMConfig


def end_harmony_turns_at_calls() -> None:
    """Stop gpt-oss-puzzle at `<|call|>`, which its generation_config.json leaves out of the end tokens. Repeatable."""
    from vllm.config import ModelConfig
    from vllm_puzzle.serving.hf_config import GptOssPuzzleConfig

    original = ModelConfig.try_get_generation_config
    if getattr(original, "_puzzle_ends_calls", False):
        return

    def with_call(self: Any) -> dict[str, Any]:
        found: dict[str, Any] = original(self)
        config = self.hf_config
        if not isinstance(config, GptOssPuzzleConfig) or config.vocab_size != HARMONY_VOCABULARY:
            return found
        ids = found.get("eos_token_id", config.eos_token_id)
        ids = [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
        return found | {"eos_token_id": list(dict.fromkeys([*ids, HARMONY_CALL]))}

    with_call._puzzle_ends_calls = True  # type: ignore[attr-defined]
    ModelConfig.try_get_generation_config = with_call


def resolve(target: str) -> Any:
    """The object a ledger entry names (`module:attribute`); AttributeError or ImportError when it is gone."""
    import importlib
    from functools import reduce

    importlib.import_module("vllm.config")  # vLLM's modules import each other in circles; this order works
    module, _, name = target.partition(":")
    return reduce(getattr, name.split("."), importlib.import_module(module))


def allow_attention_free_stages() -> None:
    """Let the KV-cache planner accept a worker that has no attention layer (pipeline parallelism).

    Such a worker gets no tensors. One byte stands for each of its blocks, so that it never limits their number.
    Safe to call twice; other workers go through vLLM's own code.
    """
    planner = kv_cache_planner()
    if getattr(planner, "_puzzle_allows_empty_workers", False):
        return
    plan, bytes_per_block = planner.get_kv_cache_config_from_groups, planner._get_kv_cache_bytes_per_block

    def is_empty(groups: Any) -> bool:
        return bool(groups) and not any(group.layer_names for group in groups)

    def plan_or_nothing(vllm_config: Any, kv_cache_groups: Any, available_memory: int) -> Any:
        config = plan(vllm_config, [] if is_empty(kv_cache_groups) else kv_cache_groups, available_memory)
        if is_empty(kv_cache_groups):
            config.num_blocks, config.kv_cache_groups = available_memory, kv_cache_groups
        return config

    def bytes_per_block_or_one(kv_cache_groups: Any, layout: Any) -> int:
        return 1 if is_empty(kv_cache_groups) else bytes_per_block(kv_cache_groups, layout)

    planner.get_kv_cache_config_from_groups = plan_or_nothing
    planner._get_kv_cache_bytes_per_block = bytes_per_block_or_one
    planner._puzzle_allows_empty_workers = True


def plan_kv_cache_groups(vllm_config: Any, kv_cache_spec: dict[str, Any]) -> list[Any]:
    """vLLM's grouping of the layers `kv_cache_spec` names, or ours where it needs fewer pages."""
    from vllm_puzzle.serving.kv_cache_groups import regroup

    planner = kv_cache_planner()
    stock = getattr(planner, "_puzzle_stock_groups", planner.get_kv_cache_groups)
    return regroup(vllm_config, stock(vllm_config, kv_cache_spec), list(kv_cache_spec))


def use_fewest_kv_cache_pages() -> None:
    """Let `plan_kv_cache_groups` group the layers of every model; vLLM 0.33 asks the model class instead.

    Safe to call twice. EngineCore plans for all workers at once; a GPU worker plans its own while it measures memory.
    """
    from vllm.model_executor.models import interfaces
    from vllm_puzzle.serving.kv_cache_groups import stages_of

    planner = kv_cache_planner()
    if hasattr(interfaces, "SupportsKVCacheGrouping") or hasattr(planner, "_puzzle_stock_groups"):
        return
    planner._puzzle_stock_groups = planner.get_kv_cache_groups
    planner.get_kv_cache_groups = plan_kv_cache_groups
    plan = planner.get_kv_cache_configs

    def plan_with_stages(vllm_config: Any, kv_cache_specs: list[dict[str, Any]], available_memory: list[int]) -> Any:
        with stages_of(kv_cache_specs, available_memory):
            return plan(vllm_config, kv_cache_specs, available_memory)

    planner.get_kv_cache_configs = plan_with_stages
    if engine_core := sys.modules.get("vllm.v1.engine.core"):
        engine_core.get_kv_cache_configs = plan_with_stages  # type: ignore[attr-defined]


def kv_cache_planner() -> Any:
    """vLLM's module that plans KV caches."""
    try:
        from vllm.v1.core import kv_cache_planning as planner  # vLLM 0.33 moved it
    except ImportError:
        from vllm.v1.core import kv_cache_utils as planner
    return planner


def refuse_unfit_adapters() -> None:
    """Leave `experts` out of the modules that take LoRA adapters, in models that say `has_expert_lora = False`, and
    refuse an adapter for FFNs that are fused: vLLM would drop it where a layer has become empty, and misplace it where
    the wide FFN is. ConfigError while it loads. Other models are untouched. Repeatable.
    """
    from vllm.lora import model_manager
    from vllm.lora.worker_manager import WorkerLoRAManager

    original, load = model_manager.get_supported_lora_modules, WorkerLoRAManager._load_adapter
    if getattr(original, "_puzzle_leaves_experts_out", False):
        return

    def has_expert_lora(model: Any) -> bool:
        return bool(getattr(model, "has_expert_lora", True))

    def supported(model: Any) -> list[str]:
        return [name for name in original(model) if has_expert_lora(model) or name != "experts"]

    def load_or_refuse(self: Any, lora_request: Any) -> Any:
        try:
            adapter = load(self, lora_request)
        except ValueError as error:
            if has_expert_lora(self._adapter_manager.model) or ".experts" not in str(error):
                raise
            raise ConfigError(
                f"adapter {lora_request.lora_path}: found weights for experts, allowed: for any other matrix "
                "(vLLM has no adapters for experts whose number differs by layer)"
            ) from None
        served = getattr(self._adapter_manager.model, "served", None)
        for ffn in served.requested.ffns if served is not None else ():
            parts = tuple(f"{part.prefix}.mlp." for part in ffn.parts)
            if named := sorted(name for name in adapter.loras if name.startswith(parts)):
                raise ConfigError(
                    f"adapter {lora_request.lora_path}: found weights for {named[0]}, allowed: for any matrix beside "
                    f"the FFNs of layers {ffn.layers[0]}-{ffn.layers[-1]}, which are fused (--puzzle-ffn-fusion)"
                )
        return adapter

    supported._puzzle_leaves_experts_out = True  # type: ignore[attr-defined]
    model_manager.get_supported_lora_modules = supported
    WorkerLoRAManager._load_adapter = load_or_refuse


def allocate_stage_inputs_on_demand() -> None:
    """Allocate a later pipeline stage's input buffers at the first step if no warm-up did (V1 runner). Repeatable."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    original = GPUModelRunner.sync_and_gather_intermediate_tensors
    if getattr(original, "_puzzle_allocates", False):
        return

    def sync_and_gather(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.intermediate_tensors is None:
            self.intermediate_tensors = self.model.make_empty_intermediate_tensors(
                batch_size=self.max_num_tokens, dtype=self.model_config.dtype, device=self.device
            )
        return original(self, *args, **kwargs)

    sync_and_gather._puzzle_allocates = True  # type: ignore[attr-defined]
    GPUModelRunner.sync_and_gather_intermediate_tensors = sync_and_gather


def round_to_fp8_on_cpu() -> None:
    """Let vLLM's CPU build round a tensor to FP8 with a given scale. Repeatable; other uses go to vLLM's own code."""
    import torch
    from vllm import _custom_ops as ops
    from vllm.platforms import current_platform

    original = ops.scaled_fp8_quant
    if not current_platform.is_cpu() or getattr(original, "_puzzle_rounds", False):
        return

    def scaled_fp8_quant(input: Any, scale: Any = None, *args: Any, **kwargs: Any) -> Any:
        if scale is None or scale.numel() != 1 or args or kwargs:
            return original(input, scale, *args, **kwargs)
        limit = torch.finfo(torch.float8_e4m3fn).max
        return (input.float() / scale).clamp(-limit, limit).to(torch.float8_e4m3fn), scale

    scaled_fp8_quant._puzzle_rounds = True  # type: ignore[attr-defined]
    ops.scaled_fp8_quant = scaled_fp8_quant


def has_packed_int_kernel() -> bool:
    """Whether this vLLM can multiply by packed INT4 or INT8 weights: always, except in its CPU build for AVX2."""
    import torch
    from vllm.platforms import current_platform

    return not current_platform.is_cpu() or hasattr(torch.ops._C, "cpu_gemm_wna16")


def has_exact_int8_kernel() -> bool:
    """Whether this vLLM multiplies INT8 matrices exactly, tried with the largest values."""
    import torch
    from vllm import _custom_ops as ops
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return True
    size = 64
    # The handler keeps pointers only: both tensors must outlive it.
    weight, weight_scales = torch.full((size, size), 127, dtype=torch.int8), torch.ones(size, 1)
    handler = ops.create_onednn_scaled_mm(weight.t(), weight_scales, torch.float32, True, False, 32)
    values, scales, zero_points = ops.onednn_scaled_int8_quant(torch.ones(1, size), None, None, True)
    product, no_shift = torch.empty(1, size), torch.zeros(1, size)
    ops.onednn_scaled_mm(handler, values, product, scales, zero_points, no_shift, None)
    # 64 products of 127 · (127 / 127), in float32: 7 bits of headroom each way.
    return bool(torch.allclose(product, torch.tensor(127.0 * size), rtol=2**-20))


def serve_command() -> tuple[Any, Any]:
    """(the `vllm serve` subcommand, cli_env_setup): the pieces of vLLM's console script."""
    from vllm.entrypoints.cli.serve import ServeSubcommand

    try:
        from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    except ImportError:  # vLLM 0.33 moved it
        from vllm.entrypoints.common.startup import cli_env_setup
    return ServeSubcommand(), cli_env_setup


def chat_template_text(argument: str | None, tokenizer: Any) -> str:
    """The chat template a server renders with, as text: --chat-template, else the tokenizer's; empty if none."""
    from vllm.renderers.chat_utils import load_chat_template

    if argument:
        return load_chat_template(argument) or ""
    template = getattr(tokenizer, "chat_template", None)
    return "\n".join(template.values()) if isinstance(template, dict) else template or ""


def fork_engine_core() -> None:
    """Start EngineCore by fork, so that it inherits the imported vLLM instead of importing it again (CPU only).

    vLLM's CPU platform sets the spawn method inside `create_engine_config`, after any setting of ours.
    """
    import multiprocessing

    from vllm.v1.engine import utils as engine_utils

    engine_utils.get_mp_context = lambda: multiprocessing.get_context("fork")


def patch_inductor_late() -> None:
    """Import vLLM without torch's Inductor behind it, which vLLM imports only to patch it: the patch waits until
    somebody else does. Nothing is done where either is imported already."""
    if "vllm" in sys.modules or INDUCTOR_LOWERING in sys.modules:
        return
    sys.modules[INDUCTOR_LOWERING] = None  # type: ignore[assignment]  # to import it is an ImportError: no patch
    try:
        from vllm import env_override
    except ImportError:  # with a torch for which vLLM has more patches: it will be imported as it wants
        return
    finally:
        del sys.modules[INDUCTOR_LOWERING]
    when_imported(INDUCTOR_LOWERING, lambda _: env_override._patch_inductor_fallback_allow_list())


def reasoning_config(engine_client: Any) -> Any:
    """vLLM's ReasoningConfig; None without a reasoning parser.

    vLLM makes none for the parser that it chooses by itself, as for gpt-oss; an empty one stands for that.
    """
    from vllm.config.reasoning import ReasoningConfig

    config = engine_client.vllm_config
    found = getattr(config, "reasoning_config", None)
    chosen = getattr(getattr(config, "structured_outputs_config", None), "reasoning_parser", "")
    return ReasoningConfig() if found is None and chosen else found


def harmony_kind(channel: str | None, recipient: str | None) -> str:
    """What a Harmony message is to vLLM: one of HARMONY_TEXTS, TOOL or IGNORE."""
    from vllm.parser.harmony import _SegmentType

    return _SegmentType.from_channel_and_recipient(channel, recipient).name


def thinking_texts(engine_client: Any) -> tuple[str, str]:
    """(start, end) of a thought as the engine's reasoning parser knows them; empty where it knows none."""
    config = reasoning_config(engine_client)
    tokenizer = getattr(engine_client.renderer, "tokenizer", None)
    if config is None or not config.enabled or tokenizer is None:
        return "", ""
    return tokenizer.decode(config.reasoning_start_token_ids), tokenizer.decode(config.natural_reasoning_end_token_ids)


def model_type(model_config: Any) -> str:
    """config.json's model type; gpt-oss-puzzle's own, which says gpt_oss to vLLM (serving/hf_config.py)."""
    if "GptOssPuzzleForCausalLM" in (getattr(model_config.hf_config, "architectures", None) or ()):
        return "gpt_oss_puzzle"
    return getattr(model_config.hf_config, "model_type", "")


def responses_reasoning(effort: str) -> Any:
    """The `reasoning` object of a Responses request."""
    from openai.types.shared import Reasoning

    return Reasoning.model_construct(effort=effort)


def enforce_thinking_budgets() -> None:
    """Let our thinking machines take the place of vLLM's budgets in the V1 runner. Repeatable; before workers start."""
    from vllm.v1.sample import thinking_budget_state
    from vllm_puzzle.serving.thinking_v1 import make_holder

    def make(*args: Any, **kwargs: Any) -> Any:
        add_worker_methods()
        spread_temperatures_on_cpu()
        return make_holder(*args, **kwargs)

    thinking_budget_state.maybe_create_thinking_budget_state_holder = make
    # A forked engine has imported the batch, and the name with it, before.
    if (module := sys.modules.get("vllm.v1.worker.gpu_input_batch")) is not None:
        module.maybe_create_thinking_budget_state_holder = make  # type: ignore[attr-defined]


def spread_temperatures_on_cpu() -> None:
    """Give each draft its request's temperature, top-k and top-p in vLLM's CPU build. Repeatable; called in a worker,
    which samples."""
    import torch
    from vllm.platforms import current_platform
    from vllm.v1.sample import rejection_sampler

    def expand(
        x: torch.Tensor, cu_num_tokens: torch.Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
    ) -> torch.Tensor:
        counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
        values = torch.where(x == replace_from, torch.full_like(x, replace_to), x)
        return values.repeat_interleave(counts, output_size=num_tokens)

    if current_platform.is_cpu():
        rejection_sampler.expand_batch_to_tokens = expand


def enforce_thinking_budgets_v2() -> None:
    """The same in the V2 runner, once somebody imports its sampler, which takes 2 s. Repeatable."""

    def use_device_budgets(sampler: Any) -> None:
        from vllm_puzzle.serving.thinking_v2 import DeviceThinkingBudgets

        sampler.ThinkingBudgetState = DeviceThinkingBudgets
        add_worker_methods()

    when_imported("vllm.v1.worker.gpu.sample.sampler", use_device_budgets)


def stock_thinking_holder(markers: Any, max_num_seqs: int, device: Any) -> Any:
    """vLLM's own budgets of the V1 runner, to be measured beside ours."""
    from vllm.v1.sample.thinking_budget_state import ThinkingBudgetStateHolder

    return ThinkingBudgetStateHolder(_reasoning_config(markers), max_num_seqs, 0, device, False)


def stock_thinking_budgets_v2(req_states: Any, markers: Any) -> Any:
    """vLLM's own budgets of the V2 runner, to be measured beside ours."""
    from vllm.v1.worker.gpu.sample.thinking_budget import ThinkingBudgetState

    return ThinkingBudgetState(req_states, _reasoning_config(markers))


def v2_request_state(max_num_reqs: int, max_model_len: int, vocab_size: int, device: Any) -> Any:
    """The V2 runner's state of all request slots."""
    from vllm.v1.worker.gpu.states import RequestState

    return RequestState(max_num_reqs, max_model_len, max_model_len, 0, vocab_size, device)


def _reasoning_config(markers: Any) -> Any:
    from vllm.config.reasoning import ReasoningConfig

    config = ReasoningConfig()
    config._reasoning_start_token_ids = list(markers.start)
    config._reasoning_end_token_ids = [*markers.phrase, *markers.closing]
    config._natural_reasoning_end_token_ids = list(markers.ends[0])
    return config


def add_worker_methods() -> None:
    """Give workers the methods that the API process calls by name. Called inside a worker, where the class is imported
    anyway: importing it elsewhere takes a second."""
    from vllm.v1.worker.worker_base import WorkerBase
    from vllm_puzzle.serving import thinking_worker

    WorkerBase.puzzle_set_markers = thinking_worker.set_markers
    WorkerBase.puzzle_end_thinking = thinking_worker.end_thinking


def refresh_sampling(batch: Any) -> None:
    """Make the V1 batch give the sampler what a newly followed request needs."""
    batch.sampling_metadata = batch._make_sampling_metadata()


def observe_outputs(observe: Any) -> None:
    """Call `observe(external request id, internal one, index, prompt, new tokens, finish reason)` for each step of
    each request in this API process, whatever the request wants returned. The last caller's function is called."""
    from vllm.v1.engine.output_processor import RequestState

    original = getattr(RequestState.make_request_output, "_puzzle_original", RequestState.make_request_output)

    def make_request_output(
        self: Any, new_token_ids: list[int], pooling_output: Any, finish_reason: Any, *args: Any, **kwargs: Any
    ) -> Any:
        external = self.parent_req.external_req_id if self.parent_req is not None else self.external_req_id
        reason = None if finish_reason is None else str(finish_reason)
        observe(external, self.request_id, self.request_index, self.prompt_token_ids, new_token_ids, reason)
        return original(self, new_token_ids, pooling_output, finish_reason, *args, **kwargs)

    make_request_output._puzzle_original = original  # type: ignore[attr-defined]
    RequestState.make_request_output = make_request_output


def internal_request_ids(engine_client: Any, request_id: str) -> list[str]:
    """The engine's ids of the running sequences of one request."""
    return list(engine_client.output_processor.external_req_ids.get(request_id, ()))


def handlers(state: Any) -> list[Any]:
    """Every handler of a server's paths that holds an engine client, each once."""
    found = {id(value): value for value in vars(state)["_state"].values() if hasattr(value, "engine_client")}
    return list(found.values())


async def ask_workers(engine_client: Any, method: str, *args: Any) -> list[Any]:
    """Call a method of every worker of every data-parallel engine; all answers. vLLM's collective_rpc returns the first
    engine's only."""
    ask_all = getattr(getattr(engine_client, "engine_core", None), "call_utility_all_async", None)
    if ask_all is None:
        return list(await engine_client.collective_rpc(method, args=args))
    answers = await ask_all("collective_rpc", method, None, args, None)
    return [answer for engine in answers for answer in engine]


def keep_plain_weights_on_cpu(*layers: Any) -> None:
    """Keep vLLM's CPU build from packing these linear layers' weights into a form that only its own kernel reads."""
    for layer in layers:
        layer._cpu_skip_gemm_dispatch = True
