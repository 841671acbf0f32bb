"""Every shipped configuration compiles for Hopper, with this environment's Triton and with the GPU machines'.

No spill, shared memory within the limit, tensor-core and TMA instructions where claimed: read from the machine code.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from beside import Script, outcome
from vllm_puzzle.kernels.variant import shipped

# Of one program on sm_90 (CUDA C Programming Guide, table of technical specifications: 227 KiB).
MAX_SHARED = 232_448
OTHER_TRITON = "3.6.0"  # ships with torch 2.11
VARIANTS = {variant.name: variant for variant in shipped()}
Report = dict[str, Any]

pytestmark = pytest.mark.slow


SCRIPT = Path(__file__).with_name("cross_compile.py")
BESIDE = (Script(SCRIPT), Script(SCRIPT, (OTHER_TRITON,)))


@pytest.fixture(scope="module")
def reports() -> dict[str, Report]:
    return {which: by_name(outcome(script)) for which, script in zip(("this", "other"), BESIDE, strict=True)}


def by_name(report: Report) -> Report:
    return report | {"variants": {entry["name"]: entry for entry in report["variants"]}}


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
