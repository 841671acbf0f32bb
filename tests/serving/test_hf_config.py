"""What transformers would refuse, or silently read as another model, `serve` says in one line beforehand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import checkpoints
import families
import published
import pytest
from vllm_puzzle.model_configs.formats import read_model
from vllm_puzzle.model_configs.schema import ConfigError
from vllm_puzzle.serving.hf_config import PuzzleGptOssConfig, check_transformers_agrees
from vllm_puzzle.serving.preflight import check, read_request

FIXTURES = {"deci": checkpoints.deci_config(checkpoints.ALL_KINDS), **families.FAMILIES, **published.PUBLISHED}


@pytest.mark.parametrize("name", FIXTURES)
def test_transformers_reads_every_fixture_as_the_same_model(name: str) -> None:
    check_transformers_agrees(FIXTURES[name], read_model(FIXTURES[name]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rms_norm_eps": 1}, "Field 'rms_norm_eps' expected float"),
        ({"tie_word_embeddings": None}, "Field 'tie_word_embeddings' expected bool"),
    ],
)
def test_what_transformers_refuses_is_one_line(changes: dict[str, Any], message: str) -> None:
    config = families.FAMILIES["llama"] | changes
    with pytest.raises(ConfigError) as caught:
        check_transformers_agrees(config, read_model(config))
    assert message in str(caught.value)
    assert "allowed: what PuzzleLlamaConfig accepts" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_transformers_reads_otherwise_is_refused_with_both_readings() -> None:
    config = families.FAMILIES["llama"]
    record = read_model(config | {"vocab_size": 96})
    with pytest.raises(ConfigError, match=r"vocab_size: found 96, allowed: as transformers reads it, 97"):
        check_transformers_agrees(config, record)
    record = read_model(config | {"per_layer_config": {"3": {"intermediate_size": 41}}, "intermediate_size": 96})
    with pytest.raises(ConfigError, match=r"layer 0: found LayerRecord\(.*, allowed: as transformers reads it"):
        check_transformers_agrees(config, record)


def test_a_heterogeneous_model_under_another_architectures_name_is_refused() -> None:
    config = families.FAMILIES["deci wide"] | {"architectures": ["LlamaForCausalLM"]}
    with pytest.raises(ConfigError, match="key `architectures`: found 'LlamaForCausalLM', allowed: AnyModel or DeciLM"):
        check_transformers_agrees(config, read_model(config))


def test_a_homogeneous_model_with_something_of_its_own_is_left_to_vllm(tmp_path: Path) -> None:
    """Our readers know what our class computes; vLLM's own classes may know more."""
    plain = {k: v for k, v in families.FAMILIES["llama"].items() if k != "per_layer_config"}
    checkpoints.write_checkpoint(tmp_path, plain)
    (tmp_path / "config.json").write_text(json.dumps(plain | {"hidden_act": "gelu"}))
    request = read_request([str(tmp_path), "--skip-tokenizer-init", "--port", "0"])
    assert check(request) is None
    (tmp_path / "config.json").write_text(json.dumps(families.FAMILIES["llama"] | {"hidden_act": "gelu"}))
    with pytest.raises(ConfigError, match="key `hidden_act`: found 'gelu'"):
        check(request)


def test_a_gpt_oss_with_another_clamp_keeps_vllms_class_unless_its_layers_differ() -> None:
    clamp = {"swiglu_limit": 5.0, "layer_types": ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"]}
    config = families.config("gpt_oss", "GptOssForCausalLM", **families.GPT_OSS) | clamp
    config.pop("model_type")
    assert PuzzleGptOssConfig(**config).architectures == ["GptOssForCausalLM"]
    with pytest.raises(ConfigError, match=r"key `swiglu_limit`: found 5\.0, allowed: 7\.0"):
        PuzzleGptOssConfig(**config, per_layer_config={"1": {"num_local_experts": 4}})
