"""Which request used how much of the machine: each moment is shared evenly by the requests in flight.

A window's length over its answers is one number, in which the questions cannot be told apart. Shared out, it is a sum
over requests, and comparisons can be paired and resampled by question.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from vllm_puzzle.bench.efficiency.facts import RunFacts
from vllm_puzzle.bench.efficiency.record import RequestRecord
from vllm_puzzle.bench.efficiency.resampling import Array


def window_seconds(records: Sequence[RequestRecord], facts: RunFacts) -> Array:
    """Seconds of the steady windows that each record used, shape (records,); of each block they sum to its window.

    A request is in flight from when it was sent to when it ended. Moments without any request are shared by all in
    proportion: an open loop pays for its idle time too.
    """
    seconds = np.zeros(len(records))
    for window in facts.windows:
        places = [place for place, record in enumerate(records) if record.block == window.block]
        sent = np.clip([records[place].sent for place in places], window.start, window.end)
        done = np.clip([records[place].done for place in places], window.start, window.end)
        used = _share(sent, done)
        if used.sum() > 0:
            seconds[places] = used * (window.duration / used.sum())
    return seconds


def _share(sent: Array, done: Array) -> Array:
    """∫ dt / (requests in flight) over each request's life, shape (requests,)."""
    if not len(sent):
        return np.zeros(0)
    times = np.unique(np.concatenate([sent, done]))
    changes = np.zeros(len(times))
    np.add.at(changes, np.searchsorted(times, sent), 1)
    np.add.at(changes, np.searchsorted(times, done), -1)
    in_flight = np.cumsum(changes)[:-1]
    slices = np.divide(np.diff(times), in_flight, out=np.zeros(len(times) - 1), where=in_flight > 0)
    passed = np.concatenate([[0.0], np.cumsum(slices)])
    return passed[np.searchsorted(times, done)] - passed[np.searchsorted(times, sent)]
