"""Build vLLM's model object for a configuration on the meta device and print its sizes: `meta_build.py FOLDER`.

A process of its own for the same reasons as engine_run.py. Prints one JSON line: parameters, attention layers, KV
elements per token, the largest parameter count that existed at any moment, and the layers that one pass calls.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch


def called_layers(model: torch.nn.Module) -> int:
    """How many layers one pass calls; their own work, and the last norm's, is left out."""
    from vllm_puzzle.serving import model as module
    from vllm_puzzle.serving.layers import PuzzleDecoderLayer

    calls = 0

    def count(self: Any, positions: Any, hidden: torch.Tensor, residual: torch.Tensor | None) -> Any:
        nonlocal calls
        calls += 1
        return hidden, hidden if residual is None else residual

    PuzzleDecoderLayer.forward = count  # type: ignore[method-assign]
    module.add_and_norm = lambda norm, hidden, residual: (hidden, residual)  # type: ignore[assignment]
    embeddings = torch.empty(3, model.record.hidden_size, device="meta")  # type: ignore[union-attr]
    model.forward(None, torch.arange(3), inputs_embeds=embeddings)
    return calls


def main(folder: str) -> None:
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.layers.attention import Attention
    from vllm_puzzle.serving.model import PuzzleForCausalLM

    arguments = EngineArgs(folder, skip_tokenizer_init=True, enforce_eager=True, kv_cache_memory_bytes=1 << 40)
    config = arguments.create_engine_config()
    created = 0
    register = torch.nn.Module.register_parameter

    def counting(self: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        nonlocal created
        created += parameter.numel() if parameter is not None else 0
        register(self, name, parameter)

    torch.nn.Module.register_parameter = counting  # type: ignore[method-assign]
    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, "tcp://127.0.0.1:0", 0, "gloo")
        initialize_model_parallel(1, 1)
        with torch.device("meta"):
            model = PuzzleForCausalLM(vllm_config=config)
    called = called_layers(model)
    attention = [module for module in model.modules() if isinstance(module, Attention)]
    sizes = {
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "num_created": created,
        "num_attention_layers": len(attention),
        "num_called_layers": called,
        "kv_elements_per_token": sum(2 * module.num_kv_heads * module.head_size for module in attention),
    }
    print(json.dumps(sizes))


if __name__ == "__main__":
    main(sys.argv[1])
