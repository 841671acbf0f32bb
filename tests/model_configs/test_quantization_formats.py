"""Published quantization entries: what they exclude, which scheme each matrix gets, and what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
from vllm_puzzle.model_configs.inspect_model import load_record
from vllm_puzzle.model_configs.quantization import Quantization, matrices, stored_tensors
from vllm_puzzle.model_configs.quantization_formats import load_quantization, read_quantization
from vllm_puzzle.model_configs.schema import ConfigError

CONFIGS = Path(__file__).parents[2] / "model_configs" / "published"
RECORD = load_record(CONFIGS / "llama-3.3-nemotron-super-49b-v1.json")
ATTENTION = {f"self_attn.{name}_proj" for name in "qkvo"}
FFN = {f"mlp.{name}_proj" for name in ("gate", "up", "down")}
WEIGHTS = {"type": "float", "num_bits": 8, "strategy": "channel", "dynamic": False, "symmetric": True}
INPUTS = {"type": "float", "num_bits": 8, "strategy": "token", "dynamic": True, "symmetric": True}


def read(entry: dict[str, Any]) -> Quantization:
    found = read_quantization(RECORD, entry)
    assert found is not None
    return found


def modelopt(algo: str = "FP8", *ignore: str, **rest: Any) -> dict[str, Any]:
    return {"quant_method": "modelopt", "quant_algo": algo, "ignore": list(ignore), **rest}


def compressed(*ignore: str, targets: tuple[str, ...] = ("Linear",), **changes: Any) -> dict[str, Any]:
    group = {"targets": list(targets), "weights": WEIGHTS, "input_activations": INPUTS}
    entry = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group}}
    return entry | {"ignore": list(ignore)} | changes


def plain(found: Quantization) -> set[str]:
    return set(matrices(RECORD)) - set(found.schemes)


def in_layers(parts: set[str], *layers: int) -> set[str]:
    return {f"model.layers.{layer}.{part}" for layer in layers for part in parts} & set(matrices(RECORD))


@pytest.mark.parametrize("nested", [False, True])
def test_super_49b_in_modelopt_fp8_by_either_file(tmp_path: Path, nested: bool) -> None:
    config: dict[str, Any] = {
        "quantization_config": modelopt("FP8", "lm_head", kv_cache_scheme=WEIGHTS | {"strategy": "tensor"})
    }
    if nested:
        body = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}
        legacy = {"producer": {"name": "modelopt", "version": "0.23.0"}, "quantization": body}
        (tmp_path / "hf_quant_config.json").write_text(json.dumps(legacy))
        config = {}
    found = load_quantization(RECORD, tmp_path, config)
    assert found is not None
    assert plain(found) == {"lm_head"}
    assert found.has_kv_scales
    stored = stored_tensors(RECORD, found)
    assert len(stored) == len(stored_tensors(RECORD)) + 2 * (len(matrices(RECORD)) - 1)  # two scales each
    assert stored["model.layers.0.self_attn.q_proj.weight"].dtypes == ("F8_E4M3",)
    assert stored["model.layers.0.self_attn.q_proj.input_scale"].shapes == ((), (1,))


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["model.layers.1*"], in_layers(ATTENTION | FFN, 1, *range(10, 20))),  # a shell pattern takes 10 to 19 too
        (
            ["model.layers.1", "model.layers.1.*"],
            in_layers(ATTENTION | FFN, 1),
        ),  # what ModelOpt writes for layer 1 alone
        (["model.layers.*.self_attn*"], in_layers(ATTENTION, *range(80))),
        (["model.layers.0.self_attn.qkv_proj"], in_layers(ATTENTION - {"self_attn.o_proj"}, 0)),
        (["*.down_proj"], in_layers({"mlp.down_proj"}, *range(80))),
    ],
)
def test_modelopt_exclusions(patterns: list[str], expected: set[str]) -> None:
    assert plain(read(modelopt("FP8", "lm_head", *patterns))) == expected | {"lm_head"}


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ([r"re:.*layers\.1\..*"], in_layers(ATTENTION | FFN, 1)),
        ([r"re:.*(q|k|v)_proj$"], in_layers(ATTENTION - {"self_attn.o_proj"}, *range(80))),
        (["model.layers.3.mlp.gate_up_proj"], in_layers({"mlp.gate_proj", "mlp.up_proj"}, 3)),
        (["model.layers.3.mlp"], set()),  # llm-compressor names modules exactly: a container excludes nothing
    ],
)
def test_compressed_tensors_exclusions(patterns: list[str], expected: set[str]) -> None:
    assert plain(read(compressed("lm_head", *patterns))) == expected | {"lm_head"}


def test_compressed_tensors_targets_by_name_come_before_the_class() -> None:
    int8 = {"type": "int", "num_bits": 8, "strategy": "channel", "dynamic": False, "symmetric": True}
    entry = compressed()
    entry["config_groups"]["group_1"] = {
        "targets": [r"re:.*down_proj"], "weights": int8, "input_activations": INPUTS | {"type": "int"},
        "format": "int-quantized",
    }  # fmt: skip
    found = read(entry)
    assert found.schemes["model.layers.0.mlp.down_proj"].weight_dtype == "I8"
    assert found.schemes["model.layers.0.mlp.up_proj"].weight_dtype == "F8_E4M3"
    assert "lm_head" not in found.schemes, "vLLM quantizes its output matrix by name only"


def test_mixed_precision_names_each_matrix_and_leaves_the_others() -> None:
    layers = {name: {"quant_algo": "FP8"} for name in in_layers(FFN, 0)}
    layers |= {name: {"quant_algo": "NVFP4", "group_size": 16} for name in in_layers(FFN, 1)}
    found = read(modelopt("MIXED_PRECISION", quantized_layers=layers))
    assert set(found.schemes) == in_layers(FFN, 0, 1)
    stored = stored_tensors(RECORD, found)
    width = RECORD.layers[1].ffn.intermediate_size  # type: ignore[union-attr]
    assert stored["model.layers.1.mlp.up_proj.weight"].shapes == ((width, 4096),)
    assert stored["model.layers.1.mlp.up_proj.weight_scale"].shapes == ((width, 512),)


def test_entries_that_match_nothing_are_kept_to_be_told() -> None:
    skipped = next(index for index, layer in enumerate(RECORD.layers) if layer.attention is None)
    parent = f"model.layers.{skipped}.self_attn.q_proj"
    assert read(modelopt("FP8", "lm_head", parent)).idle == (parent,)
    assert read(compressed("lm_head", parent)).idle == (parent,)


ONE_SHARD = "layer 0, module `self_attn.k_proj`: found ModelOpt FP8 beside q_proj unquantized, allowed: one scheme"
FP8_LAYER = {"model.layers.0.self_attn.k_proj": {"quant_algo": "FP8"}}
REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "one shard excluded": (modelopt("FP8", "model.layers.0.self_attn.q_proj"), ONE_SHARD),
    "one shard listed": (modelopt("MIXED_PRECISION", quantized_layers=FP8_LAYER), ONE_SHARD),
    "a regex that fits vLLM's fused name": (compressed("re:.*v_proj"), "layer 0, module `self_attn.v_proj`: found unq"),
    "unknown method": (
        {"quant_method": "awq"},
        "key `quant_method`: found 'awq', allowed: modelopt, compressed-tensors",
    ),
    "unknown algorithm": (modelopt("W4A8_AWQ"), "key `quant_algo`: found 'W4A8_AWQ', allowed: FP8, "),
    "unknown algorithm of a layer": (
        modelopt("MIXED_PRECISION", quantized_layers={"model.layers.0.mlp.up_proj": {"quant_algo": "INT4"}}),
        "key `quantized_layers.model.layers.0.mlp.up_proj`: found 'INT4'",
    ),
    "mixed precision without layers": (modelopt("MIXED_PRECISION"), "key `quantized_layers`: found nothing"),
    "another group size": (modelopt("NVFP4", group_size=32), "group_size`: found 32, allowed: 16 with NVFP4"),
    "NVFP4 KV cache": (modelopt("FP8", kv_cache_quant_algo="NVFP4"), "key `kv_cache_quant_algo`: found 'NVFP4'"),
    "KV scales per head": (compressed(kv_cache_scheme=WEIGHTS), "key `kv_cache_scheme`: found "),
    "a scheme nobody reads": (compressed(format="marlin-24"), "FP8, INT8 W8A8, or packed INT4/INT8 weights"),
    "sparsity": (compressed(sparsity_config={"format": "sparse-24"}), "key `sparsity_config`"),
    "a target in two groups": (
        compressed(config_groups={n: {"targets": ["Linear"], "weights": WEIGHTS} for n in "ab"}),
        "key `targets`: found 'Linear', allowed: each target in one group",
    ),
    "a broken regex": (compressed("re:("), "found 're:(', allowed: a regular expression"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_it_is_refused_in_one_line(case: str) -> None:
    entry, message = REFUSALS[case]
    with pytest.raises(ConfigError) as caught:
        read_quantization(RECORD, entry)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_older_mixed_precision_files_are_refused_because_vllm_does_not_read_them(tmp_path: Path) -> None:
    text = '{"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "MIXED_PRECISION"}}'
    (tmp_path / "hf_quant_config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"MIXED_PRECISION and no `quantization_config` in config\.json"):
        load_quantization(RECORD, tmp_path, {})


def test_random_edits_are_read_or_refused_in_one_line() -> None:
    layers = {name: {"quant_algo": "FP8"} for name in in_layers(FFN, 0)}
    entries = [modelopt("FP8", "lm_head"), compressed("lm_head"), modelopt("MIXED_PRECISION", quantized_layers=layers)]
    values: list[Any] = [None, True, 0, -1, 8, 1.5, "", "re:[", "tensor", [], [1], {}, {"x": 1}]
    random = Random(0)
    for _ in range(300):
        entry = copy.deepcopy(random.choice(entries))
        place: Any = entry
        while random.random() < 0.7 and any(isinstance(value, dict) and value for value in place.values()):
            place = random.choice([value for value in place.values() if isinstance(value, dict) and value])
        place[random.choice(list(place))] = random.choice(values)
        try:
            found = read_quantization(RECORD, entry)
            assert stored_tensors(RECORD, found)
        except ConfigError as error:
            assert "\n" not in str(error)
