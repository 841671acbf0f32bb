"""What the start-up measurement reads, and what the small commands must not import. The phases of a real start are
tested where a server starts anyway (test_server.py)."""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import server
from vllm_puzzle.serving import serve, startup_measurement
from vllm_puzzle.serving.cli import USAGE

POCKET = Path(__file__).resolve().parents[2] / "model_configs" / "pocket" / "puzzle"
# Commands that answer from files alone, as far as this version has them.
LIGHT = [
    command
    for command in (["--help"], ["inspect", str(POCKET)], ["models"])
    if command[0] == "--help" or f"vllm-puzzle {command[0]}" in USAGE
]
HEAVY = {
    *("torch", "vllm", "vllm_puzzle.kernels", "triton", "numpy", "scipy", "sympy", "pandas", "PIL"),
    *("transformers", "tokenizers", "huggingface_hub", "safetensors", "pydantic", "jinja2", "yaml"),
    *("fastapi", "starlette", "uvicorn", "httpx", "aiohttp", "openai", "anthropic", "mcp", "prometheus_client", "ray"),
}


@pytest.mark.parametrize("command", LIGHT, ids=lambda command: command[0])
def test_a_command_that_needs_no_model_imports_nothing_heavy(command: list[str]) -> None:
    program = startup_measurement.serve_command(sys.executable, "-X", "importtime")[:-1]
    done = subprocess.run([*program, *command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
    names = {name for name, _, _ in startup_measurement.read_imports(done.stderr.splitlines())}
    assert any(name.startswith("vllm_puzzle.") for name in names), "nothing was read"
    assert not {name for name in names if name in HEAVY or name.split(".")[0] in HEAVY}


def test_import_times_are_read_with_their_own_seconds_and_those_of_what_they_import(tmp_path: Path) -> None:
    (tmp_path / "outer_slow.py").write_text("import inner_slow, time\ntime.sleep(0.1)\n")
    (tmp_path / "inner_slow.py").write_text("import time\ntime.sleep(0.2)\n")
    code = "import sys; sys.path.insert(0, sys.argv[1]); import outer_slow"
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    found = {name: (own, whole) for name, own, whole in startup_measurement.read_imports(done.stderr.splitlines())}
    # A sleep never ends early; how late it ends on busy cores is bounded by what one second of waiting would be.
    assert 0.1 <= found["outer_slow"][0] < 1.1 and 0.2 <= found["inner_slow"][0] < 1.2
    assert found["outer_slow"][1] >= found["outer_slow"][0] + found["inner_slow"][1] - 1e-5  # microseconds are printed
    summary = startup_measurement.summarize_imports([("a.b", 1.0, 3.0), ("a.c", 2.0, 2.0), ("d", 0.5, 0.5)])
    assert summary["by_package_s"] == {"a": 3.0, "d": 0.5}
    assert summary["by_subpackage_s"] == {"a.c": 2.0, "a.b": 1.0, "d": 0.5}
    assert list(summary["largest_whole_s"]) == ["a.b", "a.c", "d"]


def test_cpu_seconds_count_the_processes_below_running_and_ended() -> None:
    spin = "import time\nwhile time.process_time() < 0.3: pass\n"
    code = (
        "import subprocess, sys\n"
        f"subprocess.run([sys.executable, '-S', '-c', {spin!r}])\n"
        f"running = subprocess.Popen([sys.executable, '-S', '-c', {spin + 'time.sleep(30)'!r}])\n"
        f"{spin}print('ready', flush=True); sys.stdin.read(); running.kill()\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        deadline = time.monotonic() + 30
        # Clock ticks of 10 ms: each process may show two ticks less than it has used.
        while startup_measurement.cpu_seconds(process.pid)[1] < 0.56 and time.monotonic() < deadline:
            time.sleep(0.02)
        own, below = startup_measurement.cpu_seconds(process.pid)
        process.communicate(timeout=30)
    assert 0.28 <= own < 5 and 0.56 <= below < 5
    assert startup_measurement.cpu_seconds(process.pid) == (0.0, 0.0)


def test_a_server_that_does_not_come_up_is_told_by_phase_with_its_last_words(tmp_path: Path) -> None:
    program = [*server.command("serve"), str(tmp_path / "nowhere")]
    with (
        pytest.raises(
            RuntimeError, match=re.compile("phase 'our checks': the server ended with 1: .*no such", re.DOTALL)
        ),
        startup_measurement.starting(program, tmp_path / "log.txt"),
    ):
        pass
    assert not any(str(tmp_path) in line for line in commands_running())


def commands_running() -> list[str]:
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        if file.parent.name != str(os.getpid()):
            try:
                found.append(file.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
            except OSError:
                continue
    return found


BEFORE_VLLM = """
import gc
from vllm_puzzle.serving import serve

def show(*_):
    import torch
    print(torch.get_num_threads(), gc.isenabled())
    raise SystemExit

serve._prepare_vllm = show
serve.serve(["--port", "0"])
"""


def test_the_threads_are_set_before_torch_reads_them_and_nothing_collects_during_imports() -> None:
    # OpenMP reads its variables once, when torch loads it: set later, they change nothing and tell nobody.
    # A test before this one may have left a preloaded OpenMP behind, as vLLM's CPU platform does for its workers; that
    # reads its variables before anybody's first line.
    left = ("OMP_", "KMP_", "MKL_", "LD_PRELOAD")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(left)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", BEFORE_VLLM], env=environment, capture_output=True, text=True, timeout=100
    )
    assert "default OMP_NUM_THREADS=1" in done.stderr
    assert done.stdout.split() == ["1", "False"], done.stderr[-2000:]


def test_after_the_imports_garbage_is_collected_again_and_what_they_made_is_left_alone() -> None:
    was_frozen = gc.get_freeze_count()
    try:
        with serve._imports_kept():
            assert not gc.isenabled()
            made = [[] for _ in range(10_000)]
        assert gc.isenabled() and gc.get_freeze_count() >= was_frozen + len(made)
    finally:
        gc.unfreeze()


LATE_PATCH = """
import sys
from vllm_puzzle.serving import vllm_compat

vllm_compat.patch_inductor_late()
vllm_compat.patch_inductor_late()
import vllm
assert "torch._inductor.lowering" not in sys.modules
from torch._inductor import graph, lowering
for module in (graph, lowering):
    print([name in module.FALLBACK_ALLOW_LIST for name in ("vllm::any", "other::any")])
"""


def test_vllms_patch_of_inductor_waits_for_inductor_and_is_there_then() -> None:
    environment = os.environ | {"TORCHDYNAMO_DISABLE": "1"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", LATE_PATCH], env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.stdout.splitlines() == ["[True, False]"] * 2, done.stderr[-2000:]
