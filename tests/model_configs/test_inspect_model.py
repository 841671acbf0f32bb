"""`vllm-puzzle inspect`: the table and the JSON, from a config.json alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from vllm_puzzle.model_configs.inspect_model import describe, inspect, load_record

CONFIG = "model_configs/published/llama-3.3-nemotron-super-49b-v1.json"


def test_the_table_groups_equal_neighbours_and_states_the_totals(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert inspect([str(root / CONFIG)]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split() for line in lines if line and line[0].isdigit()}
    assert rows["12-41"][:6] == ["12-41", "full", "8", "-", "gated", "28672"]
    assert rows["6-7"][:6] == ["6-7", "-", "-", "-", "gated", "14336"]
    assert "parameters         49,867,145,216" in lines
    assert "KV bytes per token 401,408 float32, 200,704 bfloat16, 100,352 fp8" in lines


def test_json_has_one_entry_per_layer(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect([str(root / CONFIG), "--json"])
    data = json.loads(capsys.readouterr().out)
    assert len(data["layers"]) == data["num_layers"] == 80
    assert data["num_attention_layers"] == sum(layer["attention"] == "full" for layer in data["layers"]) == 49
    assert data["layers"][69]["ffn_width"] == 2816
    assert data["kv_bytes_per_token"]["bfloat16"] == 200_704


def test_the_shipped_child_has_every_block_kind_that_its_card_promises(root: Path) -> None:
    layers = describe(load_record(root / "model_configs" / "pocket" / "puzzle"))["layers"]
    kinds = [layer["attention"] for layer in layers]
    assert {"full", "window", "linear", None} <= set(kinds)
    assert any(layer["ffn"] is None for layer in layers)
    assert len({layer["kv_heads"] for layer in layers if layer["kv_heads"]}) >= 2
    assert len({layer["ffn_width"] for layer in layers if layer["ffn_width"]}) >= 3
    runs = "".join("." if kind is None and layer["ffn"] else "x" for kind, layer in zip(kinds, layers, strict=True))
    assert "..." in runs


def test_inspect_imports_neither_torch_nor_vllm(root: Path) -> None:
    code = (
        "import sys; from vllm_puzzle.serving.cli import main; "
        f"assert main(['inspect', {str(root / CONFIG)!r}]) == 0; "
        "found = {'torch', 'vllm', 'transformers'} & set(sys.modules); assert not found, found"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file or directory"), ("{", "Expecting property name"), ("[]", "found a JSON list")],
    ids=["absent", "broken", "list"],
)
def test_an_unreadable_configuration_is_one_line_and_status_1(
    tmp_path: Path, content: str | None, message: str
) -> None:
    file = tmp_path / "config.json"
    if content is not None:
        file.write_text(content)
    command = [sys.executable, "-P", "-m", "vllm_puzzle.serving.cli", "inspect", str(file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
