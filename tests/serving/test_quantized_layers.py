"""vLLM's layers are held to the checkpoint: a layer built for other tensors than the file has stops the start."""

from __future__ import annotations

import pytest
import torch
from vllm_puzzle.model_configs.quantization import Quantization
from vllm_puzzle.model_configs.quantization_formats import MODELOPT
from vllm_puzzle.model_configs.schema import ConfigError


@pytest.fixture(scope="module")
def layer() -> torch.nn.Module:
    """A tree with one unquantized layer of vLLM's, `model.layers.7.mlp.down_proj`."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.linear import LinearBase

    with set_current_vllm_config(VllmConfig()):
        node: torch.nn.Module = LinearBase(64, 64, disable_tp=True)
    for name, shape in (("weight", (64, 64)), ("bias", (64,))):
        node.register_parameter(name, torch.nn.Parameter(torch.zeros(shape)))
    for name in reversed(["model", "layers", "7", "mlp", "down_proj"]):
        parent = torch.nn.Module()
        parent.add_module(name, node)
        node = parent
    return node


def test_a_layer_that_the_checkpoint_has_plain_passes(layer: torch.nn.Module) -> None:
    from vllm_puzzle.serving.quantized_layers import check_layers

    check_layers(layer, Quantization("modelopt", {}))
    check_layers(layer, None)


def test_a_layer_that_vllm_left_unquantized_is_named(layer: torch.nn.Module) -> None:
    from vllm_puzzle.serving.quantized_layers import check_layers

    with pytest.raises(ConfigError) as caught:
        check_layers(layer, Quantization("modelopt", {"model.layers.7.mlp.down_proj": MODELOPT["FP8"]}))
    assert str(caught.value) == (
        "layer 7, module `mlp.down_proj`: found vLLM's layer with weight, allowed: input_scale, weight, weight_scale, "
        "as the checkpoint has it ModelOpt FP8"
    )
