"""What vLLM calls in every process: register our configurations, model classes and attention backend, and nothing else.

Entry point `vllm.general_plugins: puzzle`. Nothing is imported at module level that can fail: vLLM swallows errors
while it loads an entry point, but not errors inside `register()`. Safe to call more than once.
"""

from __future__ import annotations

import logging

# Architecture name in config.json → class. A name that vLLM has too is replaced, said at info level.
MODELS = {
    "PuzzleForCausalLM": "vllm_puzzle.serving.model:PuzzleForCausalLM",
    "DeciLMForCausalLM": "vllm_puzzle.serving.model:PuzzleForCausalLM",
    "GptOssPuzzleForCausalLM": "vllm_puzzle.serving.model:PuzzleForCausalLM",
}
OVERRIDES = ("DeciLMForCausalLM",)
ATTENTION_BACKEND = "vllm_puzzle.serving.window_attention_backend.WindowAttentionBackend"


def register() -> None:
    """Register configurations, size convertor and model classes with transformers and vLLM."""
    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
    from vllm_puzzle.serving import vllm_compat
    from vllm_puzzle.serving.hf_config import CONFIGS
    from vllm_puzzle.serving.overrides import DISABLE_OVERRIDES, say_once

    vllm_compat.check_vllm_version()
    vllm_compat.allow_attention_free_stages()
    vllm_compat.use_gpt_oss_defaults("GptOssPuzzleForCausalLM")
    vllm_compat.end_harmony_turns_at_calls()
    vllm_compat.use_fewest_kv_cache_pages()
    vllm_compat.enforce_thinking_budgets()
    vllm_compat.enforce_thinking_budgets_v2()
    for config_class in CONFIGS:
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    for name in _served_names():
        ModelRegistry.register_model(name, MODELS[name])
        if name in OVERRIDES:
            say_once(logging.INFO, f"serves {name} in place of vLLM's class ({DISABLE_OVERRIDES}=1 keeps it)")
    if "DeciLMForCausalLM" in _served_names():
        vllm_compat.use_record_sizes("nemotron-nas")
    if not AttentionBackendEnum.CUSTOM.is_overridden():  # another plugin's stays
        register_backend(AttentionBackendEnum.CUSTOM, ATTENTION_BACKEND)


def register_classes() -> None:
    """Register the classes themselves instead of their names, once the plugins are loaded.

    A name makes vLLM inspect the class in a process of its own, which imports vLLM again (10 s and more, cached
    afterwards). Worth it only where this process has to import the class anyway, as a forked engine does.
    """
    from vllm import ModelRegistry
    from vllm.plugins import load_general_plugins
    from vllm_puzzle.serving.model import PuzzleForCausalLM

    load_general_plugins()
    for name in _served_names():
        ModelRegistry.register_model(name, PuzzleForCausalLM)


def _served_names() -> list[str]:
    from vllm_puzzle.serving.overrides import keeps_stock

    return [name for name in MODELS if not (keeps_stock() and name in OVERRIDES)]
