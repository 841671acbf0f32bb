"""Every private symbol in the ledger exists in the installed vLLM, and the code touches no other one."""

from __future__ import annotations

import logging

import families
import pytest
from vllm_puzzle.serving import plugin, vllm_compat, vllm_ledger


@pytest.mark.parametrize("entry", vllm_ledger.LEDGER, ids=lambda entry: entry.target)
def test_a_ledger_entry_resolves_and_says_why_and_until_when(entry: vllm_ledger.LedgerEntry) -> None:
    assert vllm_compat.resolve(entry.target) is not None
    assert all(len(text) > 5 for text in (entry.why, entry.upstream, entry.remove_when))


def test_an_unsupported_vllm_is_refused_by_version(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm

    vllm_compat.check_vllm_version()
    monkeypatch.setattr(vllm, "__version__", "0.31.9")
    with pytest.raises(RuntimeError, match=r"found vLLM 0\.31\.9, allowed: >=0\.32,<0\.34"):
        vllm_compat.check_vllm_version()


def test_registering_twice_is_harmless_and_the_names_are_ours() -> None:
    from vllm import ModelRegistry

    plugin.register()
    plugin.register()
    for name in plugin.MODELS:
        assert ModelRegistry.models[name].module_name == "vllm_puzzle.serving.model"


def test_vllm_finds_the_plugins_by_their_entry_points() -> None:
    from importlib.metadata import entry_points

    assert {e.name: e.value for e in entry_points(group="vllm.general_plugins")}[
        "puzzle"
    ] == "vllm_puzzle.serving.plugin:register"
    (endpoint,) = (e for e in entry_points(group="vllm.endpoint_plugins") if e.name == "puzzle_reasoning")
    assert endpoint.load()().name == "puzzle_reasoning"


def test_the_kv_head_count_is_the_largest_layers_and_survives_a_linear_first_layer() -> None:
    import checkpoints
    from vllm.transformers_utils.model_arch_config_convertor import MODEL_ARCH_CONFIG_CONVERTORS
    from vllm_puzzle.serving.hf_config import NemotronNasConfig

    plugin.register()
    blocks = [checkpoints.deci_block("linear", 32), checkpoints.deci_block(4, 32), checkpoints.deci_block(2, 32)]
    config = NemotronNasConfig(**{k: v for k, v in checkpoints.deci_config(blocks).items() if k != "model_type"})
    assert MODEL_ARCH_CONFIG_CONVERTORS["nemotron-nas"](config, config).get_total_num_kv_heads() == 2


@pytest.mark.parametrize("name", ["mamba", "sink tokens", "two experts on their input"])
def test_our_class_refuses_what_vllm_has_nothing_for(name: str) -> None:
    import families
    from vllm_puzzle.model_configs.formats import read_model
    from vllm_puzzle.model_configs.schema import ConfigError
    from vllm_puzzle.serving.servable import check_servable

    with pytest.raises(ConfigError, match=r"^layer 1, (attention|moe).*found .*, allowed: "):
        check_servable(read_model(families.UNSERVED[name]))


@pytest.mark.parametrize("name", list(families.FAMILIES))
def test_only_heterogeneous_checkpoints_of_a_family_get_our_class(name: str) -> None:
    from transformers import AutoConfig
    from vllm_puzzle.model_configs.formats import read_model
    from vllm_puzzle.serving.hf_config import GPT_OSS_ARCHITECTURE, PUZZLE_ARCHITECTURE, model_record

    plugin.register()
    config = families.FAMILIES[name]
    loaded = AutoConfig.for_model(**config)
    ours = {"gpt_oss": GPT_OSS_ARCHITECTURE, "gpt_oss_puzzle": GPT_OSS_ARCHITECTURE}
    stated = ["DeciLMForCausalLM"] if config["model_type"] == "nemotron-nas" else None
    assert loaded.architectures == (stated or [ours.get(config["model_type"], PUZZLE_ARCHITECTURE)])
    read, kept = read_model(config), model_record(loaded)
    assert (kept.layers, kept.rope, kept.is_mxfp4) == (read.layers, read.rope, read.is_mxfp4)
    plain = {key: value for key, value in config.items() if key not in ("per_layer_config", "block_configs")}
    if name != "anymodel" and config["model_type"] not in ("gpt_oss_puzzle", "nemotron-nas"):
        assert AutoConfig.for_model(**plain).architectures == config["architectures"]


def test_a_homogeneous_llama_keeps_vllms_class_and_a_heterogeneous_one_gets_ours() -> None:
    import checkpoints
    from vllm_puzzle.serving.hf_config import PUZZLE_ARCHITECTURE, PuzzleLlamaConfig, model_record

    config = {k: v for k, v in checkpoints.per_layer_config().items() if k != "model_type"}
    assert PuzzleLlamaConfig(**config).architectures == [PUZZLE_ARCHITECTURE]
    assert PuzzleLlamaConfig(**config | {"per_layer_config": None}).architectures == ["LlamaForCausalLM"]
    assert PuzzleLlamaConfig(**config | {"per_layer_config": {"1": {"num_key_value_heads": 4}}}).architectures == [
        "LlamaForCausalLM"
    ]
    windowed = PuzzleLlamaConfig(**config | {"sliding_window": 12})
    assert windowed.sliding_window is None
    windows = [layer.attention.sliding_window for layer in model_record(windowed).layers if layer.attention]  # type: ignore[union-attr]
    assert windows == [12, 12, 16, 12]


def test_taking_a_stock_class_place_is_said_once_and_can_be_switched_off(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_puzzle.serving import overrides
    from vllm_puzzle.serving.hf_config import PuzzleLlamaConfig

    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)  # vLLM switches it off, and caplog with it
    monkeypatch.setattr(overrides, "_said", set())
    config = {k: v for k, v in families.FAMILIES["llama"].items() if k != "model_type"}
    with caplog.at_level("INFO", logger="vllm.puzzle"):
        for _ in range(2):
            PuzzleLlamaConfig(**config)
        records = {id(record): record for record in caplog.records}  # one may pass two of the session's handlers
        assert [record.getMessage() for record in records.values()] == [
            "vllm-puzzle: layers differ: PuzzleForCausalLM serves them in place of vLLM's LlamaForCausalLM"
        ]
        monkeypatch.setenv(overrides.DISABLE_OVERRIDES, "1")
        assert PuzzleLlamaConfig(**config).architectures == ["LlamaForCausalLM"]
    assert caplog.records[-1].levelname == "WARNING"
    assert plugin._served_names() == ["PuzzleForCausalLM", "GptOssPuzzleForCausalLM"]
