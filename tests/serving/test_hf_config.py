"""What transformers would refuse, or silently read as another model, `serve` says in one line beforehand."""

from __future__ import annotations

from typing import Any

import checkpoints
import families
import published
import pytest
from vllm_puzzle.model_configs.formats import read_model
from vllm_puzzle.model_configs.schema import ConfigError
from vllm_puzzle.serving.hf_config import check_transformers_agrees

FIXTURES = {"deci": checkpoints.deci_config(checkpoints.ALL_KINDS), **families.FAMILIES, **published.PUBLISHED}


@pytest.mark.parametrize("name", FIXTURES)
def test_transformers_reads_every_fixture_as_the_same_model(name: str) -> None:
    check_transformers_agrees(FIXTURES[name], read_model(FIXTURES[name]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rms_norm_eps": 1}, "Field 'rms_norm_eps' expected float"),
        ({"tie_word_embeddings": None}, "Field 'tie_word_embeddings' expected bool"),
        ({"per_layer_config": {"0": {"skip": None}}}, "`skip` must be an iterable of strings"),
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
