"""mypy over the package, as `tests/test_lint.py` asks: prints {"status", "output"}.

The folders lie at the top level, their import names under vllm_puzzle: links show mypy the import names.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("serving", "kernels", "model_configs", "bench")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "links" / "vllm_puzzle"
        package.mkdir(parents=True)
        for name in FOLDERS:
            (package / name).symlink_to(ROOT / name)
        done = subprocess.run(
            [sys.executable, "-P", "-m", "mypy", "--cache-dir", f"{folder}/cache", "-p", "vllm_puzzle"],
            cwd=ROOT, env=os.environ | {"MYPYPATH": str(package.parent)}, capture_output=True, text=True,
        )  # fmt: skip
    print(json.dumps({"status": done.returncode, "output": done.stdout + done.stderr}))


main()
