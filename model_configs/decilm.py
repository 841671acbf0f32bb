"""DeciLM / nemotron-nas `block_configs`, and puzzletron v1's, which spell the same list in newer words.

NVIDIA's configuration_decilm.py and block_config.py (Model-Optimizer f7d547fba and main): `n_heads_in_group` or
`num_key_value_heads`, `ffn_mult` or `intermediate_size`, `no_op`, `replace_with_linear`, `window_length` with
`num_sink_tokens`, `moe`, `mamba`, and `parallel_blocks` in place of the two sub-blocks. On a Hugging Face family
(puzzletron v1) a size left null is the model's own. Standard library only.
"""

from __future__ import annotations

from typing import Any

from vllm_puzzle.model_configs.json_values import (
    Json,
    flag,
    integer,
    known_keys,
    optional_integer,
    optional_number,
    refuse,
    text,
)
from vllm_puzzle.model_configs.per_layer import (
    GPT_OSS,
    MODEL,
    blocks_of,
    build_at,
    family_routing,
    global_window,
    head_dim_of,
)
from vllm_puzzle.model_configs.per_layer import MOE_KEYS as FAMILY_MOE_KEYS
from vllm_puzzle.model_configs.schema import (
    MAX_EXPERTS,
    Attention,
    AttentionKind,
    ConfigError,
    FFNKind,
    GatedFFN,
    LayerRecord,
    LinearMap,
    Mamba2,
    MoE,
)

UNSUPPORTED = ("llama4", "sparsify")  # allowed only when null or empty
ATTENTION_SIZES = ("n_heads_in_group", "num_key_value_heads", "window_length")
SINK_KEYS = ("num_sink_tokens", "unshifted_sink", "use_prefill_window_in_sink_attention")
FFN_SIZES = ("ffn_mult", "intermediate_size")
FLAGS = ("no_op", "replace_with_linear")
OTHER = ("hidden_act", "weights_precision")
MOE_KEYS = (
    "num_local_experts", "num_experts_per_tok", "expert_intermediate_dim", "shared_expert_intermediate_dim",
)  # fmt: skip
MAMBA_KEYS = ("state_dim", "num_heads", "head_dim", "num_groups")
CONV_KERNEL = 4  # of the Megatron mixer that DeciLM's code instantiates


def read_layers(config: Json) -> tuple[LayerRecord, ...]:
    """One record per entry of `block_configs`."""
    return tuple(_layer(config, block, index, f"layer {index}") for index, block in enumerate(blocks_of(config)))


def ffn_mult_to_width(ffn_mult: float, hidden_size: int) -> int:
    """DeciLM's FFN width: `int(2 · ffn_mult · hidden / 3)`, rounded up to a multiple of 256."""
    width = int(2 * ffn_mult * hidden_size / 3)
    return width + -width % 256


def _layer(config: Json, block: Any, index: int, where: str, is_inner: bool = False) -> LayerRecord:
    if not isinstance(block, dict):
        raise ConfigError(f"{where}: found {block!r}, allowed: an object with `attention` and `ffn`")
    known_keys(where, block, ("attention", "ffn", "parallel_blocks"))
    if block.get("parallel_blocks") not in (None, []):
        if is_inner:
            raise refuse(where, "parallel_blocks", block["parallel_blocks"], "null (a parallel block holds no others)")
        return _parallel_layer(config, block, index, where)
    for part in ("attention", "ffn"):
        if not isinstance(block.get(part), dict):
            raise refuse(where, part, block.get(part), "an object")
    attention = _attention(config, block["attention"], index, f"{where}, attention")
    ffn = _ffn(config, block["ffn"], f"{where}, ffn")
    if isinstance(attention, Mamba2) and ffn is not None:
        raise refuse(
            f"{where}, ffn", "no_op", False, "true, as the layer's attention is `mamba` (DeciLM builds no FFN)"
        )
    return LayerRecord(attention, ffn)


