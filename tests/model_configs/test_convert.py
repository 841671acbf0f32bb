"""Conversion: each format reads back as the same layers; what it cannot say is refused; weights are untouched."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from vllm_puzzle.model_configs.convert import FORMATS, convert, convert_config
from vllm_puzzle.model_configs.formats import read_model
from vllm_puzzle.model_configs.schema import ConfigError

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "serving"))
import checkpoints
import families

NO_LINEAR = [
    block
    for block in checkpoints.ALL_KINDS
    if not (block["attention"]["replace_with_linear"] or block["ffn"]["replace_with_linear"])
]
SOURCES: dict[str, dict[str, Any]] = {
    "deci": checkpoints.deci_config(NO_LINEAR),
    **{name: families.FAMILIES[name] for name in ("llama", "mistral", "qwen2", "qwen3", "anymodel")},
}
DECI_CANNOT = ("qwen2", "qwen3", "anymodel")


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("name", SOURCES)
def test_a_converted_configuration_reads_back_as_the_same_model(name: str, to: str) -> None:
    if to == "deci" and name in DECI_CANNOT:
        with pytest.raises(ConfigError, match="allowed: a family like Llama"):
            convert_config(SOURCES[name], to)
        return
    before, after = read_model(SOURCES[name]), read_model(convert_config(SOURCES[name], to))
    same = {"model_type": before.model_type, "architecture": before.architecture}
    assert replace(after, **same) == before


@pytest.mark.parametrize("name", ["nemotron-super-49b-v1.json", "nemotron-ultra-253b-v1.json"])
def test_the_published_models_survive_a_round_trip(root: Path, name: str) -> None:
    published = json.loads((root / "tests" / "configs" / name).read_text())
    back = convert_config(convert_config(published, "per_layer_config"), "deci")
    # `ffn_mult` is rounded when read, so another one can mean the same width; everything else is the same text.
    assert read_model(back).layers == read_model(published).layers
    assert all(isinstance(block["ffn"]["ffn_mult"], float | None) for block in back["block_configs"])
    assert [b["attention"] for b in back["block_configs"]] == [b["attention"] for b in published["block_configs"]]
    assert {key: back[key] for key in ("hidden_size", "rope_scaling", "vocab_size")} == {
        key: published[key] for key in ("hidden_size", "rope_scaling", "vocab_size")
    }
    assert "auto_map" not in back


@pytest.mark.parametrize("to", ["per_layer_config", "anymodel"])
def test_a_linear_map_has_no_word_in_hugging_faces_vocabulary(to: str) -> None:
    with pytest.raises(ConfigError, match="layer 4: found a linear map"):
        convert_config(checkpoints.deci_config(checkpoints.ALL_KINDS), to)


def test_puzzletron_v1_with_a_linear_map_becomes_deci() -> None:
    source = families.FAMILIES["puzzletron v1"]
    assert read_model(convert_config(source, "deci")).layers == read_model(source).layers


def test_experts_are_refused_with_their_layer() -> None:
    with pytest.raises(ConfigError, match="layer 0, ffn: found experts"):
        convert_config(families.FAMILIES["qwen3_moe"], "anymodel")


def test_the_command_links_the_weights_and_leaves_remote_code_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    checkpoints.write_checkpoint(source, SOURCES["deci"])
    (source / "modeling_decilm.py").write_text("raise SystemExit")
    assert convert([str(source), str(target), "--to", "anymodel"]) == 0
    assert os.path.samefile(source / "model.safetensors", target / "model.safetensors")
    assert sorted(file.name for file in target.iterdir()) == ["config.json", "model.safetensors"]
    assert "as anymodel" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="found something there, allowed: a new directory"):
        convert([str(source), str(target), "--to", "deci"])
    (source / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="allowed: a JSON object"):
        convert([str(source), str(tmp_path / "new"), "--to", "deci"])
    with pytest.raises(ConfigError, match=r"found no config\.json"):
        convert([str(tmp_path), str(tmp_path / "new"), "--to", "deci"])
