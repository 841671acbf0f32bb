"""A user's mistake is one line on stderr (what, where, found, allowed) and a non-zero status, before vLLM starts."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoints
import families
import pytest
import server
from safetensors.torch import load_file, save_file


@pytest.fixture
def model(tmp_path: Path, root: Path) -> Path:
    """A small heterogeneous checkpoint with the pocket model's tokenizer: complete, so that one fault stands alone."""
    folder = tmp_path / "model"
    checkpoints.write_checkpoint(folder, checkpoints.deci_config(checkpoints.ALL_KINDS))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text((root / "model_configs" / "pocket" / "puzzle" / name).read_text())
    return folder


def serve(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(server.command("serve", *arguments), capture_output=True, text=True, timeout=60)


def edit_config(model: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((model / "config.json").read_text())
    change(config)
    (model / "config.json").write_text(json.dumps(config))


def edit_tensors(model: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors")


def truncate(model: Path) -> None:
    file = model / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1000)


NAME = "model.layers.3.mlp.up_proj.weight"
FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "unknown key in a block": (
        lambda m: edit_config(m, lambda c: c["block_configs"][2]["attention"].update(colour="red")),
        "layer 2, attention, key `colour`: found an unknown key",
    ),
    "KV heads that do not divide": (
        lambda m: edit_config(m, lambda c: c["block_configs"][2]["attention"].update(n_heads_in_group=3)),
        "layer 2, attention, key `n_heads_in_group`: found 3, allowed: a divisor of the 4",
    ),
    "hidden size that does not divide": (
        lambda m: edit_config(m, lambda c: c.update(hidden_size=65, head_dim=None)),
        "key `hidden_size`: found 65, allowed: a multiple of the 4",
    ),
    "truncated safetensors": (truncate, "(truncated?)"),
    "empty safetensors": (lambda m: (m / "model.safetensors").write_bytes(b""), "truncated"),
    "missing tensor": (
        lambda m: edit_tensors(m, lambda t: t.pop(NAME)),
        "layer 3, tensor `mlp.up_proj.weight`: found nothing in the checkpoint",
    ),
    "surplus tensor": (
        lambda m: edit_tensors(m, lambda t: t.update({"model.layers.0.mlp.up_proj.weight": t[NAME].clone()})),
        "layer 0, tensor `mlp.up_proj.weight`: found a tensor that the configuration has no place for",
    ),
    "wrong shape": (
        lambda m: edit_tensors(m, lambda t: t.update({NAME: t[NAME][1:].clone()})),
        "layer 3, tensor `mlp.up_proj.weight`: found shape (39, 64), allowed: (40, 64)",
    ),
    "wrong dtype": (
        lambda m: edit_tensors(m, lambda t: t.update({NAME: t[NAME].int()})),
        "layer 3, tensor `mlp.up_proj.weight`: found dtype I32, allowed: BF16, F16, F32",
    ),
    "mamba in DeciLM": (
        lambda m: (m / "config.json").write_text(json.dumps(families.UNSERVED["mamba"])),
        "layer 1, attention: found mamba, allowed: attention, a linear map or nothing",
    ),
    "sink tokens": (
        lambda m: (m / "config.json").write_text(json.dumps(families.UNSERVED["sink tokens"])),
        "layer 1, attention, key `num_sink_tokens`: found 4, allowed: null",
    ),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), "found no weights"),
    "missing tokenizer": (lambda m: (m / "tokenizer.json").unlink(), "found no tokenizer, allowed: one of"),
    "missing config": (lambda m: (m / "config.json").unlink(), "found no config.json"),
    "broken config": (lambda m: (m / "config.json").write_text("{"), "allowed: a JSON object"),
    "missing shard": (
        lambda m: (m / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-2.safetensors"}}'),
        "found no file model-2.safetensors",
    ),
}


def assert_one_line(done: subprocess.CompletedProcess[str], message: str) -> None:
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if not line.startswith("[vllm-puzzle")]
    assert len(errors) == 1, done.stderr
    assert message in errors[0]
    assert "found" in errors[0]
    assert "allowed:" in errors[0]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_model_directory_gives_one_clear_line(model: Path, fault: str) -> None:
    break_it, message = FAULTS[fault]
    break_it(model)
    assert_one_line(serve(str(model), "--port", "0"), message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "float7"], "flag --dtype: found 'float7', allowed: auto, half"),
        (["--port", "http"], "flag --port: found 'http', allowed: an integer"),
        (["--port", "70000"], "flag --port: found 70000, allowed: 0 to 65535"),
        (["--tensor_parallel_size=3"], "found 4, allowed: a multiple of --tensor-parallel-size 3"),
        (["--config", "/nowhere.yaml"], "flag --config: found"),
        (["-tp", "0"], "flag --tensor-parallel-size: found '0', allowed: an integer of at least 1"),
    ],
)
def test_a_faulty_flag_gives_one_clear_line(model: Path, arguments: list[str], message: str) -> None:
    assert_one_line(serve(str(model), "--port", "0", *arguments), message)


def test_a_model_directory_that_is_not_there_gives_one_clear_line(tmp_path: Path) -> None:
    assert_one_line(serve(str(tmp_path / "nowhere")), "found no such directory")


def test_a_hub_name_without_network_or_cache_gives_one_clear_line() -> None:
    assert_one_line(serve("nobody/nothing", "--port", "0"), "model nobody/nothing: found no copy in the local cache")


def test_a_config_file_is_read_as_vllm_reads_it(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(f"model: {model}\ntensor_parallel_size: 3\nport: 0\n")
    assert_one_line(serve("--config", str(file)), "allowed: a multiple of --tensor-parallel-size 3")
    # The command line wins over the file: now the first fault is another one.
    assert_one_line(serve("--config", str(file), "-tp", "1", "--dtype", "int4"), "flag --dtype")


def test_a_port_in_use_gives_one_clear_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert_one_line(serve("--port", str(port)), f"address 127.0.0.1:{port}: found 'Address already in use'")


def test_an_unknown_subcommand_is_refused() -> None:
    done = subprocess.run(server.command("train"), capture_output=True, text=True)
    assert done.returncode == 2
    allowed = "serve, inspect, models, convert, gateway, fuse, bench"
    assert done.stderr == f"vllm-puzzle: found subcommand 'train', allowed: {allowed}\n"
