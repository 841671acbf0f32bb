"""What vLLM makes of NemotronH configurations, without the plugin and with it: `nemotron_build.py FOLDER...`.

A process of its own, started with `VLLM_PLUGINS=` so that nothing of ours is loaded at first. Prints one JSON object:
per folder what vLLM understands before and after `register()` (or the error), and the sizes of its model objects, built
on the meta device.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

OPTIONS = {"skip_tokenizer_init": True, "enforce_eager": True, "max_model_len": 512, "dtype": "float32"}


def understood(folder: str) -> dict[str, str] | str:
    """The configuration's class, vLLM's model class and the sizes that vLLM takes from them; or the error."""
    from vllm import ModelRegistry
    from vllm.engine.arg_utils import EngineArgs

    try:
        config = EngineArgs(folder, **OPTIONS).create_model_config()
    except Exception as error:
        return str(error)
    model_class, _ = ModelRegistry.resolve_model_cls(config.architectures, config)
    return {
        "config_class": f"{type(config.hf_config).__module__}.{type(config.hf_config).__name__}",
        "config": config.hf_config.to_json_string(),
        "sizes": repr(config.model_arch_config),
        "model_class": f"{model_class.__module__}.{model_class.__name__}",
    }


def built_sizes(folder: str, **options: Any) -> dict[str, int]:
    """Parameters of vLLM's model object for the target, or for its draft; each KV or state-space layer's presence."""
    from vllm import ModelRegistry
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs

    # CPU has no kernel for experts without a gate. With LoRA vLLM takes Triton's without asking the platform.
    arguments = EngineArgs(folder, **OPTIONS, enable_lora=True, kv_cache_memory_bytes=1 << 34, **options)
    config = arguments.create_engine_config()
    model_config = config.speculative_config.draft_model_config if options else config.model_config
    model_class, _ = ModelRegistry.resolve_model_cls(model_config.architectures, model_config)
    with set_current_vllm_config(config), torch.device("meta"):
        model = model_class(vllm_config=config)
    shared = ("embed_tokens.weight", "lm_head.weight") if options else ()  # a draft uses the target's
    return {name: p.numel() for name, p in model.named_parameters() if not name.endswith(shared)}


def allow_plain_experts() -> None:
    """Building needs no kernel, but vLLM refuses experts without a gate on CPU in the configuration already."""
    from vllm.model_executor.layers.fused_moe import config as module

    class AsIfCuda:
        def __getattr__(self, name: str) -> Any:
            return getattr(platform, name)

        def is_cuda_alike(self) -> bool:
            return True

    platform = module.current_platform
    module.current_platform = AsIfCuda()


def main(folders: list[str]) -> None:
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm_puzzle.serving import plugin

    result: dict[str, Any] = {Path(folder).name: {"without": understood(folder)} for folder in folders}
    plugin.register()
    for folder in folders:
        result[Path(folder).name]["with"] = understood(folder)
    config = EngineArgs(folders[0], **OPTIONS).create_engine_config()
    from vllm.config import set_current_vllm_config

    with set_current_vllm_config(config):
        init_distributed_environment(1, 0, "tcp://127.0.0.1:0", 0, "gloo")
        initialize_model_parallel(1, 1)
    try:
        built_sizes(folders[0])
    except NotImplementedError as error:
        result["refusal"] = str(error)
    allow_plain_experts()
    for folder in folders:
        entry = result[Path(folder).name]
        entry["target"] = built_sizes(folder)
        if "puzzle" in folder:
            entry["draft"] = built_sizes(folder, speculative_config={"method": "mtp", "num_speculative_tokens": 1})
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])
