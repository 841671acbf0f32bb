"""The tensors of fused FFNs: what they compute is the sum of their parts, in any order of the checkpoint, and quantized
parts are joined as they are stored or refused.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from random import Random
from typing import Any

import checkpoints
import families
import pytest
import quantized_checkpoints as quantized
import torch
from checkpoints import deci_block
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import bound
from torch import Tensor
from vllm_puzzle.kernels.reference import gated_ffn
from vllm_puzzle.model_configs.ffn_fusion import KEY, FusionPlan, fuse, parallel_ffns, requested_plan
from vllm_puzzle.model_configs.formats import read_model
from vllm_puzzle.model_configs.fused_tensors import fuse_quantization, places
from vllm_puzzle.model_configs.quantization import Quantization, stored_tensors
from vllm_puzzle.model_configs.quantization_formats import read_quantization
from vllm_puzzle.model_configs.schema import ConfigError, ModelRecord
from vllm_puzzle.serving.fused_weights import FusedWeights
from vllm_puzzle.serving.reference_model import ReferenceModel
from vllm_puzzle.serving.weights import TensorAccount, dtype_name

Weights = Iterable[tuple[str, Tensor]]
TOKENS = torch.arange(23) * 7 % 97
CONFIGS = {
    "deci": checkpoints.deci_config(families.FFN_RUNS),
    "deci, biased": checkpoints.deci_config(families.FFN_RUNS, mlp_bias=True),
    "llama, tied": families.FFN_RUNS_TIED,
}
WISHES = {"deci": "1-3+4-5,7-8", "deci, biased": "1-5,7-8", "llama, tied": "1-2"}


def fused(
    weights: Weights, record: ModelRecord, plan: FusionPlan, quantization: Quantization | None = None
) -> dict[str, Tensor]:
    """What vLLM's loaders would get of a checkpoint, on one stage, in float32."""
    found: dict[str, Tensor] = {}
    table = places(record, plan, quantization)
    for name, tensor in FusedWeights(table, torch.float32, lambda layer: True).stream(weights):
        assert name not in found
        found[name] = tensor
    return found


def plan_of(config: dict[str, Any], wish: Any) -> tuple[ModelRecord, FusionPlan]:
    record = read_model(config)
    return record, requested_plan(record, {KEY: wish})


@torch.no_grad()
def assert_same(model: ReferenceModel, tensors: dict[str, Tensor], plan: FusionPlan) -> None:
    """A model of the fused tensors computes what `model` does."""
    wide = ReferenceModel(fuse(model.record, plan))
    wide.load_tensors(tensors)  # every tensor of the fused record, and no other
    expected, found = model(TOKENS), wide(TOKENS)
    assert (found - expected).abs().max().item() <= bound(model, expected)


