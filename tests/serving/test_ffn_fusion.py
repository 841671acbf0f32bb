"""vLLM serves fused FFNs as the parallel formula says, which the reference computes from tensors that are not fused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import checkpoints
import families
import pytest
import quantized_checkpoints as quantized
import torch
from checkpoints import deci_block
from parity import PROMPTS, Jobs, assert_equal_to, assert_equal_up_to_flips, bound, errors, rms
from quantized_checkpoints import QuantizedReference
from safetensors.torch import load_file, save_file
from vllm_puzzle.model_configs.ffn_fusion import KEY, fuse, requested_plan
from vllm_puzzle.model_configs.formats import read_model
from vllm_puzzle.model_configs.inspect_model import load_record
from vllm_puzzle.model_configs.quantization import matrices
from vllm_puzzle.serving.preflight import POCKET
from vllm_puzzle.serving.reference_model import ReferenceModel

pytestmark = pytest.mark.slow

LORA = {"enable_lora": True, "max_lora_rank": 8}
# The one way of quantizing while loading that vLLM's CPU build has kernels for; it wants 16 bits.
ONLINE = {"quantization": "fp8_per_channel", "dtype": "bfloat16"}
IN_THE_FILE = {"runs": "1-5,7-8", "norm": "last"}
# Name → (checkpoint, what is asked for, LLM arguments, the rest of the job). The pipeline is cut within a run.
RUNS: dict[str, tuple[str, Any, dict[str, Any], dict[str, Any]]] = {
    "pocket own": ("pocket", "5-7", {}, {}),
    "pocket last": ("pocket", {"runs": "5-7", "norm": "last"}, {}, {}),
    "odd widths own": ("runs", "1-3+4-5,7-8", {}, {"layer_outputs": True, "describe_layers": True}),
    "odd widths last": ("in the file", None, {}, {"layer_outputs": True}),
    "tied auto": ("tied", "auto", {}, {}),
    "tensor parallel": ("runs", "1-3+4-5,7-8", {"tensor_parallel_size": 2}, {"fork": True}),
    "pipeline parallel": (
        "runs", "1-5,7-8", {"pipeline_parallel_size": 2},
        {"fork": True, "environment": {"VLLM_PP_LAYER_PARTITION": "5,5"}},
    ),
    "adapter beside": ("runs", "1-3,7-8", LORA, {"prompt_logprobs": None, "adapter": "beside"}),
    "adapter on top": ("runs", "1-3,7-8", LORA, {"prompt_logprobs": None, "adapter": "on top"}),
    "parallel blocks": ("parallel", None, {}, {"describe_layers": True}),
    "parallel blocks, adapter": ("parallel", None, LORA, {"prompt_logprobs": None, "adapter": "parallel"}),
    "fp8": ("fp8", {"runs": "1-3", "norm": "last"}, {}, {"describe_layers": True}),
    "incomplete": ("incomplete", "1-5", {}, {}),
    "quantized while loading": ("plain", "1-2", ONLINE, {"describe_layers": True}),
    "written fused": ("wide", None, ONLINE, {}),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fusion")


@pytest.fixture(scope="module")
def models(folder: Path) -> dict[str, ReferenceModel]:
    """The checkpoints, each as the model that it describes, and the two with adapters merged in."""
    biased = checkpoints.deci_config(families.FFN_RUNS, mlp_bias=True)
    configs = {
        "runs": biased,
        "tied": families.FFN_RUNS_TIED,
        "in the file": biased | {KEY: IN_THE_FILE},
        "parallel": checkpoints.deci_config(families.PARALLEL_FFNS),
        "incomplete": biased,
    }
    found = {name: checkpoints.write_checkpoint(folder / name, config) for name, config in configs.items()}
    tensors = load_file(folder / "incomplete" / "model.safetensors")
    del tensors["model.layers.3.mlp.up_proj.weight"]
    save_file(tensors, folder / "incomplete" / "model.safetensors")
    found["pocket"] = ReferenceModel(load_record(POCKET / "puzzle"))
    found["pocket"].load_tensors(load_file(POCKET / "puzzle" / "model.safetensors"))
    found["fp8"] = write_fp8(folder / "fp8")
    write_wide(folder)
    for name, model, leave_out in (
        ("beside", "runs", "mlp"),
        ("on top", "runs", "no such"),
        ("parallel",) * 2 + ("no such",),
    ):
        found[f"{name} adapter"] = ReferenceModel(found[model].record)
        found[f"{name} adapter"].load_tensors(found[model].named_tensors())
        (folder / f"{name} adapter").mkdir()
        checkpoints.write_adapter(folder / f"{name} adapter", found[f"{name} adapter"], rank=4, leave_out=leave_out)
    return found


def write_wide(folder: Path) -> None:
    """A bf16 checkpoint in `plain`, and in `wide` the same with layers 1 and 2 written as one FFN, norms folded in."""
    blocks = [deci_block(2, 64), deci_block(None, 64), deci_block(None, 32), deci_block(4, 96)]
    config = checkpoints.deci_config(blocks, torch_dtype="bfloat16")
    checkpoints.write_checkpoint(folder / "plain", config)
    tensors = load_file(folder / "plain" / "model.safetensors")
    norms = {i: tensors.pop(f"model.layers.{i}.post_attention_layernorm.weight") for i in (1, 2)}
    for matrix in ("gate", "up", "down"):
        name = "model.layers.{}.mlp." + f"{matrix}_proj.weight"
        parts = [tensors.pop(name.format(i)) for i in (1, 2)]
        if matrix != "down":
            parts = [
                (part.double() * norm.double()).bfloat16() for part, norm in zip(parts, norms.values(), strict=True)
            ]
        tensors[name.format(2)] = torch.cat(parts, dim=1 if matrix == "down" else 0)
    tensors["model.layers.2.post_attention_layernorm.weight"] = torch.ones(64, dtype=torch.bfloat16)
    (folder / "wide").mkdir()
    wide = [blocks[0], deci_block(None, None), deci_block(None, 96), blocks[3]]
    (folder / "wide" / "config.json").write_text(json.dumps(config | {"block_configs": wide}))
    save_file(tensors, folder / "wide" / "model.safetensors")


def write_fp8(folder: Path) -> QuantizedReference:
    """compressed-tensors FP8, one scale for all matrices, which `last` joins exactly; its parallel FFNs stay apart."""
    widths = (64, 32, 96)
    parallel = {"attention": None, "ffn": None, "parallel_blocks": [deci_block(None, 32), deci_block(None, 64)]}
    blocks = [deci_block(2, 64), *(deci_block(None, width) for width in widths), deci_block(2, None), parallel]
    config = checkpoints.deci_config(blocks)
    entry = quantized.compressed_entry(
        "float-quantized", "float 8 tensor static", "float 8 tensor static", ["lm_head", "re:.*self_attn.*"]
    )
    weights = checkpoints.reference(config).named_tensors()
    model = QuantizedReference(read_model(config))
    model.layouts, tensors = {}, {}
    for name, tensor in weights.items():
        module, tensors[name] = name.removesuffix(".weight"), tensor.detach().clone()
        if module in matrices(model.record) and ".mlp." in module:
            layout = quantized.fp8_per_tensor(tensor.detach(), 0.02, (1,), torch.tensor(0.6 / 448))
            model.layouts[module] = layout
            del tensors[name]
            tensors |= {f"{module}.{part}": value for part, value in layout.tensors.items()}
        model.named_tensors()[name].data.copy_(tensor)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": entry}))
    save_file(tensors, folder / "model.safetensors")
    return model


@pytest.fixture(scope="module")
def outcomes(folder: Path, models: dict[str, ReferenceModel]) -> dict[str, Any]:
    jobs = Jobs(folder)
    jobs.environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    for name, (model, wish, llm, job) in RUNS.items():
        path = POCKET / "puzzle" if model == "pocket" else folder / model
        overrides = {} if wish is None else {"hf_overrides": {KEY: wish}}
        rest = job | ({"adapter": str(folder / f"{job['adapter']} adapter")} if "adapter" in job else {})
        jobs.add(name, path, overrides | llm, **rest)
    return jobs.run()


def reference(models: dict[str, ReferenceModel], name: str, wish: Any = None) -> ReferenceModel:
    """The parallel formula of a run, or of another wish on its model."""
    model, asked, _, job = RUNS[name]
    base = models[f"{job['adapter']} adapter" if "adapter" in job else model]
    asked = IN_THE_FILE if model == "in the file" else asked
    plan = requested_plan(base.record, {KEY: asked if wish is None else wish})
    found = type(base)(base.record, plan=plan)
    found.load_tensors(base.named_tensors())
    if isinstance(base, QuantizedReference):
        found.layouts = base.layouts
    return found


REFUSED = ("adapter on top", "incomplete")
QUANTIZED = ("fp8", "quantized while loading", "written fused")
SERVED = [name for name in RUNS if name not in REFUSED + QUANTIZED]


@pytest.mark.parametrize("name", SERVED)
def test_vllm_serves_the_parallel_formula(
    models: dict[str, ReferenceModel], outcomes: dict[str, Any], name: str
) -> None:
    expected = reference(models, name)
    assert_equal_to(expected, outcomes[name])
    assert bool(expected.plan.ffns) == (RUNS[name][0] != "parallel")


@torch.no_grad()
def test_quantized_parts_are_served_as_their_sum(models: dict[str, ReferenceModel], outcomes: dict[str, Any]) -> None:
    model = reference(models, "fp8")
    assert isinstance(model, QuantizedReference)
    assert_equal_up_to_flips(model, outcomes["fp8"])
    one_after_the_other = reference(models, "fp8", "off")
    assert rms(errors(one_after_the_other, outcomes["fp8"])) > 10 * rms(errors(model, outcomes["fp8"]))


@pytest.mark.parametrize(("name", "other"), [("pocket own", "pocket last"), ("odd widths own", "odd widths last")])
def test_the_norm_rules_and_the_layers_in_sequence_are_told_apart(
    models: dict[str, ReferenceModel], outcomes: dict[str, Any], name: str, other: str
) -> None:
    """The bound that a fused model meets is none that any other reading of its layers would meet too."""
    for wish in ("off", RUNS[other][1] or IN_THE_FILE):
        with pytest.raises(AssertionError, match="error"):
            assert_equal_to(reference(models, name, wish), outcomes[name])


@torch.no_grad()
@pytest.mark.parametrize("name", ["odd widths own", "odd widths last"])
def test_each_layer_hands_on_what_the_formula_says(
    models: dict[str, ReferenceModel], outcomes: dict[str, Any], name: str
) -> None:
    model = reference(models, name)
    found = outcomes[name][0]["layer_outputs"]
    live = fuse(model.record, model.plan).layers
    assert sorted(found) == [index for index, layer in enumerate(live) if layer.attention or layer.ffn]
    hidden = model.embed(torch.tensor(PROMPTS[-1]))
    for index in range(len(live)):
        hidden = model.layer(index, hidden)
        if index in found:
            error = (found[index] - hidden).abs().max().item()
            assert error <= bound(model, hidden), f"after layer {index}: {error:.2e}"


def test_norms_are_folded_before_vllm_quantizes(outcomes: dict[str, Any]) -> None:
    """Bit by bit what a checkpoint gives that was written with the wide FFN."""
    found, expected = outcomes["quantized while loading"], outcomes["written fused"]
    assert isinstance(found, list), found
    assert found[0]["layers"]["model.layers.2.mlp.gate_up_proj"] == "Fp8PtpcOnlineLinearMethod"
    for one, other in zip(found, expected, strict=True):
        assert one["ids"] == other["ids"]
        assert torch.equal(one["logprobs"], other["logprobs"])


def test_a_run_is_one_wide_ffn_and_its_other_layers_are_gone(outcomes: dict[str, Any]) -> None:
    names = {name for name in outcomes["odd widths own"][0]["layers"] if ".mlp." in name}
    assert names == {f"model.layers.{i}.mlp.{part}" for i in (0, 3, 5, 6, 8) for part in ("gate_up_proj", "down_proj")}


def test_parallel_ffns_are_one_unless_norms_cannot_be_folded(outcomes: dict[str, Any]) -> None:
    layers = outcomes["parallel blocks"][0]["layers"]
    apart = {name.split(".")[2] for name in layers if ".parallel_blocks." in name}
    assert apart == {"2"}, "only the layer with an attention among its blocks"
    assert {"model.layers.1.mlp.gate_up_proj", "model.layers.3.mlp.gate_up_proj"} <= set(layers)
    quantized_layers = outcomes["fp8"][0]["layers"]
    assert "model.layers.5.parallel_blocks.1.mlp.gate_up_proj" in quantized_layers
    assert quantized_layers["model.layers.3.mlp.gate_up_proj"] == "CompressedTensorsW8A8Fp8"
    assert "model.layers.2.mlp.gate_up_proj" not in quantized_layers


def test_an_adapter_for_a_fused_ffn_is_refused_in_one_line(folder: Path, outcomes: dict[str, Any]) -> None:
    (line,) = (
        line
        for line in outcomes["adapter on top"].splitlines()
        if line.startswith("vllm_puzzle.") and "adapter" in line
    )
    assert "found weights for model.layers.1.mlp." in line
    assert "the FFNs of layers 1-3, which are fused (--puzzle-ffn-fusion)" in line


def test_a_missing_tensor_of_a_part_is_named_as_the_checkpoint_names_it(outcomes: dict[str, Any]) -> None:
    assert "layer 3, tensor `mlp.up_proj.weight`: found nothing in the checkpoint" in outcomes["incomplete"]
