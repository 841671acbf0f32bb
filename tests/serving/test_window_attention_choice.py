"""Which layers take our attention backend, what the flag says, and that what is launched depends on shapes only."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import families
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.platforms.interface import DeviceCapability
from vllm_puzzle.kernels import attention_table
from vllm_puzzle.kernels.attention_table import Choice
from vllm_puzzle.model_configs.formats import read_model
from vllm_puzzle.model_configs.partition import layer_bytes
from vllm_puzzle.model_configs.schema import Attention, ConfigError
from vllm_puzzle.serving import plugin, servable, window_attention, window_attention_mode
from vllm_puzzle.serving.window_attention import HASHED, choose_backend
from vllm_puzzle.serving.window_attention_mode import FLAG, VARIABLE, take_window_attention

WINDOWED = Attention(num_heads=8, num_kv_heads=2, head_dim=64, sliding_window=128)
FULL = Attention(num_heads=8, num_kv_heads=2, head_dim=64)
PREFIX = "model.layers.3.self_attn"


class Rotary(torch.nn.Module):
    is_neox_style = True

    def __init__(self, rotary_dim: int = 64) -> None:
        super().__init__()
        self.register_buffer("cos_sin_cache", torch.rand(512, rotary_dim))


def config(**changes: Any) -> Any:
    cache = {
        "cache_dtype": "auto", "kv_cache_dtype_skip_layers": [], "block_size": 16, "user_specified_block_size": False,
    }  # fmt: skip
    parallel = {"prefill_context_parallel_size": 1, "decode_context_parallel_size": 1, "enable_dbo": False}
    return SimpleNamespace(
        cache_config=SimpleNamespace(**{key: changes.get(key, value) for key, value in cache.items()}),
        parallel_config=SimpleNamespace(**{key: changes.get(key, value) for key, value in parallel.items()}),
        quant_config=None,
        additional_config={},
    )


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    platform = SimpleNamespace(
        is_cuda=lambda: True, is_cpu=lambda: False, get_device_name=lambda: "H",
        get_device_capability=lambda: DeviceCapability(9, 0),
    )  # fmt: skip
    monkeypatch.setattr(window_attention, "current_platform", platform)
    monkeypatch.setattr(torch, "get_default_dtype", lambda: torch.bfloat16)


def chosen(
    spec: Attention = WINDOWED, found: Any = None, rotary: Rotary | None = None
) -> tuple[str | None, dict[str, Any]]:
    backend, arguments = choose_backend(spec, found or config(), PREFIX, rotary or Rotary())
    return backend and backend.get_name(), arguments


@pytest.mark.parametrize("mode", ["auto", "off"])
def test_without_a_table_auto_is_off(hopper: None, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    monkeypatch.setenv(VARIABLE, mode)
    assert chosen() == (None, {})


def test_on_takes_layers_with_a_window_and_keeps_vllms_for_full_ones(
    hopper: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "on")
    found = config()
    assert chosen(FULL, found) == (None, {}) and found.additional_config == {}
    name, arguments = chosen(WINDOWED, found)
    assert name == "CUSTOM" and (arguments["window"], arguments["num_sink_tokens"]) == (128, 0)
    assert isinstance(arguments["rotary"], Rotary)
    assert found.additional_config == {HASHED: [f"{PREFIX} rotates"]}, "vLLM's key of compiled graphs must differ"


@pytest.mark.parametrize(
    ("rotary", "changes"), [(Rotary(32), {}), (Rotary(), {"enable_dbo": True})], ids=["partial", "micro-batches"]
)
def test_the_layer_rotates_where_the_kernel_cannot(
    hopper: None, monkeypatch: pytest.MonkeyPatch, rotary: Rotary, changes: dict[str, Any]
) -> None:
    monkeypatch.setenv(VARIABLE, "on")
    name, arguments = chosen(WINDOWED, config(**changes), rotary)
    assert name == "CUSTOM" and "rotary" not in arguments


@pytest.mark.parametrize(
    ("changes", "cache"),
    [
        ({}, "bfloat16"),
        ({"cache_dtype": "fp8"}, "e4m3"),
        ({"cache_dtype": "fp8", "kv_cache_dtype_skip_layers": ["3"]}, "bfloat16"),
        ({"cache_dtype": "fp8", "kv_cache_dtype_skip_layers": ["sliding_window"]}, "bfloat16"),
        ({"cache_dtype": "fp8", "kv_cache_dtype_skip_layers": ["13"]}, "e4m3"),
    ],
)
def test_auto_asks_the_table_for_the_layers_own_cache(
    hopper: None, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], cache: str
) -> None:
    asked = []

    def choose(*case: Any) -> Choice:
        asked.append(case)
        return Choice(fused=False)

    monkeypatch.setenv(VARIABLE, "auto")
    monkeypatch.setattr(attention_table, "choose", choose)
    name, arguments = chosen(WINDOWED, config(**changes))
    assert (name, asked) == ("CUSTOM", [("H", 64, cache, 128)])
    assert arguments["fuses_decode"] is False, "as the table says"


@pytest.mark.parametrize(
    ("spec", "changes", "reason"),
    [
        (Attention(8, 2, 320, 128), {}, "head_size not supported"),
        (Attention(8, 2, 24, 128), {}, "head_size not supported"),
        (WINDOWED, {"cache_dtype": "fp8_e5m2"}, "kv_cache_dtype not supported"),
        (WINDOWED, {"cache_dtype": "float16"}, "KV cache in float16 beside torch.bfloat16"),
        (WINDOWED, {"block_size": 8, "user_specified_block_size": True}, "block_size not supported"),
        (WINDOWED, {"decode_context_parallel_size": 2}, "DCP not supported"),
    ],
)
def test_on_where_the_backend_cannot_run_is_refused_in_one_line_and_auto_keeps_vllms(
    hopper: None, monkeypatch: pytest.MonkeyPatch, spec: Attention, changes: dict[str, Any], reason: str
) -> None:
    monkeypatch.setattr(attention_table, "choose", lambda *case: pytest.fail("no table is asked"))
    monkeypatch.setenv(VARIABLE, "on")
    with pytest.raises(ConfigError, match=f"^flag {FLAG}: found on, allowed: auto or off, as {reason} .*{PREFIX}"):
        chosen(spec, config(**changes))
    monkeypatch.setenv(VARIABLE, "auto")
    assert chosen(spec, config(**changes)) == (None, {})


def test_fp8_needs_a_gpu_that_converts_it(hopper: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "on")
    monkeypatch.setattr(window_attention.current_platform, "get_device_capability", lambda: DeviceCapability(8, 0))
    assert chosen()[0] == "CUSTOM"
    with pytest.raises(ConfigError, match=r"FP8 KV cache needs compute capability 8\.9"):
        chosen(WINDOWED, config(cache_dtype="fp8"))


def test_a_cpu_without_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "on")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    platform = SimpleNamespace(is_cuda=lambda: False, is_cpu=lambda: True)
    monkeypatch.setattr(window_attention, "current_platform", platform)
    with pytest.raises(ConfigError, match="it runs on NVIDIA GPUs"):
        chosen()


@pytest.mark.parametrize(
    ("argv", "rest", "mode"),
    [
        (["m", FLAG, "on", "--port", "1"], ["m", "--port", "1"], "on"),
        (["m", f"{FLAG}=off"], ["m"], "off"),
        (["m", "--puzzle_window_attention=on"], ["m"], "on"),
        (["m"], ["m"], "auto"),
    ],
)
def test_the_flag_becomes_the_variable(
    monkeypatch: pytest.MonkeyPatch, argv: list[str], rest: list[str], mode: str
) -> None:
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(window_attention_mode, "is_cpu_engine", lambda: False)
    assert take_window_attention(argv) == rest
    assert window_attention_mode.window_attention_mode() == mode


def test_on_a_cpu_the_flag_is_refused_before_vllm_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(window_attention_mode, "is_cpu_engine", lambda: True)
    assert take_window_attention(["m", FLAG, "auto"]) == ["m"]
    with pytest.raises(ConfigError, match=f"^flag {FLAG}: found on, allowed: auto or off"):
        take_window_attention(["m", FLAG, "on"])


@pytest.mark.parametrize("argv", [["m", FLAG], ["m", f"{FLAG}=yes"]])
def test_another_value_is_refused(monkeypatch: pytest.MonkeyPatch, argv: list[str]) -> None:
    monkeypatch.setattr(os, "environ", {})
    with pytest.raises(ConfigError, match=f"^flag {FLAG}: found .*, allowed: auto, on, off"):
        take_window_attention(argv)


@pytest.mark.parametrize(("mode", "is_cpu", "interprets", "serves"), [
    ("on", False, False, True), ("on", True, False, False), ("on", True, True, True), ("auto", False, False, False),
])  # fmt: skip
def test_sink_tokens_are_served_where_our_backend_is_on_and_runs(
    monkeypatch: pytest.MonkeyPatch, mode: str, is_cpu: bool, interprets: bool, serves: bool
) -> None:
    record = read_model(families.UNSERVED["sink tokens"])
    monkeypatch.setattr(window_attention_mode, "is_cpu_engine", lambda: is_cpu)
    monkeypatch.setattr(os, "environ", {VARIABLE: mode, "TRITON_INTERPRET": str(int(interprets))})
    if serves:
        servable.check_servable(record)
        return
    with pytest.raises(ConfigError, match=f"found 4, allowed: null .*{FLAG} on"):
        servable.check_servable(record)


def test_a_cache_that_keeps_sink_tokens_is_planned_with_every_token() -> None:
    record = read_model(families.UNSERVED["sink tokens"])
    full, kept = (layer_bytes(record, layer, 4096) for layer in record.layers)
    assert full == kept, "the two layers differ in window and sink tokens only"


def test_the_backend_is_registered_once_and_leaves_another_plugins_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
    from vllm_puzzle.serving.window_attention_backend import WindowAttentionBackend

    plugin.register()
    plugin.register()
    assert AttentionBackendEnum.CUSTOM.get_class() is WindowAttentionBackend
    register_backend(AttentionBackendEnum.CUSTOM, "another.plugin.Backend")
    try:
        plugin.register()
        assert AttentionBackendEnum.CUSTOM.get_path() == "another.plugin.Backend"
    finally:
        register_backend(AttentionBackendEnum.CUSTOM, plugin.ATTENTION_BACKEND)


class NoSync(TorchDispatchMode):
    """Fails where the host would wait for the device, or make something of a size that depends on values."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "item")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not any(name in str(func) for name in self.FORBIDDEN), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rotates", [True, False])
