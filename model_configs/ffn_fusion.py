"""FFN Fusion at load time: which layers' FFNs become one wide FFN, and the record that follows. Standard library only.

A run of attention-free layers x += FFN_i(norm_i(x)) is computed as one step, x + Σ FFN_i(norm_i(x)) (FFN Fusion, arXiv
2503.18908, §3): gates and ups stacked, downs side by side. That changes what the model computes, so it is off unless
asked for: by `puzzle_ffn_fusion` in config.json, or by `--puzzle-ffn-fusion`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from typing import Any

from vllm_puzzle.model_configs.json_values import shown
from vllm_puzzle.model_configs.partition import split_costs
from vllm_puzzle.model_configs.schema import ConfigError, GatedFFN, LayerRecord, LinearMap, ModelRecord, MoE

KEY = "puzzle_ffn_fusion"
PLACE = f"model, key `{KEY}`"
# `own`: each FFN keeps its norm's weights. `last`: all take those of the run's last layer, as the paper does.
NORMS = ("own", "last")
# `auto` keeps the weights of one fused FFN, unquantized in the checkpoint's dtype, under this. The largest of the paper
# just fits (Ultra-253B's 425,984 columns of 16,384 in bf16: 39 GiB), and no two of Ultra's fused FFNs are joined again.
DEFAULT_CAP_BYTES = 40 * 2**30
ELEMENT_BYTES = {"float32": 4}
MAX_CHARACTERS = 10_000
ALLOWED = "off, auto, or runs of layers such as 42-50,53-61+62-69"

Span = tuple[int, int]  # first and last layer, both included
Run = tuple[Span, ...]  # adjacent spans, each of which becomes one FFN


@dataclass(frozen=True, slots=True)
class Fusion:
    """What is asked for, not yet held against a model: the runs (None: `auto`) and the norm rule."""

    runs: tuple[Run, ...] | None
    norm: str = "own"


@dataclass(frozen=True, slots=True)
class Part:
    """One FFN that goes into a fused one: a layer's, or that of one of a layer's parallel blocks."""

    layer: int
    width: int
    block: int | None = None

    @property
    def prefix(self) -> str:
        """What the names of its tensors begin with in the checkpoint."""
        inner = "" if self.block is None else f".parallel_blocks.{self.block}"
        return f"model.layers.{self.layer}{inner}"


@dataclass(frozen=True, slots=True)
class FusedFFN:
    """One wide FFN: its parts in the model's order, and which norm weights their inputs get (see NORMS)."""

    parts: tuple[Part, ...]
    norm: str = "own"

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers whose FFNs it holds, ascending."""
        return tuple(sorted({part.layer for part in self.parts}))

    @property
    def holder(self) -> int:
        """The layer that holds it: the last. The other layers become empty, so that layer numbers stay."""
        return self.layers[-1]

    @property
    def widths(self) -> tuple[int, ...]:
        """The intermediate size of each part."""
        return tuple(part.width for part in self.parts)

    @property
    def width(self) -> int:
        """The intermediate size of the whole."""
        return sum(self.widths)


@dataclass(frozen=True, slots=True)
class FusionPlan:
    """The fused FFNs of one model, in layer order."""

    ffns: tuple[FusedFFN, ...] = ()

    @property
    def text(self) -> str:
        """The plan in the flag's own words, every run one of its own: `42-50,53-61,62-69`; `off` when empty."""
        return ",".join(f"{ffn.layers[0]}-{ffn.layers[-1]}" for ffn in self.ffns) or "off"

    @property
    def sentence(self) -> str:
        """What the plan does, in one line for the user."""
        if not self.ffns:
            return "FFN Fusion: found no run of attention-free layers to fuse, so nothing changes"
        runs = ", ".join(f"{f.layers[0]}-{f.layers[-1]} ({len(f.parts)} FFNs, {f.width} wide)" for f in self.ffns)
        norms = {"own": "each FFN keeps its norm", "last": "the last layer's norm for all"}[self.ffns[0].norm]
        return f"FFN Fusion: layers {runs} as one FFN each, {norms}; this changes what the model answers"


