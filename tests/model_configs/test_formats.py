"""Published configurations become the right records; anything not understood is refused with its place."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from vllm_puzzle.model_configs.decilm import ffn_mult_to_width
from vllm_puzzle.model_configs.formats import read_model
from vllm_puzzle.model_configs.schema import Attention, ConfigError, GatedFFN, LayerRecord, LinearMap, MoE
from vllm_puzzle.model_configs.tensors import kv_bytes_per_token, num_parameters

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}


def attention_block(**changes: Any) -> dict[str, Any]:
    """DeciLM's attention entry with all published keys, live with 2 query heads per KV head."""
    block = {
        "n_heads_in_group": 2,
        "no_op": False,
        "num_sink_tokens": None,
        "replace_with_linear": False,
        "sparsify": None,
        "unshifted_sink": False,
        "use_prefill_window_in_sink_attention": False,
        "window_length": None,
    }
    return block | changes


def ffn_block(**changes: Any) -> dict[str, Any]:
    return {"ffn_mult": 3.0, "no_op": False, "replace_with_linear": False, "sparsify": None} | changes


def deci(*blocks: dict[str, Any]) -> dict[str, Any]:
    base = {key: value for key, value in LLAMA.items() if key not in ("intermediate_size", "num_key_value_heads")}
    return base | {
        "architectures": ["DeciLMForCausalLM"],
        "model_type": "nemotron-nas",
        "num_hidden_layers": len(blocks),
        "block_configs": list(blocks),
    }


def block(attention: dict[str, Any] | None = None, ffn: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"attention": attention or attention_block(), "ffn": ffn or ffn_block()}


def test_a_homogeneous_llama_has_equal_layers() -> None:
    record = read_model(LLAMA)
    assert record.layers == (LayerRecord(Attention(4, 2, 16), GatedFFN(96)),) * 3
    assert not record.is_heterogeneous


def test_skip_and_sparse_overrides_reach_their_layers_only() -> None:
    overrides = {"01": {"skip": ["attention"]}, "2": {"num_key_value_heads": 1, "skip": ["mlp"]}}
    record = read_model(LLAMA | {"per_layer_config": overrides})
    assert record.layers[0] == LayerRecord(Attention(4, 2, 16), GatedFFN(96))
    assert record.layers[1] == LayerRecord(None, GatedFFN(96))
    assert record.layers[2] == LayerRecord(Attention(4, 1, 16), None)
    assert record.is_heterogeneous


def test_a_layers_own_window_wins_over_the_global_one() -> None:
    config = LLAMA | {
        "sliding_window": 8,
        "per_layer_config": {"1": {"sliding_window": None}, "2": {"sliding_window": 4}},
    }
    windows = [layer.attention.sliding_window for layer in read_model(config).layers]  # type: ignore[union-attr]
    assert windows == [8, None, 4]


def test_deci_blocks_of_every_kind_are_read() -> None:
    linear_attention = attention_block(n_heads_in_group=None, replace_with_linear=True)
    no_attention = attention_block(n_heads_in_group=None, no_op=True)
    linear_ffn, no_ffn = ffn_block(ffn_mult=None, replace_with_linear=True), ffn_block(ffn_mult=None, no_op=True)
    record = read_model(
        deci(
            block(attention_block(n_heads_in_group=4, window_length=32)),
            block(linear_attention, linear_ffn),
            block(no_attention, ffn_block(ffn_mult=None, intermediate_size=40)),
            block(ffn=no_ffn),
        )
    )
    assert record.layers == (
        LayerRecord(Attention(4, 1, 16, sliding_window=32), GatedFFN(256)),
        LayerRecord(LinearMap(), LinearMap()),
        LayerRecord(None, GatedFFN(40)),
        LayerRecord(Attention(4, 2, 16), None),
    )


@pytest.mark.parametrize(
    ("ffn_mult", "hidden", "width"),
    [(5.25, 8192, 28672), (0.5, 8192, 2816), (1.3125, 8192, 7168), (1.0, 8192, 5632), (39.0, 16384, 425984)],
)
def test_ffn_mult_gives_the_published_widths(ffn_mult: float, hidden: int, width: int) -> None:
    assert ffn_mult_to_width(ffn_mult, hidden) == width


