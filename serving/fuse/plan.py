"""From the dependency matrix to the FFNs that are fused, and what that takes out of a decode step.

The rule: every maximal attention-free run without its last FFN, which is sensitive (FFN Fusion, arXiv 2503.18908).
Where the cap on one fused FFN forces cuts, as few as possible; of the ways to cut so often, the one whose greatest
distance inside a fused FFN is least, then the one whose distances inside sum to least. So the cuts fall where the
blocks of a run need each other most.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from vllm_puzzle.model_configs.ffn_fusion import FusionPlan, attention_free_runs, ffn_bytes, plan_fusion, read_fusion
from vllm_puzzle.model_configs.schema import GatedFFN, ModelRecord, MoE
from vllm_puzzle.serving.fuse.dependency import Matrix

# vLLM runs an FFN as residual add + norm, gate-and-up matrix, SiLU · mul, down matrix: a launch each.
LAUNCHES_PER_FFN = 4
Group = tuple[int, ...]  # layers whose FFNs become one


@dataclass(frozen=True, slots=True)
class Inside:
    """The distances between the members of one group: the greatest, between which two layers, and the sum."""

    max: float
    pair: tuple[int, int]
    sum: float


@dataclass(frozen=True, slots=True)
class Gain:
    """What the fusion takes out of one decode step, counted from the records and the files.

    Bytes are those that one token reads; of routed experts, the chosen ones.
    """

    steps_removed: int
    ffn_steps: int
    fused_ffn_bytes: int
    ffn_bytes: int
    weight_bytes: int

    @property
    def launches_removed(self) -> int:
        """Kernel launches."""
        return LAUNCHES_PER_FFN * self.steps_removed

    @property
    def all_reduces_removed(self) -> int:
        """All-reduces, under tensor parallelism; each FFN ends in one."""
        return self.steps_removed


@dataclass(frozen=True, slots=True)
class Rates:
    """What the user knows of his machine: GB/s of memory per GPU, µs per launch and per all-reduce; None: not given."""

    tensor_parallel_size: int = 1
    bandwidth_gbs: float | None = None
    launch_us: float | None = None
    all_reduce_us: float | None = None

    def saved_us(self, gain: Gain) -> float | None:
        """µs of launches and all-reduces that a step loses; None when neither rate is given."""
        if self.launch_us is None and self.all_reduce_us is None:
            return None
        all_reduces = gain.all_reduces_removed if self.tensor_parallel_size > 1 else 0
        return gain.launches_removed * (self.launch_us or 0.0) + all_reduces * (self.all_reduce_us or 0.0)

    def weights_us(self, gain: Gain) -> float | None:
        """µs that reading one GPU's share of the weights takes at least; None without a bandwidth."""
        if self.bandwidth_gbs is None:
            return None
        return gain.weight_bytes / self.tensor_parallel_size / (1e3 * self.bandwidth_gbs)


def distances_inside(matrix: Matrix, group: Sequence[int]) -> Inside:
    """The sub-matrix of a group of at least two layers with FFNs."""
    found = [(matrix[i][j] or 0.0, (i, j)) for at, i in enumerate(group) for j in group[at + 1 :]]
    strongest, pair = max(found, key=lambda entry: entry[0])
    return Inside(strongest, pair, sum(distance for distance, _ in found))


def plan(record: ModelRecord, matrix: Matrix, cap_bytes: int, norm: str) -> FusionPlan:
    """The FFNs to fuse, each of at most `cap_bytes` (three matrices in the checkpoint's dtype, unquantized)."""
    groups: list[Group] = []
    for run in attention_free_runs(record):
        sizes = {layer: ffn_bytes(record, _width(record, layer)) for layer in run[:-1]}
        # An FFN that is over the cap by itself stays as it is.
        for fits, entries in groupby(sizes.items(), lambda entry: entry[1] <= cap_bytes):
            members = dict(entries)
            groups += cut(tuple(members), members, cap_bytes, matrix) if fits else []
    spans = ",".join(f"{group[0]}-{group[-1]}" for group in groups if len(group) > 1)
    fusion = read_fusion({"runs": spans or "off", "norm": norm})
    return plan_fusion(record, fusion) if fusion is not None else FusionPlan()


def cut(run: Group, sizes: Mapping[int, int], cap: int, matrix: Matrix) -> list[Group]:
    """The rule of this file for one run, none of whose FFNs is over the cap by itself."""

    def inside(group: Group) -> tuple[float, float]:
        if len(group) == 1:
            return 0.0, 0.0
        found = distances_inside(matrix, group)
        return found.max, found.sum

    def fits(group: Group) -> bool:
        return sum(sizes[layer] for layer in group) <= cap

    greatest, _ = _best(run, lambda group: inside(group)[0] if fits(group) else None, max)
    _, groups = _best(
        run,
        lambda group: inside(group)[1] if fits(group) and inside(group)[0] <= greatest else None,
        lambda a, b: a + b,
    )
    return groups


def gain(record: ModelRecord, fusion: FusionPlan, stored_bytes: Mapping[str, int]) -> Gain:
    """Counts for one decode step. `stored_bytes`: the size of each tensor in the files, scales included."""
    fused = {part.prefix for ffn in fusion.ffns for part in ffn.parts}
    ffns, in_fused, weights = 0, 0, 0
    for name, size in stored_bytes.items():
        prefix, is_ffn, inner = name.partition(".mlp.")
        read = round(size * _share_read(record, name, inner))
        weights += read if name != "model.embed_tokens.weight" or record.tie_word_embeddings else 0
        ffns += read if is_ffn else 0
        in_fused += read if is_ffn and prefix in fused else 0
    steps = sum(any(block.ffn is not None for block in layer.blocks) for layer in record.layers)
    return Gain(sum(len(ffn.parts) - 1 for ffn in fusion.ffns), steps, in_fused, ffns, weights)


def _best(
    run: Group, cost: Callable[[Group], float | None], join: Callable[[float, float], float]
) -> tuple[float, list[Group]]:
    """The cut into fewest consecutive groups, then of least joined cost; a group without a cost is not allowed."""
    best: list[tuple[int, float, list[Group]]] = [(0, 0.0, [])]
    for end in range(1, len(run) + 1):
        options = []
        for start in range(end):
            own = cost(run[start:end])
            if own is not None:
                count, total, groups = best[start]
                options.append((count + 1, join(total, own), [*groups, run[start:end]]))
        best.append(min(options))
    return best[-1][1], best[-1][2]


def _width(record: ModelRecord, layer: int) -> int:
    ffn = record.layers[layer].ffn
    assert isinstance(ffn, GatedFFN), "only such layers are in a run"
    return ffn.intermediate_size


def _share_read(record: ModelRecord, name: str, inner: str) -> float:
    """Of a tensor, the share that one token reads: routed experts are stored all and used a few."""
    if not inner.startswith("experts."):
        return 1.0
    layer = record.layers[int(name.split(".")[2])]
    blocks = {f".parallel_blocks.{index}.": block for index, block in enumerate(layer.parallel)}
    block = next((block for place, block in blocks.items() if place in name), layer)
    assert isinstance(block.ffn, MoE), "only experts have such names"
    return block.ffn.num_experts_per_tok / block.ffn.num_experts