def read_fusion(value: Any, place: str = PLACE) -> Fusion | None:
    """The wish that a value of `puzzle_ffn_fusion` states: a string, or {"runs": string, "norm": "own" or "last"}.

    None for off (also null). Raises ConfigError naming `place`, found and allowed.
    """
    norm: Any = "own"
    if isinstance(value, Mapping):
        for key in value:
            if key not in ("runs", "norm"):
                raise ConfigError(f"{place}: found the key {shown(key)}, allowed: `runs`, `norm`")
        if value.get("runs") is None:
            raise ConfigError(f"{place}: found no `runs`, allowed: {ALLOWED}")
        value, norm = value["runs"], value.get("norm", "own")
    if norm not in NORMS:
        raise ConfigError(f"{place}, `norm`: found {shown(norm)}, allowed: {', '.join(NORMS)}")
    if value is None:
        return None
    if not isinstance(value, str) or len(value) > MAX_CHARACTERS:
        raise ConfigError(f"{place}: found {shown(value)}, allowed: {ALLOWED}")
    text = value.strip()
    if text == "off":
        return None
    return Fusion(None if text == "auto" else _read_runs(text, place), str(norm))


def requested_plan(record: ModelRecord, config: Mapping[str, Any], place: str = PLACE) -> FusionPlan:
    """What a config.json's `puzzle_ffn_fusion` asks for; an empty plan when it is off or absent."""
    fusion = read_fusion(config.get(KEY), place)
    return FusionPlan() if fusion is None else plan_fusion(record, fusion, place)


def _read_runs(text: str, place: str) -> tuple[Run, ...]:
    runs = []
    for run in text.split(","):
        spans = []
        for span in run.split("+"):
            match = re.fullmatch(r"\s*(\d{1,6})\s*-\s*(\d{1,6})\s*", span)
            if match is None:
                raise ConfigError(f"{place}: found {shown(span)} in {shown(text)}, allowed: {ALLOWED}")
            first, last = int(match[1]), int(match[2])
            if first >= last:
                raise ConfigError(f"{place}: found {first}-{last}, allowed: a lower number before a higher one")
            spans.append((first, last))
        runs.append(tuple(spans))
    return tuple(runs)


def attention_free_runs(record: ModelRecord) -> tuple[tuple[int, ...], ...]:
    """The maximal runs of layers that could be fused, as the numbers of the layers that hold an FFN.

    Wholly empty layers are passed over; parallel blocks, linear maps and experts end a run. A run may be one layer.
    """
    groups = groupby(enumerate(record.layers), lambda entry: _obstacle(entry[1]) is None)
    runs = (tuple(index for index, layer in group if _holds_ffn(layer)) for is_free, group in groups if is_free)
    return tuple(run for run in runs if run)


def plan_fusion(
    record: ModelRecord, fusion: Fusion, place: str = PLACE, cap_bytes: int = DEFAULT_CAP_BYTES
) -> FusionPlan:
    """Hold the wish against the model. `cap_bytes` limits `auto` only, and may leave it nothing to fuse.

    Raises ConfigError naming run and layer where a layer cannot be part of a run.
    """
    if fusion.runs is None:
        groups = list(_automatic(record, cap_bytes))
    else:
        groups = [_ffns_of(record, span, place) for run in fusion.runs for span in run]
        _check_order(record, fusion.runs, place)
    ffns = (FusedFFN(tuple(_part(record, layer) for layer in group), fusion.norm) for group in groups)
    return FusionPlan(tuple(sorted(ffns, key=lambda ffn: ffn.holder)))


def parallel_ffns(record: ModelRecord) -> FusionPlan:
    """The layers of `parallel_blocks` that hold FFNs and nothing else: each is one wide FFN as it stands."""
    ffns = []
    for index, layer in enumerate(record.layers):
        kinds = {_obstacle(block) for block in layer.parallel}
        parts = [
            Part(index, block.ffn.intermediate_size, number)
            for number, block in enumerate(layer.parallel)
            if isinstance(block.ffn, GatedFFN)
        ]
        if kinds == {None} and parts:
            ffns.append(FusedFFN(tuple(parts), "own"))
    return FusionPlan(tuple(ffns))


def fuse(record: ModelRecord, plan: FusionPlan) -> ModelRecord:
    """The record that is served: each holder has the wide FFN, the other layers of its parts nothing."""
    layers = list(record.layers)
    for ffn in plan.ffns:
        for layer in ffn.layers:
            layers[layer] = LayerRecord(None, None)
        layers[ffn.holder] = LayerRecord(None, GatedFFN(ffn.width))
    return replace(record, layers=tuple(layers))


