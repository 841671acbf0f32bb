"""NemotronH (Nano v2, Nemotron 3, Puzzle-75B): reading the configuration, and the tensors it implies.

vLLM's own class serves this family; `inspect` reads it. A layer holds one mixer: Mamba-2, attention, MLP or MoE. The
order is spelled as a pattern string (`hybrid_override_pattern`, "M-M*E"), as a list (`layers_block_type`), or in
Puzzle-75B as `block_configs`, whose entries carry their own sizes. Multi-token-prediction layers are not counted.
Standard library only.
"""

from __future__ import annotations

from itertools import zip_longest
from typing import Any

from vllm_puzzle.model_configs.json_values import (
    Json,
    flag,
    integer,
    known_keys,
    optional_integer,
    refuse,
    strings,
    text,
)
from vllm_puzzle.model_configs.per_layer import build_at
from vllm_puzzle.model_configs.schema import (
    MAX_EXPERTS,
    MAX_LAYERS,
    Attention,
    ConfigError,
    LayerRecord,
    Mamba2,
    ModelRecord,
    MoE,
    PlainFFN,
    Shape,
)

SYMBOLS = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
# What an entry of `block_configs` may state (NVIDIA's configuration_nemotron_h_puzzle.py); the rest is the model's.
BLOCK_KEYS = {
    "mamba": ("ssm_state_size",),
    "attention": ("sliding_window",),
    "mlp": ("intermediate_size",),
    "moe": (
        "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "moe_shared_expert_intermediate_size",
        "moe_latent_size", "routed_scaling_factor", "n_group", "topk_group", "norm_topk_prob",
    ),
}  # fmt: skip
# transformers 5 renames two of them.
KINDS = {"linear_attention": "mamba", "full_attention": "attention"} | {kind: kind for kind in SYMBOLS.values()}


def read_layers(config: Json) -> tuple[LayerRecord, ...]:
    """One record per layer, from whichever of the three spellings the configuration has."""
    blocks = _blocks(config)
    stated = optional_integer("model", config, "num_hidden_layers", MAX_LAYERS)
    if stated not in (None, len(blocks)) or not 1 <= len(blocks) <= MAX_LAYERS:
        raise refuse("model", "num_hidden_layers", stated, f"{len(blocks)}, the layers that are listed")
    return tuple(_layer({**config, **block}, kind, f"layer {i}") for i, (kind, block) in enumerate(blocks))


def layer_tensors(model: ModelRecord, layer: LayerRecord) -> dict[str, Shape]:
    """Tensors of one layer, relative to the layer (`norm.weight`, `mixer.*`)."""
    hidden = model.hidden_size
    tensors: dict[str, Shape] = {"norm.weight": (hidden,)}
    if isinstance(layer.attention, Mamba2):
        return tensors | {f"mixer.{name}": shape for name, shape in mamba_tensors(hidden, layer.attention).items()}
    if isinstance(layer.attention, Attention):
        sizes = {"q": layer.attention.q_size, "k": layer.attention.kv_size, "v": layer.attention.kv_size}
        tensors |= {f"mixer.{name}_proj.weight": (size, hidden) for name, size in sizes.items()}
        return tensors | {"mixer.o_proj.weight": (hidden, layer.attention.q_size)}
    if isinstance(layer.ffn, PlainFFN):
        return tensors | _plain("mixer", hidden, layer.ffn.intermediate_size)
    assert isinstance(layer.ffn, MoE), "read_layers builds nothing else"
    return tensors | _moe_tensors(hidden, layer.ffn)


def mamba_tensors(hidden: int, mamba: Mamba2) -> dict[str, Shape]:
    """Tensors of one Mamba-2 mixer (Megatron's and Hugging Face's names agree)."""
    inner = mamba.num_heads * mamba.head_dim
    conv = inner + 2 * mamba.num_groups * mamba.state_size
    return {
        "in_proj.weight": (inner + conv + mamba.num_heads, hidden),
        "conv1d.weight": (conv, 1, mamba.conv_kernel),
        "conv1d.bias": (conv,),
        "A_log": (mamba.num_heads,),
        "D": (mamba.num_heads,),
        "dt_bias": (mamba.num_heads,),
        "norm.weight": (inner,),
        "out_proj.weight": (hidden, inner),
    }


def _moe_tensors(hidden: int, moe: MoE) -> dict[str, Shape]:
    tensors: dict[str, Shape] = {
        "mixer.gate.weight": (moe.num_experts, hidden),
        "mixer.gate.e_score_correction_bias": (moe.num_experts,),
    }
    inside = moe.latent_size or hidden
    if moe.latent_size:
        tensors |= {"mixer.fc1_latent_proj.weight": (inside, hidden), "mixer.fc2_latent_proj.weight": (hidden, inside)}
    for expert in range(moe.num_experts):
        tensors |= _plain(f"mixer.experts.{expert}", inside, moe.intermediate_size)
    if moe.shared_intermediate_size:
        tensors |= _plain("mixer.shared_experts", hidden, moe.shared_intermediate_size)
    return tensors


def _plain(prefix: str, hidden: int, width: int) -> dict[str, Shape]:
    return {f"{prefix}.up_proj.weight": (width, hidden), f"{prefix}.down_proj.weight": (hidden, width)}