@pytest.mark.parametrize("query_len", [1, 4, 40])
def test_what_is_launched_depends_on_shapes_only(
    monkeypatch: pytest.MonkeyPatch, query_len: int, rotates: bool
) -> None:
    from triton.runtime.jit import JITFunction
    from vllm_puzzle.kernels.window_attention import Scratch
    from vllm_puzzle.serving.window_attention_backend import WindowAttentionImpl, WindowAttentionMetadata

    launches: list[Any] = []

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        values = [*args, *kwargs.items()]
        launches.append((self.fn.__name__, grid, [v for v in values if not has_tensor(v)]))

    monkeypatch.setattr(JITFunction, "run", record)
    impl = WindowAttentionImpl(8, 64, 0.125, 2, None, 128, "fp8", rotary=Rotary() if rotates else None)
    layer = SimpleNamespace(_k_scale=torch.tensor(1.0), _v_scale=torch.tensor(1.0))
    cache, scratch = torch.zeros(40, 2, 16, 128, dtype=torch.uint8), Scratch.allocate(4, 8, 64, device="cpu")
    seen = []
    for lengths in ([200, 90, 41, 0], [300, 300, 300, 300]):
        launches.clear()
        tokens = 4 * query_len
        qkv = torch.randn(tokens, 12 * 64)
        q, k, v = (x.unflatten(-1, (-1, 64)) for x in qkv.split([512, 128, 128], dim=-1))
        metadata = WindowAttentionMetadata(
            tokens, query_len, torch.arange(5, dtype=torch.int32) * query_len, torch.tensor(lengths, dtype=torch.int32),
            torch.randint(0, 40, (4, 20), dtype=torch.int32), torch.randint(-1, 600, (tokens,)),
            torch.randint(0, 500, (tokens,)), scratch,
        )  # fmt: skip
        with NoSync():
            impl.forward(layer, q, k, v, cache, metadata, torch.empty(tokens, 8, 64))
        seen.append(list(launches))
    assert seen[0] == seen[1]
    names = [name for name, _, _ in seen[0]]
    assert names == ["fused_decode_kernel"] if query_len == 1 and rotates else names[0] == "kv_write_kernel"


def has_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or (isinstance(value, tuple) and any(map(has_tensor, value)))
