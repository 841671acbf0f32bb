"""Measure where the seconds of `vllm-puzzle serve` go, from the command to the first answer.

    python -m vllm_puzzle.serving.startup_measurement [--starts 5] [--against PYTHON] > bench/results/startup-cpu.json

Each start is the packaged model on a free port of 127.0.0.1, with no variable of the shell's that would change the
defaults. A phase ends at a line of the log; at that moment the CPU seconds of the process and of those below it are
read from /proc. `--against` alternates (ABBA) with another installation, whose interpreter it names. The largest
imports come from one more start under `-X importtime`, which slows it. Prints one JSON document; progress goes to
stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from vllm_puzzle.serving.cpu_measurement import about_machine

# (phase, text of the log line that ends it). The first four and the last two are the API process's, the others the
# engine's, for which the API process waits.
PHASES = (
    ("Python and our modules", "1/4 checking"),
    ("our checks", "2/4 importing"),
    ("imports", "3/4 reading the configuration"),
    ("configuration and tokenizer", "Initializing a V1 LLM engine"),
    ("worker", "Starting to load model"),
    ("weights", "Loading weights took"),
    ("KV cache and warm-up", "init engine (profile"),
    ("scheduler and handshake", "Supported tasks"),
    ("API server", "Application startup complete"),
)
FIRST_ANSWER = "first answer"
NAMES = (*(name for name, _ in PHASES), FIRST_ANSWER)
DEADLINE_S = 240
QUESTION = "3+4-2+9"
TICKS = os.sysconf("SC_CLK_TCK")
IMPORT_LINE = re.compile(r"import time:\s+(\d+) \|\s+(\d+) \| +([\w.]+)\s*$")
NUM_LARGEST = 25


@dataclass(frozen=True, slots=True)
class Mark:
    """A moment: seconds since the command, and CPU seconds until then of the process and of those below it."""

    wall_s: float
    own_cpu_s: float
    below_cpu_s: float


@dataclass(slots=True)
class Start:
    """One server on its way up; `phases` is complete once `starting` has yielded it."""

    url: str
    began: float
    marks: list[Mark] = field(default_factory=lambda: [Mark(0.0, 0.0, 0.0)])
    answer: str = ""

    @property
    def phases(self) -> dict[str, dict[str, float]]:
        """Seconds of each phase: wall clock, CPU of the API process, CPU of the processes below it."""
        pairs = zip(NAMES, pairwise(self.marks), strict=True)
        return {
            name: {
                "wall_s": round(end.wall_s - begin.wall_s, 3),
                "api_cpu_s": round(end.own_cpu_s - begin.own_cpu_s, 3),
                "engine_cpu_s": round(end.below_cpu_s - begin.below_cpu_s, 3),
            }
            for name, (begin, end) in pairs
        }

    @property
    def total(self) -> dict[str, float]:
        """The same from the command to the first answer."""
        last = self.marks[-1]
        numbers = {"wall_s": last.wall_s, "api_cpu_s": last.own_cpu_s, "engine_cpu_s": last.below_cpu_s}
        return {name: round(value, 3) for name, value in numbers.items()}


def serve_command(python: str = sys.executable, *options: str) -> list[str]:
    """`vllm-puzzle serve` of the installation of `python`, under these options of the interpreter."""
    return [python, "-P", *options, "-m", "vllm_puzzle.serving.cli", "serve"]


@contextmanager
def starting(program: Sequence[str], log: Path) -> Iterator[Start]:
    """Start `program` (with a free port), yield it once it has answered, stop it by its pid. Its output is in `log`.

    RuntimeError with the end of the log when it ends, or when a phase has not ended after DEADLINE_S.
    """
    port = _free_port()
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "VLLM_", "KMP_"))}
    start = Start(f"http://127.0.0.1:{port}", time.monotonic())
    process = subprocess.Popen(
        [*program, "--port", str(port)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    reader = threading.Thread(target=_follow, args=(process, start, log), daemon=True)
    reader.start()
    try:
        _wait(process, start, log)
        start.answer = _ask(start.url)
        start.marks.append(_mark(process.pid, start.began))
        yield start
    finally:
        _stop(process)
        reader.join(10)


def _follow(process: subprocess.Popen[bytes], start: Start, log: Path) -> None:
    """Copy the output to `log`; mark the end of each phase as its line comes."""
    texts = [text.encode() for _, text in PHASES]
    assert process.stdout is not None
    with log.open("wb", buffering=0) as copy:
        for line in process.stdout:
            ended = len(start.marks) - 1
            if ended < len(texts) and texts[ended] in line:
                start.marks.append(_mark(process.pid, start.began))
            copy.write(line)


def _wait(process: subprocess.Popen[bytes], start: Start, log: Path) -> None:
    while (ended := len(start.marks) - 1) < len(PHASES):
        is_late = time.monotonic() - start.began > DEADLINE_S
        if is_late or process.poll() is not None:
            what = f"found no end after {DEADLINE_S} s" if is_late else f"the server ended with {process.returncode}"
            raise RuntimeError(f"phase {PHASES[ended][0]!r}: {what}: {log.read_text(errors='replace')[-3000:]}")
        time.sleep(0.005)


def _mark(pid: int, began: float) -> Mark:
    return Mark(time.monotonic() - began, *cpu_seconds(pid))


def cpu_seconds(pid: int) -> tuple[float, float]:
    """CPU seconds, user and system, of a process and of all below it, those that have ended included; 0 once it is
    gone."""
    try:
        # After the name, which may hold blanks: state is field 3 of proc_pid_stat(5), utime 14 to cstime 17.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        children = " ".join(path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")).split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0, 0.0
    user, system, *ended = (int(ticks) / TICKS for ticks in fields[11:15])
    return user + system, sum(ended) + sum(sum(cpu_seconds(int(child))) for child in children)


def _ask(url: str) -> str:
    """The answer to QUESTION; the port may open a moment after the log says so."""
    body = json.dumps({"messages": [{"role": "user", "content": QUESTION}]}).encode()
    request = urllib.request.Request(f"{url}/v1/chat/completions", body, {"Content-Type": "application/json"})
    for _ in range(1000):
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                answer: str = json.load(reply)["choices"][0]["message"]["content"]
                return answer.strip()
        except urllib.error.HTTPError:
            raise
        except urllib.error.URLError:
            time.sleep(0.005)
    raise RuntimeError(f"{url}: found no open port after the start")


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(30)
    with suppress(ProcessLookupError):  # what is left of its own session
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(30)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


# --- imports -----------------------------------------------------------------------------------------------------


def read_imports(lines: Iterable[str]) -> list[tuple[str, float, float]]:
    """(module, seconds of its own, seconds with what it imported) of `-X importtime`, in the order they ended."""
    found = (IMPORT_LINE.search(line) for line in lines)
    return [(m[3], int(m[1]) / 1e6, int(m[2]) / 1e6) for m in found if m]


def summarize_imports(imports: Sequence[tuple[str, float, float]]) -> dict[str, Any]:
    """Seconds by package and by subpackage, own seconds summed, and the modules with the largest own and whole ones."""
    sums: dict[int, Counter[str]] = {1: Counter(), 2: Counter()}
    for name, own, _ in imports:
        for depth, counter in sums.items():
            counter[".".join(name.split(".")[:depth])] += own  # type: ignore[assignment]
    by_own, by_whole = (sorted(imports, key=lambda row, i=i: -row[i])[:NUM_LARGEST] for i in (1, 2))  # type: ignore[misc]
    return {
        "num_modules": len(imports),
        "own_s": round(sum(own for _, own, _ in imports), 3),
        "by_package_s": {name: round(seconds, 3) for name, seconds in sums[1].most_common(NUM_LARGEST)},
        "by_subpackage_s": {name: round(seconds, 3) for name, seconds in sums[2].most_common(NUM_LARGEST)},
        "largest_own_s": {name: round(own, 3) for name, own, _ in by_own},
        "largest_whole_s": {name: round(whole, 3) for name, _, whole in by_whole},
    }


# --- the table ---------------------------------------------------------------------------------------------------


def machine_cpu_seconds() -> float:
    """CPU seconds that all processes of this machine have used since it runs: user, nice, system, irq, softirq."""
    numbers = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    return sum(int(numbers[i]) for i in (0, 1, 2, 5, 6)) / TICKS


def measure(program: Sequence[str], log: Path) -> dict[str, Any]:
    """One start as a row: seconds by phase, in total, and what the rest of the machine used meanwhile."""
    before = machine_cpu_seconds()
    with starting(program, log) as start:
        used = machine_cpu_seconds() - before
        total = start.total
        others = max(0.0, used - total["api_cpu_s"] - total["engine_cpu_s"])
        return {"total": total, "others_cpu_s": round(others, 2), "answer": start.answer, "phases": start.phases}


def medians(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The median of each figure over the starts, and the range of the whole."""
    totals = [row["total"] for row in rows]
    walls = [total["wall_s"] for total in totals]
    return {
        "total": {key: round(median(total[key] for total in totals), 3) for key in totals[0]},
        "range_wall_s": [min(walls), max(walls)],
        "phases": {
            name: {key: round(median(row["phases"][name][key] for row in rows), 3) for key in rows[0]["phases"][name]}
            for name in NAMES
        },
    }


