"""Attention over a paged KV cache, sliding window first: signature only, the kernels follow."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Scratch:
    """Partial results of split sequences, made once and shared by all layers: float32 outputs and statistics."""

    outputs: Tensor
    statistics: Tensor

    @classmethod
    def allocate(
        cls, max_num_seqs: int, num_heads: int, head_dim: int, *, max_query_len: int = 8, device: torch.device | str
    ) -> Scratch:
        """For batches of up to `max_num_seqs` sequences and layers of up to `num_heads` query heads of `head_dim`."""
        raise NotImplementedError


def window_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    out: Tensor,
    *,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    max_query_len: int,
    softmax_scale: float,
    sliding_window: int | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    sinks: Tensor | None = None,
    num_sink_tokens: int = 0,
    scratch: Scratch | None = None,
    num_splits: int | None = None,
) -> None:
    """`reference.paged_attention` into `out`. sinks: float32 [H]. num_splits: for tests; None lets the launcher choose."""
    raise NotImplementedError
