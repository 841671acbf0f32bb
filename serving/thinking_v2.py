"""Thinking budgets for vLLM's V2 model runner (the default on CUDA), on device tensors.

Stands in for `vllm/v1/worker/gpu/sample/thinking_budget.py:ThinkingBudgetState` (`vllm_compat` installs it). The rules
are `kernels/thinking.py`'s, computed by `kernels/thinking_triton.py`; here is the host's part: which slots have
limits, and what is written to the device before a step.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm_puzzle.kernels import thinking_triton
from vllm_puzzle.kernels.thinking import ThinkingLimits, ThinkingMarkers
from vllm_puzzle.kernels.thinking_triton import Column, MarkerTables
from vllm_puzzle.serving.thinking_plan import MAX_PATTERN, markers_of
from vllm_puzzle.serving.thinking_v1 import limits_or_none


class DeviceThinkingBudgets:
    """Every request slot's limits and thinking state. Sampler calls come once per step and never wait for the device.

    A slot that (re)starts is written by `apply_staged_writes`; after a preemption the runner fills one with prompt and
    outputs, and the kernel replays the outputs. A batch in which no request has limits launches nothing.
    """

    def __init__(self, req_states: Any, reasoning_config: Any) -> None:
        self.req_states = req_states
        size, device = req_states.max_num_reqs, req_states.device
        self.rows = torch.zeros(size, thinking_triton.ROW_SIZE, dtype=torch.int32, device=device)
        self.runs = torch.zeros(size, MAX_PATTERN, dtype=torch.int32, device=device)
        self.uses = np.zeros(size, dtype=bool)
        self._limits: list[ThinkingLimits | None] = [None] * size
        self._to_fill: set[int] = set()
        self._to_close: set[int] = set()
        self._tables: MarkerTables | None = None
        markers = markers_of(reasoning_config)
        if markers is not None:
            self.set_markers(markers)

    @property
    def enabled(self) -> bool:
        """Whether the markers are known."""
        return self._tables is not None

    def set_markers(self, markers: ThinkingMarkers) -> None:
        """Use these markers; running requests are read anew with them. ValueError for tokens beyond the vocabulary."""
        states = self.req_states
        self._tables = MarkerTables.build(markers, states.vocab_size, states.device)
        self._to_fill.update(np.flatnonzero(self.uses).tolist())
        if states.device.type == "cuda":
            self._compile()

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """Take a request into a slot; whether its logits may be changed."""
        limits = limits_or_none(sampling_params)
        had, uses = bool(self.uses[req_idx]), limits is not None and not limits.is_free
        self._limits[req_idx] = limits
        self.uses[req_idx] = uses
        self._to_close.discard(req_idx)
        if uses or had:  # a former request's row would still force
            self._to_fill.add(req_idx)
        return uses

    def close(self, req_idx: int) -> None:
        """End this slot's open thought at its next step; nothing if none is open then.

        A slot without limits is followed from then on, from its first token; the caller sets the sampler's
        `needs_logits_processing` for it.
        """
        if not self.enabled:
            return
        if not self.uses[req_idx]:
            self.uses[req_idx] = True
            self._to_fill.add(req_idx)
        self._to_close.add(req_idx)

    def apply_staged_writes(self) -> None:
        """Write filled slots and asked closings to the device, in this order."""
        if self._to_fill:
            slots = sorted(self._to_fill)
            self.rows.index_copy_(0, self._sent(slots, torch.int64), self._sent(list(map(self._row, slots))))
            self._to_fill.clear()
        if self._to_close:
            self.rows[:, Column.CLOSE_ASKED].index_fill_(0, self._sent(sorted(self._to_close), torch.int64), 1)
            self._to_close.clear()

    def apply(self, logits: torch.Tensor, ctx: Any) -> None:
        """Force tokens in `logits` (float32 [rows, vocabulary]), in place. ctx: vLLM's LogitsContext."""
        if self._tables is None or not np.any(self.uses[ctx.idx_mapping_np]):
            return
        states = self.req_states
        thinking_triton.launch_thinking(
            logits, ctx.expanded_idx_mapping, ctx.expanded_local_pos, ctx.input_ids, states.all_token_ids.gpu,
            states.prompt_len.gpu, states.total_len.gpu, self.rows, self.runs, self._tables,
            states.num_speculative_steps + 1,
        )  # fmt: skip

    def _row(self, slot: int) -> list[int]:
        limits = self._limits[slot] or ThinkingLimits()
        return thinking_triton.state_row(limits if self.uses[slot] else None)

    def _sent(self, data: list[Any], dtype: torch.dtype = torch.int32) -> torch.Tensor:
        tensor, device = torch.tensor(data, dtype=dtype), self.req_states.device
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)

    def _compile(self) -> None:
        """Build the kernel now instead of in the first step that needs it: one row of a slot that is not tracked."""
        assert self._tables is not None
        states, device = self.req_states, self.req_states.device
        zero = torch.zeros(1, dtype=torch.int32, device=device)
        thinking_triton.launch_thinking(
            torch.zeros(1, states.vocab_size, device=device), zero, zero, zero, states.all_token_ids.gpu,
            states.prompt_len.gpu, states.total_len.gpu, torch.zeros_like(self.rows[:1]), self.runs, self._tables,
            states.num_speculative_steps + 1,
        )  # fmt: skip
