"""The published models: their sizes are those published, their sources are named, a reconstruction says so."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from vllm_puzzle.model_configs import catalogue, memory_plan
from vllm_puzzle.model_configs.catalogue import NAMES, PUBLISHED, Published, find
from vllm_puzzle.model_configs.inspect_model import inspect
from vllm_puzzle.model_configs.models_command import format_models
from vllm_puzzle.model_configs.quantization_formats import read_quantization
from vllm_puzzle.model_configs.schema import Attention, ConfigError, LayerRecord, Mamba2
from vllm_puzzle.serving.cli import main

# Billions of parameters as the models' cards and reports give them, and attention layers, layers, KV elements per token
# (2 × KV heads × head size per attention layer, from the cards' shapes).
PUBLISHED_SIZES = {
    "llama-3.3-nemotron-super-49b-v1": ("49.9", 49, 80, 2 * 8 * 128),
    "llama-3.3-70b-instruct": ("70.6", 80, 80, 2 * 8 * 128),
    "llama-3.1-nemotron-ultra-253b-v1": ("253.4", 64, 162, 2 * 8 * 128),
    "gpt-oss-puzzle-88b": ("88", 36, 36, 2 * 8 * 64),
    "gpt-oss-120b": ("116.8", 36, 36, 2 * 8 * 64),
    "gpt-oss-20b": ("20.9", 24, 24, 2 * 8 * 64),
    "nemotron-3-nano-30b-a3b": ("31.6", 6, 52, 2 * 2 * 128),
    "nemotron-3-nano-30b-a3b-nvfp4": ("31.6", 6, 52, 2 * 2 * 128),
    "nemotron-3-super-120b-a12b-fp8": ("120.6", 8, 88, 2 * 2 * 128),
    "nemotron-3-super-120b-a12b-nvfp4": ("120.6", 8, 88, 2 * 2 * 128),
    "nemotron-3-ultra-550b-a55b": ("550", 12, 108, 2 * 2 * 128),
    "nemotron-3.5-lightning-30b-a3b-nvfp4": ("31.6", 6, 52, 2 * 2 * 128),
    "qwen3-30b-a3b-thinking-2507": ("30.5", 48, 48, 2 * 4 * 128),
}
# Bytes of Mamba-2 state per request in float32, without the convolution's (papers' shapes: layers, heads, size, state).
SSM_BYTES = {"nano": 23 * 64 * 64 * 128 * 4, "super": 40 * 128 * 64 * 128 * 4, "ultra": 48 * 256 * 64 * 128 * 4}


@pytest.fixture(scope="module")
def described() -> dict[str, dict[str, Any]]:
    """What `vllm-puzzle models --json` prints, by name."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(["models", "--json"]) == 0
    return {model["name"]: model for model in json.loads(printed.getvalue())}


def test_the_folder_holds_the_listed_models_and_nothing_else() -> None:
    files = {file.name for file in catalogue.FOLDER.iterdir()}
    quantization = {name for name in files if name.endswith(catalogue.QUANTIZATION_SUFFIX)}
    assert {name.removesuffix(".json") for name in files - quantization} == set(NAMES) == set(PUBLISHED_SIZES)
    assert {name.removesuffix(catalogue.QUANTIZATION_SUFFIX) for name in quantization} <= set(NAMES)
    assert len(NAMES) == len(set(NAMES)) == len({published.hub for published in PUBLISHED})


@pytest.mark.parametrize("name", NAMES)
def test_sizes_are_the_published_ones(described: dict[str, dict[str, Any]], name: str) -> None:
    total, attentions, layers, kv_elements = PUBLISHED_SIZES[name]
    digits = len(total.partition(".")[2])
    # One unit of the last published digit: cards round (31.58 → 31.6) and cut (120.67 → 120.6).
    assert abs(described[name]["num_parameters"] / 1e9 - float(total)) < 10**-digits
    assert (described[name]["num_attention_layers"], described[name]["num_layers"]) == (attentions, layers)
    kv = attentions * kv_elements
    assert described[name]["kv_bytes_per_token"] == {"bf16": 2 * kv, "fp8": kv}


@pytest.mark.parametrize("name", NAMES)
def test_state_per_request_is_that_of_the_mamba_layers(described: dict[str, dict[str, Any]], name: str) -> None:
    kind = "nano" if "lightning" in name else next((kind for kind in SSM_BYTES if f"nemotron-3-{kind}" in name), None)
    found = described[name]["state_bytes_per_request"]
    if kind is None:
        assert found == 0
        return
    mixers = [layer.attention for layer in find(name).record().layers if isinstance(layer.attention, Mamba2)]
    conv = sum((m.num_heads * m.head_dim + 2 * m.num_groups * m.state_size) * (m.conv_kernel - 1) * 2 for m in mixers)
    assert found == SSM_BYTES[kind] + conv


