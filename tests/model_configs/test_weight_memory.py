"""Bytes of weights: published loads, by hand on odd models, the exact table of a quantized checkpoint, ranks."""

from __future__ import annotations

from math import ceil, prod

import pytest
from vllm_puzzle.model_configs.catalogue import find
from vllm_puzzle.model_configs.ffn_fusion import Fusion, fuse, plan_fusion
from vllm_puzzle.model_configs.gpus import GIB, GPUS
from vllm_puzzle.model_configs.quantization import Quantization, stored_tensors
from vllm_puzzle.model_configs.quantization_formats import read_quantization
from vllm_puzzle.model_configs.schema import (
    Attention,
    ConfigError,
    GatedFFN,
    LayerRecord,
    LinearMap,
    Mamba2,
    ModelRecord,
    MoE,
    Rope,
)
from vllm_puzzle.model_configs.tensors import num_parameters
from vllm_puzzle.model_configs.weight_memory import expert_multiples, weight_bytes, weight_parts

GB = 10**9


def published(name: str) -> ModelRecord:
    return find(name).record()


def model(*layers: LayerRecord, hidden: int = 24, vocab: int = 51, family: str = "llama") -> ModelRecord:
    return ModelRecord(family, "AnyModel", vocab, hidden, layers, 1024, 1e-5, Rope())


LLAMA_70B = published("llama-3.3-70b-instruct")


@pytest.mark.parametrize(
    ("record", "weights", "unit", "expected", "digit"),
    [
        # papers' derived figures, to the digit they have
        (published("llama-3.3-nemotron-super-49b-v1"), "fp8", GB, 52.0, 0.1),
        (LLAMA_70B, "fp8", GB, 72.7, 0.1),
        (published("gpt-oss-120b"), "mxfp4", GIB, 60.77, 0.01),
        (published("gpt-oss-puzzle-88b"), "mxfp4", GIB, 46.56, 0.01),
        # a load that vLLM reports: besides the digit, up to 2 MiB per tensor that torch's allocator rounds (52 layers)
        (published("nemotron-3-nano-30b-a3b"), "bf16", GIB, 58.9, 0.1),
    ],
)
def test_weights_have_the_published_size(
    record: ModelRecord, weights: str, unit: int, expected: float, digit: float
) -> None:
    assert abs(weight_bytes(record, weights) / unit - expected) <= digit


def test_experts_padded_by_a_kernel_have_the_size_that_was_loaded() -> None:
    # gpt-oss-puzzle with Marlin's padding, 2880 to 3072 and 2944: 50.71 GiB, some of it workspace: hence 1 %.
    puzzle = published("gpt-oss-puzzle-88b")
    padded = weight_bytes(puzzle, "mxfp4", multiples=GPUS["A100-80"].mxfp4_multiples)
    assert padded / GIB == pytest.approx(50.71, rel=0.01)
    # Nemotron 3 Nano in FP8 with FlashInfer's, 1856 to 1920: 31.4 GiB, to its digit.
    nano = published("nemotron-3-nano-30b-a3b")
    multiples = expert_multiples(nano, "fp8", (1, 1))
    assert multiples == (1, 128)
    assert abs(weight_bytes(nano, "fp8", multiples=multiples) / GIB - 31.4) <= 0.1
    # Hopper's MXFP4 kernels leave both sizes: 120b loads what its checkpoint has, 60.77 GiB.
    big = published("gpt-oss-120b")
    assert weight_bytes(big, "mxfp4", multiples=GPUS["H100-80"].mxfp4_multiples) == weight_bytes(big, "mxfp4")


ODD = model(
    LayerRecord(Attention(6, 2, 8), GatedFFN(40)),
    LayerRecord(None, GatedFFN(56)),
    LayerRecord(LinearMap(), None),
    LayerRecord(None, None),
)
TRUNK_BYTES = 2 * (2 * 51 * 24 + 24)  # embedding, output matrix, final norm
# q 48, k and v 16 each, o: 24 x (48 + 16 + 16 + 48); two FFNs; one linear map. Norms: 2 + 1 + 1 of 24.
MATRICES = {"attention": 24 * 128, "FFN": 3 * 24 * (40 + 56), "linear maps": 24 * 24}
NORM_BYTES = 2 * 4 * 24