def _parallel_layer(config: Json, block: Json, index: int, where: str) -> LayerRecord:
    """Blocks that read the same input; the outer `attention` and `ffn` are null then."""
    entries = block["parallel_blocks"]
    if not isinstance(entries, list | tuple) or config["model_type"] != "nemotron-nas":
        raise refuse(where, "parallel_blocks", entries, "a list of objects, on nemotron-nas")
    for part in ("attention", "ffn"):
        if block.get(part) is not None:
            raise refuse(where, part, block[part], "null beside `parallel_blocks`")
    blocks = [_layer(config, entry, index, f"{where}, block {i}", True) for i, entry in enumerate(entries)]
    return LayerRecord(None, None, tuple(blocks))


def _attention(config: Json, block: Json, index: int, where: str) -> AttentionKind:
    known_keys(where, block, ATTENTION_SIZES + SINK_KEYS + FLAGS + OTHER + UNSUPPORTED + ("mamba",))
    sizes = {key: optional_integer(where, block, key) for key in ATTENTION_SIZES}
    if _is_replaced(block, where, (*ATTENTION_SIZES, "num_sink_tokens", "mamba")):
        _read_sinks(block, where, None)
        return LinearMap() if flag(where, block, "replace_with_linear") else None
    if block.get("mamba") is not None:
        return _mamba(block, where)
    heads = integer(MODEL, config, "num_attention_heads")
    group, kv_heads = sizes["n_heads_in_group"], sizes["num_key_value_heads"]
    window = sizes["window_length"]
    if config["model_type"] != "nemotron-nas":
        kv_heads = kv_heads or (None if group else optional_integer(MODEL, config, "num_key_value_heads"))
        window = window or global_window(config, index)
    if group is None and kv_heads is None:
        raise refuse(where, "n_heads_in_group", None, "a number (the attention is live)")
    if group is not None and heads % group:
        raise refuse(where, "n_heads_in_group", group, f"a divisor of the {heads} attention heads")
    if group is not None and kv_heads not in (None, heads // group):
        raise refuse(where, "num_key_value_heads", kv_heads, f"{heads // group}, as `n_heads_in_group` = {group} says")
    kv_heads = kv_heads if group is None else heads // group
    sinks = _read_sinks(block, where, window)
    attention: Attention = build_at(
        where,
        Attention,
        *(heads, kv_heads, head_dim_of(config), window),
        has_sinks=config["model_type"] in GPT_OSS,
        num_sink_tokens=sinks,
    )
    return attention


def _read_sinks(block: Json, where: str, window: int | None) -> int:
    """Sink tokens. Shifted ones are refused: what such a token sees depends on how its neighbours were batched
    (DeciLM prefills them without the window and decodes with re-rotated keys), which no server can reproduce.
    """
    is_unshifted, has_prefill_window = (flag(where, block, key) for key in SINK_KEYS[1:])
    count = optional_integer(where, block, "num_sink_tokens")
    if count is None:
        return 0
    if window is None:
        raise refuse(where, "num_sink_tokens", count, "null, as there is no `window_length`")
    if not is_unshifted:
        raise refuse(where, "unshifted_sink", is_unshifted, "true, as `num_sink_tokens` is set")
    if has_prefill_window:
        raise refuse(where, SINK_KEYS[2], True, "false, as `unshifted_sink` is true")
    return count


def _mamba(block: Json, where: str) -> Mamba2:
    mamba = block["mamba"]
    if not isinstance(mamba, dict):
        raise refuse(where, "mamba", mamba, f"an object with {', '.join(MAMBA_KEYS)}")
    for key in (*ATTENTION_SIZES, "num_sink_tokens"):
        if block.get(key) is not None:
            raise refuse(where, key, block[key], "null, as `mamba` is set")
    known_keys(f"{where}, mamba", mamba, MAMBA_KEYS)
    state, heads, head_dim, groups = (integer(f"{where}, mamba", mamba, key) for key in MAMBA_KEYS)
    return Mamba2(heads, head_dim, state, groups, CONV_KERNEL)


def _ffn(config: Json, block: Json, where: str) -> FFNKind:
    known_keys(where, block, FFN_SIZES + FLAGS + OTHER + UNSUPPORTED + ("gated", "moe"))
    width, mult = optional_integer(where, block, "intermediate_size"), optional_number(where, block, "ffn_mult")
    if _is_replaced(block, where, (*FFN_SIZES, "moe")):
        flag(where, block, "gated")
        return LinearMap() if flag(where, block, "replace_with_linear") else None
    if block.get("moe") is not None:
        return _moe(config, block, where)
    if block.get("gated") is not None and not flag(where, block, "gated"):
        raise refuse(where, "gated", block["gated"], "true")
    if text(where, block, "hidden_act", "silu") != "silu":
        raise refuse(where, "hidden_act", block["hidden_act"], "'silu'")
    if config["model_type"] in FAMILY_MOE_KEYS:
        raise refuse(where, "moe", None, "the experts' sizes (the family has no other FFN)")
    if mult is None:
        if config["model_type"] != "nemotron-nas":
            width = width or optional_integer(MODEL, config, "intermediate_size")
        if width is None:
            raise refuse(where, "ffn_mult", None, "a number (the FFN is live)")
        ffn: GatedFFN = build_at(where, GatedFFN, width)
        return ffn
    from_mult = ffn_mult_to_width(mult, integer(MODEL, config, "hidden_size"))
    if width not in (None, from_mult):
        raise refuse(where, "intermediate_size", width, f"{from_mult}, as `ffn_mult` = {mult} says")
    ffn = build_at(where, GatedFFN, from_mult)
    return ffn


def _moe(config: Json, block: Json, where: str) -> MoE:
    """DeciLM's experts: a shared one, and routed ones whose input is scaled by the sigmoid of the router's logit.
    puzzletron v1 describes a family's experts by the same keys; the family has its own routing and no shared one.
    """
    moe, is_deci = block["moe"], config["model_type"] == "nemotron-nas"
    if not isinstance(moe, dict) or not (is_deci or config["model_type"] in FAMILY_MOE_KEYS):
        raise refuse(where, "moe", moe, f"an object with {', '.join(MOE_KEYS)}, on a family with experts")
    for key in FFN_SIZES:
        if block.get(key) is not None:
            raise refuse(where, key, block[key], "null, as `moe` is set")
    where = f"{where}, moe"
    known_keys(where, moe, MOE_KEYS)
    num_experts, top = (integer(where, moe, key, MAX_EXPERTS) for key in MOE_KEYS[:2])
    width, shared = integer(where, moe, MOE_KEYS[2]), 0
    if is_deci:
        shared = integer(where, moe, MOE_KEYS[3])
    elif moe.get(MOE_KEYS[3]) not in (None, 0):
        raise refuse(where, MOE_KEYS[3], moe[MOE_KEYS[3]], "0, as the family has no shared expert")
    routing = "sigmoid_on_input" if is_deci else family_routing(config)
    built: MoE = build_at(where, MoE, num_experts, top, width, shared_intermediate_size=shared, routing=routing)
    return built


def _is_replaced(block: Json, where: str, sizes: tuple[str, ...]) -> bool:
    """Whether the sub-block is a no-op or a linear map; sizes beside either, or both at once, contradict it."""
    for key in UNSUPPORTED:
        if block.get(key) not in (None, [], {}, False):
            raise refuse(where, key, block[key], "null (not supported)")
    kinds = [key for key in FLAGS if flag(where, block, key)]
    if len(kinds) == 2:
        raise refuse(where, "replace_with_linear", True, "false, as `no_op` is true")
    if kinds:
        for key in sizes:
            if block.get(key) is not None:
                raise refuse(where, key, block[key], f"null, as `{kinds[0]}` is true")
    return bool(kinds)