def _blocks(config: Json) -> list[tuple[str, Json]]:
    """(kind, the entry's own sizes) per layer."""
    if config.get("block_configs") is not None:
        check_same_kinds(config, config["block_configs"])
        return checked_blocks(config["block_configs"], "layer")
    kinds = _listed_kinds(config)
    if not kinds:
        raise refuse("model", "hybrid_override_pattern", None, "a pattern, or `layers_block_type`, or `block_configs`")
    return [(kind, {}) for kind in kinds]


def _listed_kinds(config: Json) -> list[str]:
    names = strings("model", config, "layers_block_type")
    if not names:
        pattern = text("model", config, "hybrid_override_pattern", "")
        names = [SYMBOLS.get(symbol, symbol) for symbol in pattern]
    return [_kind(name, f"layer {index}") for index, name in enumerate(names)]


def check_same_kinds(config: Json, entries: Any) -> None:
    """Refuse a list or a pattern beside `block_configs` that says something else."""
    listed, kinds = _listed_kinds(config), [kind for kind, _ in checked_blocks(entries, "layer")]
    for index, (found, kind) in enumerate(zip_longest(listed, kinds)):
        if listed and found != kind:
            raise refuse(f"layer {index}", "layers_block_type", found, f"{kind}, as in `block_configs`")


def checked_blocks(entries: Any, name: str) -> list[tuple[str, Json]]:
    """(kind, the sizes it states) of each entry of `block_configs`, or of `mtp_block_configs` (`name` says which)."""
    if not isinstance(entries, list | tuple) or not all(isinstance(entry, dict) for entry in entries):
        raise refuse("model", "block_configs", entries, "a list of objects")
    blocks: list[tuple[str, Json]] = []
    for index, entry in enumerate(entries):
        kind = _kind(entry.get("block_type"), f"{name} {index}")
        known_keys(f"{name} {index}, {kind}", entry, ("block_type", *BLOCK_KEYS[kind]))
        blocks.append((kind, {key: value for key, value in entry.items() if value is not None}))
    return blocks


def block_types(entries: Any, name: str) -> list[str]:
    """The kinds of Puzzle-75B's blocks in transformers' words."""
    names = {"mamba": "linear_attention", "attention": "full_attention"}
    return [names.get(kind, kind) for kind, _ in checked_blocks(entries, name)]


def shared_state_size(entries: Any, usual: int) -> int:
    """The one `ssm_state_size` of all Mamba layers: vLLM's class has it from the model, so another one is refused."""
    states = {
        index: block.get("ssm_state_size", usual)
        for index, (kind, block) in enumerate(checked_blocks(entries, "layer"))
        if kind == "mamba"
    }
    first: int = next(iter(states.values()), usual)
    for index, state in states.items():
        if state != first:
            raise refuse(f"layer {index}, mamba", "ssm_state_size", state, f"{first}, as before (vLLM has one for all)")
    return first


def _kind(name: Any, where: str) -> str:
    if not isinstance(name, str) or name not in KINDS:
        raise ConfigError(f"{where}: found block type {name!r}, allowed: {', '.join(SYMBOLS.values())}")
    return KINDS[name]


def _layer(config: Json, kind: str, where: str) -> LayerRecord:
    for key in ("use_bias", "mlp_bias", "mamba_proj_bias", "attention_bias"):
        if flag("model", config, key):
            raise refuse("model", key, True, "false (no published model has it)")
    if kind == "mamba":
        return LayerRecord(_mamba(config, where), None)
    if kind == "attention":
        heads, kv_heads = (integer(where, config, f"num_{key}_heads") for key in ("attention", "key_value"))
        window = optional_integer(where, config, "sliding_window")
        return LayerRecord(
            build_at(where, Attention, heads, kv_heads, integer(where, config, "head_dim"), window), None
        )
    if kind == "mlp":
        return LayerRecord(None, PlainFFN(integer(where, config, "intermediate_size")))
    num_shared = optional_integer(where, config, "n_shared_experts") or 1
    shared = optional_integer(where, config, "moe_shared_expert_intermediate_size") or 0
    moe = build_at(
        where,
        MoE,
        integer(where, config, "n_routed_experts", MAX_EXPERTS),
        integer(where, config, "num_experts_per_tok", MAX_EXPERTS),
        integer(where, config, "moe_intermediate_size"),
        shared_intermediate_size=num_shared * shared,
        latent_size=optional_integer(where, config, "moe_latent_size"),
    )
    return LayerRecord(None, moe)


def _mamba(config: Json, where: str) -> Mamba2:
    """Some exports write `mamba_state_dim` and `mamba_num_groups` for `ssm_state_size` and `n_groups`."""
    state = optional_integer(where, config, "ssm_state_size") or integer(where, config, "mamba_state_dim")
    groups = optional_integer(where, config, "n_groups") or integer(where, config, "mamba_num_groups")
    heads, head_dim = (integer(where, config, key) for key in ("mamba_num_heads", "mamba_head_dim"))
    return Mamba2(heads, head_dim, state, groups, integer(where, config, "conv_kernel"))
