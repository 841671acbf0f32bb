"""Quantized checkpoints through vLLM equal the reference that holds the dequantized weights and rounds the inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import quantized_checkpoints as quantized
import torch
from parity import Jobs, assert_equal_up_to_flips, errors, rms
from quantized_checkpoints import KINDS, KV_SCALES, QuantizedReference
from vllm_puzzle.serving.cpu_defaults import has_exact_int8

pytestmark = pytest.mark.slow

FLOAT32 = ("fp8 static", "fp8 dynamic")
INT8 = ("int8 dynamic", "int8 static")
BFLOAT16 = ("modelopt fp8", "modelopt mixed", "fp8 kv")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quantized")


@pytest.fixture(scope="module")
def references(folder: Path) -> dict[str, QuantizedReference]:
    return {name: quantized.write(folder / name, name) for name in KINDS}


@pytest.fixture(scope="module")
def outcomes(folder: Path, references: dict[str, QuantizedReference]) -> dict[str, Any]:
    """All runs, in one process."""
    jobs = Jobs(folder)
    for name in (*FLOAT32, *INT8, *BFLOAT16, "int4 weights", "fp8 weights"):
        llm: dict[str, Any] = {"dtype": KINDS[name].dtype}
        if KINDS[name].kv_spelling is not None:
            llm["kv_cache_dtype"] = "bfloat16"  # FP8 needs AVX-512 on CPU; the scales are loaded all the same
        jobs.add(name, folder / name, llm, describe_layers=True)
    jobs.add("int4 weights, float32", folder / "int4 weights", {"dtype": "float32"})
    compiled = {"enforce_eager": False, "compilation_config": {"backend": "eager"}}
    jobs.add("dynamic, compiled", folder / "fp8 dynamic", compiled)
    return jobs.run()


@pytest.mark.parametrize("name", FLOAT32)
def test_rounded_inputs_and_weights_equal_the_reference_in_float32(
    references: dict[str, QuantizedReference], outcomes: dict[str, Any], name: str
) -> None:
    assert_equal_up_to_flips(references[name], outcomes[name])


@pytest.mark.parametrize("name", INT8)
def test_int8_is_exact_where_the_cpu_has_vnni_and_is_refused_elsewhere(
    references: dict[str, QuantizedReference], outcomes: dict[str, Any], name: str
) -> None:
    if isinstance(outcomes[name], str):
        assert "found compressed-tensors INT8 per channel, allowed on this CPU: FP8 (without VNNI" in outcomes[name]
        assert not has_exact_int8(), "the product that is tried and the CPU's own flags must agree"
    else:
        assert_equal_up_to_flips(references[name], outcomes[name])


@torch.no_grad()
def assert_as_accurate_as_bfloat16(model: QuantizedReference, results: list[dict[str, Any]]) -> None:
    assert isinstance(results, list), results
    rounded = QuantizedReference(model.record, torch.bfloat16)
    rounded.load_tensors(model.named_tensors())
    rounded.layouts = model.layouts
    # Both are roundings of the same computation; their RMS errors over some 30,000 values agree within a factor.
    assert rms(errors(model, results)) <= 1.5 * rms(errors(model, results, rounded))


@pytest.mark.parametrize("name", BFLOAT16)
def test_in_bfloat16_it_is_as_accurate_as_plain_pytorch(
    references: dict[str, QuantizedReference], outcomes: dict[str, Any], name: str
) -> None:
    assert_as_accurate_as_bfloat16(references[name], outcomes[name])


def test_packed_int4_runs_where_the_cpu_has_the_kernel_and_is_refused_elsewhere(
    references: dict[str, QuantizedReference], outcomes: dict[str, Any]
) -> None:
    results = outcomes["int4 weights"]
    if isinstance(results, str):
        assert "quantization: found compressed-tensors INT4 per group, allowed on this CPU" in results
    else:
        assert_as_accurate_as_bfloat16(references["int4 weights"], results)
    if not isinstance(results, str):
        in_float32 = "found compressed-tensors INT4 per group in float32, allowed on CPU: --dtype bfloat16"
        assert in_float32 in outcomes["int4 weights, float32"]


def test_compiled_fp8_with_scales_per_token_is_refused_as_vllm_answers_nan(outcomes: dict[str, Any]) -> None:
    assert (
        "found compressed-tensors FLOAT8 per channel compiled, allowed on CPU: --enforce"
        in outcomes["dynamic, compiled"]
    )


def test_weight_only_fp8_has_no_cpu_kernel_and_vllm_says_so(outcomes: dict[str, Any]) -> None:
    assert "Failed to find a kernel that can implement the ScaledMM linear layer" in outcomes["fp8 weights"]


def test_each_layer_gets_its_method_and_exclusions_none(outcomes: dict[str, Any]) -> None:
    fp8 = outcomes["modelopt fp8"][0]["layers"]
    plain = {name for name, method in fp8.items() if method == "UnquantizedLinearMethod"}
    assert plain == {
        "model.layers.1.mlp.gate_up_proj",
        "model.layers.1.mlp.down_proj",
        "model.layers.3.self_attn.qkv_proj",
        "model.layers.3.self_attn.o_proj",
        "model.layers.4.self_attn.linear_attn",
    }
    assert fp8["model.layers.10.mlp.gate_up_proj"] == "ModelOptLinearMethod", "vLLM's own rule takes it for layer 1"
    assert fp8["model.layers.9.self_attn.linear_attn"] == fp8["model.layers.7.mlp.linear_mlp"] == "ModelOptLinearMethod"
    mixed = outcomes["modelopt mixed"][0]["layers"]
    assert mixed["model.layers.2.self_attn.qkv_proj"] == "UnquantizedLinearMethod"
    assert mixed["model.layers.8.mlp.linear_mlp"] == mixed["model.layers.1.mlp.gate_up_proj"] == "ModelOptLinearMethod"
    static = outcomes["fp8 static"][0]["layers"]
    assert static["model.layers.7.self_attn.qkv_proj"] == "UnquantizedLinearMethod"
    assert static["model.layers.2.self_attn.qkv_proj"] == "CompressedTensorsW8A8Fp8"


def test_each_attention_gets_its_own_kv_scales(outcomes: dict[str, Any]) -> None:
    found = [scales for scales in outcomes["fp8 kv"][0]["layers"].values() if isinstance(scales, tuple)]
    expected = [((n + 1) * KV_SCALES["k"], (n + 1) * KV_SCALES["v"]) for n in range(len(found))]
    assert len(found) == 6
    assert found == [pytest.approx(pair, rel=2**-23) for pair in expected]  # float32
