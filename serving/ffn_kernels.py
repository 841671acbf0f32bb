"""Which path a gated FFN takes, ours or vLLM's, and ours as two operators that a compiler sees as one node each.

A layer is taken or left once its weights are in their final form; with a taken layer each call still goes by the
table for its number of tokens, and computes with vLLM's own calls where those are faster. Quantizing an input stays
outside the operators, so that vLLM can fuse it with the norm before.
"""

# No `from __future__ import annotations`: operators are declared by their functions' annotations.

import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.forward_context import get_forward_context
from vllm.utils.torch_utils import direct_register_custom_op
from vllm_puzzle.kernels import ffn
from vllm_puzzle.kernels.ffn_table import Config, choose, table_of
from vllm_puzzle.model_configs.schema import ConfigError
from vllm_puzzle.serving import vllm_linear
from vllm_puzzle.serving.ffn import device_name
from vllm_puzzle.serving.kernel_flags import FFN_KERNEL
from vllm_puzzle.serving.vllm_linear import LayerName

logger = logging.getLogger("vllm.puzzle")
NAMESPACE = "vllm_puzzle"
FACTOR = "vllm_puzzle_ffn_kernel"  # among what vLLM's cache of compiled models is keyed by
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")  # the operators live as long as it


class Half:
    """One of the two matrix products: its weight and scales as the kernel takes them, and vLLM's own call."""

    def __init__(self, op: str, layer: Any, num_rows: int, size: int) -> None:
        self.op, self.layer, self.num_rows, self.size = op, layer, num_rows, size
        self.fp8 = vllm_linear.fp8_kernel(layer)
        self.is_block = self.fp8 is not None and vllm_linear.is_block_scaled(self.fp8)
        self.num_outputs = num_rows // (2 if op == "gate_up" else 1)
        self.configs: dict[int, Config | None] = {}

    @property
    def kind(self) -> str:
        """As in kernels/ffn_table.KINDS."""
        if self.fp8 is None or self.is_block:
            return "bf16" if self.fp8 is None else "fp8-block"
        return "fp8-token" if self.static_scale() is None else "fp8"

    def why_kept(self, dtype: torch.dtype, device: torch.device) -> str | None:
        """Why vLLM's path stays, or None."""
        if getattr(self.layer, "bias", None) is not None:
            return "a bias"
        if self.fp8 is None and not vllm_linear.is_unquantized(self.layer):
            return f"the quantization method {type(self.layer.quant_method).__name__}"
        weight = self.weight()
        wanted = dtype if self.fp8 is None else torch.float8_e4m3fn
        if tuple(weight.shape) != (self.num_rows, self.size) or weight.dtype != wanted or weight.stride(1) != 1:
            return f"a weight of {weight.dtype} {tuple(weight.shape)} with strides {weight.stride()}"
        if weight.device.type != device.type:  # offloaded
            return f"a weight on {weight.device}"
        scale = self.weight_scale()
        if scale is None:
            return None
        allowed = {(-(-self.num_rows // 128), -(-self.size // 128))} if self.is_block else {(1,), (self.num_rows,)}
        if scale.dtype != torch.float32 or tuple(scale.shape) not in allowed:
            return f"scales of {scale.dtype} {tuple(scale.shape)}"
        return None

    def weight(self) -> torch.Tensor:
        """[num_rows, size] without a copy: vLLM keeps FP8 weights transposed but for block scales, some padded."""
        weight = self.layer.weight
        if self.fp8 is not None and not self.is_block:
            weight = weight.t()
        return weight[: self.num_rows, : self.size]

    def weight_scale(self) -> torch.Tensor | None:
        """As kernels/ffn.py takes it; None for plain weights."""
        if self.fp8 is None:
            return None
        if self.is_block:
            return vllm_linear.block_scale(self.layer)
        scale = self.layer.weight_scale.reshape(-1)
        return scale if scale.numel() == 1 else scale[: self.num_rows]

    def quantized(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(values, scale) of an input, by vLLM's own quantization; plain inputs as they are."""
        if self.fp8 is None:
            return x, None
        return vllm_linear.quantize_input(self.fp8, self.layer, x)

    def static_scale(self) -> torch.Tensor | None:
        """The input's one scale that the checkpoint fixes, if it does."""
        return None if self.fp8 is None or self.is_block else getattr(self.layer, "input_scale", None)

    def config(self, x: torch.Tensor, dtype: torch.dtype, is_forced: bool) -> Config | None:
        """The configuration for this many tokens, None for vLLM's call."""
        m = x.shape[0]
        if m not in self.configs:
            weight = self.weight()
            found = choose(self.op, device_name(x.device), self.kind, m, self.num_outputs, self.size)
            is_usable = found is not None and ffn.is_usable(found, x, weight, self.op == "gate_up", dtype)
            if not is_usable:
                found = ffn.default_for(x, weight, self.op == "gate_up", dtype, self.kind) if is_forced else None
            self.configs[m] = found
        return self.configs[m]

    def stock(self, x: torch.Tensor, x_scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        """vLLM's own product. x: [M, size] → [M, num_rows]."""
        if self.fp8 is None:
            return self.layer.quant_method.apply(self.layer, x, None)
        return vllm_linear.scaled_product(self.fp8, self.layer, x, x_scale, self.num_rows, dtype)


class FusedFFN:
    """Our path of one layer. [num_tokens, hidden_size] → the same shape."""

    def __init__(self, layer: Any, name: str, width: int, hidden_size: int, dtype: torch.dtype) -> None:
        self.name, self.width, self.hidden_size, self.dtype = name, width, hidden_size, dtype
        self.act_fn, self.down_proj = layer.act_fn, layer.down_proj
        self.first = Half("gate_up", layer.gate_up_proj, 2 * width, hidden_size)
        self.second = Half("down", layer.down_proj, hidden_size, width)
        self.is_forced = FFN_KERNEL.read() == "on"

    def why_kept(self, device: torch.device) -> str | None:
        """Why the layer keeps vLLM's path, or None."""
        if vllm_linear.is_batch_invariant():
            return "VLLM_BATCH_INVARIANT"
        if self.dtype not in ffn.allowed_types():
            return f"dtype {self.dtype}"
        reason = self.first.why_kept(self.dtype, device) or self.second.why_kept(self.dtype, device)
        if reason is not None or self.is_forced:
            return reason
        table = table_of(device_name(device))
        half = self.first
        is_faster = table is not None and table.is_never_slower("gate_up", half.kind, half.num_outputs, half.size)
        return None if is_faster else "no table says that ours is faster"

    def __call__(self, hidden: torch.Tensor, row_scale: torch.Tensor | None = None) -> torch.Tensor:
        """`row_scale`, float32 [num_tokens], multiplies the rows of gate and up (a norm's 1/rms)."""
        operators, name = torch.ops.vllm_puzzle, vllm_linear.encode_layer_name(self.name)
        hidden = hidden if hidden.stride(-1) == 1 else hidden.contiguous()
        x, x_scale = self.first.quantized(hidden)
        h_scale = self.second.static_scale()
        dtype = self.dtype if h_scale is None else torch.float8_e4m3fn
        h = operators.ffn_gate_up(x, x_scale, row_scale, name, self.width, dtype)
        if h_scale is None:
            h, h_scale = self.second.quantized(h)
        output = operators.ffn_down(h, h_scale, name, self.hidden_size, self.dtype)
        if self.down_proj.reduce_results and self.down_proj.tp_size > 1:
            output = tensor_model_parallel_all_reduce(output)
        return output

    def gate_up(
        self, x: torch.Tensor, x_scale: torch.Tensor | None, row_scale: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        """silu(gate) · up, [num_tokens, width]; e4m3 where the down projection's input scale is fixed."""
        out_scale = self.second.static_scale() if dtype == torch.float8_e4m3fn else None
        config = self.first.config(x, dtype, self.is_forced)
        if config is None:
            both = self.first.stock(x, x_scale, self.dtype)
            if row_scale is not None:
                both = (both * row_scale[:, None]).to(both.dtype)
            return vllm_linear.silu_and_mul(self.act_fn, both, out_scale)
        out = torch.empty((x.shape[0], self.width), dtype=dtype, device=x.device)
        return ffn.gate_up_silu(
            x, self.first.weight(), row_scale=row_scale, weight_scale=self.first.weight_scale(), x_scale=x_scale,
            out_scale=out_scale, out=out, config=config,
        )  # fmt: skip

    def down(self, h: torch.Tensor, h_scale: torch.Tensor | None) -> torch.Tensor:
        """This rank's part of the output, [num_tokens, hidden_size]."""
        config = self.second.config(h, self.dtype, self.is_forced)
        if config is None:
            return self.second.stock(h, h_scale, self.dtype)
        out = torch.empty((h.shape[0], self.hidden_size), dtype=self.dtype, device=h.device)
        weight, scale = self.second.weight(), self.second.weight_scale()
        return ffn.down(h, weight, weight_scale=scale, h_scale=h_scale, out=out, config=config)


def choose_paths(layers: Iterable[Any], vllm_config: VllmConfig) -> None:
    """Give each of these PuzzleFFN its path, where the flag is not `off`.

    Raises ConfigError for `on` on a device that has no kernel; layers that keep vLLM's path are named in one line.
    """
    choice, found = FFN_KERNEL.read(), list(layers)
    if choice == "on" and (reason := ffn.why_unsupported(vllm_config.device_config.device)) is not None:
        raise ConfigError(f"flag {FFN_KERNEL.flag} on: {reason}")
    kept: dict[str, list[str]] = {}
    taken: list[str] = []
    for layer in found:
        reason = why_none(vllm_config) or layer.take_kernels(vllm_config)
        (taken if reason is None else kept.setdefault(reason, [])).append(layer.prefix)
    if choice == "on":
        for reason, names in kept.items():
            logger.warning("%s on: %s keep vLLM's path: %s", FFN_KERNEL.flag, ", ".join(names), reason)
    if taken:
        register_operators()
        logger.info("FFN kernels: %d of %d layers", len(taken), len(found))
        # A compiled model that another choice has left in vLLM's cache must not be taken.
        vllm_config.additional_config[FACTOR] = taken


def why_none(vllm_config: VllmConfig) -> str | None:
    """What keeps every layer on vLLM's path, or None."""
    if vllm_config.lora_config is not None:
        return "LoRA is enabled"
    if not isinstance(vllm_config.additional_config, dict):
        return "additional_config is not a dictionary"
    return ffn.why_unsupported(vllm_config.device_config.device)


def _fused(layer: Any) -> FusedFFN:
    fused = get_forward_context().no_compile_layers[vllm_linear.decode_layer_name(layer)].fused
    assert isinstance(fused, FusedFFN), "only a taken layer calls the operators"
    return fused


def _gate_up(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    row_scale: torch.Tensor | None,
    layer: LayerName,
    width: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    return _fused(layer).gate_up(x, x_scale, row_scale, dtype)


def _gate_up_fake(
    x: torch.Tensor,
    x_scale: torch.Tensor | None,
    row_scale: torch.Tensor | None,
    layer: LayerName,
    width: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    return torch.empty((x.shape[0], width), dtype=dtype, device=x.device)


def _down(
    h: torch.Tensor, h_scale: torch.Tensor | None, layer: LayerName, width: int, dtype: torch.dtype
) -> torch.Tensor:
    return _fused(layer).down(h, h_scale)


def _down_fake(
    h: torch.Tensor, h_scale: torch.Tensor | None, layer: LayerName, width: int, dtype: torch.dtype
) -> torch.Tensor:
    return torch.empty((h.shape[0], width), dtype=dtype, device=h.device)


def register_operators() -> None:
    """Make `torch.ops.vllm_puzzle.ffn_gate_up` and `ffn_down`. Repeatable."""
    operators: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
        "ffn_gate_up": (_gate_up, _gate_up_fake),
        "ffn_down": (_down, _down_fake),
    }
    for name, (function, fake) in operators.items():
        if not hasattr(torch.ops.vllm_puzzle, name):
            direct_register_custom_op(name, function, fake_impl=fake, target_lib=_LIBRARY)