@pytest.mark.parametrize(
    ("name", "parameters", "attention_layers", "kv_bytes"),
    [
        ("llama-3.3-nemotron-super-49b-v1.json", 49_867_145_216, 49, 200_704),
        ("llama-3.1-nemotron-ultra-253b-v1.json", 253_401_268_224, 64, 262_144),
        ("gpt-oss-20b.json", 20_914_757_184, 24, 49_152),
        ("gpt-oss-120b.json", 116_829_156_672, 36, 73_728),
        ("gpt-oss-puzzle-88b.json", 88_150_438_080, 36, 73_728),
        ("nemotron-3-nano-30b-a3b.json", 31_577_940_288, 6, 6_144),
        ("nemotron-3-super-120b-a12b-fp8.json", 120_668_707_840, 8, 8_192),
        ("nemotron-3-ultra-550b-a55b.json", 549_308_993_536, 12, 12_288),
        ("nemotron-3.5-lightning-30b-a3b-nvfp4.json", 31_577_940_288, 6, 6_144),
        ("llama-3.3-70b-instruct.json", 70_553_706_496, 80, 327_680),
        ("qwen3-30b-a3b-thinking-2507.json", 30_532_122_624, 48, 98_304),
    ],
)
def test_the_published_configurations_have_their_published_sizes(
    root: Path, name: str, parameters: int, attention_layers: int, kv_bytes: int
) -> None:
    record = read_model(json.loads((root / "model_configs" / "published" / name).read_text()))
    assert num_parameters(record) == parameters
    assert sum(isinstance(layer.attention, Attention) for layer in record.layers) == attention_layers
    assert kv_bytes_per_token(record) == kv_bytes


def test_gpt_oss_puzzle_has_its_published_windows_and_expert_counts(root: Path) -> None:
    file = root / "model_configs" / "published" / "gpt-oss-puzzle-88b.json"
    layers = read_model(json.loads(file.read_text())).layers
    windows = [layer.attention.sliding_window for layer in layers if isinstance(layer.attention, Attention)]
    assert [windows.count(window) for window in (None, 128, 8192)] == [10, 18, 8]
    assert [sum(layer.ffn.num_experts == count for layer in layers) for count in (128, 64)] == [18, 18]  # type: ignore[union-attr]


NEMOTRON_H: dict[str, Any] = {
    "architectures": ["NemotronHForCausalLM"],
    "model_type": "nemotron_h",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "norm_eps": 1e-5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "ssm_state_size": 32,
    "n_groups": 2,
    "conv_kernel": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 40,
    "moe_shared_expert_intermediate_size": 80,
}


def test_nemotron_h_reads_pattern_list_and_block_spellings_alike() -> None:
    by_pattern = read_model(NEMOTRON_H | {"hybrid_override_pattern": "M-*E"})
    by_list = read_model(NEMOTRON_H | {"layers_block_type": ["mamba", "mlp", "full_attention", "moe"]})
    kinds = [{"block_type": kind} for kind in ("mamba", "mlp", "attention", "moe")]
    by_blocks = read_model(NEMOTRON_H | {"model_type": "nemotron_h_puzzle", "block_configs": kinds})
    assert by_pattern.layers == by_list.layers == by_blocks.layers
    own_sizes = read_model(NEMOTRON_H | {"block_configs": [{"block_type": "moe", "num_experts_per_tok": 5}]})
    assert own_sizes.layers[0].ffn == MoE(8, 5, 40, shared_intermediate_size=80)


def test_qwen3_moe_layers_have_experts() -> None:
    config = LLAMA | {
        "model_type": "qwen3_moe",
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    }
    record = read_model(config | {"mlp_only_layers": [1]})
    experts = MoE(8, 2, 32, routing="softmax")
    assert [layer.ffn for layer in record.layers] == [experts, GatedFFN(96), experts]
    assert read_model(config | {"norm_topk_prob": True}).layers[0].ffn == MoE(8, 2, 32, routing="renormalize")
    assert record.qk_norm


def test_puzzletron_v1_blocks_inherit_what_they_leave_null() -> None:
    newer = {"no_op": False, "replace_with_linear": False, "num_key_value_heads": None, "mamba": None, "llama4": None}
    ffn = {"no_op": False, "replace_with_linear": False, "intermediate_size": None, "moe": None}
    blocks = [
        block(newer, ffn),
        block(newer | {"num_key_value_heads": 1}, ffn | {"intermediate_size": 40}),
        block(newer | {"no_op": True}, ffn | {"replace_with_linear": True}),
    ]
    assert read_model(LLAMA | {"block_configs": blocks}).layers == (
        LayerRecord(Attention(4, 2, 16), GatedFFN(96)),
        LayerRecord(Attention(4, 1, 16), GatedFFN(40)),
        LayerRecord(None, LinearMap()),
    )


def test_any_model_is_read_by_its_base_architecture() -> None:
    any_model = LLAMA | {"architectures": ["AnyModel"], "base_architecture": "LlamaForCausalLM"}
    record = read_model(any_model | {"per_layer_config": {"1": {"skip": ["mlp"]}}})
    assert record.layers[1] == LayerRecord(Attention(4, 2, 16), None)


