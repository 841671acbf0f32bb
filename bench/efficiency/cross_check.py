"""The same requests measured by `vllm bench serve` and by us, in turn, and what comes out of it.

    python -m vllm_puzzle.bench.efficiency.cross_check --base-url URL --tokenizer FOLDER --out FILE

Each round asks a server the same questions once with each tool (A B, B A, …), closed load, natural stops. Three columns
come out: theirs; ours by their definitions, computed from our records; ours. The first two must agree; what lies
between the last two is what the definitions differ in:

- they divide by the time from the first request to the end of the last, we by a steady window;
- their first token is the first chunk, which may be the role alone; ours is the first text;
- their last token is the last chunk, which may be the end token alone; ours is the last text.

vLLM's tool runs in a process of its own, by its functions (`vllm.benchmarks.serve`): a distribution of vLLM that goes
by another name has no `vllm` command. It reads its questions with pandas, which must be installed.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_puzzle.bench.efficiency.arm import CLOSED, Load, thinking_fields
from vllm_puzzle.bench.efficiency.command import questions_of, run
from vllm_puzzle.bench.efficiency.flags import make_parser
from vllm_puzzle.bench.efficiency.machine import describe_machine, describe_versions
from vllm_puzzle.bench.efficiency.question import work_list
from vllm_puzzle.bench.efficiency.record import RequestRecord, measured, read_records
from vllm_puzzle.bench.efficiency.resampling import geometric_mean
from vllm_puzzle.model_configs.schema import ConfigError

SCHEMA_VERSION = 1
OURS, THEIRS = "ours", "vllm"
MAX_TOKENS = 512
LIMIT_S = 570.0
TRIES = 4  # of a run of ours for which the client was too slow
START = """
import argparse, asyncio, sys
from vllm.benchmarks import serve
parser = argparse.ArgumentParser()
serve.add_cli_args(parser)
serve.main(parser.parse_args(sys.argv[1:]))
"""


@dataclass(frozen=True, slots=True)
class Measurement:
    """What one tool says of one round; times in seconds."""

    requests: int
    output_tokens: int
    request_throughput: float
    output_throughput: float
    ttft_mean: float
    ttft_median: float
    tpot_mean: float
    tpot_median: float


QUANTITIES = tuple(name for name in Measurement.__slots__ if name not in ("requests", "output_tokens"))


def from_vllm(found: Mapping[str, Any]) -> Measurement:
    """Their result file."""
    return Measurement(
        found["completed"],
        found["total_output_tokens"],
        found["request_throughput"],
        found["output_throughput"],
        *(found[f"{kind}_{name}_ms"] / 1000 for name in ("ttft", "tpot") for kind in ("mean", "median")),
    )


def by_their_definitions(records: Sequence[RequestRecord]) -> Measurement:
    """Our records under their definitions, as near as the records go: a reply's end stands for its last chunk."""
    done = [record for record in records if record.first is not None and record.output_tokens]
    wall = max(record.done for record in done) - min(record.sent for record in done)
    ttft = [(record.first or 0.0) - record.sent for record in done]
    tpot = [
        (record.done - (record.first or 0.0)) / ((record.output_tokens or 0) - 1)
        for record in done
        if (record.output_tokens or 0) > 1
    ]
    tokens = sum(record.output_tokens or 0 for record in done)
    return Measurement(
        len(done),
        tokens,
        len(done) / wall,
        tokens / wall,
        statistics.fmean(ttft),
        statistics.median(ttft),
        statistics.fmean(tpot),
        statistics.median(tpot),
    )


def from_summary(summary: Mapping[str, Any]) -> dict[str, float]:
    """The same quantities as our own summary has them."""
    metrics = summary["metrics"]
    names = ("request_throughput", "output_throughput", "ttft_mean", "ttft_p50", "tpot_mean", "tpot_p50")
    return {name: float(metrics[key]) for name, key in zip(QUANTITIES, names, strict=True) if metrics.get(key)}


def ratio(theirs: Sequence[float], ours: Sequence[float]) -> tuple[float, float, float]:
    """Geometric mean of theirs over ours, pair by pair, and its 95 % interval (Student's t over rounds)."""
    logs = [math.log(a / b) for a, b in zip(theirs, ours, strict=True)]
    found = geometric_mean(logs)
    return found.estimate, found.low, found.high


