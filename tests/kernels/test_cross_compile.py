"""Every shipped configuration compiles for Hopper, with this environment's Triton and with the GPU machines'.

No spill, shared memory within the limit, tensor-core and TMA instructions where claimed: read from the machine code.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from vllm_puzzle.kernels.variant import shipped

# Of one program on sm_90 (CUDA C Programming Guide, table of technical specifications: 227 KiB).
MAX_SHARED = 232_448
OTHER_TRITON = "3.6.0"  # ships with torch 2.11
VARIANTS = {variant.name: variant for variant in shipped()}
Report = dict[str, Any]

pytestmark = pytest.mark.slow


def compile_all(extra_path: Path | None) -> Report:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    if extra_path is not None:
        environment["PYTHONPATH"] = str(extra_path)
    script = Path(__file__).with_name("cross_compile.py")
    done = subprocess.run(
        [sys.executable, "-P", str(script)], env=environment, capture_output=True, text=True, timeout=580
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report: Report = json.loads(done.stdout.splitlines()[-1])
    return report | {"variants": {entry["name"]: entry for entry in report["variants"]}}


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Report]:
    folder = tmp_path_factory.mktemp("triton")
    install = ["uv", "pip", "install", "--quiet", "--no-deps", "--python", sys.executable, "--target", str(folder)]
    subprocess.run([*install, f"triton=={OTHER_TRITON}"], check=True, timeout=300)
    return {"this": compile_all(None), "other": compile_all(folder)}


def test_two_versions_of_triton_are_compared(reports: dict[str, Report]) -> None:
    assert reports["other"]["triton"] == OTHER_TRITON != reports["this"]["triton"]
    assert set(reports["this"]["variants"]) == set(reports["other"]["variants"]) == set(VARIANTS)
    assert len(VARIANTS) == len(shipped()), "each configuration has a name of its own"


@pytest.mark.parametrize("which", ["this", "other"])
@pytest.mark.parametrize("name", VARIANTS)
def test_it_compiles_without_spills_and_keeps_its_claims(reports: dict[str, Report], name: str, which: str) -> None:
    found = reports[which]["variants"][name]
    assert "error" not in found, found["error"]
    assert found["stack"] == found["local"] == found["spills"] == 0, found
    assert found["shared"] <= MAX_SHARED, found
    missing = [claim for claim in VARIANTS[name].claims if not found[claim]]
    assert not missing, found
