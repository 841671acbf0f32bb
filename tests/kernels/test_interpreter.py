"""The interpreter of the kernel tests computes bfloat16 and FP8 as torch does; as shipped it does not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


def probe(which: str) -> dict[str, int]:
    script = Path(__file__).with_name("interpreter_probe.py")
    done = subprocess.run([sys.executable, "-P", str(script), which], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    outcome: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return outcome


@pytest.fixture(scope="module")
def mended() -> dict[str, int]:
    return probe("mended")


def test_every_cast_between_float_types_equals_torchs_to_the_bit(mended: dict[str, int]) -> None:
    casts = {name: count for name, count in mended.items() if " to " in name}
    assert len(casts) == 20
    assert not {name: count for name, count in casts.items() if count}


@pytest.mark.parametrize("what", ["arithmetic", "comparison", "product"])
def test_bfloat16_is_computed_and_rounded_once(mended: dict[str, int], what: str) -> None:
    assert mended[f"bfloat16 {what}"] == 0


def test_the_fix_is_still_needed() -> None:
    """Once Triton's own interpreter passes, `interpreter.py` can go."""
    assert any(probe("stock").values())
