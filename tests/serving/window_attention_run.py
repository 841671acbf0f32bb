"""engine_run.py with our window attention: `window_attention_run.py JOBS.json`.

Without a GPU the kernels run under Triton's interpreter, and two things of vLLM's CPU platform are made as on CUDA: the
V2 model runner, which wants a Triton backend named "cpu" (an empty one does, see v2_run.py), and `--attention-backend
CUSTOM`, which the CPU platform ignores. Each result also tells how often each kernel was launched for the whole job,
and the backend of each layer.
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
    act_like_cuda()


def act_like_cuda() -> None:
    import vllm.config  # noqa: F401 — the order in which vLLM's modules can be imported
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    # The V1 sampler's small functions; inductor would ask the empty Triton backend for its version.
    CpuPlatform.simple_compile_backend = "eager"
    stock = CpuPlatform.get_attn_backend_cls

    def select(cls: Any, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None) -> str:
        if selected_backend is not AttentionBackendEnum.CUSTOM:
            return str(stock(selected_backend, attn_selector_config, num_heads))
        backend = selected_backend.get_class()
        reasons = backend.validate_configuration(device_capability=None, **attn_selector_config._asdict())
        assert not reasons, reasons
        return str(selected_backend.get_path())

    CpuPlatform.get_attn_backend_cls = classmethod(select)


def counted(launches: Counter[str], name: str, kernel: Callable[..., None]) -> Callable[..., None]:
    def launch(*args: Any, **kwargs: Any) -> None:
        launches[name] += 1
        kernel(*args, **kwargs)

    return launch


def backends_of(model: Any) -> dict[str, str]:
    """Backend by layer, in order."""
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
