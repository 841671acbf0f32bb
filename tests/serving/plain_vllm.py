"""A plain vLLM API server on a model folder: our model class is registered, our endpoint plugin is not named."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import server

NAME = "pocket-puzzle"


@contextmanager
def plain_vllm(log: Path, model: Path, *arguments: str) -> Iterator[str]:
    """Yield the URL of `python -m vllm.entrypoints.openai.api_server`; its output goes to `log`."""
    port = server.free_port()
    environment = os.environ | {
        "VLLM_PLUGINS": "puzzle",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONSAFEPATH": "1",
    }
    command = [sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--served-model-name", NAME, "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--enforce-eager", "--max-model-len", "1024", *arguments]
    with server.started(command, environment, port, log) as url:
        yield url
