"""What the engine measurement asks of a worker by name, through vLLM's `worker_extension_cls`."""

from __future__ import annotations

import resource
from collections import Counter
from typing import Any

import torch
from vllm_puzzle.serving.engine_routing import RoutingWatch


class EngineMeasurementWorker:
    """Methods that vLLM mixes into its worker; what a device or runner does not know is None."""

    model_runner: Any
    vllm_config: Any
    puzzle_routing_watch: RoutingWatch

    def puzzle_describe(self) -> dict[str, Any]:
        """Class of the model, layers of each attention backend, name of the card, seconds of compilation."""
        layers = self.vllm_config.compilation_config.static_forward_context.values()
        attentions = [layer for layer in layers if hasattr(layer, "get_attn_backend")]
        backends = Counter(layer.get_attn_backend().get_name() for layer in attentions)
        return {
            "model_class": type(self.model_runner.get_model()).__name__,
            "model_runner": f"{type(self.model_runner).__module__}.{type(self.model_runner).__name__}",
            "attention_backends": dict(backends),
            "card": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "compile_s": self.vllm_config.compilation_config.compilation_time,
        }

    def puzzle_memory(self) -> dict[str, int | None]:
        """Bytes: the most that torch has reserved on the card (on a CPU: the process's peak), and the loaded weights as
        vLLM's runner measured them on the card (None on a CPU, which does not)."""
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_reserved()
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        weights = getattr(self.model_runner, "model_memory_usage", None)
        return {"memory_bytes": peak, "weights_bytes": None if weights is None else int(weights)}

    def puzzle_even_weights(self) -> None:
        """Set every norm's weights to 1 and every bias to 0 (vLLM's dummy weights are all within ±0.001).

        A bias that is as large as what a token adds decides alone: every token goes to the same experts, and every
        request generates the same tokens.
        """
        for name, parameter in self.model_runner.get_model().named_parameters():
            if name.endswith("bias"):
                parameter.data.zero_()
            elif parameter.ndim == 1 and name.endswith(".weight") and "norm" in name.split(".")[-2]:
                parameter.data.fill_(1)

    def puzzle_watch_routing(self, num_tokens: int) -> None:
        """Count where the tokens of steps of `num_tokens` go, from now on."""
        self.puzzle_routing_watch = RoutingWatch(num_tokens)
        self.puzzle_routing_watch.start(self.model_runner.get_model())

    def puzzle_routing(self) -> list[dict[str, Any]]:
        """What was counted, a row per MoE layer."""
        return self.puzzle_routing_watch.described()
