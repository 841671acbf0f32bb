"""Each tensor of each quantized checkpoint counts: dropped, renamed, reshaped, retyped or doubled, it is refused."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
import quantized_checkpoints as quantized
from safetensors.torch import load_file
from vllm_puzzle.model_configs.formats import read_model
from vllm_puzzle.model_configs.json_values import read_object
from vllm_puzzle.model_configs.quantization_formats import load_quantization
from vllm_puzzle.model_configs.schema import ConfigError, Shape
from vllm_puzzle.serving import cpu_defaults
from vllm_puzzle.serving.preflight import check, precision_limits, read_request, read_safetensors_header
from vllm_puzzle.serving.weights import TensorAccount, WeightsError, check_shared_scales, place

Header = tuple[str, Shape, str]


class Checkpoint:
    """One written checkpoint: its tensors' headers, and a fresh account of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        config = read_object(folder / "config.json")
        self.record = read_model(config)
        self.quantization = load_quantization(self.record, folder, config)
        entries = read_safetensors_header(folder / "model.safetensors")
        self.headers = [(name, tuple(entry["shape"]), entry["dtype"]) for name, entry in entries]

    def account(self, headers: Iterable[Header]) -> None:
        account = TensorAccount(self.record, self.quantization)
        for header in headers:
            account.see(*header)
        account.close()

    def refusal(self, headers: Iterable[Header]) -> str:
        with pytest.raises(WeightsError) as caught:
            self.account(headers)
        assert "\n" not in str(caught.value)
        return str(caught.value)


