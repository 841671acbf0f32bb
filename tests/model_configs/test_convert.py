"""Conversion: each format reads back as the same layers; what it cannot say is refused; weights are untouched."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from vllm_puzzle.model_configs import catalogue
from vllm_puzzle.model_configs.convert import FORMATS, convert, convert_config
from vllm_puzzle.model_configs.formats import read_model
from vllm_puzzle.model_configs.schema import ConfigError
from vllm_puzzle.model_configs.tensors import model_tensors

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "serving"))
import checkpoints
import families

NO_LINEAR = [
    block
    for block in checkpoints.ALL_KINDS
    if not (block["attention"]["replace_with_linear"] or block["ffn"]["replace_with_linear"])
]
HUGGING_FACE = ("per_layer_config", "anymodel")
# A published configuration that states neither its YaRN factor nor what would become of it without one.
SILENT_ROPE = "gpt-oss-puzzle-88b"
PUBLISHED = {each.name: each.config() for each in catalogue.PUBLISHED}
QWEN = "qwen3-30b-a3b-thinking-2507"
SOURCES: dict[str, dict[str, Any]] = {
    "deci": checkpoints.deci_config(NO_LINEAR),
    "deci, every kind": checkpoints.deci_config(checkpoints.ALL_KINDS),
    "homogeneous mistral": families.config("mistral", "MistralForCausalLM", sliding_window=24),
    "homogeneous qwen2": families.config(
        "qwen2", "Qwen2ForCausalLM", use_sliding_window=True, sliding_window=24, max_window_layers=2
    ),
    "dense layer among experts": families.FAMILIES["qwen3_moe"] | {"mlp_only_layers": [1]},
    **families.FAMILIES,
    **families.UNSERVED,
    **PUBLISHED,
}
LINEAR, DECI_EXPERTS = "layer 4, key `replace_with_linear`: found a linear map", "ffn, key `moe`: found experts with"
FAMILY = "key `model_type`: found '{}', allowed: a family like Llama"
OTHER_ROUTING = f"layer 0, {DECI_EXPERTS} 'renormalize' routing, allowed: DeciLM's own"
SINKS = "layer 0, attention, tensor `sinks`: found learned sinks"
NO_NEMOTRON_H = "key `model_type`: found 'nemotron_h', allowed: nemotron-nas, llama"
# (source, format) → why it is refused; every other pair converts.
REFUSED = {
    **{("deci, every kind", to): LINEAR for to in HUGGING_FACE},
    **{("puzzletron v1", to): "layer 2, key `replace_with_linear`: found a linear map" for to in HUGGING_FACE},
    **{("deci wide", to): "layer 0, key `parallel_blocks`: found 4 blocks" for to in HUGGING_FACE},
    **{("mamba", to): "layer 1, attention, key `mamba`: found a Mamba-2 mixer" for to in HUGGING_FACE},
    **{("sink tokens", to): "layer 1, attention, key `num_sink_tokens`: found 4" for to in HUGGING_FACE},
    **{("two experts on their input", to): f"layer 1, {DECI_EXPERTS} DeciLM's routing" for to in HUGGING_FACE},
    **{(SILENT_ROPE, to): "key `rope_scaling`: found nothing, allowed: a value" for to in HUGGING_FACE},
    **{(name, "deci"): FAMILY.format("qwen2") for name in ("qwen2", "homogeneous qwen2")},
    **{(name, "deci"): FAMILY.format("qwen3") for name in ("qwen3", "anymodel")},
    ("puzzletron v2", "deci"): "layer 2, attention: found 4 heads of 32, allowed: 2 of 32, as before",
    **{(name, "deci"): OTHER_ROUTING for name in ("qwen3_moe", "gpt_oss", "dense layer among experts", QWEN)},
    **{(name, "deci"): SINKS for name in ("gpt_oss v2", "gpt_oss_puzzle", SILENT_ROPE)},
    **{(name, "deci"): SINKS for name in ("gpt-oss-20b", "gpt-oss-120b")},
    **{(name, to): NO_NEMOTRON_H for name in PUBLISHED if name.startswith("nemotron-3") for to in FORMATS},
}


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("name", SOURCES)
def test_a_converted_configuration_reads_back_as_the_same_model_with_the_same_tensors(name: str, to: str) -> None:
    if (name, to) in REFUSED:
        with pytest.raises(ConfigError) as caught:
            convert_config(SOURCES[name], to)
        assert REFUSED[name, to] in str(caught.value)
        return
    before, after = read_model(SOURCES[name]), read_model(convert_config(SOURCES[name], to))
    same = {"model_type": before.model_type, "architecture": before.architecture}
    assert replace(after, **same) == before
    assert model_tensors(after, as_stored=True) == model_tensors(before, as_stored=True)


@pytest.mark.parametrize("name", SOURCES)
def test_every_way_there_and_back_ends_at_the_same_layers(name: str) -> None:
    """Each format in turn, as far as it can say the model; what it cannot is the test above."""
    layers, config, ways = read_model(SOURCES[name]).layers, SOURCES[name], 0
    for to in (*FORMATS, *reversed(FORMATS)):
        if (name, to) not in REFUSED:
            config, ways = convert_config(config, to), ways + 1
            assert read_model(config).layers == layers
    assert ways == 6 - 2 * sum((name, to) in REFUSED for to in FORMATS)


def test_gpt_oss_puzzle_becomes_a_gpt_oss_and_keeps_everything_that_is_not_per_layer() -> None:
    mxfp4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    more = {"quantization_config": mxfp4, "eos_token_id": [200002], "layer_types": ["full_attention"] * 5}
    source = families.FAMILIES["gpt_oss_puzzle"] | more
    written = convert_config(source, "per_layer_config")
    assert written["architectures"] == ["GptOssForCausalLM"]
    assert written["model_type"] == "gpt_oss"
    kept = ("rope_theta", "rope_scaling", "quantization_config", "eos_token_id", "swiglu_limit", "attention_bias")
    assert {key: written[key] for key in kept} == {key: source[key] for key in kept}
    assert written["per_layer_config"] == {"2": {"num_local_experts": 4}, "3": {
        "num_local_experts": 4, "sliding_window": 40
    }}  # fmt: skip
    # Hugging Face chooses a layer's mask by its type, so the types follow the windows.
    kinds = ["sliding" if block["sliding_window"] else "full" for block in families.PUZZLE_BLOCKS]
    assert written["layer_types"] == [f"{kind}_attention" for kind in kinds]
    assert read_model(written).is_mxfp4


@pytest.mark.parametrize("name", ["gpt-oss-20b", "homogeneous mistral", "homogeneous qwen2"])
def test_a_homogeneous_model_keeps_its_window_where_its_own_class_reads_it(name: str) -> None:
    written = convert_config(SOURCES[name], "per_layer_config")
    assert written["per_layer_config"] == {}
    assert written["sliding_window"] == SOURCES[name]["sliding_window"]
    assert written.get("use_sliding_window") == SOURCES[name].get("use_sliding_window")


@pytest.mark.parametrize("name", ["mamba", "sink tokens", "two experts on their input", "deci wide"])
def test_decilms_wider_words_are_written_as_they_were_read(name: str) -> None:
    def stated(value: Any) -> Any:
        """Without the keys that say nothing, which other writers leave out."""
        if isinstance(value, list):
            return [stated(entry) for entry in value]
        if not isinstance(value, dict):
            return value
        return {key: stated(entry) for key, entry in value.items() if entry not in (None, False)}

    source = SOURCES[name]
    written = convert_config(source, "deci")["block_configs"]
    # `ffn_mult` and `intermediate_size` are two words for one width; these files use the second.
    assert stated(written) == stated(source["block_configs"])


@pytest.mark.parametrize("name", ["llama-3.3-nemotron-super-49b-v1", "llama-3.1-nemotron-ultra-253b-v1"])
def test_the_published_models_survive_a_round_trip(name: str) -> None:
    published = PUBLISHED[name]
    back = convert_config(convert_config(published, "per_layer_config"), "deci")
    # `ffn_mult` is rounded when read, so another one can mean the same width; everything else is the same text.
    assert read_model(back).layers == read_model(published).layers
    assert all(isinstance(block["ffn"]["ffn_mult"], float | None) for block in back["block_configs"])
    assert [b["attention"] for b in back["block_configs"]] == [b["attention"] for b in published["block_configs"]]
    assert {key: back[key] for key in ("hidden_size", "rope_scaling", "vocab_size")} == {
        key: published[key] for key in ("hidden_size", "rope_scaling", "vocab_size")
    }
    assert "auto_map" not in back


def test_the_command_links_the_weights_and_leaves_remote_code_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    checkpoints.write_checkpoint(source, SOURCES["deci"])
    (source / "modeling_decilm.py").write_text("raise SystemExit")
    beside = ("generation_config.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json")
    for name in beside:
        (source / name).write_text("{}")
    linked = ("model.safetensors", *beside)
    assert convert([str(source), str(target), "--to", "anymodel"]) == 0
    assert all(os.path.samefile(source / name, target / name) for name in linked)
    assert sorted(file.name for file in target.iterdir()) == sorted(("config.json", *linked))
    assert "as anymodel" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="found something there, allowed: a new directory"):
        convert([str(source), str(target), "--to", "deci"])
    (source / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="allowed: a JSON object"):
        convert([str(source), str(tmp_path / "new"), "--to", "deci"])
    with pytest.raises(ConfigError, match=r"found no config\.json"):
        convert([str(tmp_path), str(tmp_path / "new"), "--to", "deci"])
