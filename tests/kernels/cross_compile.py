"""Compile every shipped configuration for Hopper, without a GPU: `cross_compile.py [VERSION]` prints JSON.

Runs in a process of its own, never under the interpreter, with this environment's Triton or with VERSION of it, which
is then installed into a folder of its own. `WORDS=…` takes only the configurations that have each word in their name.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

HOPPER = ("cuda", 90, 32)


def compile_one(name: str) -> dict[str, Any]:
    """Resources and instructions of one configuration, or the compiler's error."""
    import triton
    from triton.backends.compiler import GPUTarget
    from vllm_puzzle.kernels.variant import shipped

    variant = next(variant for variant in shipped() if variant.name == name)
    names = variant.kernel.arg_names
    signature = {key: variant.signature.get(key, "constexpr") for key in names}
    attributes = {(names.index(key),): [["tt.divisibility", 16]] for key in variant.aligned}
    source = triton.compiler.ASTSource(variant.kernel, signature, constexprs=dict(variant.constexprs), attrs=attributes)
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages, **variant.options}
    try:
        program = triton.compile(source, target=GPUTarget(*HOPPER), options=options)
    except Exception as error:
        return {"name": name, "error": f"{type(error).__name__}: {error}"[-2000:]}
    return {"name": name, "shared": program.metadata.shared} | read(program.asm["cubin"])


def read(cubin: bytes) -> dict[str, Any]:
    """What the disassembler says of one program."""
    import triton

    tool = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        code = subprocess.run([tool, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    numbers = {key.lower(): int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return numbers | {
        "instructions": len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", code, re.M)),
        "wgmma": len(re.findall(r"\b[HQI]GMMA\.", code)),
        "mma": len(re.findall(r"\bHMMA\.", code)),
        "tma": len(re.findall(r"\bUTMALDG\.", code)),
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", code)),
    }


def run_with(version: str) -> None:
    """This script again, with another Triton."""
    with tempfile.TemporaryDirectory() as folder:
        install = ["uv", "pip", "install", "--quiet", "--no-deps", "--python", sys.executable, "--target", folder]
        subprocess.run([*install, f"triton=={version}"], check=True, timeout=300)
        environment = os.environ | {"PYTHONPATH": folder}
        subprocess.run([sys.executable, "-P", __file__], env=environment, check=True)


def main() -> None:
    if sys.argv[1:]:
        run_with(sys.argv[1])
        return
    import triton
    from vllm_puzzle.kernels.variant import shipped

    words = os.environ.get("WORDS", "").split()
    names = [variant.name for variant in shipped() if all(word in variant.name for word in words)]
    with ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
        entries = list(pool.map(compile_one, names))
    print(json.dumps({"triton": triton.__version__, "variants": entries}))


if __name__ == "__main__":
    main()