def test_an_odd_dense_model_weighs_what_a_hand_computes() -> None:
    total = sum(MATRICES.values())
    assert weight_bytes(ODD, "bf16") == TRUNK_BYTES + NORM_BYTES + 2 * total == 2 * num_parameters(ODD)
    # 11 matrices, each with a weight scale and an input scale in float32
    assert weight_bytes(ODD, "fp8") == TRUNK_BYTES + NORM_BYTES + total + 11 * 8
    # half a byte, a one-byte scale per 16 columns (24 → 2, 40 → 3, 56 → 4, 48 → 3), two float32 scalars per matrix
    columns = [(48, 2), (16, 2), (16, 2), (24, 3), (40, 2), (40, 2), (24, 3), (56, 2), (56, 2), (24, 4), (24, 2)]
    scales = sum(rows * groups for rows, groups in columns)
    assert weight_bytes(ODD, "nvfp4") == TRUNK_BYTES + NORM_BYTES + total // 2 + scales + 11 * 8


def test_the_parts_hold_every_parameter_once() -> None:
    for record, weights in ((ODD, "bf16"), (published("gpt-oss-20b"), "mxfp4"), (LLAMA_70B, "nvfp4")):
        parts = weight_parts(record, weights)
        assert sum(part.num_parameters for part in parts) == num_parameters(record)
    parts_by_name = {part.name: part for part in weight_parts(ODD, "bf16")}
    assert {name: part.num_layers for name, part in parts_by_name.items()} == {
        "embeddings": 0, "attention": 1, "FFN": 2, "linear maps": 1, "final norm": 0,
    }  # fmt: skip


def test_an_odd_gpt_oss_in_mxfp4_weighs_what_a_hand_computes() -> None:
    record = model(LayerRecord(Attention(2, 1, 8, has_sinks=True), MoE(5, 2, 64)), hidden=32, family="gpt_oss")
    trunk = 2 * (2 * 51 * 32 + 32)
    attention = 2 * (32 + 2) + 2 * (32 * (16 + 8 + 8 + 16) + 16 + 8 + 8 + 32)  # norm, sinks, four with biases
    router = 2 * (32 + 5 * 32 + 5)
    # 17 bytes per 32 values of a row: gate_up 128 rows of 32, down 32 rows of 64; biases bf16
    experts = 5 * (128 * 17 + 32 * 2 * 17) + 2 * 5 * (128 + 32)
    assert weight_bytes(record, "mxfp4") == trunk + attention + router + experts
    assert weight_bytes(record, "bf16") == 2 * num_parameters(record)


def test_ranks_of_gpt_oss_cut_the_experts_and_repeat_the_biases_that_are_added_after_the_sum() -> None:
    record = model(LayerRecord(Attention(4, 2, 8, has_sinks=True), MoE(5, 2, 64)), hidden=32, family="gpt_oss")
    by_name = {part.name: part.num_bytes for part in weight_parts(record, "bf16", tensor_parallel_size=2)}
    # gate_up 32 x 128 and down 64 x 32 by half, gate_up's 128 biases too, down's 32 whole
    assert by_name["experts"] == 5 * 2 * (32 * 64 + 32 * 32 + 64 + 32)


HYBRID = model(
    LayerRecord(Mamba2(4, 8, 16, 2, 4), None),
    LayerRecord(None, MoE(3, 2, 40, shared_intermediate_size=56, latent_size=16)),
    LayerRecord(Mamba2(4, 8, 16, 2, 4), None),
    LayerRecord(Attention(4, 2, 8), None),
    family="nemotron_h",
)


def test_nemotron_h_in_fp8_keeps_attention_the_mamba_before_it_and_the_latent_projections() -> None:
    bf16 = weight_bytes(HYBRID, "bf16")
    inner, state = 32, 2 * 2 * 16
    first_mamba = 24 * (2 * inner + state + 4) + inner * 24
    experts, shared = 3 * 2 * 16 * 40, 2 * 24 * 56
    saved = first_mamba + experts + shared
    num_matrices = 2 + 3 * 2 + 2
    assert weight_bytes(HYBRID, "fp8") == bf16 - saved + 8 * num_matrices
    # NVFP4: the routed experts alone go further down: 16 columns one scale, 40 columns three.
    nvfp4 = experts // 2 + 3 * (40 * 1 + 16 * 3)
    assert weight_bytes(HYBRID, "nvfp4") == weight_bytes(HYBRID, "fp8") - experts + nvfp4


def bytes_of_table(record: ModelRecord, quantization: Quantization) -> int:
    sizes, total = {"U8": 1, "F8_E4M3": 1}, 0
    for name, stored in stored_tensors(record, quantization).items():
        is_scale = name.endswith(("scale", "scale_2"))
        total += prod(stored.shapes[0]) * sizes.get(stored.dtypes[0], 4 if is_scale else 2)
    return total


