"""The block-dependency matrix of FFN Fusion (arXiv 2503.18908): what each block needs of each earlier one.

h_j(X) = f_j(X) − X is what block j adds to the residual stream. M[i][j] is the cosine distance between h_j in the whole
model and h_j in the model without block i, a mean over tokens. One pass over the layers does it: beside the whole
model's residual stream run the streams of the models without block i, for every i before j, so that every layer is read
once per batch and evaluated once per stream, O(L²) evaluations in all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from vllm_puzzle.model_configs.schema import Attention, GatedFFN, LayerRecord, MoE
from vllm_puzzle.serving.fuse.checkpoint import LayerwiseModel

Matrix = list[list[float | None]]
# Residual streams of one batch, and what a layer computes between its inputs and outputs.
STREAM_BYTES, WORK_BYTES = 2**30, 2**29
Progress = Callable[[int, int], None]


def cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    """1 − cos of the angle between vectors over the last axis, exact near 0. [..., D] twice → [...] float32.

    0 between two zero vectors (nothing changed), 1 between a zero vector and any other.
    """
    a, b = a.float(), b.float()
    size_a, size_b = a.norm(dim=-1, keepdim=True), b.norm(dim=-1, keepdim=True)
    tiny = torch.finfo(torch.float32).tiny
    # |â − b̂|² / 2 is the same number without the cancellation of 1 − â·b̂.
    distance = (a / size_a.clamp_min(tiny) - b / size_b.clamp_min(tiny)).pow(2).sum(-1) / 2
    is_lost = (size_a == 0) != (size_b == 0)
    return torch.where(is_lost.squeeze(-1), torch.ones_like(distance), distance)


@torch.no_grad()
def dependency_matrix(
    model: LayerwiseModel,
    sequences: Sequence[Sequence[int]],
    progress: Progress = lambda done, total: None,
    stream_bytes: int = STREAM_BYTES,
    work_bytes: int = WORK_BYTES,
) -> Matrix:
    """M over all tokens of `sequences` (token ids). Row i, column j; None where j ≤ i or where either layer is empty.

    `stream_bytes` and `work_bytes` bound the memory beside the weights of one layer, down to one sequence at a time.
    progress(done, total) is called after every layer of every batch.
    """
    num_layers = len(model.record.layers)
    totals = torch.zeros(num_layers, num_layers, dtype=torch.float64)
    batches = _batches(model, sequences, stream_bytes)
    names = model.layer_names()
    total, done = len(batches) * sum(map(bool, names)), 0
    for batch in batches:
        for _ in _add_batch(model, names, batch, totals, work_bytes):
            done += 1
            progress(done, total)
    means = (totals / sum(map(len, sequences))).tolist()
    return [
        [mean if i < j and names[i] and names[j] else None for j, mean in enumerate(row)] for i, row in enumerate(means)
    ]


def _add_batch(
    model: LayerwiseModel, names: list[list[str]], batch: Sequence[Sequence[int]], totals: Tensor, work_bytes: int
) -> Iterator[None]:
    """Add the batch's distances, summed over its tokens, to `totals` [L, L]; yields after every layer."""
    width = max(map(len, batch))
    # Padding on the right: no real token attends to it, and `is_real` keeps it out of the sums.
    ids = torch.tensor([[*sequence, *[0] * (width - len(sequence))] for sequence in batch])
    is_real = torch.arange(width) < torch.tensor([len(sequence) for sequence in batch])[:, None]
    live = [index for index, own in enumerate(names) if own]
    with model.loaded(["model.embed_tokens.weight"]):
        hidden = model.embed(ids)
    streams = hidden.new_empty((len(live), *hidden.shape))  # of the models without each earlier block
    for count, index in enumerate(live):
        rows = _rows_at_once(model, model.record.layers[index], hidden.shape[0], width, work_bytes)
        with model.loaded(names[index]):
            output = model.layer(index, hidden)
            contribution = output - hidden
            for start in range(0, count, rows):
                part = streams[start : min(start + rows, count)]
                result = model.layer(index, part)
                distances = cosine_distance(result - part, contribution) * is_real
                totals[live[start : start + len(part)], index] += distances.double().sum((1, 2))
                part.copy_(result)
        streams[count], hidden = hidden, output  # without this block, the next one reads what this one read
        yield


def _batches(model: LayerwiseModel, sequences: Sequence[Sequence[int]], stream_bytes: int) -> list[list[Sequence[int]]]:
    """Sequences of similar length together, so that padding is short; at least one per batch."""
    per_token = (len(model.record.layers) + 2) * model.record.hidden_size * _element_bytes(model)
    batches: list[list[Sequence[int]]] = []
    for sequence in sorted(sequences, key=len, reverse=True):
        if batches and (len(batches[-1]) + 1) * len(batches[-1][0]) * per_token <= stream_bytes:
            batches[-1].append(sequence)
        else:
            batches.append([sequence])
    return batches


def _rows_at_once(model: LayerwiseModel, layer: LayerRecord, batch: int, width: int, work_bytes: int) -> int:
    """How many streams one call of the layer takes: attention scores and FFN columns are what grows with them."""
    per_token = 4 * model.record.hidden_size
    for block in layer.blocks:
        if isinstance(block.attention, Attention):
            per_token += 3 * block.attention.num_heads * width + 4 * block.attention.q_size
        if isinstance(block.ffn, GatedFFN):
            per_token += 3 * block.ffn.intermediate_size
        if isinstance(block.ffn, MoE):
            per_token += 3 * (block.ffn.intermediate_size + block.ffn.shared_intermediate_size)
    return max(1, work_bytes // (4 * per_token * batch * width))


def _element_bytes(model: LayerwiseModel) -> int:
    return next(iter(model.tensors.values())).element_size()