def test_what_is_a_reconstruction_says_so_in_its_file_and_in_both_outputs(
    described: dict[str, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    told = {name for name in NAMES if str(find(name).config().get("_provenance", "")).startswith("RECONSTRUCTED")}
    assert told == {"gpt-oss-puzzle-88b"} == {published.name for published in PUBLISHED if published.is_reconstructed}
    assert all(described[name]["is_reconstructed"] is (name in told) for name in NAMES)
    lines = format_models(list(described.values())).splitlines()
    assert [line.split()[0] for line in lines if "*" in line.split(" ")[0]] == ["gpt-oss-puzzle-88b*", "*"]
    assert next(line for line in lines if line.startswith("* ")).startswith("* gpt-oss-puzzle-88b: RECONSTRUCTED")
    assert inspect(["gpt-oss-puzzle-88b"]) == 0
    assert "note               RECONSTRUCTED" in capsys.readouterr().out


@pytest.mark.parametrize("published", PUBLISHED, ids=NAMES)
def test_every_entry_has_a_source_and_agrees_with_its_file(published: Published) -> None:
    assert published.source.startswith("https://")
    assert published.reasoning
    record = published.record()
    assert published.served_as in ("bf16", "fp8", "mxfp4", "nvfp4")
    assert published.kv in ("bf16", "fp8")
    # The repository's name ends in what it holds; gpt-oss says it in the file (the reconstruction has no such entry).
    suffix = published.hub.rpartition("-")[2].lower()
    if suffix in ("bf16", "fp8", "nvfp4"):
        assert published.served_as == suffix
    if not published.is_reconstructed:
        assert record.is_mxfp4 is (published.served_as == "mxfp4")
    config = published.config()
    assert config.get("torch_dtype", config.get("dtype", "bfloat16")) == "bfloat16"


def test_the_49bs_parent_is_its_widest_layer_everywhere() -> None:
    """Puzzle only takes away, so the untouched layers of the child are the parent's; 48 of 80 were not touched."""
    parent, child = find("llama-3.3-70b-instruct").record(), find("llama-3.3-nemotron-super-49b-v1").record()
    assert not parent.is_heterogeneous
    assert child.is_heterogeneous
    assert set(parent.layers) == {child.layers[1]}
    assert child.layers.count(child.layers[1]) == 48
    same = {"layers": (LayerRecord(None, None),), "model_type": "", "architecture": ""}
    assert replace(parent, **same) == replace(child, **same)  # type: ignore[arg-type]


def test_gpt_oss_puzzle_differs_from_its_parent_in_windows_and_expert_counts_only() -> None:
    def bare(layer: LayerRecord) -> LayerRecord:
        assert isinstance(layer.attention, Attention)
        return LayerRecord(replace(layer.attention, sliding_window=None), replace(layer.ffn, num_experts=4))  # type: ignore[type-var,arg-type]

    parent, child = find("gpt-oss-120b").record(), find("gpt-oss-puzzle-88b").record()
    assert [bare(layer) for layer in child.layers] == [bare(layer) for layer in parent.layers]


def test_the_older_quantization_file_is_read_and_agrees_with_its_entry() -> None:
    published = find("nemotron-3-nano-30b-a3b-nvfp4")
    entry = published.hf_quant_config()
    assert entry is not None
    found = read_quantization(published.record(), entry)
    assert found is not None
    assert {scheme.name for scheme in found.schemes.values()} == {"NVFP4"}
    assert (published.served_as, published.kv) == ("nvfp4", "fp8" if found.has_kv_scales else "bf16")
    # Not quantized: six attentions, the Mamba layer before each, lm_head.
    plain = {name for name in entry["quantization"]["exclude_modules"] if not name.endswith("conv1d")}
    assert plain.isdisjoint(found.schemes)
    assert len(plain) == 6 * 4 + 6 * 2 + 1
    assert find("gpt-oss-20b").hf_quant_config() is None


def test_a_name_is_found_in_any_case_and_an_unknown_one_is_one_line_with_the_allowed() -> None:
    assert find("GPT-OSS-20b") is find("gpt-oss-20b")
    with pytest.raises(ConfigError) as caught:
        find("gpt-5")
    assert str(caught.value) == f"published model: found 'gpt-5', allowed: {', '.join(NAMES)}"


def test_the_table_has_a_row_per_model_and_needs_neither_torch_nor_vllm(described: dict[str, dict[str, Any]]) -> None:
    code = (
        "import sys; from vllm_puzzle.serving.cli import main; assert main(['models']) == 0; "
        "found = {'torch', 'vllm', 'transformers', 'yaml'} & set(sys.modules); assert not found, found"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert done.stdout == format_models(list(described.values())) + "\n"
    rows = {line.split("  ")[0].rstrip("*"): line for line in lines[2 : 2 + len(NAMES)]}
    assert tuple(rows) == NAMES
    assert lines[2 + len(NAMES)] == ""
    for name, row in rows.items():
        assert row.endswith(f"  {find(name).reasoning}")
        assert f"{described[name]['num_parameters'] / 1e9:.2f} B" in row
        assert all(f"{weights}: {gpu}" in row for weights, gpu in described[name]["smallest_gpu"].items())
    cells = rows["llama-3.3-nemotron-super-49b-v1"].split()
    assert cells[1:8] == ["49.87", "B", "49", "of", "80", "200,704", "100,352"]
    assert "36 of 36 (26)" in rows["gpt-oss-puzzle-88b"], "18 windows of 128 and 8 of 8192"
    assert "  49.1  " in rows["nemotron-3-nano-30b-a3b"], "48.2 MB of state and 0.8 MB of the convolutions"


def test_the_smallest_gpu_agrees_with_what_the_cards_and_papers_say(described: dict[str, dict[str, Any]]) -> None:
    found = {name: described[name]["smallest_gpu"] for name in NAMES}
    # OpenAI: a single 80 GB GPU for 120b, 16 GB for 20b. 2505.00949: the 49B in FP8 on one H100; its parent has room
    # for 33K tokens there at 0.95 of the memory (by the arithmetic of weights and KV), so not for 32K at 0.9.
    assert found["gpt-oss-120b"]["mxfp4"] in ("A100-80", "H100-80")
    assert found["gpt-oss-puzzle-88b"]["mxfp4"] in ("A100-80", "H100-80")
    smallest = min(memory_plan.GPUS.values(), key=lambda gpu: gpu.memory_bytes)
    assert found["gpt-oss-20b"]["mxfp4"] == smallest.name
    assert found["llama-3.3-nemotron-super-49b-v1"]["fp8"] in ("A100-80", "H100-80")
    assert memory_plan.GPUS[found["llama-3.3-70b-instruct"]["fp8"]].memory_bytes > 100e9
    for published in PUBLISHED:
        assert list(found[published.name]) == [published.served_as] + ["fp8"] * (published.served_as == "bf16")
        for gpu in found[published.name].values():
            count, _, card = gpu.rpartition(" x ")
            assert card in memory_plan.GPUS
            assert count in ("", "2", "4", "8", "more than 8")


@pytest.mark.parametrize("arguments", [["--jsn"], ["gpt-oss-20b"], ["--json", "--json=1"]], ids=" ".join)
def test_a_bad_command_line_is_one_line_and_status_1(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", *arguments]) == 1
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("vllm-puzzle: models: found a command line where ")
    assert err.endswith("allowed: vllm-puzzle models [--json]\n")
    assert len(err.splitlines()) == 1


def test_inspect_takes_a_published_name_unless_there_is_such_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    name = "llama-3.3-nemotron-super-49b-v1"
    assert main(["inspect", name.upper()]) == 0
    by_name = capsys.readouterr().out
    assert main(["inspect", str(catalogue.FOLDER / f"{name}.json")]) == 0
    assert by_name == capsys.readouterr().out + f"source             {find(name).source}\n"
    assert main(["inspect", "gpt-oss-puzzle-88b", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["num_parameters"], found["note"][:13]) == (88_150_438_080, "RECONSTRUCTED")
    (tmp_path / name).write_text("[]")
    assert main(["inspect", name]) == 1
    assert "found a JSON list" in capsys.readouterr().err


@pytest.mark.parametrize("model", ["gpt-5", "no/such/folder", "x" * 5000, "a\0b", ""])
def test_inspect_refuses_what_is_neither_in_one_line(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", model]) == 1
    out, err = capsys.readouterr()
    assert not out
    assert "found No such file or directory, allowed: a model directory, a config.json, or a name" in err
    assert len(err.splitlines()) == 1
