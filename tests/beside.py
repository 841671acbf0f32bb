"""Long scripts of the suite run beside its other tests, one after another, on the core that those leave free.

A test module names its scripts in BESIDE; `conftest.py` starts those of the selected modules once tests are collected,
and `outcome` waits for one. A module that runs alone waits for its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

TIMEOUT_S = 900


@dataclass(frozen=True)
class Script:
    """A Python script and its arguments, in a process of its own: Triton is interpreted there or compiled, by its own
    choice and not by this process's. The last line that it prints is JSON."""

    path: Path
    arguments: tuple[str, ...] = ()

    def run(self) -> Any:
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        done = subprocess.run(
            [sys.executable, "-P", str(self.path), *self.arguments],
            env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=TIMEOUT_S,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])


_started: dict[Script, Future[Any]] = {}


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="beside")


def start(scripts: Iterable[Script]) -> None:
    """Queue scripts; each once."""
    for script in scripts:
        if script not in _started:
            _started[script] = _pool().submit(script.run)


def outcome(script: Script) -> Any:
    """What the script printed, once it has ended. Raises what its run raised."""
    start([script])
    return _started[script].result()


def stop() -> None:
    """Forget what has not begun, as when the suite is interrupted."""
    _pool().shutdown(wait=False, cancel_futures=True)
