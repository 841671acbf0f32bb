"""engine_run.py with our window attention under Triton's interpreter: `window_attention_run.py JOBS.json`.

vLLM's V2 model runner, the default on CUDA, wants a Triton backend named "cpu" on a CPU; an empty one does (see
v2_run.py). Each result also tells how often each kernel was launched for the whole job, by name, and which layers are
ours.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "kernels")]
KERNELS = ("fused_decode", "rope_and_write_kv", "write_kv", "window_attention")


def prepare() -> None:
    """Before vLLM is imported."""
    import torch

    if torch.cuda.is_available():
        return
    import interpreter

    interpreter.install()
    from triton.backends import Backend, backends

    backends["cpu"] = Backend(compiler=None, driver=None)  # type: ignore[arg-type]


def counted(launches: Counter[str], name: str, kernel: Callable[..., None]) -> Callable[..., None]:
    def launch(*args: Any, **kwargs: Any) -> None:
        launches[name] += 1
        kernel(*args, **kwargs)

    return launch


def backends_of(model: Any) -> dict[str, str]:
    """Backend by layer."""
    from vllm.model_executor.layers.attention import Attention

    return {name: m.attn_backend.get_name() for name, m in model.named_modules() if isinstance(m, Attention)}


def main(jobs_file: str) -> None:
    prepare()
    import engine_run
    from vllm_puzzle.serving import window_attention_backend as backend

    launches: Counter[str] = Counter()
    for name in KERNELS:
        setattr(backend, name, counted(launches, name, getattr(backend, name)))
    generate = engine_run.run
    engine_run.describe_layers = backends_of

    def run(job: dict[str, Any]) -> list[dict[str, Any]]:
        launches.clear()
        results = generate(job | {"describe_layers": True})
        return [result | {"launches": dict(launches)} for result in results]

    engine_run.run = run
    engine_run.main(jobs_file)


if __name__ == "__main__":
    main(sys.argv[1])
