"""The papers' figures: what was measured there and how, which quotient of ours answers each, and how ours differs.

An answer without its differences is never shown. Sources: Puzzle (arXiv 2411.19146, Table 2), Llama-Nemotron
(2505.00949), FFN Fusion (2503.18908), gpt-oss-puzzle (2602.11937 and the model's card), Nemotron 3 Nano (2512.20848),
NVIDIA Model-Optimizer's tutorial on pruning Nemotron 3 Nano.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vllm_puzzle.bench.engine.case import FULL, Shape
from vllm_puzzle.bench.engine.derived import Derived
from vllm_puzzle.bench.engine.rows import Row

BEST = "best batch"
# As CUDA names the SXM cards.
H100, H200 = "H100 80GB HBM3", "H200"
THROUGHPUT, TPOT = "output_throughput", "tpot_p50_s"
PUZZLE = "arXiv 2411.19146, Table 2"
PUZZLE_SETUP = (
    "Nemotron-51B over Llama-70B, TensorRT-LLM, FP8 weights, activations and KV cache, H100 SXM, tokens/s per GPU at "
    "the best batch"
)
ENGINE_51B = ("49B in place of the 51B, whose layers are not public", "vLLM in place of TensorRT-LLM")
P88 = "arXiv 2602.11937, abstract; lengths from the card of nvidia/gpt-oss-puzzle-88B"
P88_DIFFERS = (
    "the 88B's configuration is reconstructed",
    "random weights, whose routers choose the experts nearly evenly",
    "the baseline's KV dtype, concurrency and flags are not known",
)
NANO = "arXiv 2512.20848"
NANO_SETUP = "8192/16384, one H200, best of vLLM and TensorRT-LLM for each model, output tokens/s"
NANO_DIFFERS = ("vLLM only", "random weights, whose routers choose the experts nearly evenly")
TUTORIAL = "NVIDIA/Model-Optimizer, examples/pruning/minitron, Nemotron-3-Nano"
TUTORIAL_DIFFERS = (
    "32 requests in place of vllm bench throughput's 1,000, so that the tail weighs more",
    "random weights, whose routers choose the experts nearly evenly",
    "the tutorial gives other figures in other versions",
)


@dataclass(frozen=True, slots=True)
class Quotient:
    """What of ours answers a figure: `over`'s `metric` over `under`'s, or `over`'s alone.

    batch: a number, or BEST (each variant at its own best). is_derived: from the derived figures of that shape.
    """

    over: str
    under: str | None
    shape: Shape
    batch: int | str = BEST
    metric: str = THROUGHPUT
    is_derived: bool = False


@dataclass(frozen=True, slots=True)
class Anchor:
    """One published figure. `card`: what it was measured on, as the card's name contains it. `differs`: what is never
    the same here. Without a quotient, `differs` says why no case of ours answers it.
    """

    key: str
    suite: str
    figure: float
    what: str
    source: str
    setup: str
    card: str
    quotient: Quotient | None
    differs: tuple[str, ...] = ()
    unit: str = "x"


@dataclass(frozen=True, slots=True)
class Answer:
    """Ours beside a figure: None where it was not measured. An empty `differences` means the same set-up."""

    anchor: Anchor
    ours: float | None
    differences: tuple[str, ...]
    cases: tuple[str, ...] = ()

    def as_object(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def _puzzle(lengths: str, figure: float, parallel: str, answered: bool) -> Anchor:
    shape = Shape(*map(int, lengths.split("/")))
    quotient = Quotient("49b-fp8", "70b-fp8", shape) if answered else None
    differs = ENGINE_51B if answered else ("not measured here: it takes more than one GPU",)
    setup = f"{PUZZLE_SETUP}; {parallel}"
    key = f"puzzle-{shape.name}-{parallel.split()[-1]}"
    return Anchor(key, "super49", figure, f"{lengths}, {parallel}", PUZZLE, setup, H100, quotient, differs)


def _gpt_oss(key: str, figure: float, what: str, source: str, card: str, kv: str, lengths: Shape, *more: str) -> Anchor:
    quotient = Quotient("88b-fp8kv", f"120b-{kv}kv", lengths, is_derived=True)
    baseline = f"120b with a KV cache in {kv}, 88b in fp8"
    return Anchor(f"{key}-{kv}", "gptoss", figure, f"{what}; {baseline}", source, what, card, quotient,
                  (*P88_DIFFERS, *more))  # fmt: skip


LONG, SHORT = Shape(65536, 65536), Shape(4096, 4096)
ONE_GPU = "one GPU in place of eight: other capacity, no parallel cost"
ANCHORS: tuple[Anchor, ...] = (
    _puzzle("128/128", 2.07, "51B TP1, 70B TP1", True),
    _puzzle("128/1024", 5.08, "51B TP1, 70B TP1", True),
    _puzzle("128/1024", 2.17, "51B TP1, 70B TP4", False),
    _puzzle("2048/128", 2.17, "51B TP1, 70B TP1", True),
    _puzzle("2048/128", 1.92, "51B TP1, 70B TP4", False),
    _puzzle("128/2048", 1.76, "51B TP2, 70B TP4", False),
    _puzzle("128/4096", 2.11, "51B TP2, 70B TP4", False),
    _puzzle("2048/2048", 1.96, "51B TP2, 70B TP4", False),
    Anchor(
        "super-batch-256", "super49", 5.0, "batch 256, TP1", "arXiv 2505.00949",
        "Llama-Nemotron-Super-49B over Llama-3.3-70B, FP8, batch 256, TP1, one H100; lengths not stated", H100,
        Quotient("49b-fp8", "70b-fp8", Shape(128, 1024), 256),
        ("the paper states no lengths (ours: 128/1024) and no engine (ours: vLLM)",),
    ),
    *(
        Anchor(
            f"fusion-b{batch}", "fusion", 0.90, f"time per output token, batch {batch}", "arXiv 2503.18908",
            "49B ablation: latency with layers 42-50 as one FFN and 53-69 as two, over unfused; 5.3 to 5.9 ms a token",
            H100, Quotient("49b-fp8-fused", "49b-fp8", Shape(128, 128), batch, TPOT),
            (
                "one GPU, where no all-reduce is saved; the paper's latency suggests several (inferred)",
                "where 53-69 is cut is not stated; here after 61",
                "the paper's batch and lengths are not known",
            ),
        )
        for batch in (1, 2, 4, 8, 16, 32)
    ),
    *(
        anchor
        for kv in ("bf16", "fp8")
        for anchor in (
            _gpt_oss("p88-long-node", 1.63, "64K/64K, 8 H100", P88, "8 H100", kv, LONG, ONE_GPU),
            _gpt_oss("p88-short-node", 1.22, "4K/4K, 8 H100", P88, "8 H100", kv, SHORT, ONE_GPU),
            _gpt_oss("p88-one", 2.82, "one H100, up to; lengths not stated (long inferred)", P88, H100, kv, LONG),
            _gpt_oss("p88-one-short", 2.44, "one H100, short context, read off the card's figure by a third party",
                     "rits.shanghai.nyu.edu, second hand", H100, kv, SHORT),
        )
    ),
    Anchor(
        "nano-qwen", "nano3", 3.3, "over Qwen3-30B-A3B-Thinking-2507, FP8", NANO, NANO_SETUP, H200,
        Quotient("nano-fp8", "qwen3-30b-fp8", Shape(8192, 16384), is_derived=True), NANO_DIFFERS,
    ),
    Anchor(
        "nano-gpt-oss", "nano3", 2.2, "over gpt-oss-20b, MXFP4 weights and bf16 activations", NANO, NANO_SETUP, H200,
        Quotient("nano-fp8", "gpt-oss-20b", Shape(8192, 16384), is_derived=True), NANO_DIFFERS,
    ),
    *(
        Anchor(
            f"tutorial-{variant}-{version}", "nano3", figure, f"{what}, 32768/1024", f"{TUTORIAL} @{version}",
            f"vllm bench throughput, random 32768/1024, one H100, SSM cache float32, {kv}", H100,
            Quotient(variant, None, Shape(32768, 1024)), TUTORIAL_DIFFERS, "tok/s",
        )
        for variant, what, version, kv, figure in (
            ("nano-bf16", "BF16", "a2fbac7b", "KV cache as the model", 598.0),
            ("nano-fp8", "FP8", "a2fbac7b", "FP8 KV cache, FlashInfer's FP8 experts", 1323.0),
            ("nano-bf16-fp8kv", "BF16 with an FP8 KV cache", "08dbac73", "FP8 KV cache", 1006.0),
            ("nano-fp8", "FP8", "08dbac73", "FP8 KV cache", 1404.0),
        )
    ),
)  # fmt: skip


def anchors_of(suite: str) -> tuple[Anchor, ...]:
    """The figures that a suite is held against."""
    return tuple(anchor for anchor in ANCHORS if anchor.suite == suite)


def derived_shapes(suite: str) -> tuple[Shape, ...]:
    """The lengths for which a suite derives a throughput."""
    quotients = [anchor.quotient for anchor in anchors_of(suite) if anchor.quotient is not None]
    return tuple(dict.fromkeys(quotient.shape for quotient in quotients if quotient.is_derived))


def answer(anchor: Anchor, rows: Sequence[Row], derived: Sequence[Derived], card: str) -> Answer:
    """Ours for a figure, with every difference between the set-ups that is known."""
    quotient = anchor.quotient
    if quotient is None:
        return Answer(anchor, None, anchor.differs)
    differences = list(anchor.differs)
    if card != f"NVIDIA {anchor.card}":
        differences.insert(0, f"measured on {card}, the figure on {anchor.card}")
    if quotient.is_derived:
        differences.append("ours is derived: decoding at the mean context and prefill, each measured in minutes")
    over = _best(quotient, quotient.over, rows, derived)
    under = (1.0, "") if quotient.under is None else _best(quotient, quotient.under, rows, derived)
    if over is None or under is None:
        return Answer(anchor, None, tuple(differences))
    cases = tuple(name for _, name in (over, under) if name)
    if quotient.batch != BEST:
        short = [name for name in (quotient.over, quotient.under) if name and _was_short(name, quotient, rows)]
        differences += [
            f"the KV cache of {name} holds fewer than {quotient.batch} such requests, as it may have there"
            for name in short
        ]
    return Answer(anchor, over[0] / under[0], tuple(differences), cases)


def _best(
    quotient: Quotient, variant: str, rows: Sequence[Row], derived: Sequence[Derived]
) -> tuple[float, str] | None:
    """The variant's value and the case that it is from."""
    lengths = (quotient.shape.input_len, quotient.shape.output_len)
    if quotient.is_derived:
        values = [
            (each.output_throughput, f"{each.variant} derived {quotient.shape.name} b{each.batch}")
            for each in derived
            if each.variant == variant and (each.input_len, each.output_len) == lengths
        ]
        return max(values, default=None)
    found = []
    for row in rows:
        is_its = row.variant == variant and (row.input_len, row.output_len) == lengths and row.role == FULL
        if is_its and row.status == "ok" and quotient.batch in (BEST, row.batch):
            value = getattr(row, quotient.metric)
            if value:
                found.append((float(value), row.case))
    if not found:
        return None
    return min(found) if quotient.metric == TPOT else max(found)


def _was_short(variant: str, quotient: Quotient, rows: Sequence[Row]) -> bool:
    """Whether the KV cache held fewer whole requests than the batch."""
    for row in rows:
        lengths = (row.input_len, row.output_len) == (quotient.shape.input_len, quotient.shape.output_len)
        if row.variant == variant and lengths and row.batch == quotient.batch and row.kv_capacity_tokens:
            return row.kv_capacity_tokens < int(quotient.batch) * quotient.shape.total
    return False
