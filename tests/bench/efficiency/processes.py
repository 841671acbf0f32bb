"""The mock server and the commands as processes of their own, over real sockets."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

COMMAND = [sys.executable, "-P", str(Path(__file__).parent / "bench_command.py")]
START_S = 30.0  # imports, on a machine that others use too


@contextmanager
def served(*settings: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A mock with these settings; yields its URL and process."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    words = [word for setting in settings for word in ("--set", setting)]
    process = subprocess.Popen([*COMMAND, "mock:mock", "--port", str(port), *words])
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: _answers(url) or process.poll() is not None)
        yield url, process
    finally:
        process.kill()
        process.wait()


def _answers(url: str) -> bool:
    try:
        return httpx.get(url + "/health").status_code == 200
    except httpx.TransportError:
        return False


def wait_for(condition: Callable[[], bool], timeout_s: float = START_S) -> None:
    """Until it holds. Raises TimeoutError."""
    until = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > until:
            raise TimeoutError
        time.sleep(0.02)


def start(*words: str, **options: Any) -> subprocess.Popen[str]:
    """A command, its output kept."""
    environment = os.environ | {"OPENAI_API_KEY": ""}
    return subprocess.Popen(
        [*COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, **options
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Its status and what it printed."""
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err
