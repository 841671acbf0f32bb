"""Start `vllm-puzzle serve` as a user does, wait until it answers, stop it by its pid."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

DEADLINE_S = 300


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-P", "-m", "vllm_puzzle.serving.cli", *arguments]


@contextmanager
def running(log: Path, *arguments: str, program: Sequence[str] | None = None) -> Iterator[str]:
    """Yield the URL of a server started with `vllm-puzzle serve` (or `program`) and these arguments; its output goes to
    `log`.
    """
    port = free_port()
    # What the suite sets for itself must not help `serve`: it has to need no variable.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "VLLM_", "KMP_"))}
    with started([*(program or command("serve")), *arguments, "--port", str(port)], environment, port, log) as url:
        yield url


@contextmanager
def started(program: list[str], environment: dict[str, str], port: int, log: Path) -> Iterator[str]:
    """Yield the URL of a server once it answers; stop it by its pid."""
    url = f"http://127.0.0.1:{port}"
    with log.open("w") as output:
        process = subprocess.Popen(program, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            _wait(process, f"{url}/health", log)
            yield url
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        assert process.poll() is None, f"the server ended: {log.read_text()[-3000:]}"
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise AssertionError(f"no answer after {DEADLINE_S} s: {log.read_text()[-3000:]}")
