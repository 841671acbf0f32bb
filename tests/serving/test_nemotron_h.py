"""NemotronH: the plugin leaves it alone, `inspect` reads it, and Nemotron Puzzle needs no remote code."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import nemotron
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig
from vllm_puzzle.model_configs.formats import read_model
from vllm_puzzle.model_configs.inspect_model import describe, format_table, load_record
from vllm_puzzle.model_configs.schema import Attention, ConfigError, Mamba2, MoE, PlainFFN
from vllm_puzzle.model_configs.tensors import model_tensors
from vllm_puzzle.serving import plugin
from vllm_puzzle.serving.hf_config import NemotronHPuzzleConfig, model_record
from vllm_puzzle.serving.preflight import check, read_request

BUILDER = Path(__file__).with_name("nemotron_build.py")
PLAIN = ("nemotron-3-nano-30b-a3b", "nemotron-3-super-120b-a12b-fp8", "nemotron-3-ultra-550b-a55b")
# The published head: 1040 bf16 tensors (a census of the 75B's mtp.safetensors), among them 512 experts of 2688.
PUBLISHED_MTP_TENSORS = 1040


def write(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def loaded(tmp_path: Path) -> NemotronHPuzzleConfig:
    """The toy from its directory, which names remote code and has none."""
    plugin.register()
    config = AutoConfig.from_pretrained(write(tmp_path / "toy", nemotron.toy()))
    assert type(config) is NemotronHPuzzleConfig
    return config


def test_the_published_shape_loads_without_remote_code(loaded: NemotronHPuzzleConfig) -> None:
    assert loaded.architectures == ["NemotronHPuzzleForCausalLM"]
    assert loaded.hybrid_override_pattern == "ME*EM-*E"
    assert loaded.mtp_hybrid_override_pattern == "*E"
    assert (loaded.n_routed_experts, loaded.num_experts_per_tok, loaded.mtp_n_routed_experts) == (8, 4, 8)


def test_a_layers_view_has_its_own_sizes_and_the_models_for_the_rest(loaded: NemotronHPuzzleConfig) -> None:
    views = [loaded.get_nemotron_h_config_for_layer(index) for index in range(10)]
    assert [view.moe_intermediate_size for view in (views[1], views[3], views[7])] == [32, 48, 32]
    assert [view.num_experts_per_tok for view in (views[1], views[3], views[7])] == [2, 3, 4]
    assert [view.sliding_window for view in (views[2], views[6])] == [None, 24]
    assert (views[5].intermediate_size, views[5].hidden_size) == (96, 64)
    # Multi-token prediction goes on counting where the layers end: attention, then experts of its own.
    assert (views[8].sliding_window, views[9].moe_intermediate_size, views[9].num_experts_per_tok) == (None, 2688, 8)
    assert (loaded.moe_intermediate_size, loaded.sliding_window) == (48, None), "a view changes nothing but itself"


def test_saving_and_loading_keeps_every_layer(loaded: NemotronHPuzzleConfig, tmp_path: Path) -> None:
    loaded.save_pretrained(tmp_path / "saved")
    again = AutoConfig.from_pretrained(tmp_path / "saved")
    assert type(again) is NemotronHPuzzleConfig
    assert model_record(again) == model_record(loaded)
    again._name_or_path = loaded._name_or_path
    assert again.to_dict() == loaded.to_dict()
    assert model_record(loaded).layers == read_model(nemotron.toy()).layers


def test_a_config_without_prediction_layers_refuses_to_invent_them(loaded: NemotronHPuzzleConfig) -> None:
    fields = {key: value for key, value in nemotron.toy().items() if key not in ("mtp_block_configs", "model_type")}
    with pytest.raises(ConfigError, match="key `mtp_block_configs`: found nothing, allowed: a list"):
        NemotronHPuzzleConfig(**fields).get_nemotron_h_config_for_layer(8)


def changed(index: int, **keys: Any) -> dict[str, Any]:
    config = copy.deepcopy(nemotron.toy())
    config["block_configs"][index] |= keys
    return config


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (changed(1, top_k=3), "layer 1, moe, key `top_k`: found an unknown key, allowed: block_type, n_routed"),
        (changed(2, block_type="conv"), "layer 2: found block type 'conv', allowed: mamba, attention, mlp, moe"),
        (changed(3, num_experts_per_tok=9), "layer 3, moe, key `num_experts_per_tok`: found 9, allowed: at most the 8"),
        (changed(4, ssm_state_size=64), "layer 4, mamba, key `ssm_state_size`: found 64, allowed: 32, as before"),
        (
            nemotron.toy() | {"layers_block_type": ["moe"] * 8},
            "layer 0, key `layers_block_type`: found 'moe', allowed: mamba, as in `block_configs`",
        ),
        (
            nemotron.toy() | {"hybrid_override_pattern": "ME*EM-*"},
            "layer 7, key `layers_block_type`: found nothing, allowed: moe, as in",
        ),
        (
            nemotron.toy() | {"mtp_block_configs": [{"block_type": "moe", "width": 4}]},
            "mtp layer 0, moe, key `width`: found an unknown key",
        ),
    ],
)
def test_a_bad_block_stops_the_configuration_in_one_line(config: dict[str, Any], message: str) -> None:
    plugin.register()
    with pytest.raises(ConfigError) as caught:
        AutoConfig.for_model(**config)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_inspect_shows_every_kind_of_layer_with_its_own_sizes(tmp_path: Path) -> None:
    record = load_record(write(tmp_path / "toy", nemotron.toy()))
    layers = describe(record)["layers"]
    assert [layer["attention"] or layer["ffn"] for layer in layers] == [
        "mamba2", "moe", "full", "moe", "mamba2", "relu2", "window", "moe",
    ]  # fmt: skip
    assert [(layers[i]["ffn_width"], layers[i]["experts"]) for i in (1, 3, 7)] == [
        (32, "2/8"),
        (48, "3/8"),
        (32, "4/8"),
    ]
    assert record.layers[0].attention == Mamba2(8, 16, 32, 2, 4)
    assert record.layers[5].ffn == PlainFFN(96)
    assert "5       -          -         -       relu2  96" in format_table(record)


def test_the_made_up_75b_keeps_to_what_is_published() -> None:
    layers = read_model(nemotron.puzzle_75b()).layers
    experts = [layer.ffn for layer in layers if isinstance(layer.ffn, MoE)]
    attentions = [layer.attention for layer in layers if isinstance(layer.attention, Attention)]
    mambas = [layer.attention for layer in layers if isinstance(layer.attention, Mamba2)]
    assert (len(mambas), len(attentions), len(experts)) == (40, 8, 40)
    assert {(a.num_heads, a.num_kv_heads) for a in attentions} == {(32, 2)}
    assert {mamba.state_size for mamba in mambas} == {96}
    assert {moe.intermediate_size for moe in experts} <= set(range(1280, 2689))
    assert (min(m.num_experts_per_tok for m in experts), max(m.num_experts_per_tok for m in experts)) == (4, 18)


@pytest.mark.parametrize("name", [*PLAIN, "toy"])
def test_preflight_lets_nemotron_h_through_untouched(root: Path, tmp_path: Path, name: str) -> None:
    published = root / "model_configs" / "published" / f"{name}.json"
    folder = write(tmp_path / name, nemotron.toy() if name == "toy" else json.loads(published.read_text()))
    request = read_request([str(folder), "--skip-tokenizer-init", "--load-format", "dummy", "--port", "0"])
    assert check(request) is None


def test_preflight_reads_the_headers_of_nemotron_h_weights_and_nothing_more(tmp_path: Path) -> None:
    folder = write(tmp_path / "toy", nemotron.toy())
    names = model_tensors(load_record(folder))
    # As published for the BF16 files (`model.`); the table has the NVFP4 files' `backbone.`, and vLLM takes both.
    tensors = {name.replace("backbone.", "model."): torch.zeros(shape) for name, shape in names.items()}
    save_file(tensors, folder / "model.safetensors")
    assert check(read_request([str(folder), "--skip-tokenizer-init", "--port", "0"])) is None
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(ConfigError, match=r"model\.safetensors: found 1000 bytes"):
        check(read_request([str(folder), "--skip-tokenizer-init", "--port", "0"]))


@pytest.fixture(scope="module")
def outcome(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("nemotron")
    configs = {"toy puzzle": nemotron.toy(), "75b puzzle": nemotron.puzzle_75b()}
    configs |= {name: json.loads((root / "model_configs" / "published" / f"{name}.json").read_text()) for name in PLAIN}
    folders = [str(write(folder / name, config)) for name, config in configs.items()]
    done = subprocess.run(
        [sys.executable, "-P", str(BUILDER), *folders],
        env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_PLUGINS": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", PLAIN)
def test_vllm_sees_the_same_nemotron_h_with_the_plugin_and_without(outcome: dict[str, Any], name: str) -> None:
    assert outcome[name]["with"] == outcome[name]["without"]
    assert outcome[name]["with"]["config_class"].startswith("transformers.")
    assert outcome[name]["with"]["model_class"] == "vllm.model_executor.models.nemotron_h.NemotronHForCausalLM"


@pytest.mark.slow
def test_vllm_alone_wants_remote_code_for_a_puzzle_and_with_the_plugin_none(outcome: dict[str, Any]) -> None:
    found = outcome["75b puzzle"]
    assert "trust_remote_code" in found["without"] or "trust-remote-code" in found["without"]
    assert found["with"]["config_class"] == "vllm_puzzle.serving.hf_config.NemotronHPuzzleConfig"
    assert found["with"]["model_class"] == "vllm.model_executor.models.nemotron_h.NemotronHForCausalLM"
    assert "num_experts=512, num_experts_per_token=18" in found["with"]["sizes"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["toy puzzle", "75b puzzle", *PLAIN])
def test_vllms_own_class_has_the_parameters_that_inspect_counts(root: Path, outcome: dict[str, Any], name: str) -> None:
    made_up = {"toy puzzle": nemotron.toy, "75b puzzle": nemotron.puzzle_75b}
    file = root / "model_configs" / "published" / f"{name}.json"
    config = made_up[name]() if name in made_up else json.loads(file.read_text())
    assert sum(outcome[name]["target"].values()) == describe(read_model(config))["num_parameters"]


@pytest.mark.slow
def test_vllm_builds_the_prediction_layers_from_their_own_blocks(outcome: dict[str, Any]) -> None:
    draft = outcome["75b puzzle"]["draft"]
    hidden, experts, width, latent, shared = 4096, 512, 2688, 1024, 5376
    routed = "model.layers.1.mixer.experts.routed_experts"
    assert draft[f"{routed}.w13_weight"] == draft[f"{routed}.w2_weight"] == experts * width * latent
    assert draft["model.layers.1.mixer.shared_experts.up_proj.weight"] == shared * hidden
    # In the file q, k and v are three tensors, and each expert has two.
    assert len(draft) + 2 + (2 * experts - 2) == PUBLISHED_MTP_TENSORS


@pytest.mark.slow
def test_vllm_has_no_nemotron_experts_on_cpu(outcome: dict[str, Any]) -> None:
    assert "is supported only for CUDA" in outcome["refusal"], "then NemotronH can be run here, and should be tested"
