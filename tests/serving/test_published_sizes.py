"""vLLM's model object for the published full-size configurations has the published size, on the meta device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


# The published scaling of gpt-oss-puzzle is not known, and changes no size; a configuration without one is refused.
ROPE = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096}


@pytest.mark.parametrize(
    ("name", "parameters", "attention_layers", "called_layers", "kv_bytes"),
    [
        ("llama-3.3-nemotron-super-49b-v1.json", 49_867_145_216, 49, 80, 200_704),
        ("llama-3.1-nemotron-ultra-253b-v1.json", 253_401_268_224, 64, 81, 262_144),
        ("gpt-oss-puzzle-88b.json", 88_150_438_080, 36, 36, 73_728),
    ],
)
def test_a_published_model_is_built_at_its_final_size_and_never_larger(
    root: Path, tmp_path: Path, name: str, parameters: int, attention_layers: int, called_layers: int, kv_bytes: int
) -> None:
    config = json.loads((root / "model_configs" / "published" / name).read_text())
    config |= {"rope_scaling": ROPE} if config["model_type"] == "gpt_oss_puzzle" else {}
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = subprocess.run(
        [sys.executable, "-P", str(Path(__file__).with_name("meta_build.py")), str(tmp_path)],
        env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    sizes = json.loads(done.stdout.splitlines()[-1])
    assert sizes["num_parameters"] == parameters
    assert sizes["num_created"] == parameters, "a layer was built at another size first"
    assert sizes["num_attention_layers"] == attention_layers
    # 81 of Ultra's 162 layers are empty: they cost no call, and no node in a traced graph.
    assert sizes["num_called_layers"] == called_layers
    assert 2 * sizes["kv_elements_per_token"] == kv_bytes
