"""A child process that loads one engine and measures shapes in it: `python -m vllm_puzzle.serving.engine_measurement`.

JSON lines on standard input, JSON lines on standard output; what vLLM prints goes to standard error.

    {"model": PATH, "engine": {LLM's keyword arguments}}           → {"event": "ready", …}, once the engine runs
    {"input_len": 128, "output_len": 128, "num_requests": 64,
     "max_concurrency": 16, "seed": 1}                             → {"event": "case", …} (serving/engine_load.py)
    {"routing": {"num_tokens": 16, "seed": 1}}                     → {"event": "routing", …} (serving/engine_routing.py)
    {"weights": "even"}                                            → {"event": "weights", …}, with dummy weights only

A case that warms up is a case like any other, sent first. The end of the input ends the process. Any error is one line,
{"event": "error", "message": …}, and exit status 1. All times are seconds, all sizes bytes or tokens. Environment
variables are the parent's; only VLLM_ENABLE_V1_MULTIPROCESSING has another default on a CPU build (0).

**vLLM's dummy weights send every token to the same experts** where routers have a bias: all weights are within ±0.001,
and the bias outweighs what a token adds. (gpt-oss in small, 32 tokens, 4 of 32 experts each: a step reads 4 experts in
place of 31.5.) The speed is another model's then. {"weights": "even"} sets norms to 1, biases to 0; with a temperature
of 1, which keeps the tokens of requests apart, choices are even after that, as {"routing": …} shows.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from dataclasses import asdict
from importlib import metadata
from typing import Any, TextIO

from vllm_puzzle.model_configs.schema import ConfigError
from vllm_puzzle.serving.cpu_defaults import is_cpu_engine
from vllm_puzzle.serving.engine_load import Load, StepRecorder, run_load

# The prompts are token ids. Statistics are where the times per request come from.
DEFAULTS: dict[str, Any] = {"skip_tokenizer_init": True}
OURS: dict[str, Any] = {
    "disable_log_stats": False,
    "worker_extension_cls": "vllm_puzzle.serving.engine_worker.EngineMeasurementWorker",
}
MAX_MESSAGE = 2000


def main() -> int:
    """Answer the lines of standard input until it ends; the exit status."""
    answers = _take_stdout()
    try:
        answer_lines(sys.stdin, answers)
    except Exception as error:
        traceback.print_exc()
        _say(answers, {"event": "error", "message": _one_line(error)})
        return 1
    return 0


def answer_lines(lines: TextIO, answers: TextIO) -> None:
    """The protocol: the engine of the first line, then one answer per line."""
    first = lines.readline()
    if not first:
        return
    model, arguments = _checked_start(_parsed(first))
    llm, recorder, about = start_engine(model, arguments)
    try:
        _say(answers, {"event": "ready"} | about)
        while line := lines.readline():
            _say(answers, _answer(llm.llm_engine, recorder, _parsed(line)))
    finally:
        llm.llm_engine.engine_core.shutdown()


def start_engine(model: str, arguments: dict[str, Any]) -> tuple[Any, StepRecorder, dict[str, Any]]:
    """(vLLM's LLM, what records its steps, what the parent is told about it)."""
    began = time.perf_counter()
    if is_cpu_engine():
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM
    from vllm_puzzle.serving.vllm_measurement import record_steps

    _register_classes()
    imported = time.perf_counter()
    llm = LLM(model, **(DEFAULTS | arguments | OURS))
    started = time.perf_counter()
    recorder = StepRecorder()
    engine = llm.llm_engine
    record_steps(engine, recorder)
    cache = engine.vllm_config.cache_config
    about = {
        "start_s": started - began,
        "import_s": imported - began,
        "kv_capacity_tokens": cache.kv_cache_size_tokens,
        "max_concurrency": cache.kv_cache_max_concurrency,
        "num_kv_blocks": cache.num_gpu_blocks,
        "block_size": cache.block_size,
        "max_model_len": engine.model_config.max_model_len,
        "max_num_seqs": engine.vllm_config.scheduler_config.max_num_seqs,
        "max_num_batched_tokens": engine.vllm_config.scheduler_config.max_num_batched_tokens,
        "versions": _versions(),
    }
    return llm, recorder, about | _described(engine) | _memory(engine)


def _answer(engine: Any, recorder: StepRecorder, line: dict[str, Any]) -> dict[str, Any]:
    if set(line) == {"routing"}:
        from vllm_puzzle.serving.engine_routing import run_routing

        return {"event": "routing"} | run_routing(engine, recorder, line["routing"])
    if set(line) == {"weights"}:
        return _even_weights(engine, line["weights"])
    load = Load.from_line(line)
    result = run_load(engine, recorder, load)
    return {"event": "case"} | asdict(load) | result | {"memory_bytes": _memory(engine)["memory_bytes"]}


def _even_weights(engine: Any, how: object) -> dict[str, Any]:
    found = str(engine.vllm_config.load_config.load_format)
    if how != "even" or found != "dummy":
        raise ConfigError(f"weights: found {how!r} with load_format {found}, allowed: 'even' with load_format dummy")
    engine.collective_rpc("puzzle_even_weights")
    return {"event": "weights", "weights": how}


def _register_classes() -> None:
    """On a CPU the engine runs here and has to import the model's class anyway: without its class, vLLM would import it
    in another process first, to look at it. Not where VLLM_PLUGINS leaves us out."""
    from vllm import ModelRegistry
    from vllm.plugins import load_general_plugins
    from vllm_puzzle.serving.plugin import register_classes

    load_general_plugins()
    if is_cpu_engine() and "PuzzleForCausalLM" in ModelRegistry.get_supported_archs():
        register_classes()


def _described(engine: Any) -> dict[str, Any]:
    """The first worker's answer; where there is no card, the CPU stands for it."""
    about: dict[str, Any] = engine.collective_rpc("puzzle_describe")[0]
    if about["card"] is None:
        from vllm_puzzle.serving.cpu_measurement import about_machine

        about["card"] = about_machine()["cpu"]
    return about


def _memory(engine: Any) -> dict[str, int | None]:
    """The fullest worker's."""
    workers = engine.collective_rpc("puzzle_memory")
    return {
        key: max((worker[key] for worker in workers if worker[key] is not None), default=None) for key in workers[0]
    }


def _versions() -> dict[str, str | None]:
    import torch
    import vllm

    try:
        triton: str | None = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = None
    return {"vllm": vllm.__version__, "torch": torch.__version__, "triton": triton}


def _checked_start(line: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    if set(line) != {"model", "engine"}:
        raise ConfigError(f"first line: found keys {', '.join(sorted(line)) or 'none'}, allowed: model and engine")
    model, arguments = line["model"], line["engine"]
    if not isinstance(model, str) or not model:
        raise ConfigError(f"first line, key `model`: found {model!r}, allowed: a folder or a name on the hub")
    if not isinstance(arguments, dict):
        raise ConfigError(f"first line, key `engine`: found {arguments!r}, allowed: an object of LLM's arguments")
    if taken := sorted(set(arguments) & set(OURS)):
        raise ConfigError(f"first line, key `engine`: found {taken[0]}, allowed: all but {', '.join(sorted(OURS))}")
    return model, arguments


def _parsed(line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError:
        value = line.strip()
    if not isinstance(value, dict):
        raise ConfigError(f"line: found {str(value)[:80]!r}, allowed: a JSON object")
    return value


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())[:MAX_MESSAGE]
    return text if isinstance(error, ConfigError) else f"{type(error).__name__}: {text}"


def _say(answers: TextIO, message: dict[str, Any]) -> None:
    print(json.dumps(message), file=answers, flush=True)


def _take_stdout() -> TextIO:
    """Standard output for our lines alone: whatever else writes there, here or in a child, writes to standard error."""
    sys.stdout.flush()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


if __name__ == "__main__":
    sys.exit(main())