@pytest.mark.parametrize("word", ["FP8", "NVFP4"])
def test_a_quantization_entry_gives_the_exact_bytes_of_its_table(word: str) -> None:
    record = published("llama-3.3-nemotron-super-49b-v1")
    entry = {"quant_method": "modelopt", "quant_algo": word, "ignore": ["lm_head", "model.layers.3.self_attn*"]}
    quantization = read_quantization(record, entry)
    assert quantization is not None
    found = weight_bytes(record, "bf16", quantization=quantization)
    assert found == bytes_of_table(record, quantization)
    # What the word means is the same list without layer 3's four matrices.
    attention = 8192 * (8192 + 2 * 1024 + 8192)
    share = 1 if word == "FP8" else 9 / 16
    assert found - weight_bytes(record, word.lower()) == attention * (2 - share) - 4 * 8


def test_a_quantization_entry_is_read_under_the_names_of_nemotron_h() -> None:
    entry = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head", "backbone.layers.0.mixer.in_proj"]}
    quantization = read_quantization(HYBRID, entry)
    assert quantization is not None
    found = weight_bytes(HYBRID, "fp8", quantization=quantization)
    assert found == bytes_of_table(HYBRID, quantization)
    everything = read_quantization(HYBRID, entry | {"ignore": []})
    assert everything is not None
    assert weight_bytes(HYBRID, "fp8", quantization=everything) == bytes_of_table(HYBRID, everything)
    # in_proj and the output matrix, one byte an entry less, two scales each
    saved = 24 * (2 * 32 + 64 + 4) + 51 * 24 - 2 * 8
    assert found - weight_bytes(HYBRID, "fp8", quantization=everything) == saved


def test_a_quantization_entry_is_read_for_each_parallel_block() -> None:
    blocks = tuple(LayerRecord(None, GatedFFN(width)) for width in (40, 56))
    record = model(LayerRecord(None, None, blocks), LayerRecord(Attention(6, 2, 8), None), family="nemotron-nas")
    entry = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head", "*parallel_blocks.1.mlp*"]}
    quantization = read_quantization(record, entry)
    assert quantization is not None
    found = weight_bytes(record, "fp8", quantization=quantization)
    assert found == bytes_of_table(record, quantization)
    assert found - weight_bytes(record, "fp8") == 3 * (24 * 56 - 8)


def test_ranks_hold_their_part_and_repeat_kv_heads_norms_and_routers() -> None:
    moe = MoE(4, 2, 40, shared_intermediate_size=0)
    record = model(LayerRecord(Attention(8, 2, 8), moe), hidden=32, vocab=50, family="qwen3_moe")
    router, norms = 2 * 4 * 32, 2 * 3 * 32
    heads, kv = 2 * 32 * 64 * 2, 2 * 32 * 16 * 2  # q and o; k and v
    experts = 2 * 4 * 3 * 32 * 40
    for tp in (1, 2, 4):
        vocab = 2 * 2 * ceil(50 / tp) * 32
        expected = vocab + norms + router + heads // tp + kv // min(tp, 2) + experts // tp
        assert weight_bytes(record, "bf16", tensor_parallel_size=tp) == expected


def test_ranks_of_a_mamba_mixer_repeat_the_groups_that_do_not_divide() -> None:
    by_name = {part.name: part.num_bytes for part in weight_parts(HYBRID, "bf16", tensor_parallel_size=4)}
    # 2 groups over 4 ranks become 4: each rank has one head of 8, one group of 16 for B and for C
    in_proj, out_proj = 24 * (2 * 8 + 2 * 16 + 1), 24 * 8
    conv = ceil(2 * (32 + 64) * 4 / 4)
    replicated = 2 * (24 + 32 + 3 * 4 + (32 + 64))  # norms, A_log, D, dt_bias, the convolution's bias
    assert by_name["Mamba"] == 2 * (2 * (in_proj + out_proj) + conv + replicated)


def test_ffn_fusion_changes_the_weights_by_the_norms_it_shares_out() -> None:
    record = published("llama-3.3-nemotron-super-49b-v1")
    plan = plan_fusion(record, Fusion((((42, 50),), ((53, 61), (62, 69)))))
    dropped = 9 + 9 + 8 - 3
    assert weight_bytes(record, "bf16") - weight_bytes(fuse(record, plan), "bf16") == dropped * 2 * 8192


@pytest.mark.parametrize(
    ("record", "weights", "message"),
    [
        (ODD, "int4", "weights: found 'int4', allowed: bf16, fp8, mxfp4, nvfp4"),
        (ODD, "mxfp4", "weights of a llama: found 'mxfp4', allowed: bf16, fp8, nvfp4"),
        (published("gpt-oss-20b"), "fp8", "weights of a gpt_oss: found 'fp8', allowed: bf16, mxfp4"),
    ],
)
def test_a_word_that_a_model_cannot_have_is_refused(record: ModelRecord, weights: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        weight_bytes(record, weights)
    assert str(error.value) == message