def test_a_family_that_is_silent_on_its_head_size_or_window_gets_its_own_default() -> None:
    assert read_model(LLAMA | {"model_type": "qwen3"}).layers[0].attention == Attention(4, 2, 128)
    assert read_model(LLAMA | {"model_type": "mistral"}).layers[0].attention == Attention(4, 2, 16, 4096)
    assert read_model(LLAMA | {"model_type": "mistral", "sliding_window": None}).layers[0].attention == Attention(
        4, 2, 16
    )


def test_a_layer_with_other_heads_keeps_the_models_head_size() -> None:
    record = read_model(LLAMA | {"per_layer_config": {"1": {"num_attention_heads": 2}}})
    assert record.layers[1] == LayerRecord(Attention(2, 2, 16), GatedFFN(96))


def test_a_yarn_model_that_does_not_say_was_trained_at_its_full_length() -> None:
    rope = read_model(LLAMA | {"rope_scaling": {"type": "yarn", "factor": 2.0}}).rope
    assert (rope.rope_type, rope.original_max_position_embeddings) == ("yarn", 128)


BAD = [
    (
        NEMOTRON_H | {"hybrid_override_pattern": "MX"},
        "layer 1: found block type 'X', allowed: mamba, attention, mlp, moe",
    ),
    (NEMOTRON_H, "key `hybrid_override_pattern`: found nothing, allowed: a pattern, or `layers_block_type`"),
    (
        NEMOTRON_H | {"hybrid_override_pattern": "M", "num_hidden_layers": 2},
        "key `num_hidden_layers`: found 2, allowed: 1",
    ),
    (
        LLAMA | {"architectures": ["AnyModel"]},
        "key `base_architecture`: found nothing, allowed: LlamaForCausalLM for model_type",
    ),
    (
        LLAMA | {"architectures": ["AnyModel"], "base_architecture": "Qwen3ForCausalLM"},
        "found 'Qwen3ForCausalLM', allowed: Llama",
    ),
    (
        LLAMA | {"block_configs": [], "per_layer_config": {"0": {}}},
        "key `block_configs`: found 0 entries, allowed: num_hidden_layers = 3",
    ),
    (deci(block()) | {"per_layer_config": {"0": {}}}, "key `per_layer_config`: found on nemotron-nas"),
    (LLAMA | {"model_type": "gpt2"}, "key `model_type`: found 'gpt2', allowed: nemotron-nas, llama"),
    (
        LLAMA | {"num_key_value_heads": 3},
        "layer 0, attention, key `num_key_value_heads`: found 3, allowed: a divisor of the 4",
    ),
    (LLAMA | {"hidden_size": 66}, "model, key `hidden_size`: found 66, allowed: a multiple of the 4"),
    (LLAMA | {"intermediate_size": 0}, "layer 0, ffn, key `intermediate_size`: found 0"),
    (LLAMA | {"per_layer_config": {"7": {}}}, "key `per_layer_config`: found layer '7', allowed: 0 to 2"),
    (LLAMA | {"per_layer_config": {"1": {"skip": ["norm"]}}}, "layer 1, per_layer_config, key `skip`: found 'norm'"),
    (
        LLAMA | {"per_layer_config": {"1": {"n_embd": 3}}},
        "layer 1, per_layer_config, key `n_embd`: found an unknown key",
    ),
    (
        LLAMA | {"per_layer_config": {"1": {"num_key_value_heads": None}}},
        "layer 1, per_layer_config, key `num_key_value_heads`: found nothing, allowed: a value, or no such key",
    ),
    (
        LLAMA | {"rope_scaling": {"rope_type": "linear", "factor": 0.5}},
        "rope, key `factor`: found 0.5, allowed: a number from 1",
    ),
    (
        LLAMA | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 1.0, "beta_slow": 2.0}},
        "rope, key `beta_fast`: found 1.0, allowed: more than beta_slow = 2.0",
    ),
    (LLAMA | {"hidden_act": "gelu"}, "key `hidden_act`: found 'gelu', allowed: 'silu'"),
    ({k: v for k, v in LLAMA.items() if k != "vocab_size"}, "key `vocab_size`: found nothing"),
    (deci(block()) | {"num_hidden_layers": 2}, "key `block_configs`: found 1 entries, allowed: num_hidden_layers = 2"),
    (deci(block(attention_block(n_heads_in_group=3))), "layer 0, attention, key `n_heads_in_group`: found 3"),
    (deci(block(attention_block(n_heads_in_group=None))), "layer 0, attention, key `n_heads_in_group`: found nothing"),
    (deci(block(), block(attention_block(num_sink_tokens=4))), "layer 1, attention, key `num_sink_tokens`: found 4"),
    (deci(block(attention_block(windowlength=4))), "layer 0, attention, key `windowlength`: found an unknown key"),
    (deci(block(ffn=ffn_block(ffn_mult=None))), "layer 0, ffn, key `ffn_mult`: found nothing"),
    (deci(block(ffn=ffn_block(ffn_mult="wide"))), "layer 0, ffn, key `ffn_mult`: found 'wide'"),
    (
        deci(block(ffn=ffn_block(intermediate_size=100))),
        "layer 0, ffn, key `intermediate_size`: found 100, allowed: 256",
    ),
    (deci(block(ffn=ffn_block(moe=[4]))), "layer 0, ffn, key `moe`: found [4]"),
    (deci(block(ffn=ffn_block(ffn_mult=None, moe={"x": 4}))), "layer 0, ffn, moe, key `x`: found an unknown key"),
    (deci({"attention": attention_block(), "mlp": {}}), "layer 0, key `mlp`: found an unknown key"),
    (
        deci(block(attention_block(no_op=True))),
        "layer 0, attention, key `n_heads_in_group`: found 2, allowed: null, as `no_op`",
    ),
    (deci(block(ffn=ffn_block(no_op="yes"))), "layer 0, ffn, key `no_op`: found 'yes', allowed: true, false"),
    (
        deci(block(ffn=ffn_block(ffn_mult=None, no_op=True, replace_with_linear=True))),
        "found True, allowed: false, as `no_op`",
    ),
    (deci({"attention": attention_block()}), "layer 0, key `ffn`: found nothing, allowed: an object"),
    (LLAMA | {"rope_scaling": {"rope_type": "yarn"}}, "rope, key `factor`: found nothing, allowed: a number above 0"),
    (
        LLAMA | {"rope_scaling": {"rope_type": "spiral"}},
        "rope, key `rope_type`: found 'spiral', allowed: default, linear",
    ),
    (
        LLAMA | {"rope_scaling": {"type": "linear", "rope_type": "dynamic", "factor": 2.0}},
        "rope, key `type`: found 'linear'",
    ),
    (LLAMA | {"rope_parameters": {"mrope_section": [1]}}, "rope, key `mrope_section`: found an unknown key"),
    (
        LLAMA | {"rope_scaling": {"type": "default"}, "rope_parameters": {"rope_theta": 2.0}},
        "key `rope_scaling`: found beside another `rope_parameters`",
    ),
    (
        LLAMA | {"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 1}},
        "rope, key `high_freq_factor`: found 1.0, allowed: more than low_freq_factor",
    ),
    (LLAMA | {"rope_theta": []}, "rope, key `rope_theta`: found []"),
    (LLAMA | {"rope_theta": 1}, "rope, key `rope_theta`: found 1.0, allowed: a number above 1"),
    (LLAMA | {"original_max_position_embeddings": 64}, "found 64, allowed: None, as under `rope_scaling`"),
    (LLAMA | {"partial_rotary_factor": 0.5}, "model, key `partial_rotary_factor`: found 0.5, allowed: 1.0"),
    (LLAMA | {"position_embedding_type": "none"}, "key `position_embedding_type`: found 'none', allowed: None or rope"),
    (LLAMA | {"logit_scale": 0.25}, "model, key `logit_scale`: found 0.25, allowed: None or 1"),
    (LLAMA | {"num_experts": 4}, "model, key `num_experts`: found 4, allowed: None or 0"),
    (LLAMA | {"torch_dtype": "float8"}, "model, key `torch_dtype`: found 'float8', allowed: bfloat16"),
    (LLAMA | {"auto_map": 1.5}, "model, key `auto_map`: found 1.5, allowed: an object"),
    (LLAMA | {"hidden_act": ""}, "model, key `hidden_act`: found '', allowed: a string"),
    (
        LLAMA | {"model_type": "qwen3_moe", "num_experts": 8, "num_local_experts": 4},
        "model, key `num_experts`: found 8, allowed: as `num_local_experts`",
    ),
    (deci(block(attention_block(window_length=0))), "layer 0, attention, key `window_length`: found 0"),
]


@pytest.mark.parametrize(("config", "message"), BAD, ids=[message[:60] for _, message in BAD])
def test_a_bad_configuration_is_refused_in_one_line_with_its_place(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_model(config)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "allowed:" in str(caught.value)


def test_reading_leaves_the_configuration_untouched() -> None:
    config = deci(block(), block())
    before = copy.deepcopy(config)
    read_model(config)
    assert config == before
