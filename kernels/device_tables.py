"""Where the tables of measured speed lie, and when one may be believed: on its own device, under its own Triton."""

from __future__ import annotations

import re
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "tables"


def file_name(kind: str, device_name: str) -> str:
    """`ffn`, `NVIDIA H100 80GB HBM3` → ffn-nvidia-h100-80gb-hbm3.json."""
    return f"{kind}-{re.sub(r'[^a-z0-9]+', '-', device_name.lower()).strip('-')}.json"


def is_this_triton(version: str) -> bool:
    """Whether `version` and the Triton here agree in their first two numbers: another minor one compiles otherwise."""
    import triton

    return version.split(".")[:2] == str(triton.__version__).split(".")[:2]
