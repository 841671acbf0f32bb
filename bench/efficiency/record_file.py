"""`requests.jsonl` while it is written: a line is whole or not there, on a full disk too. Standard library only."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

from vllm_puzzle.bench.efficiency.record import RequestRecord, to_line


class RecordFile:
    """Appends records to a new file, each at once: nothing waits in a buffer for a crash."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb", buffering=0)

    def add(self, record: RequestRecord) -> None:
        """Raises OSError when it does not fit; the file is then as it was before."""
        data = to_line(record).encode() + b"\n"
        before = self._file.tell()
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError:
            self._file.truncate(before)
            raise

    def __enter__(self) -> RecordFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
