"""The toy checkpoints are the published models in small: same kinds in the same order, and no layer is idle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import checkpoints
import parity
import published
import pytest
import torch
from vllm_puzzle.model_configs.catalogue import find
from vllm_puzzle.model_configs.formats import read_model
from vllm_puzzle.model_configs.schema import Attention, GatedFFN, LayerRecord, MoE

ORIGINALS = {
    "nemotron super 49b": "llama-3.3-nemotron-super-49b-v1",
    "nemotron ultra 253b": "llama-3.1-nemotron-ultra-253b-v1",
    "gpt-oss-puzzle 88b": "gpt-oss-puzzle-88b",
}


def kind(layer: LayerRecord) -> tuple[Any, ...]:
    """What a smaller width must not change."""
    attention, ffn = layer.attention, layer.ffn
    return (
        attention.num_heads // attention.num_kv_heads if isinstance(attention, Attention) else attention,
        isinstance(attention, Attention) and attention.sliding_window is not None,
        type(ffn),
        ffn.num_experts_per_tok if isinstance(ffn, MoE) else None,
    )


@pytest.mark.parametrize("name", ORIGINALS)
def test_a_toy_has_its_originals_kinds_and_order_of_sizes(name: str) -> None:
    original = find(ORIGINALS[name]).record().layers
    toy = read_model(published.PUBLISHED[name]).layers
    assert [kind(layer) for layer in toy] == [kind(layer) for layer in original]
    for size in (
        lambda layer: layer.ffn.intermediate_size if isinstance(layer.ffn, GatedFFN) else 0,
        lambda layer: layer.ffn.num_experts if isinstance(layer.ffn, MoE) else 0,
        lambda layer: (layer.attention.sliding_window or 0) if isinstance(layer.attention, Attention) else 0,
    ):
        pairs = sorted({(size(mine), size(theirs)) for mine, theirs in zip(original, toy, strict=True)})
        assert pairs == sorted(pairs, key=lambda pair: pair[1]), "a wider original is no narrower as a toy"


@pytest.mark.parametrize("name", [name for name in published.PUBLISHED if not name.endswith("mxfp4")])
@torch.no_grad()
def test_sub_blocks_and_windows_of_a_toy_show_beyond_the_tolerance(tmp_path: Path, name: str) -> None:
    """Else the parity tests could not tell a layer that vLLM left out, or gave another window."""
    model = checkpoints.write_checkpoint(tmp_path, published.PUBLISHED[name])
    tokens = torch.arange(64) * 7 % 97
    inputs = [model.embed(tokens)]
    for index in range(len(model.record.layers)):
        inputs.append(model.layer(index, inputs[-1]))
    logits = model.logits(inputs[-1])
    expected, limit = logits.log_softmax(-1), parity.bound(model, logits)
    for index in Random(name).sample(range(len(model.record.layers)), 14):
        layer = model.record.layers[index]
        for other in without_a_part(layer):
            hidden = model.block(other, f"model.layers.{index}", inputs[index])
            for later in range(index + 1, len(model.record.layers)):
                hidden = model.layer(later, hidden)
            error = (model.logits(hidden).log_softmax(-1) - expected).abs().max().item()
            assert error > 5 * limit, f"layer {index}, {layer} as {other}: {error:.1e}, bound {limit:.1e}"


def without_a_part(layer: LayerRecord) -> list[LayerRecord]:
    """The layer without its attention, without its FFN, and with a window one token shorter."""
    others = []
    if layer.attention is not None:
        others.append(LayerRecord(None, layer.ffn))
    if layer.ffn is not None:
        others.append(LayerRecord(layer.attention, None))
    if isinstance(layer.attention, Attention) and layer.attention.sliding_window is not None:
        shorter = replace(layer.attention, sliding_window=layer.attention.sliding_window - 1)
        others.append(LayerRecord(shorter, layer.ffn))
    return others
