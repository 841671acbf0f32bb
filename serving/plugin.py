"""What vLLM calls in every process: register our configurations and model classes, and nothing else.

Entry point `vllm.general_plugins: puzzle`. Nothing is imported at module level that can fail: vLLM swallows errors
while it loads an entry point, but not errors inside `register()`. Safe to call more than once.
"""

from __future__ import annotations

import logging
import os

# Architecture name in config.json → class. A name that vLLM has too is replaced, said at info level.
MODELS = {
    "PuzzleForCausalLM": "vllm_puzzle.serving.model:PuzzleForCausalLM",
    "DeciLMForCausalLM": "vllm_puzzle.serving.model:PuzzleForCausalLM",
}
OVERRIDES = ("DeciLMForCausalLM",)
DISABLE_OVERRIDES = "VLLM_PUZZLE_DISABLE_OVERRIDES"


def register() -> None:
    """Register configurations, size convertor and model classes with transformers and vLLM."""
    from transformers import AutoConfig
    from vllm import ModelRegistry

    from vllm_puzzle.serving import vllm_compat
    from vllm_puzzle.serving.hf_config import NemotronNasConfig, PuzzleLlamaConfig

    vllm_compat.check_vllm_version()
    AutoConfig.register("nemotron-nas", NemotronNasConfig, exist_ok=True)
    AutoConfig.register("llama", PuzzleLlamaConfig, exist_ok=True)
    keep_stock = os.environ.get(DISABLE_OVERRIDES, "0") not in ("", "0")
    for name, target in MODELS.items():
        if name in OVERRIDES and keep_stock:
            continue
        ModelRegistry.register_model(name, target)
    if not keep_stock:
        vllm_compat.use_record_sizes("nemotron-nas")
        _logger().info(
            "vllm-puzzle serves %s in place of vLLM's class (%s=1 keeps vLLM's)", ", ".join(OVERRIDES), DISABLE_OVERRIDES
        )


def _logger() -> logging.Logger:
    from vllm.logger import init_logger

    return init_logger("vllm.puzzle")
