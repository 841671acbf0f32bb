"""`--puzzle-ffn-fusion` before vLLM is imported: what it says, what it refuses, and that nothing of it reaches vLLM."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import checkpoints
import families
import pytest
import quantized_checkpoints as quantized
import server
import torch
from checkpoints import deci_block
from safetensors.torch import save_file
from vllm_puzzle.model_configs.ffn_fusion import KEY, fuse, requested_plan
from vllm_puzzle.model_configs.formats import read_model
from vllm_puzzle.model_configs.quantization import stored_tensors
from vllm_puzzle.model_configs.quantization_formats import read_quantization
from vllm_puzzle.model_configs.schema import ConfigError, ModelRecord
from vllm_puzzle.serving.fusion_flags import take_fusion
from vllm_puzzle.serving.overrides import DISABLE_OVERRIDES
from vllm_puzzle.serving.preflight import check, read_request

BLOCKS = [deci_block(2, 48), *(deci_block(None, width) for width in (33, 17, 46)), deci_block(4, 48)]
CONFIG = checkpoints.deci_config(BLOCKS)


def start(folder: Path, *flags: str) -> ModelRecord | None:
    """What `serve` does with its arguments before it starts vLLM."""
    argv, fusion = take_fusion([str(folder), "--skip-tokenizer-init", "--port", "0", *flags])
    return check(read_request(argv, fusion))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    checkpoints.write_checkpoint(tmp_path / "model", CONFIG)
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("argv", "rest", "value"),
    [
        (["M", "--port", "1"], ["M", "--port", "1"], None),
        (["M", "--puzzle-ffn-fusion", "auto"], ["M"], "auto"),
        (["--puzzle-ffn-fusion=1-3", "M"], ["M"], "1-3"),
        (["--puzzle_ffn_fusion=1-3", "--puzzle-ffn-fusion", "off"], [], "off"),
        (
            ["--puzzle-ffn-fusion-norm", "last", "-tp", "2", "--puzzle-ffn-fusion", "1-2+3-4"],
            ["-tp", "2"],
            {"runs": "1-2+3-4", "norm": "last"},
        ),
    ],
)
def test_the_flags_become_the_config_keys_value(argv: list[str], rest: list[str], value: Any) -> None:
    assert take_fusion(argv) == (rest, value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--puzzle-ffn-fusion"], "flag --puzzle-ffn-fusion: found nothing, allowed: off, auto, or runs"),
        (["--puzzle-ffn-fusion", "--port", "1"], "flag --puzzle-ffn-fusion: found nothing"),
        (["--puzzle-ffn-fusion=all"], "flag --puzzle-ffn-fusion: found 'all' in 'all', allowed: off, auto"),
        (["--puzzle-ffn-fusion-norm=last"], "flag --puzzle-ffn-fusion-norm: found without --puzzle-ffn-fusion"),
        (["--puzzle-ffn-fusion-norm"], "flag --puzzle-ffn-fusion-norm: found nothing, allowed: own, last"),
        (
            ["--puzzle-ffn-fusion=auto", "--puzzle-ffn-fusion-norm=mean"],
            "flag --puzzle-ffn-fusion, `norm`: found 'mean', allowed: own, last",
        ),
    ],
)
def test_a_wrong_flag_is_refused_in_one_line(argv: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        take_fusion(argv)
    assert message in str(caught.value)


def test_the_start_says_what_is_fused_and_goes_on_with_the_fused_record(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = read_model(CONFIG)
    assert start(model) == record
    assert start(model, "--puzzle-ffn-fusion", "off") == record
    assert capsys.readouterr().err == ""
    assert start(model, "--puzzle-ffn-fusion", "auto") == fuse(record, requested_plan(record, {KEY: "1-2"}))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("[vllm-puzzle]   FFN Fusion: layers 1-2 (2 FFNs, 50 wide) as one FFN each")


def test_the_flag_wins_over_vllms_overrides_and_these_over_the_file(model: Path) -> None:
    record = read_model(CONFIG)
    (model / "config.json").write_text(json.dumps(CONFIG | {KEY: {"runs": "1-3", "norm": "last"}}))
    in_file, overridden, flagged = (fuse(record, requested_plan(record, {KEY: runs})) for runs in ("1-3", "2-3", "1-2"))
    overrides = ("--hf-overrides", json.dumps({KEY: "2-3"}))
    assert start(model) == in_file
    assert start(model, *overrides) == overridden
    assert start(model, *overrides, "--puzzle-ffn-fusion=1-2") == flagged
    assert start(model, "--puzzle-ffn-fusion=off") == record


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--puzzle-ffn-fusion=0-2"], "run 0-2: found attention in layer 0, allowed: "),
        (
            ["--puzzle-ffn-fusion=1-2", "-tp", "4"],
            "layer 2, ffn, key `intermediate_size`: found 50, allowed: a multiple",
        ),
    ],
)
def test_what_the_model_cannot_have_is_refused_before_vllm_starts(model: Path, flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        start(model, *flags)


def test_widths_that_only_the_sum_divides_may_be_split(tmp_path: Path) -> None:
    blocks = [deci_block(2, 48), deci_block(None, 33), deci_block(None, 17), deci_block(None, 46)]
    checkpoints.write_checkpoint(tmp_path, checkpoints.deci_config(blocks))
    with pytest.raises(ConfigError, match="layer 1, ffn, key `intermediate_size`: found 33"):
        start(tmp_path, "-tp", "2")
    assert start(tmp_path, "-tp", "2", "--puzzle-ffn-fusion=auto") is not None


def test_another_familys_model_is_refused_and_a_homogeneous_one_has_nothing_to_fuse(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = {"model_type": "gemma", "architectures": ["GemmaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(other))
    with pytest.raises(ConfigError, match="found on model_type 'gemma', allowed: off, or on one of nemotron-nas"):
        start(tmp_path, "--puzzle-ffn-fusion=auto", "--load-format", "dummy")
    assert start(tmp_path, "--load-format", "dummy") is None
    plain = families.config("llama", "LlamaForCausalLM")
    (tmp_path / "config.json").write_text(json.dumps(plain))
    assert start(tmp_path, "--puzzle-ffn-fusion=auto", "--load-format", "dummy") == read_model(plain)
    assert "found no run of attention-free layers" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="found attention in layer 1"):
        start(tmp_path, "--puzzle-ffn-fusion=1-2", "--load-format", "dummy")


def test_a_class_that_fuses_nothing_is_not_asked_to(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DISABLE_OVERRIDES, "1")
    with pytest.raises(ConfigError, match=f"found with {DISABLE_OVERRIDES}, allowed: off"):
        start(model, "--puzzle-ffn-fusion=auto")


def test_a_hub_models_cached_configuration_is_asked_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants, file_download

    snapshot = tmp_path / "models--some--model" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (tmp_path / "models--some--model" / "refs").mkdir()
    (tmp_path / "models--some--model" / "refs" / "main").write_text("0" * 40)
    (snapshot / "config.json").write_text(json.dumps({"model_type": "gemma"}))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert file_download.constants is constants
    with pytest.raises(ConfigError, match="found on model_type 'gemma', allowed: off"):
        check(read_request(["some/model", "--port", "0"], "auto"))


@pytest.mark.slow
def test_the_flags_reach_the_engine_of_a_server(tmp_path: Path) -> None:
    flags = ("--puzzle-ffn-fusion", "5-7", "--puzzle-ffn-fusion-norm=last", "--hf-overrides", '{"bos_token_id": 3}')
    log = tmp_path / "log.txt"
    with server.running(log, *flags) as url:
        body = json.dumps({"model": "pocket-puzzle", "prompt": "1+2", "max_tokens": 3}).encode()
        request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as reply:
            assert json.load(reply)["usage"]["completion_tokens"] > 0
    said = [line for line in log.read_text().splitlines() if "FFN Fusion: layers 5-7 (3 FFNs, 768 wide)" in line]
    assert [line.startswith("[vllm-puzzle]") for line in said] == [True, False], "before the start, and by the engine"
    assert all("the last layer's norm for all" in line for line in said)


# --- quantized checkpoints ---------------------------------------------------------------------------------------


def write_fp8(folder: Path, **numbers: float) -> None:
    """ModelOpt FP8 per tensor; all numbers 1 but those named `layer_2_up_proj_weight_scale`."""
    entry = quantized.modelopt_entry(quant_algo="FP8", exclude_modules=["lm_head"])
    config = CONFIG | {"quantization_config": entry, "torch_dtype": "bfloat16"}
    record = read_model(config)
    tensors = {}
    for name, stored in stored_tensors(record, read_quantization(record, entry)).items():
        dtype = torch.float8_e4m3fn if stored.dtypes == ("F8_E4M3",) else torch.bfloat16
        tensors[name] = torch.ones(stored.shapes[0], dtype=dtype)
    for name, number in numbers.items():
        layer, _, rest = name.removeprefix("layer_").partition("_")
        matrix, _, part = rest.partition("_proj_")
        tensors[f"model.layers.{layer}.mlp.{matrix}_proj.{part}"] *= number
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")


def test_numbers_that_differ_are_found_before_vllm_starts(tmp_path: Path) -> None:
    flags = ("--puzzle-ffn-fusion=1-3", "--puzzle-ffn-fusion-norm=last")
    write_fp8(tmp_path / "same")
    assert start(tmp_path / "same", *flags) is not None
    for name in ("layer_2_up_proj_weight_scale", "layer_3_down_proj_input_scale"):
        write_fp8(tmp_path / name, **{name: 2.0})
        assert start(tmp_path / name) is not None
        with pytest.raises(
            ConfigError, match=r"FFN Fusion of layers 1-3, `.*_scale`: found different numbers in its parts"
        ):
            start(tmp_path / name, *flags)


def test_a_norm_that_cannot_be_folded_is_refused_before_vllm_starts(tmp_path: Path) -> None:
    write_fp8(tmp_path / "model")
    with pytest.raises(ConfigError, match="found ModelOpt FP8 with norm `own`, allowed: norm `last`"):
        start(tmp_path / "model", "--puzzle-ffn-fusion=auto")
