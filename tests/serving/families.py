"""Configurations of the families and spellings beside DeciLM's, at toy size."""

from __future__ import annotations

from typing import Any

from checkpoints import BASE, deci_block, deci_config

OVERRIDES: dict[str, dict[str, Any]] = {
    "0": {"skip": ["attention"]},
    "1": {"num_key_value_heads": 1},
    "2": {"skip": ["mlp"]},
    "3": {"sliding_window": 16, "intermediate_size": 40},
}


def config(model_type: str, architecture: str, **changes: Any) -> dict[str, Any]:
    sizes = {"num_key_value_heads": 2, "intermediate_size": 96, "num_hidden_layers": 5, "sliding_window": None}
    return BASE | sizes | {"model_type": model_type, "architectures": [architecture]} | changes


def v1_block(attention: dict[str, Any], ffn: dict[str, Any]) -> dict[str, Any]:
    """One entry of puzzletron v1's `block_configs` (ModelOpt block_config.py), all its keys written."""
    empty_attention = {"num_key_value_heads": None, "llama4": None, "mamba": None}
    common = {"no_op": False, "replace_with_linear": False, "sparsify": None, "weights_precision": "bf16"}
    empty_ffn = {"moe": None, "intermediate_size": None, "gated": True, "hidden_act": None}
    return {"attention": common | empty_attention | attention, "ffn": common | empty_ffn | ffn, "parallel_blocks": None}


V1_BLOCKS = [
    v1_block({"no_op": True}, {"intermediate_size": 48}),
    v1_block({"num_key_value_heads": 1}, {"intermediate_size": 96}),
    v1_block({"replace_with_linear": True}, {}),
    v1_block({}, {"no_op": True}),
    v1_block({"num_key_value_heads": 4}, {"replace_with_linear": True}),
]

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
MOE_OVERRIDES = OVERRIDES | {
    "3": {"sliding_window": 16, "num_experts": 6, "moe_intermediate_size": 64, "num_experts_per_tok": 3}
}
YARN = {
    "rope_type": "yarn", "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 128,
}  # fmt: skip
GPT_OSS: dict[str, Any] = {
    "num_local_experts": 8,
    "num_experts_per_tok": 4,
    "intermediate_size": 32,
    "sliding_window": 16,
    "attention_bias": True,
    "swiglu_limit": 7.0,
    "rope_theta": 150000.0,
    "rope_scaling": YARN,
}
GPT_OSS_OVERRIDES: dict[str, dict[str, Any]] = {
    "0": {"skip": ["attention"]},
    "1": {"num_local_experts": 4, "sliding_window": 40},
    "2": {"skip": ["mlp"], "num_key_value_heads": 1},
    "3": {"num_experts_per_tok": 2, "intermediate_size": 64},
}
# Published shape of gpt-oss-puzzle: two numbers per layer.
PUZZLE_BLOCKS = [
    {"num_local_experts": experts, "sliding_window": window}
    for experts, window in ((8, 16), (8, None), (4, 16), (4, 40), (8, 16))
]


def v2_block(attention: dict[str, Any], ffn: dict[str, Any]) -> dict[str, Any]:
    """One entry of puzzletron v2's `block_configs` (ModelOpt's to_dict leaves out what is null)."""
    part = {"kind": "moe", "name": "moe"} if "num_experts" in ffn else {"kind": "ffn", "name": "ffn"}
    shared = {"kind": "attention", "name": "attention", "no_op": False}
    return {"subblock_configs": [shared | attention, part | {"no_op": False} | ffn]}


V2_BLOCKS = [
    v2_block({"no_op": True}, {"intermediate_size": 48}),
    v2_block({"num_kv_heads": 1, "num_query_heads": 2, "sliding_window_size": "full"}, {"intermediate_size": 96}),
    v2_block({"num_kv_heads": 2, "sliding_window_size": 20}, {"no_op": True}),
    v2_block({"qk_head_dim": 64, "v_head_dim": 64}, {}),
    v2_block({}, {"intermediate_size": 40}),
]
V2_GPT_OSS_BLOCKS = [
    v2_block({"num_kv_heads": 2, "sliding_window_size": window}, {"num_experts": experts, "top_k": 2})
    for experts, window in ((8, 16), (6, "full"), (4, 16), (8, 24), (5, "full"))
]

