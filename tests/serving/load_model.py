"""Load checkpoints into vLLM's model objects, without a KV cache, and print what their attention layers hold:
`load_model.py JOBS.json`, a list of {"model": folder, "llm": engine arguments}.

For what CPU can load but not run: an FP8 KV cache needs AVX-512. Prints one JSON object per job: attention name →
[k_scale, v_scale].
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch


def main(jobs_file: str) -> None:
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.model_loader import get_model

    torch.accelerator.empty_cache = lambda: None  # as vLLM's CPU worker does: there is no accelerator
    is_initialized = False
    for job in json.loads(Path(jobs_file).read_text()):
        config = EngineArgs(job["model"], skip_tokenizer_init=True, **job["llm"]).create_engine_config()
        with set_current_vllm_config(config):
            if not is_initialized:
                init_distributed_environment(1, 0, "tcp://127.0.0.1:0", 0, "gloo")
                initialize_model_parallel(1, 1)
                is_initialized = True
            model = get_model(vllm_config=config)
        layers = {name: m for name, m in model.named_modules() if isinstance(m, Attention)}
        print(json.dumps({name: [m._k_scale_float, m._v_scale_float] for name, m in layers.items()}))


if __name__ == "__main__":
    main(sys.argv[1])