@pytest.fixture(scope="module", params=quantized.KINDS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("tensors") / "model"
    quantized.write(folder, request.param)
    return Checkpoint(folder)


def test_the_checkpoint_passes_the_check_before_the_start(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = read_request([str(checkpoint.folder), "--skip-tokenizer-init", "--port", "0"])
    monkeypatch.setattr(cpu_defaults, "_cpu_has", {"avx512f", "avx512_vnni"}.__contains__)
    assert check(request) == checkpoint.record
    monkeypatch.setattr(cpu_defaults, "_cpu_has", {"avx2"}.__contains__)
    dtypes = {dtype for name, _, dtype in checkpoint.headers if ".weight" in name}
    if cpu_defaults.is_cpu_engine() and not dtypes.isdisjoint({"I8", "I32"}):
        with pytest.raises(ConfigError, match="allowed on this CPU: FP8"):
            check(request)
    else:
        assert check(request) == checkpoint.record


def test_any_dropped_tensor_is_named(checkpoint: Checkpoint) -> None:
    for header in checkpoint.headers:
        error = checkpoint.refusal(other for other in checkpoint.headers if other is not header)
        owner, _, last = header[0].rpartition(".")
        # A KV-cache scale may be spelled in three ways; the first is the one that is asked for.
        is_scale = last in ("k_scale", "v_scale")
        name = f"{owner.partition('.self_attn')[0]}.self_attn.{last}" if is_scale else header[0]
        assert place(name) in error, header


def test_any_renamed_tensor_is_named(checkpoint: Checkpoint) -> None:
    for header in checkpoint.headers:
        renamed = (f"{header[0]}_inv", *header[1:])
        error = checkpoint.refusal(renamed if other is header else other for other in checkpoint.headers)
        assert f"{place(renamed[0])}: found a tensor that the configuration has no place for" in error


def test_any_tensor_of_another_shape_is_named(checkpoint: Checkpoint) -> None:
    # A square matrix looks the same when it is transposed; such a one is cut short instead.
    for name, shape, _ in checkpoint.headers:
        other = shape[::-1] if shape[::-1] != shape else (*shape[:-1], 3)
        error = checkpoint.refusal((n, other if n == name else s, d) for n, s, d in checkpoint.headers)
        assert f"{place(name)}: found shape {other}, allowed: " in error


def test_any_tensor_of_another_type_is_named(checkpoint: Checkpoint) -> None:
    # The quantized values stored plain, and plain ones stored as bytes.
    for name, _, dtype in checkpoint.headers:
        other = "I8" if dtype in ("F32", "BF16") else "BF16"
        error = checkpoint.refusal((n, s, other if n == name else d) for n, s, d in checkpoint.headers)
        assert f"{place(name)}: found dtype {other}, allowed: " in error


def test_any_tensor_that_comes_twice_is_named(checkpoint: Checkpoint) -> None:
    for header in checkpoint.headers:
        assert f"{place(header[0])}: found twice" in checkpoint.refusal([*checkpoint.headers, header])


@pytest.fixture(scope="module")
def kv_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("scales") / "model"
    quantized.write(folder, "fp8 kv")
    return Checkpoint(folder)


@pytest.mark.parametrize("spelling", ["{0}_scale", "attn.{0}_scale", "{0}_proj.{0}_scale"])
def test_kv_scales_come_in_three_spellings_each_once(kv_checkpoint: Checkpoint, spelling: str) -> None:
    respelled = [
        (f"{name.rpartition('.')[0]}.{spelling.format(name[-7])}" if name.endswith("_scale") else name, shape, dtype)
        for name, shape, dtype in kv_checkpoint.headers
    ]
    kv_checkpoint.account(respelled)
    again = ("model.layers.2.self_attn.v_proj.v_scale", (), "F32")
    assert "layer 2, tensor `self_attn.v_proj.v_scale`: found twice" in kv_checkpoint.refusal([*respelled, again])


def test_without_any_kv_scale_it_goes_on_aloud(
    kv_checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import logging

    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)  # vLLM switches it off, and caplog with it
    with caplog.at_level("WARNING", logger="vllm.puzzle"):
        kv_checkpoint.account(header for header in kv_checkpoint.headers if not header[0].endswith("_scale"))
    assert "KV-cache scales: none in the checkpoint, 1.0 is used" in caplog.text


@pytest.mark.parametrize("is_equal", [True, False])
def test_shards_of_an_int8_layer_must_share_their_input_scale(tmp_path: Path, is_equal: bool) -> None:
    quantized.write(tmp_path / "model", "int8 static")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors["model.layers.2.self_attn.k_proj.input_scale"] *= 1 if is_equal else 2
    passed = check_shared_scales(tensors.items(), Checkpoint(tmp_path / "model").quantization)
    if is_equal:
        assert dict(passed) == tensors
        return
    with pytest.raises(WeightsError, match=r"layer 2, tensor `self_attn.[kqv]_proj.input_scale`: found 0.0"):
        list(passed)


def test_the_cpu_defaults_follow_from_what_the_checkpoint_allows(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert checkpoint.quantization is not None
    is_modelopt, has_scales = checkpoint.quantization.method == "modelopt", checkpoint.quantization.has_kv_scales
    limits = precision_limits(str(checkpoint.folder))
    is_packed = any(scheme.is_packed_int for scheme in checkpoint.quantization.schemes.values())
    assert limits == (not is_modelopt and not has_scales and not is_packed, has_scales)
    for flags in ("avx2", "avx2 avx512f"):
        monkeypatch.setattr(cpu_defaults, "_cpu_has", flags.split().__contains__)
        chosen = {s.name: s.value for s in cpu_defaults.cpu_settings(checkpoint.record, 1, *limits)}
        assert chosen.get("dtype") == ("float32" if limits[0] else None)
        assert chosen.get("kv_cache_dtype") == ("bfloat16" if has_scales and flags == "avx2" else None)


def test_a_plain_checkpoint_has_no_place_for_scales(tmp_path: Path) -> None:
    quantized.write(tmp_path / "model", "modelopt fp8")
    (tmp_path / "model" / "hf_quant_config.json").unlink()
    with pytest.raises(WeightsError, match=r"found dtype F8_E4M3, allowed: BF16|no place for"):
        check(read_request([str(tmp_path / "model"), "--skip-tokenizer-init", "--port", "0"]))