def commit_of(python: str) -> str:
    """The commit of the sources that the installation of `python` runs, `+` where they are changed; else no text."""
    code = "import vllm_puzzle.serving; print(vllm_puzzle.serving.__path__[0])"
    found = subprocess.run([python, "-P", "-c", code], capture_output=True, text=True, check=True, timeout=60)
    git = ["git", "-C", found.stdout.strip(), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    return subprocess.run(git, capture_output=True, text=True, timeout=60).stdout.strip()


def main() -> None:
    """The whole table as one JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=5, help="of each installation")
    parser.add_argument("--against", metavar="PYTHON", help="another installation's interpreter")
    arguments = parser.parse_args()
    pythons = {"here": sys.executable} | ({"against": arguments.against} if arguments.against else {})
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in pythons}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.txt"
        for i in range(arguments.starts):
            for name in list(pythons)[:: 1 if i % 2 == 0 else -1]:
                rows[name].append(measure(serve_command(pythons[name]), log))
                print(name, json.dumps(rows[name][-1]), file=sys.stderr, flush=True)
        measure(serve_command(sys.executable, "-X", "importtime"), log)
        imports = summarize_imports(read_imports(log.read_text(errors="replace").splitlines()))
    document = {
        **about_machine(),
        "what": "vllm-puzzle serve with the packaged model, from the command to the first answer; medians of the rows",
        "commits": {name: commit_of(python) for name, python in pythons.items()},
        "starts": arguments.starts,
        "medians": {name: medians(found) for name, found in rows.items()},
        "imports": imports,
        "rows": rows,
    }
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