def compared(rounds: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row per quantity: means over the rounds, the ratio with its interval, whether 1 is in it."""
    rows = []
    for name in QUANTITIES:
        theirs, same = ([found[column][name] for found in rounds] for column in (THEIRS, "ours_by_their_definitions"))
        own = [found[OURS][name] for found in rounds if name in found[OURS]]
        middle, low, high = ratio(theirs, same)
        row = {
            "quantity": name,
            "vllm_bench_serve": statistics.fmean(theirs),
            "ours_by_their_definitions": statistics.fmean(same),
            "ours": statistics.fmean(own) if own else None,
            "ratio": middle,
            "ratio_95": [low, high],
            "is_within_noise": low <= 1 <= high,
        }
        rows.append(row)
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """For a terminal and Markdown."""
    lines = ["| | vllm bench serve | ours, their definitions | ratio, 95 % | ours |", "|---|---|---|---|---|"]
    for row in rows:
        is_time = not str(row["quantity"]).endswith("throughput")
        shown: Callable[[float], str] = (lambda v: f"{v * 1000:.2f} ms") if is_time else (lambda v: f"{v:.2f}/s")
        low, high = row["ratio_95"]
        values = [shown(row["vllm_bench_serve"]), shown(row["ours_by_their_definitions"])]
        values.append(f"{row['ratio']:.3f} ({low:.3f} … {high:.3f})")
        values.append("-" if row["ours"] is None else shown(row["ours"]))
        lines.append(f"| {str(row['quantity']).replace('_', ' ')} | {' | '.join(values)} |")
    return "\n".join(lines)


def measure_ours(options: argparse.Namespace, folder: Path, seed: int) -> dict[str, Any]:
    """One run of ours. Raises ConfigError when it is not to be compared."""
    words = ["--base-url", options.base_url, "--model", options.model, "--task", options.task]
    words += ["--num-prompts", str(options.num_prompts), "--max-concurrency", str(options.max_concurrency)]
    words += ["--num-warmups", str(options.max_concurrency), "--seed", str(seed), "--temperature", "0"]
    words += ["--thinking", options.thinking, "--max-tokens", str(MAX_TOKENS), "--prefix-cache", "salted"]
    words += [] if options.nice is None else ["--nice", str(options.nice)]
    tries = [folder / str(number) for number in range(TRIES)]
    folder = next((attempt for attempt in tries if run([*words, "--out", str(attempt)]) == 0), folder)
    if folder not in tries:
        raise ConfigError(f"cross-check, seed {seed}: found {TRIES} runs that are not valid, allowed: quiet cores")
    records = measured(read_records(folder / "requests.jsonl"))
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    return {OURS: from_summary(summary), "ours_by_their_definitions": _plain(by_their_definitions(records))}


def measure_theirs(options: argparse.Namespace, folder: Path, seed: int) -> dict[str, Any]:
    """One run of theirs over the same questions in the same order. Raises ConfigError when it fails."""
    folder.mkdir(parents=True, exist_ok=True)
    questions, _ = questions_of(options, Load(CLOSED, concurrency=options.max_concurrency))
    asks = work_list(questions, options.num_prompts, seed)
    lines = [json.dumps({"prompt": ask.question.messages[-1]["content"]}) for ask in asks]
    prompts = folder / "prompts.jsonl"
    prompts.write_text("\n".join(lines) + "\n", encoding="utf-8")
    fields = thinking_fields(THEIRS, options.thinking, None, None) | {"cache_salt": uuid.uuid4().hex}
    words = ["--backend", "openai-chat", "--base-url", options.base_url, "--endpoint", "/v1/chat/completions"]
    words += ["--model", options.model, "--tokenizer", str(options.tokenizer), "--temperature", "0"]
    words += ["--dataset-name", "custom", "--dataset-path", str(prompts), "--disable-shuffle", "--skip-chat-template"]
    words += ["--custom-output-len", str(MAX_TOKENS), "--num-prompts", str(options.num_prompts), "--disable-tqdm"]
    words += ["--max-concurrency", str(options.max_concurrency), "--num-warmups", str(options.max_concurrency)]
    words += ["--seed", str(seed), "--extra-body", json.dumps(fields), "--ready-check-timeout-sec", "0"]
    words += ["--save-result", "--result-dir", str(folder), "--result-filename", "result.json"]
    command = [] if options.nice is None else ["nice", "-n", str(options.nice)]
    command += [sys.executable, "-P", "-c", START, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    if done.returncode:
        raise ConfigError(f"vllm bench serve: found {done.stderr.strip().splitlines()[-1:]}, allowed: a finished run")
    found = from_vllm(json.loads((folder / "result.json").read_text(encoding="utf-8")))
    if found.requests != options.num_prompts:
        raise ConfigError(f"vllm bench serve: found {found.requests} replies, allowed: {options.num_prompts}")
    return {THEIRS: _plain(found)}


def cross_check(options: argparse.Namespace) -> dict[str, Any]:
    """All rounds, and the comparison."""
    rounds: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds):
            options.seed = number
            found: dict[str, Any] = {}
            tools = (measure_ours, measure_theirs)
            for tool in tools if number % 2 == 0 else tools[::-1]:
                found |= tool(options, Path(folder) / f"{number}-{tool.__name__}", number)
            rounds.append(found)
            print(f"round {number + 1} of {options.rounds}", file=sys.stderr, flush=True)
    load = {"task": options.task, "thinking": options.thinking, "num_prompts": options.num_prompts}
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "cross-check",
        "load": load | {"max_concurrency": options.max_concurrency, "model": options.model},
        "machine": describe_machine(),
        "versions": describe_versions(),
        "rows": compared(rounds),
        "rounds": rounds,
    }


def _plain(found: Measurement) -> dict[str, float]:
    return {name: getattr(found, name) for name in Measurement.__slots__}


def main() -> int:
    """As a module; returns the exit status: 1 where the two tools disagree or one fails."""
    parser = make_parser("cross-check", "the same requests by vllm bench serve and by us")
    parser.add_argument("--rounds", type=int, default=6)
    options = parser.parse_args()
    try:
        if options.tokenizer is None or options.model is None or options.max_concurrency is None:
            raise ConfigError("cross-check: found no --tokenizer, --model or --max-concurrency, allowed: all three")
        found = cross_check(options)
    except ConfigError as error:
        print(f"vllm-puzzle: {error}", file=sys.stderr)
        return 1
    options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(table(found["rows"]))
    return 0 if all(row["is_within_noise"] for row in found["rows"]) else 1


if __name__ == "__main__":
    sys.exit(main())