def ffn_bytes(record: ModelRecord, width: int) -> int:
    """Bytes of one gated FFN's three matrices in the checkpoint's dtype, unquantized."""
    return 3 * record.hidden_size * width * ELEMENT_BYTES.get(record.dtype, 2)


def _automatic(record: ModelRecord, cap_bytes: int) -> Iterator[tuple[int, ...]]:
    """Every maximal run without its last FFN, which is sensitive, cut as evenly as the cap allows."""
    for run in attention_free_runs(record):
        costs = {layer: ffn_bytes(record, _part(record, layer).width) for layer in run[:-1]}
        # One that is over the cap by itself stays as it is.
        for fits, group in groupby(costs.items(), lambda entry: entry[1] <= cap_bytes):
            entries, at = tuple(group), 0
            for size in _cut([cost for _, cost in entries], cap_bytes) if fits else ():
                if size > 1:
                    yield tuple(layer for layer, _ in entries[at : at + size])
                at += size


def _cut(costs: Sequence[int], cap: int) -> tuple[int, ...]:
    """Sizes of the fewest consecutive parts with no sum over `cap`, as even as possible. No cost is over `cap`."""
    num_parts, total = 1, 0
    for cost in costs:
        num_parts, total = (num_parts, total + cost) if total + cost <= cap else (num_parts + 1, cost)
    return split_costs(costs, num_parts)


def _part(record: ModelRecord, layer: int) -> Part:
    ffn = record.layers[layer].ffn
    assert isinstance(ffn, GatedFFN), "only such layers are in a run"
    return Part(layer, ffn.intermediate_size)


def _ffns_of(record: ModelRecord, span: Span, place: str) -> tuple[int, ...]:
    where, last = f"{place}, run {span[0]}-{span[1]}", len(record.layers) - 1
    if span[1] > last:
        raise ConfigError(f"{where}: found layer {span[1]}, allowed: 0 to {last}")
    layers = range(span[0], span[1] + 1)
    for index in layers:
        obstacle = _obstacle(record.layers[index])
        if obstacle is not None:
            allowed = "; ".join(f"{run[0]} to {run[-1]}" for run in attention_free_runs(record) if len(run) > 1)
            raise ConfigError(
                f"{where}: found {obstacle} in layer {index}, allowed: layers without attention that hold a gated FFN, "
                f"here {allowed or 'none'}"
            )
    found = tuple(index for index in layers if _holds_ffn(record.layers[index]))
    if len(found) < 2:
        raise ConfigError(f"{where}: found {len(found)} FFN, allowed: at least 2")
    return found


def _check_order(record: ModelRecord, runs: Sequence[Run], place: str) -> None:
    """No layer twice, and nothing that computes between the parts of a run that `+` joins."""
    for before, after in pairwise(sorted(span for run in runs for span in run)):
        if after[0] <= before[1]:
            raise ConfigError(f"{place}: found layer {after[0]} in two runs, allowed: each layer once")
    for run in runs:
        for before, after in pairwise(run):
            live = [i for i in range(before[1] + 1, after[0]) if record.layers[i] != LayerRecord(None, None)]
            if after[0] < before[1] or live:
                raise ConfigError(
                    f"{place}: found {before[0]}-{before[1]}+{after[0]}-{after[1]}, allowed: adjacent parts (`+` cuts "
                    "one run; `,` separates runs)"
                )


def _holds_ffn(layer: LayerRecord) -> bool:
    return isinstance(layer.ffn, GatedFFN)


def _obstacle(layer: LayerRecord) -> str | None:
    """What keeps a layer out of a run, in words; None for a gated FFN alone, and for an empty layer."""
    if layer.parallel:
        return "parallel blocks"
    if layer.attention is not None:
        return "a linear map" if isinstance(layer.attention, LinearMap) else "attention"
    if layer.ffn is None or isinstance(layer.ffn, GatedFFN):
        return None
    return "experts" if isinstance(layer.ffn, MoE) else "a linear map" if isinstance(layer.ffn, LinearMap) else "an FFN"
