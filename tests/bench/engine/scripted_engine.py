"""Speaks the measuring process's protocol by a script: what the runner does with answers, late ones and none is then
known exactly. The engine argument `script` says what happens:

    tokens_per_s: speed of every case        drift: how much slower each later case is (a share per case)
    fail_at: number of the case that fails   hang_at: number of the case that never answers
    dies: ends without a word                noise: lines that are no answers, before each answer
    started: a file that gets a line per start
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def say(message: dict[str, Any]) -> None:
    print(json.dumps(message), flush=True)


def case(line: dict[str, Any], script: dict[str, Any], number: int) -> dict[str, Any]:
    tokens = line["num_requests"] * line["output_len"]
    seconds = tokens / script.get("tokens_per_s", 1000.0) * (1 + number * script.get("drift", 0.0))
    times = {"mean": seconds / 2, "p50": seconds / 2, "p99": seconds}
    return {
        "event": "case", **line, "duration_s": seconds, "output_tokens": tokens, "output_throughput": tokens / seconds,
        "request_throughput": line["num_requests"] / seconds, "total_token_throughput": 2 * tokens / seconds,
        "steady_output_throughput": tokens / seconds, "ttft_s": times, "tpot_s": None, "num_preempted": 0,
        "memory_bytes": 77,
    }  # fmt: skip


def main() -> int:
    first = json.loads(sys.stdin.readline())
    script = first["engine"].get("script", {})
    if "started" in script:
        with Path(script["started"]).open("a") as file:
            file.write("start\n")
    if script.get("dies"):
        print("last words, said in /some/where/engine.py", file=sys.stderr, flush=True)
        return 7
    say(
        {
            "event": "ready", "start_s": 1.5, "kv_capacity_tokens": 4096, "max_concurrency": 8.0, "weights_bytes": 5,
            "memory_bytes": 6, "attention_backends": {"CPU_ATTN": 8}, "model_class": "Scripted", "card": "a card",
            "versions": {"vllm": "0.32.0", "torch": "2", "triton": None},
        }
    )  # fmt: skip
    number, evened = 0, False
    for text in sys.stdin:
        line = json.loads(text)
        if script.get("noise"):
            print("INFO something else", flush=True)
            say({"no": "event"})
        if "routing" in line:
            layer = {"layer": "0", "num_experts": 8, "coverage": 0.5}
            say({"event": "routing", "num_tokens": line["routing"]["num_tokens"], "layers": [layer]})
            continue
        if "weights" in line:
            evened = True
            say({"event": "weights", "weights": line["weights"]})
            continue
        if line["temperature"] != float(evened):
            say({"event": "error", "message": "sampling without even weights, or the other way round"})
            return 1
        number += 1
        if number == script.get("fail_at"):
            say({"event": "error", "message": f"no room in {first['model']} for this"})
            return 1
        if number == script.get("hang_at"):
            time.sleep(60)
        say(case(line, script, number))
    return 0


if __name__ == "__main__":
    sys.exit(main())