# DeciLM's wider schema: experts beside a shared one, and parallel blocks (a whole one, an FFN, an attention).
DECI_MOE = {
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
    "expert_intermediate_dim": 32,
    "shared_expert_intermediate_dim": 64,
}


def _wide_blocks() -> list[dict[str, Any]]:
    experts = deci_block(2, 48)
    experts["ffn"] |= {"intermediate_size": None, "moe": DECI_MOE}
    parallel = {
        "attention": None,
        "ffn": None,
        "parallel_blocks": [deci_block(1, 32), deci_block(None, 96), deci_block(None, None), deci_block(4, None)],
    }
    return [parallel, experts, deci_block(4, 40, window=24), parallel]


def _parallel(*blocks: dict[str, Any]) -> dict[str, Any]:
    return {"attention": None, "ffn": None, "parallel_blocks": list(blocks)}


# Parallel blocks that are one wide FFN, with and without an empty one among them, beside some that are not.
PARALLEL_FFNS = [
    deci_block(2, 48),
    _parallel(deci_block(None, 33), deci_block(None, None), deci_block(None, 17)),
    _parallel(deci_block(1, 32), deci_block(None, 96)),
    _parallel(deci_block(None, 47), deci_block(None, 51), deci_block(None, 64)),
]


# Runs of attention-free layers of odd widths: an empty layer within one, a linear map between two.
FFN_RUNS = [
    deci_block(2, 48), deci_block(None, 33), deci_block(None, None), deci_block(None, 17), deci_block(None, 47),
    deci_block(None, 51), deci_block("linear", 40), deci_block(None, 21), deci_block(None, 95), deci_block(4, None),
]  # fmt: skip
FFN_RUNS_TIED = config(
    "llama",
    "LlamaForCausalLM",
    tie_word_embeddings=True,
    per_layer_config={str(i): {"skip": ["attention"], "intermediate_size": 30 + i} for i in (1, 2, 3)},
)


def _with_second(part: str, **changes: Any) -> dict[str, Any]:
    blocks = [deci_block(2, 48), deci_block(2, 48)]
    blocks[1][part] |= changes
    if changes.get("mamba"):
        blocks[1]["ffn"] = deci_block(2, None)["ffn"]
    return deci_config(blocks)


# Read, inspected, and refused by `serve`: vLLM has nothing to compute them with.
UNSERVED = {
    "mamba": _with_second(
        "attention", n_heads_in_group=None, mamba={"state_dim": 16, "num_heads": 8, "head_dim": 16, "num_groups": 2}
    ),
    "sink tokens": _with_second("attention", window_length=16, num_sink_tokens=4, unshifted_sink=True),
    "two experts on their input": _with_second(
        "ffn", intermediate_size=None, moe=DECI_MOE | {"num_experts_per_tok": 2}
    ),
}

# Mistral's global window is on every layer that does not say otherwise, as in its own class.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": config("llama", "LlamaForCausalLM", per_layer_config=OVERRIDES),
    "mistral": config("mistral", "MistralForCausalLM", per_layer_config=OVERRIDES, sliding_window=24),
    "qwen2": config("qwen2", "Qwen2ForCausalLM", per_layer_config=OVERRIDES, use_sliding_window=False),
    "qwen3": config("qwen3", "Qwen3ForCausalLM", per_layer_config=OVERRIDES),
    "anymodel": config("qwen3", "AnyModel", per_layer_config=OVERRIDES, base_architecture="Qwen3ForCausalLM"),
    "puzzletron v1": config("llama", "LlamaForCausalLM", block_configs=V1_BLOCKS),
    "puzzletron v2": config("llama", "LlamaForCausalLM", block_configs=V2_BLOCKS),
    "qwen3_moe": config("qwen3_moe", "Qwen3MoeForCausalLM", per_layer_config=MOE_OVERRIDES, **MOE),
    "gpt_oss": config("gpt_oss", "GptOssForCausalLM", per_layer_config=GPT_OSS_OVERRIDES, **GPT_OSS),
    "gpt_oss v2": config("gpt_oss", "GptOssForCausalLM", block_configs=V2_GPT_OSS_BLOCKS, **GPT_OSS),
    "gpt_oss_puzzle": config("gpt_oss_puzzle", "GptOssPuzzleForCausalLM", block_configs=PUZZLE_BLOCKS, **GPT_OSS),
    "deci wide": deci_config(_wide_blocks()),
}
