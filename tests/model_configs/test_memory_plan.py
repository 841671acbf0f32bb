"""The memory plan: published capacities, hand computation on odd models, and advice that is tried, not believed."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from vllm_puzzle.model_configs.activation_memory import RUNTIME_BYTES, activation_bytes, largest_layer
from vllm_puzzle.model_configs.catalogue import find
from vllm_puzzle.model_configs.ffn_fusion import Fusion, fuse, plan_fusion
from vllm_puzzle.model_configs.memory_plan import (
    GPUS,
    MemoryPlan,
    plan_memory,
    smallest_gpu,
    weight_bytes,
)
from vllm_puzzle.model_configs.memory_settings import FLAGS, MemorySettings, flags_that_fit
from vllm_puzzle.model_configs.request_memory import kv_bytes_of_request, state_bytes_of_request
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
from vllm_puzzle.model_configs.tensors import kv_bytes_per_token

GIB, MIB = 2**30, 2**20


def published(name: str) -> ModelRecord:
    return find(name).record()


def model(*layers: LayerRecord, hidden: int = 24, vocab: int = 51, family: str = "llama") -> ModelRecord:
    return ModelRecord(family, "AnyModel", vocab, hidden, layers, 131072, 1e-5, Rope())


SUPER_49B = published("llama-3.3-nemotron-super-49b-v1")
LLAMA_70B = published("llama-3.3-70b-instruct")
LLAMA_8B = model(*[LayerRecord(Attention(32, 8, 128), GatedFFN(14336))] * 32, hidden=4096, vocab=128256)
OSS_120B = published("gpt-oss-120b")
PUZZLE_88B = published("gpt-oss-puzzle-88b")
NANO = published("nemotron-3-nano-30b-a3b")
USUAL: dict[str, Any] = {
    "weights": "fp8",
    "kv_dtype": "fp8",
    "max_model_len": 4096,
    "max_num_seqs": 256,
    "max_num_batched_tokens": 8192,
    "gpu": GPUS["H100-80"],
}


# --- the papers' figures -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "card", "thousands"),
    [
        (SUPER_49B, "H100-80", 259),
        (LLAMA_70B, "H100-80", 33),
        (SUPER_49B, "H200-141", 878),
        (LLAMA_70B, "H200-141", 412),
    ],
)
def test_kv_capacity_at_95_percent_less_2_5_gib_is_the_papers(record: ModelRecord, card: str, thousands: int) -> None:
    left = 0.95 * GPUS[card].memory_bytes - 2.5 * GIB - weight_bytes(record, "fp8")
    per_token = kv_bytes_per_token(record, 1)
    # Drivers give an H100 79.1 to 79.3 GiB and an H200 139.7 to 140.0; the figures do not say which. Half a thousand
    # is their rounding.
    tolerance = 0.95 * 0.25 * GIB / per_token + 500
    assert abs(left / per_token - 1000 * thousands) <= tolerance


@pytest.mark.parametrize(("card", "shown_mib", "space"), [("H100-80", 81_559, 12.4), ("H200-141", 143_771, 70.1)])
def test_gpt_oss_120b_leaves_the_papers_kv_space(card: str, shown_mib: int, space: float) -> None:
    # These figures take what nvidia-smi shows as the card.
    shown = replace(GPUS[card], memory_bytes=shown_mib * MIB)
    settings = {"weights": "mxfp4", "gpu": shown, "gpu_memory_utilization": 0.95}
    plan = plan_memory(OSS_120B, **(USUAL | settings))
    assert (plan.available_bytes - plan.weights_bytes) / GIB - 2.5 == pytest.approx(space, abs=0.05)
    assert shown.memory_bytes > GPUS[card].memory_bytes


@pytest.mark.parametrize(
    ("tokens", "puzzle", "parent"), [(8, 146, 146), (16, 226, 290), (32, 386, 578), (64, 706, 1154), (128, 1346, 2306)]
)
def test_a_request_of_gpt_oss_takes_the_papers_mib(tokens: int, puzzle: int, parent: int) -> None:
    for record, expected in ((PUZZLE_88B, puzzle), (OSS_120B, parent)):
        found = kv_bytes_of_request(record, "fp8", 1024 * tokens) / MIB
        num_windows = sum(spec.sliding_window is not None for spec in record.attentions)
        # The table counts tokens, vLLM blocks of 16: one more per window. Half a MiB is the table's rounding.
        assert -0.5 <= found - expected <= 0.5 + num_windows * 16 * 1024 / MIB


@pytest.mark.parametrize(
    ("name", "megabytes", "mambas", "channels"),
    [
        ("nemotron-3-nano-30b-a3b", 48.2, 23, 64 * 64 + 2 * 8 * 128),
        ("nemotron-3-super-120b-a12b-fp8", 167.8, 40, 128 * 64 + 2 * 8 * 128),
        ("nemotron-3-ultra-550b-a55b", 402.7, 48, 256 * 64 + 2 * 8 * 128),
    ],
)
def test_mamba_states_take_the_papers_megabytes(name: str, megabytes: float, mambas: int, channels: int) -> None:
    record = published(name)
    windows = mambas * 3 * channels * 2  # the convolution's last 3 inputs in bf16, which the figure leaves out
    states = state_bytes_of_request(record) - windows
    assert states / 1e6 == pytest.approx(megabytes, abs=0.05)
    assert state_bytes_of_request(record, "float16") - windows == states / 2


def test_the_activation_estimate_is_near_what_vllm_profiled() -> None:
    # vllm#10511: Llama-3-8B, bf16, 8,192 tokens, 256 sequences, 1.26 GiB. 10 %: an estimate from shapes.
    found = activation_bytes(LLAMA_8B, "bf16", max_num_batched_tokens=8192, max_num_seqs=256) - RUNTIME_BYTES
    assert found / GIB == pytest.approx(1.26, rel=0.1)


def test_activations_and_runtime_of_a_49b_are_what_the_papers_leave_for_them() -> None:
    # 2.5 GiB, for 4,096 tokens; RUNTIME_BYTES was chosen for this, in steps of a quarter: half a step.
    found = activation_bytes(SUPER_49B, "fp8", max_num_batched_tokens=4096, max_num_seqs=256)
    assert found / GIB == pytest.approx(2.5, abs=0.125)


# --- by hand ---------------------------------------------------------------------------------------------------------


def test_each_layer_holds_its_window_in_whole_blocks() -> None:
    record = model(
        LayerRecord(Attention(6, 3, 8), None),
        LayerRecord(Attention(6, 2, 8, sliding_window=21), None),
        LayerRecord(Attention(6, 2, 8, sliding_window=21, num_sink_tokens=4), None),
        LayerRecord(None, GatedFFN(8)),
    )
    full, windowed = 2 * 3 * 8 * 2, 2 * 2 * 8 * 2
    # 100 tokens → 112. The window: 20 + 1 → 32 and a block more; 20 + 37 → 64 and one; never more than the sequence.
    for in_flight, held in ((1, 48), (37, 80), (5000, 128)):
        found = kv_bytes_of_request(record, "bf16", 100, tokens_in_flight=in_flight)
        assert found == 112 * full + held * windowed + 112 * windowed
    assert kv_bytes_of_request(record, "fp8", 100) * 2 == kv_bytes_of_request(record, "bf16", 100)
    # Four ranks: 3 heads become one per rank, 2 heads one.
    assert kv_bytes_of_request(record, "bf16", 100, tensor_parallel_size=4) == 112 * 32 + 48 * 32 + 112 * 32


def test_states_of_an_odd_mixer_are_what_a_hand_computes() -> None:
    record = model(LayerRecord(Mamba2(6, 10, 7, 2, 5), None), LayerRecord(None, GatedFFN(8)))
    assert state_bytes_of_request(record) == 6 * 10 * 7 * 4 + 4 * (60 + 2 * 2 * 7) * 2
    # Three ranks: two heads each; the two groups become three, one each.
    assert state_bytes_of_request(record, "float16", 3) == 2 * 10 * 7 * 2 + 4 * (20 + 2 * 7) * 2


@pytest.mark.parametrize(
    ("layer", "family", "inner"),
    [
        (LayerRecord(Attention(6, 2, 8), None), "llama", 2 * (2 * 48 + 2 * 16)),
        (LayerRecord(None, GatedFFN(41)), "llama", 2 * 3 * 41),
        (LayerRecord(LinearMap(), None), "llama", 2 * 24),
        # two experts: workspaces of max(19, 24) and max(38, 24); shared 3 x 11; 5 router logits in float32
        (LayerRecord(None, MoE(5, 2, 19, 11)), "qwen3_moe", 2 * (2 * (24 + 38) + 33) + 4 * 5),
        # relu²: one matrix before the activation; the experts work in 16
        (LayerRecord(None, MoE(5, 2, 19, 11, latent_size=16)), "nemotron_h", 2 * (2 * (19 + 19) + 22) + 4 * 5),
        # projections 2 x 60 + 28 + 6, convolution 88, scan 60; chunk states, 2 groups' products, 2 x 6 time steps
        (
            LayerRecord(Mamba2(6, 10, 7, 2, 5), None),
            "nemotron_h",
            2 * (154 + 88 + 60) + 4 * (-(-(2 * 420 + 2 * 128**2) // 128) + 12),
        ),
    ],
)
def test_the_largest_layer_is_what_a_hand_computes(layer: LayerRecord, family: str, inner: int) -> None:
    record = model(LayerRecord(None, GatedFFN(2)), layer, family=family)
    peak = largest_layer(record, "bf16")
    assert (peak.layer, peak.bytes_per_token) == (1, 4 * 24 * 2 + inner)


def test_fp8_adds_the_quantized_input_and_ranks_share_the_width() -> None:
    record = model(LayerRecord(None, GatedFFN(42)))
    plain = largest_layer(record, "bf16").bytes_per_token
    assert largest_layer(record, "fp8").bytes_per_token == plain + 42
    assert largest_layer(record, "bf16", 3).bytes_per_token == 4 * 24 * 2 + 2 * 3 * 14


def test_a_fused_ffn_needs_the_activations_of_its_whole_width() -> None:
    plan = plan_fusion(SUPER_49B, Fusion((((42, 50),),)))
    fused = largest_layer(fuse(SUPER_49B, plan), "bf16")
    assert (fused.layer, fused.bytes_per_token) == (50, 2 * (4 * 8192 + 3 * 107_520))


def test_a_plan_of_an_odd_model_adds_up() -> None:
    record = model(LayerRecord(Attention(6, 2, 8), GatedFFN(40)), LayerRecord(Mamba2(6, 10, 7, 2, 5), None), vocab=1001)
    settings = {"max_num_seqs": 5, "max_num_batched_tokens": 48, "max_model_len": 100, "weights": "bf16"}
    plan = plan_memory(record, **(USUAL | settings), gpu_memory_utilization=0.5)
    weights = weight_bytes(record, "bf16")
    states = 5 * state_bytes_of_request(record)
    activations = 48 * largest_layer(record, "bf16").bytes_per_token + 5 * 1001 * 10 + RUNTIME_BYTES
    available = 81_090 * MIB // 2
    assert (plan.available_bytes, plan.weights_bytes, plan.state_bytes) == (available, weights, states)
    assert plan.activation_bytes == activations
    assert plan.kv_bytes_left == available - weights - states - activations
    assert plan.kv_bytes_of_one_request == 112 * 32
    assert plan.fits


@pytest.mark.parametrize("tp", [1, 2, 8])
def test_each_rank_takes_its_part_of_everything_but_logits_and_runtime(tp: int) -> None:
    plan = plan_memory(LLAMA_70B, **USUAL, tensor_parallel_size=tp)
    one = plan_memory(LLAMA_70B, **USUAL)
    # Norms are whole on every rank: 161 of 8192. Scales too, 560 matrices of 8 bytes, of which less than all count.
    spread = 161 * 8192 * 2 + 560 * 8
    assert 0 <= plan.weights_bytes - one.weights_bytes / tp <= spread
    assert plan.kv_bytes_of_one_request * tp == one.kv_bytes_of_one_request
    assert plan.activation_bytes < one.activation_bytes or tp == 1


# --- the text --------------------------------------------------------------------------------------------------------


def value(plan: MemoryPlan, name: str) -> float:
    (line,) = [line for line in plan.lines() if line.startswith(f"{name}  ")]
    return float(re.findall(r"= (-?[\d,]+\.\d\d) GiB$", line)[0].replace(",", ""))


@pytest.mark.parametrize(
    ("record", "weights", "card", "tp"),
    [
        (SUPER_49B, "fp8", "H100-80", 1),
        (NANO, "fp8", "H200-141", 2),
        (PUZZLE_88B, "mxfp4", "B200-192", 1),
        (LLAMA_70B, "bf16", "L40S-48", 1),
    ],
)
def test_the_lines_show_sums_that_add_up(record: ModelRecord, weights: str, card: str, tp: int) -> None:
    settings = {"weights": weights, "gpu": GPUS[card], "tensor_parallel_size": tp}
    plan = plan_memory(record, **(USUAL | settings))
    names = [*(f"  {part.name}" for part in plan.parts), *(["  padding"] if plan.padding_bytes else [])]
    rounding = 0.005 * (len(names) + 1)  # each shown figure is rounded to a hundredth
    assert sum(value(plan, name) for name in names) == pytest.approx(value(plan, "weights"), abs=rounding)
    states = value(plan, "states") if plan.state_bytes else 0.0
    left = value(plan, "available") - value(plan, "weights") - states - value(plan, "activations")
    assert left == pytest.approx(value(plan, "left for KV"), abs=0.025)
    inner = [value(plan, f"  {name}") for name in (f"in layer {plan.peak.layer}", "logits", "runtime")]
    assert sum(inner) == pytest.approx(value(plan, "activations"), abs=0.02)
    assert plan.lines()[-1].startswith("fits" if plan.fits else "does not fit: ")


def test_the_lines_of_a_mixed_model_name_what_each_group_of_layers_holds() -> None:
    settings = {"weights": "mxfp4", "max_model_len": 131_072, "gpu_memory_utilization": 0.95, "max_num_seqs": 8}
    plan = plan_memory(PUZZLE_88B, **(USUAL | settings))
    (line,) = [line for line in plan.lines() if line.startswith("one request")]
    for group in ("10 x 131,072 x 1,024 B", "8 x 16,400 x 1,024 B", "18 x 8,336 x 1,024 B"):
        assert group in line
    assert plan.padding_bytes == 0
    assert [line for line in plan.lines() if line.startswith("  experts")] == [
        "  experts             36 layers, 86,026,199,040 parameters = 42.60 GiB"
    ]


# --- advice ----------------------------------------------------------------------------------------------------------

# Nine heads: no tensor parallelism, so that several flags must go together.
NINE_HEADS = model(*[LayerRecord(Attention(9, 3, 128), GatedFFN(28673))] * 52, hidden=8192, vocab=128256)
TIGHT: list[tuple[ModelRecord, dict[str, Any]]] = [
    (LLAMA_70B, {"max_model_len": 32_768}),
    (LLAMA_70B, {"gpu": GPUS["H200-141"], "weights": "bf16", "kv_dtype": "bf16"}),
    (SUPER_49B, {"gpu": GPUS["L40S-48"]}),
    (SUPER_49B, {"max_num_batched_tokens": 131_072}),
    (SUPER_49B, {"max_model_len": 131_072, "kv_dtype": "bf16", "max_num_batched_tokens": 65_536}),
    (NANO, {"weights": "bf16", "max_num_seqs": 512}),
    (OSS_120B, {"weights": "mxfp4", "gpu": GPUS["A100-80"], "max_model_len": 131_072, "kv_dtype": "bf16"}),
    (LLAMA_8B, {"weights": "bf16", "gpu_memory_utilization": 0.2}),
    (NINE_HEADS, {"weights": "bf16", "gpu": GPUS["L40S-48"]}),
]
READ = {flag: name for name, flag in FLAGS.items()}


def read_flags(text: str) -> dict[str, Any]:
    words = text.split()
    found: dict[str, Any] = {}
    for flag, word in zip(words[::2], words[1::2], strict=True):
        found[READ[flag]] = word if word == "fp8" else float(word) if "." in word else int(word)
    return found


@pytest.mark.parametrize(("record", "settings"), TIGHT)
def test_every_piece_of_advice_makes_it_fit_and_none_of_its_flags_is_idle(
    record: ModelRecord, settings: dict[str, Any]
) -> None:
    wanted = USUAL | settings
    plan = plan_memory(record, **wanted)
    assert not plan.fits
    assert plan.advice(), plan.lines()
    for text in plan.advice():
        changes = read_flags(text)
        assert plan_memory(record, **(wanted | changes)).fits, text
        for name in changes:
            fewer = {other: changes[other] for other in changes if other != name}
            assert not plan_memory(record, **(wanted | fewer)).fits, text


@pytest.mark.parametrize(("record", "settings"), TIGHT)
def test_a_single_flag_changes_as_little_as_it_can(record: ModelRecord, settings: dict[str, Any]) -> None:
    wanted = USUAL | settings
    for text in plan_memory(record, **wanted).advice():
        changes = read_flags(text)
        if len(changes) > 1:
            continue
        ((name, found),) = changes.items()
        steps = {"max_model_len": 16, "max_num_batched_tokens": 16, "max_num_seqs": 1, "gpu_memory_utilization": -0.01}
        if name in steps:
            milder = found + steps[name]
            is_change = milder > wanted.get(name, 0.9) if steps[name] < 0 else milder < wanted[name]
        elif name == "tensor_parallel_size":
            milder, is_change = found // 2, found > 2
        else:
            continue
        assert not is_change or not plan_memory(record, **(wanted | {name: milder})).fits, text


def test_advice_covers_every_flag_that_can_help() -> None:
    found = {name for record, settings in TIGHT for text in plan_memory(record, **(USUAL | settings)).advice()
             for name in read_flags(text)}  # fmt: skip
    assert found == set(FLAGS)


@pytest.mark.parametrize("limit", range(13, 140, 9))
def test_the_largest_size_is_found_wherever_the_limit_lies(limit: int) -> None:
    plain = {name: value for name, value in USUAL.items() if name != "gpu"}
    settings = MemorySettings(**(plain | {"max_model_len": 140, "max_num_seqs": 140}), gpu=GPUS["H100-80"])
    assert flags_that_fit(settings, lambda tried: tried.max_num_seqs <= limit) == (f"--max-num-seqs {limit}",)
    expected = () if limit < 16 else (f"--max-model-len {limit // 16 * 16}",)
    assert flags_that_fit(settings, lambda tried: tried.max_model_len <= limit) == expected


def test_there_is_no_advice_where_it_fits_or_nothing_helps() -> None:
    assert plan_memory(SUPER_49B, **USUAL).advice() == ()
    ultra = published("llama-3.1-nemotron-ultra-253b-v1")
    assert plan_memory(ultra, **(USUAL | {"gpu": replace(GPUS["L40S-48"], memory_bytes=8 * GIB)})).advice() == ()


# --- the smallest card -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "weights", "kv_dtype", "expected"),
    [
        # its makers serve it on one H100 (Llama-Nemotron, section 1)
        (SUPER_49B, "fp8", "fp8", "A100-80"),
        # 72.7 GB of weights leave 3.8 GB of 80 GB cards; 32,768 tokens take 5.4
        (LLAMA_70B, "fp8", "fp8", "H200-141"),
        # OpenAI: 120b on one 80 GB card, 20b within 16 GB
        (OSS_120B, "mxfp4", "bf16", "A100-80"),
        (published("gpt-oss-20b"), "mxfp4", "bf16", "L40S-48"),
        # 241 GB, or half of it, against cards of 150
        (published("nemotron-3-super-120b-a12b-fp8"), "bf16", "fp8", "2 x H200-141"),
        # 70.9 GB leave 3.7 on an 80 GB card; 32,768 tokens take 5.2, 16,384 half of it
        (replace(LLAMA_70B, layers=LLAMA_70B.layers[:78]), "fp8", "fp8", "H200-141"),
        (replace(LLAMA_70B, layers=LLAMA_70B.layers[:78], max_position_embeddings=16_384), "fp8", "fp8", "A100-80"),
        # 40 layers: 72 GB, padded to 78 on an A100
        (replace(OSS_120B, layers=(*OSS_120B.layers, *OSS_120B.layers[:4])), "mxfp4", "fp8", "H100-80"),
        # 550B parameters: one byte each is more than 4 of any card, 2 bytes are 1.1 TB of a node's 1.4
        (published("nemotron-3-ultra-550b-a55b"), "bf16", "fp8", "8 x B200-192"),
    ],
)
def test_the_smallest_gpu_is_the_known_one(record: ModelRecord, weights: str, kv_dtype: str, expected: str) -> None:
    assert smallest_gpu(record, weights, kv_dtype) == expected


def test_no_smaller_choice_than_the_smallest_gpu_serves_the_request() -> None:
    ultra = published("llama-3.1-nemotron-ultra-253b-v1")
    count, card = smallest_gpu(ultra, "bf16", "bf16").split(" x ")
    settings: dict[str, Any] = {
        "weights": "bf16", "kv_dtype": "bf16", "max_model_len": 32_768, "max_num_seqs": 1,
        "max_num_batched_tokens": 2048,
    }  # fmt: skip
    for gpu in GPUS.values():
        for tp in (1, 2, 4, 8):
            plan = plan_memory(ultra, **settings, gpu=gpu, tensor_parallel_size=tp)
            is_smaller = (tp, gpu.memory_bytes) < (int(count), GPUS[card].memory_bytes)
            assert not (is_smaller and plan.fits)
            if (tp, gpu.name) == (int(count), card):
                assert plan.fits


def test_a_model_beyond_a_node_is_said_to_need_more() -> None:
    huge = model(*[LayerRecord(Attention(64, 8, 128), GatedFFN(16 * 28672))] * 100, hidden=8192, vocab=128256)
    assert smallest_gpu(huge, "bf16", "bf16") == "more than 8 x B200-192"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_model_len": 0}, "flag --max-model-len: found 0, allowed: an integer from 1"),
        ({"max_num_seqs": True}, "flag --max-num-seqs: found True, allowed: an integer from 1"),
        (
            {"max_num_batched_tokens": 255},
            "flag --max-num-batched-tokens: found 255, allowed: at least the 256 of --max-num-seqs",
        ),
        (
            {"gpu_memory_utilization": 1.01},
            "flag --gpu-memory-utilization: found 1.01, allowed: above 0, at most 1",
        ),
        (
            {"kv_dtype": "int8"},
            "flag --kv-cache-dtype: found 'int8', allowed: float32, bf16, bfloat16, float16, fp8, fp8_e4m3",
        ),
        (
            {"mamba_ssm_cache_dtype": "fp8"},
            "flag --mamba-ssm-cache-dtype: found 'fp8', allowed: float32, bfloat16, float16",
        ),
        (
            {"tensor_parallel_size": 3},
            "layer 0, attention, key `num_attention_heads`: found 64, allowed: a multiple of --tensor-parallel-size 3",
        ),
    ],
)
def test_settings_that_vllm_refuses_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        plan_memory(LLAMA_70B, **(USUAL | settings))
    assert str(error.value) == message
