"""Our configuration classes: converted models mean the same to vLLM, and no window is lost between two classes."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import families
import pytest
from transformers import AutoConfig
from vllm_puzzle.model_configs.convert import FORMATS, convert_config
from vllm_puzzle.model_configs.formats import read_model
from vllm_puzzle.model_configs.schema import ConfigError
from vllm_puzzle.serving import plugin
from vllm_puzzle.serving.hf_config import GPT_OSS_ARCHITECTURE, PUZZLE_ARCHITECTURE, model_record


def converted() -> dict[str, tuple[str, dict[str, Any]]]:
    """Name → source and converted configuration, of all pairs that exist (which do not, and why: test_convert.py)."""
    pairs = {}
    for name, source in families.FAMILIES.items():
        for to in FORMATS:
            with suppress(ConfigError):
                pairs[f"{name} as {to}"] = (name, convert_config(source, to))
    return pairs


CONVERTED = converted()


@pytest.mark.parametrize("pair", CONVERTED)
def test_a_converted_configuration_loads_as_the_same_model_for_our_class(pair: str) -> None:
    plugin.register()
    name, written = CONVERTED[pair]
    source = families.FAMILIES[name]
    loaded, expected = AutoConfig.for_model(**written), read_model(source)
    found = model_record(loaded)
    assert (found.layers, found.rope, found.is_mxfp4) == (expected.layers, expected.rope, expected.is_mxfp4)
    ours = {"gpt_oss": GPT_OSS_ARCHITECTURE, "nemotron-nas": "DeciLMForCausalLM"}
    assert loaded.architectures == [ours.get(written["model_type"], PUZZLE_ARCHITECTURE)]


WINDOW_OVERRIDE = {"1": {"sliding_window": 16}}
ON_SOME: list[tuple[str, str, dict[str, Any], list[int | None]]] = [
    ("llama", "LlamaForCausalLM", {"per_layer_config": WINDOW_OVERRIDE}, [None, 16, None, None, None]),
    ("qwen2", "Qwen2ForCausalLM", {"per_layer_config": WINDOW_OVERRIDE}, [None, 16, None, None, None]),
    (
        "mistral",
        "MistralForCausalLM",
        {"per_layer_config": {"1": {"intermediate_size": 96}}, "sliding_window": 24},
        [24] * 5,
    ),
    (
        "qwen2",
        "Qwen2ForCausalLM",
        {"per_layer_config": WINDOW_OVERRIDE, "use_sliding_window": True, "sliding_window": 24, "max_window_layers": 0},
        [24, 16, 24, 24, 24],
    ),
    (
        "llama",
        "LlamaForCausalLM",
        {"block_configs": [families.v2_block({"sliding_window_size": window}, {}) for window in (8, 16, 8, 8, 16)]},
        [8, 16, 8, 8, 16],
    ),
]


@pytest.mark.parametrize(("family", "architecture", "changes", "windows"), ON_SOME)
def test_windows_that_only_a_layers_description_holds_get_our_class(
    family: str, architecture: str, changes: dict[str, Any], windows: list[int | None]
) -> None:
    """vLLM's own class reads the model's window alone, and would serve full attention here."""
    plugin.register()
    loaded = AutoConfig.for_model(**families.config(family, architecture, **changes))
    assert [attention.sliding_window for attention in model_record(loaded).attentions] == windows
    assert loaded.architectures == [PUZZLE_ARCHITECTURE]


def test_a_homogeneous_model_with_one_window_keeps_vllms_class() -> None:
    plugin.register()
    loaded = AutoConfig.for_model(**families.config("mistral", "MistralForCausalLM", sliding_window=24))
    assert (loaded.architectures, loaded.sliding_window) == (["MistralForCausalLM"], 24)
