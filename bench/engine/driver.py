"""An engine in a process of its own: started, asked and stopped over JSON lines, everything within a time limit.

The other end is `python -m vllm_puzzle.serving.engine_measurement`. A process that is late, or does not end, is killed
with all that it started, by its own number.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from vllm_puzzle.bench.engine.rows import without_paths

COMMAND = (sys.executable, "-P", "-m", "vllm_puzzle.serving.engine_measurement")
STOP_S = 15.0
# No request leaves this machine, and no engine looks for a model elsewhere.
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
TAIL_BYTES = 4000


class EngineError(Exception):
    """The engine failed or was late; the message is one line."""


class EngineChild:
    """One engine. `start` sends the first line; `ready` waits for its answer; `ask` sends a request and waits."""

    def __init__(
        self, name: str, model: Path, engine: Mapping[str, Any], environment: Mapping[str, str], log: Path,
        command: Sequence[str] = COMMAND,
    ) -> None:  # fmt: skip
        self.name, self.model, self.log = name, model, log
        self._answers: queue.Queue[str | None] = queue.Queue()
        self._has_failed = False
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                env={**os.environ, **ENVIRONMENT, **environment}, start_new_session=True,
            )  # fmt: skip
        assert self._process.stdout is not None, "asked for above"
        self._reader = threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True)
        self._reader.start()
        self._send({"model": str(model), "engine": dict(engine)})

    def __enter__(self) -> EngineChild:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop(is_patient=kind is None and not self._has_failed)

    @property
    def pid(self) -> int:
        """The process, which leads a group of its own."""
        return self._process.pid

    def ready(self, limit_s: float) -> dict[str, Any]:
        """The engine's first answer. Raises EngineError."""
        return self._answer("ready", limit_s)

    def ask(self, request: Mapping[str, Any], limit_s: float) -> dict[str, Any]:
        """One case, the routing, or other weights. Raises EngineError."""
        self._send(request)
        return self._answer(next((kind for kind in ("routing", "weights") if kind in request), "case"), limit_s)

    def stop(self, is_patient: bool = True) -> None:
        """End the process and all that it started; it gets STOP_S for itself if `is_patient`."""
        if self._process.stdin is not None:
            with suppress(OSError):
                self._process.stdin.close()
        if is_patient:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_S)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)  # the engine's own workers too, where it has any
        self._process.wait()
        self._reader.join(STOP_S)
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _send(self, message: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None, "asked for above"
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except (OSError, ValueError) as error:
            raise EngineError(self._last_words() or f"the engine is gone ({error})") from None

    def _read(self, stdout: IO[str]) -> None:
        with suppress(ValueError, OSError):  # closed meanwhile
            for line in stdout:
                self._answers.put(line)
        self._answers.put(None)

    def _answer(self, wanted: str, limit_s: float) -> dict[str, Any]:
        self._has_failed = True  # until the answer is there
        deadline = time.monotonic() + limit_s
        while True:
            try:
                line = self._answers.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise EngineError(f"no answer within {limit_s:.0f} s") from None
            if line is None:
                raise EngineError(self._last_words() or "the engine ended without a word")
            event = _parsed(line)
            if event is None:
                continue  # something of a library's that reached the real stdout
            if event["event"] == "error":
                raise EngineError(without_paths(str(event.get("message", "")), self.model))
            if event["event"] == wanted:
                self._has_failed = False
                return event

    def _last_words(self) -> str:
        """What the process said last on stderr, on one line."""
        with suppress(OSError), self.log.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - TAIL_BYTES))
            lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
            return without_paths(lines[-1], self.model) if lines else ""
        return ""


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and isinstance(event.get("event"), str) else None