@pytest.mark.parametrize("norm", ["own", "last"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_fused_tensors_compute_the_parallel_formula(name: str, norm: str) -> None:
    record, plan = plan_of(CONFIGS[name], {"runs": WISHES[name], "norm": norm})
    weights = checkpoints.reference(CONFIGS[name]).named_tensors()
    model = ReferenceModel(record, plan=plan)
    model.load_tensors(weights)
    assert_same(model, fused(weights.items(), record, plan), plan)
    # The other rule, and the layers one after the other, are other functions: the bound can tell.
    for other in (
        FusionPlan(),
        plan_of(CONFIGS[name], {"runs": WISHES[name], "norm": {"own": "last", "last": "own"}[norm]})[1],
    ):
        different = ReferenceModel(record, plan=other)
        different.load_tensors(weights)
        with torch.no_grad():
            expected = different(TOKENS)
            assert (model(TOKENS) - expected).abs().max() > 100 * bound(model, expected)


def test_parallel_ffn_blocks_compute_the_same_as_one_ffn() -> None:
    config = checkpoints.deci_config(families.PARALLEL_FFNS, mlp_bias=True)
    model = checkpoints.reference(config)
    plan = parallel_ffns(model.record)
    assert len(plan.ffns) == 2
    assert_same(model, fused(model.named_tensors().items(), model.record, plan), plan)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.booleans(), st.sampled_from(["own", "last"]))
@settings(max_examples=40, deadline=None)
def test_a_fused_ffn_of_n_is_the_sum_of_n(widths: list[int], bias: bool, norm: str) -> None:
    blocks = [deci_block(2, 8), *(deci_block(None, width) for width in widths), deci_block(None, 5)]
    config = checkpoints.deci_config(blocks, mlp_bias=bias, hidden_size=16, head_dim=4)
    record, plan = plan_of(config, {"runs": f"1-{len(blocks) - 1}", "norm": norm})
    weights = {name: tensor.detach().double() for name, tensor in checkpoints.reference(config).named_tensors().items()}
    table = places(record, plan)
    found = dict(FusedWeights(table, torch.float64, lambda layer: True).stream(weights.items()))
    x = torch.randn(7, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def run(tensors: dict[str, Tensor], prefix: str, scale: Tensor) -> Tensor:
        matrices = [f"{prefix}.mlp.{name}_proj" for name in ("gate", "up", "down")]
        biases = [tensors.get(f"{name}.bias") for name in matrices]
        return gated_ffn(x * scale, *(tensors[f"{name}.weight"] for name in matrices), *biases)

    (ffn,) = plan.ffns
    norms = [weights[f"{part.prefix}.post_attention_layernorm.weight"] for part in ffn.parts]
    norms = norms if norm == "own" else [norms[-1]] * len(norms)
    expected = sum(run(weights, part.prefix, scale) for part, scale in zip(ffn.parts, norms, strict=True))
    holder = f"model.layers.{ffn.holder}"
    whole = run(found, holder, found[f"{holder}.post_attention_layernorm.weight"])
    # The products and biases pass through float32 once, on their way into the fused tensors: 2^-24 each, and sums of
    # at most 205 terms.
    assert isinstance(expected, Tensor)
    assert (whole - expected).abs().max() <= 205 * 2**-23 * max(1.0, expected.abs().max().item())


def test_the_order_of_the_checkpoint_does_not_matter() -> None:
    record, plan = plan_of(CONFIGS["deci, biased"], "1-5,7-8")
    weights = list(checkpoints.reference(CONFIGS["deci, biased"]).named_tensors().items())
    expected = fused(weights, record, plan)
    for seed in range(5):
        Random(seed).shuffle(weights)
        found = fused(weights, record, plan)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_with_nothing_to_fuse_the_very_same_tensors_pass_through() -> None:
    record = read_model(CONFIGS["deci"])
    weights = list(checkpoints.reference(CONFIGS["deci"]).named_tensors().items())
    stream = FusedWeights(places(record, FusionPlan()), torch.bfloat16, lambda layer: True).stream(weights)
    assert all(a is b for (_, a), (_, b) in zip(stream, weights, strict=True))


def test_a_stage_gets_the_ffns_of_its_own_layers_whole_and_nothing_of_others() -> None:
    """A part's layer may belong to another stage than the layer that holds the FFN."""
    record, plan = plan_of(CONFIGS["deci"], "1-3+4-5,7-8")
    weights = checkpoints.reference(CONFIGS["deci"]).named_tensors()
    whole = fused(weights.items(), record, plan)
    found = dict(FusedWeights(places(record, plan), torch.float32, lambda layer: layer >= 5).stream(weights.items()))
    left_out = {name for name in whole if name.startswith("model.layers.3.")}
    assert left_out
    assert found.keys() == whole.keys() - left_out


def test_parts_are_forgotten_once_their_ffn_is_whole() -> None:
    record, plan = plan_of(CONFIGS["deci"], "1-3,4-5")
    weights = checkpoints.reference(CONFIGS["deci"]).named_tensors()
    alive: dict[str, weakref.ref[Tensor]] = {}

    def read() -> Iterator[tuple[str, Tensor]]:
        for name, parameter in weights.items():
            tensor = parameter.detach().clone()
            if ".mlp." in name:
                alive[name] = weakref.ref(tensor)
            yield name, tensor

    stream = FusedWeights(places(record, plan), torch.float32, lambda layer: True).stream(read())
    for name, tensor in stream:
        del tensor
        layer = int(name.split(".")[2]) if name.startswith("model.layers.") else -1
        if layer == 5:
            held = {int(key.split(".")[2]) for key, reference in alive.items() if reference() is not None}
            assert held <= {4, 5}, "of the first run nothing is held any more"


def test_a_folded_matrix_is_rounded_once_to_the_models_dtype() -> None:
    record, plan = plan_of(CONFIGS["deci"], "7-8")
    weights = {
        name: tensor.detach().bfloat16()
        for name, tensor in checkpoints.reference(CONFIGS["deci"]).named_tensors().items()
    }
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        found = dict(FusedWeights(places(record, plan), dtype, lambda layer: True).stream(weights.items()))
        parts = [
            weights[f"model.layers.{i}.mlp.up_proj.weight"].double()
            * weights[f"model.layers.{i}.post_attention_layernorm.weight"].double()
            for i in (7, 8)
        ]
        # A product of two bf16 numbers has 16 bits: float32 holds it exactly.
        assert torch.equal(found["model.layers.8.mlp.up_proj.weight"], torch.cat(parts).to(dtype))
        assert torch.equal(
            found["model.layers.8.post_attention_layernorm.weight"], torch.ones(64, dtype=torch.bfloat16)
        )


# --- quantized checkpoints ---------------------------------------------------------------------------------------

SIZES = [deci_block(2, 256), deci_block(None, 256), deci_block(None, 128), deci_block(None, 384), deci_block(2, 256)]
WIDE = checkpoints.deci_config(SIZES, hidden_size=128)
INT4 = quantized.compressed_entry("pack-quantized", "int 4 group static", None, ["lm_head"])
BLOCKS_FP8 = quantized.compressed_entry("float-quantized", "float 8 block static", "float 8 group dynamic", ["lm_head"])
BLOCKS_FP8["config_groups"]["group_0"]["weights"]["block_structure"] = [128, 128]
ASYMMETRIC = quantized.compressed_entry("pack-quantized", "int 4 group static", None, ["lm_head"])
ASYMMETRIC["config_groups"]["group_0"]["weights"]["symmetric"] = False
EXACT = {
    "packed INT4": INT4,
    "packed INT4 with zero points": ASYMMETRIC,
    "FP8 blocks": BLOCKS_FP8,
    "ModelOpt FP8 blocks": quantized.modelopt_entry(quant_algo="FP8_PB_WO", exclude_modules=["lm_head"]),
    "NVFP4": quantized.modelopt_entry(quant_algo="NVFP4", exclude_modules=["lm_head"]),
    "MXFP8": quantized.modelopt_entry(quant_algo="MXFP8", exclude_modules=["lm_head"]),
    "FP8 per tensor": quantized.modelopt_entry(quant_algo="FP8", exclude_modules=["lm_head"]),
}
PER_CHANNEL = {
    "ModelOpt": quantized.modelopt_entry(quant_algo="FP8_PER_CHANNEL_PER_TOKEN", exclude_modules=["lm_head"]),
    "compressed-tensors": quantized.compressed_entry(
        "float-quantized", "float 8 channel static", "float 8 token dynamic", ["lm_head"]
    ),
    "INT8": quantized.compressed_entry("int-quantized", "int 8 channel static", "int 8 token dynamic", ["lm_head"]),
}
TORCH_DTYPES = {
    "F8_E4M3": torch.float8_e4m3fn,
    "U8": torch.uint8,
    "I32": torch.int32,
    "I64": torch.int64,
    "I8": torch.int8,
}


def quantization_of(record: ModelRecord, entry: dict[str, Any]) -> Quantization:
    found = read_quantization(record, entry)
    assert found is not None
    return found


def stored(record: ModelRecord, quantization: Quantization) -> dict[str, Tensor]:
    """A checkpoint of the right names, shapes and types; numbers that must be the same are."""
    return {
        name: torch.ones(entry.shapes[0], dtype=TORCH_DTYPES.get(entry.dtypes[0], torch.bfloat16))
        for name, entry in stored_tensors(record, quantization).items()
    }


@pytest.mark.parametrize("name", EXACT)
def test_quantized_parts_are_joined_into_the_layout_that_the_wide_ffn_has(name: str) -> None:
    record, plan = plan_of(WIDE, {"runs": "1-3", "norm": "last"})
    quantization = quantization_of(record, EXACT[name])
    after = fuse_quantization(plan, quantization)
    account = TensorAccount(fuse(record, plan), after)
    for key, tensor in fused(stored(record, quantization).items(), record, plan, quantization).items():
        account.see(key, tuple(tensor.shape), dtype_name(tensor.dtype))
    account.close()
    assert {module for module in after.schemes if ".layers.2." in module or ".layers.1." in module} == set()


@pytest.mark.parametrize(("matrix", "axis"), [("gate_proj", 0), ("down_proj", 1)])
def test_groups_quantized_apart_and_joined_are_the_groups_quantized_as_one(matrix: str, axis: int) -> None:
    """Every group of 32 columns has its own scale, so that the two ways agree in every bit."""
    record, plan = plan_of(WIDE, {"runs": "1-3", "norm": "last"})
    quantization = quantization_of(record, INT4)
    weights = stored(record, quantization)
    shape = (768, 128) if axis == 0 else (128, 768)
    whole = torch.randn(shape, generator=torch.Generator().manual_seed(4))
    for layer, part in zip((1, 2, 3), whole.split([256, 128, 384], axis), strict=True):
        for name, tensor in quantized.int4_packed(part.contiguous(), 0.0).tensors.items():
            weights[f"model.layers.{layer}.mlp.{matrix}.{name}"] = tensor
    found = fused(weights.items(), record, plan, quantization)
    for name, tensor in quantized.int4_packed(whole, 0.0).tensors.items():
        assert torch.equal(found[f"model.layers.3.mlp.{matrix}.{name}"], tensor), name


def refusal(entry: dict[str, Any], norm: str, config: dict[str, Any] = WIDE) -> str:
    record, plan = plan_of(config, {"runs": "1-3", "norm": norm})
    with pytest.raises(ConfigError) as caught:
        fuse_quantization(plan, quantization_of(record, entry))
    message = str(caught.value)
    assert message.startswith("FFN Fusion of layers 1-3, `")
    assert "found" in message
    assert "allowed" in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", EXACT)
def test_a_norm_is_not_folded_into_quantized_columns(name: str) -> None:
    message = refusal(EXACT[name], "own")
    assert "`gate_proj`: found" in message
    assert "with norm `own`, allowed: norm `last`, or an unquantized checkpoint" in message


@pytest.mark.parametrize("name", PER_CHANNEL)
def test_down_projections_with_one_scale_per_output_are_refused(name: str) -> None:
    assert "`down_proj`: found" in refusal(PER_CHANNEL[name], "last")
    assert "one scale per output" in refusal(PER_CHANNEL[name], "last")


def test_blocks_that_would_lose_their_borders_are_refused() -> None:
    config = checkpoints.deci_config([*SIZES[:2], deci_block(None, 192), *SIZES[3:]], hidden_size=128)
    message = refusal(BLOCKS_FP8, "last", config)
    assert "found the width 192 in model.layers.2, allowed with" in message
    assert "multiples of 128" in message
    # The last part has no border behind it.
    config = checkpoints.deci_config([*SIZES[:3], deci_block(None, 192), SIZES[4]], hidden_size=128)
    record, plan = plan_of(config, {"runs": "1-3", "norm": "last"})
    assert fuse_quantization(plan, quantization_of(record, BLOCKS_FP8)).schemes


def test_parts_that_are_stored_differently_are_refused() -> None:
    entry = quantized.modelopt_entry(
        quant_algo="FP8_PB_WO", exclude_modules=["lm_head", "model.layers.2.mlp.down_proj"]
    )
    assert "`down_proj`: found unquantized in model.layers.2 beside ModelOpt FP8 blocks" in refusal(entry, "last")


def test_an_unquantized_run_of_a_quantized_checkpoint_keeps_its_own_norms() -> None:
    entry = quantized.modelopt_entry(
        quant_algo="FP8", exclude_modules=["lm_head", *(f"model.layers.{i}" for i in (1, 2, 3))]
    )
    record, plan = plan_of(WIDE, "1-3")
    quantization = quantization_of(record, entry)
    assert fuse_quantization(plan, quantization) == quantization


@pytest.mark.parametrize("part", ["weight_scale", "input_scale"])
def test_numbers_that_differ_from_part_to_part_are_refused(part: str) -> None:
    record, plan = plan_of(WIDE, {"runs": "1-3", "norm": "last"})
    quantization = quantization_of(record, EXACT["FP8 per tensor"])
    weights = stored(record, quantization)
    weights[f"model.layers.2.mlp.up_proj.{part}"] *= 2
    with pytest.raises(ConfigError, match=rf"FFN Fusion of layers 1-3, `up_proj\.{part}`: found different numbers"):
        fused(weights.items(), record, plan, quantization)
