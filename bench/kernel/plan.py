"""The goals, row by row, and the cases beyond them: sweeps over widths, windows, contexts and batches.

Rows A1 to A8 are the FFN's, B1 to B11 attention's; P1 to P7 are the seven that decide. H100 and H200 are judged by the
ceilings measured on the card at hand.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache

from vllm_puzzle.bench.kernel.cases import AttentionCase, Case, FfnCase, attention, decode
from vllm_puzzle.bench.kernel.goals import (
    Goal,
    against,
    between,
    latency,
    launches,
    launches_against,
    rate,
    share,
)
from vllm_puzzle.model_configs.schema import ConfigError

SUPER, ULTRA_SHARD = (8192, 17920), (16384, 53248)  # hidden, width; 53248 is an eighth of 425984
WIDE = (8192, 28672)
PREFILL = ((4096, 14336), WIDE)
VLLM = ("vllm_triton", "vllm_triton_bf16q")  # with the query quantised, as vLLM does on CUDA, and without
TILE = 64


def _gate_up(tokens: Iterable[int], shapes: Iterable[tuple[int, int]], precision: str = "bf16") -> list[FfnCase]:
    return [FfnCase("gate_up", m, hidden, width, precision) for hidden, width in shapes for m in tokens]


def _with(cases: Sequence[FfnCase], precision: str) -> list[FfnCase]:
    return [replace(case, precision=precision) for case in cases]


DECODE_FFN = _gate_up((1, 4, 16), (SUPER, WIDE)) + _gate_up((16,), (ULTRA_SHARD,))
DECODE_FFN_LARGER = _gate_up((32, 64), (SUPER, WIDE))
DOWN = [FfnCase("down", m, *SUPER) for m in (1, 16, 64)]
DECODE_BF16 = _gate_up((1, 16, 64), (WIDE,))
DECODE_FP8 = [case for precision in ("fp8_tensor", "fp8_channel") for case in _with(DECODE_BF16, precision)]
PARALLEL_SMALL = [FfnCase("ffn", m, 8192, 704, count=count) for count in (2, 4, 8) for m in (1, 16)]  # 5632 over 8
PARALLEL_LARGE = [FfnCase("ffn", m, 8192, width, count=4) for width in (2816, 5632, 7168) for m in (1, 16)]
PREFILL_FFN = _gate_up((2048, 8192), PREFILL)
PREFILL_FP8 = [case for precision in ("fp8_tensor", "fp8_channel") for case in _with(PREFILL_FFN, precision)]
PREFILL_BLOCK = _with(PREFILL_FFN, "fp8_block")

FFN_GOALS = (
    Goal("A1.1", "decode gate_up + SiLU·mul, bf16, M 1 to 16", "≥ 90 % of copy", share(DECODE_FFN), 90, promise="P1"),
    Goal("A1.2", "the same", "≥ 1.10x torch.compile max-autotune", against(DECODE_FFN, "torch_compile"), 1.10),
    Goal("A2.1", "the same, M 32 and 64", "≥ 85 % of copy", share(DECODE_FFN_LARGER), 85),
    Goal("A2.2", "the same", "≥ 1.05x torch.compile max-autotune", against(DECODE_FFN_LARGER, "torch_compile"), 1.05),
    Goal("A3.1", "down, bf16, M 1 to 64", "≥ 85 % of copy", share(DOWN), 85),
    Goal("A3.2", "the same", "≥ 1.00x cuBLAS", against(DOWN, "cublas"), 1.0),
    Goal("A4.1", "gate_up, FP8 per tensor and per channel, M 1 to 64", "≥ 85 % of copy", share(DECODE_FP8), 85),
    Goal(
        "A4.2", "the same", "≥ 1.6x own bf16",
        between([(replace(case, precision="bf16"), case) for case in DECODE_FP8]), 1.6,
    ),
    Goal("A4.3", "the same", "≥ 1.15x `_scaled_mm` + activation", against(DECODE_FP8, "scaled_mm"), 1.15),
    Goal(
        "A5.1", "n parallel FFNs fused, M 1 and 16, one FFN's weights ≤ 64 MB", "≥ 1.3x one by one",
        against(PARALLEL_SMALL, "one_by_one", "one_by_one_cublas"), 1.3,
    ),
    Goal(
        "A5.2", "the same, up to 400 MB", "≥ 1.05x one by one",
        against(PARALLEL_LARGE, "one_by_one", "one_by_one_cublas"), 1.05,
    ),
    Goal("A6.1", "prefill gate_up, bf16, M 2,048 and 8,192", "≥ 90 % of bf16 matmul", share(PREFILL_FFN), 90),
    Goal("A6.2", "the same", "≥ 1.00x cuBLAS + compiled SiLU·mul", against(PREFILL_FFN, "cublas"), 1.0),
    Goal("A7.1", "the same, FP8 per tensor and per channel", "≥ 90 % of FP8 matmul", share(PREFILL_FP8), 90),
    Goal("A7.2", "the same", "≥ 1.05x `_scaled_mm` + activation", against(PREFILL_FP8, "scaled_mm"), 1.05),
    Goal("A8.1", "the same, FP8 in blocks of 128x128", "≥ 700 TFLOP/s", rate(PREFILL_BLOCK), 700),
    Goal("A8.2", "the same", "≥ 1.5x vLLM's Triton block kernel", against(PREFILL_BLOCK, "vllm_block"), 1.5),
    Goal(
        "A8.3", "the same", "≥ 1.0x own bf16",
        between([(replace(case, precision="bf16"), case) for case in PREFILL_BLOCK]), 1.0,
    ),
)  # fmt: skip

BIG = [decode("128q1s4k", 4096), decode("64q1s32k", 8192), decode("128q1s128k", 4096)]
BIG_64 = [decode("128q1s8k", 8192, 64), decode("256q1s32k", 4096, 64)]
BIG_BF16 = [replace(case, cache="bf16") for case in BIG[:2]]
WINDOWS = (128, 512, 1024, 4096, 8192)
NEVER_SLOWER = [
    decode(f"{batch}q1s8k", window, head_dim) for window in WINDOWS for batch in (1, 16, 128) for head_dim in (64, 128)
]
SMALL_WINDOWS = (128, 512, 1024, 4096)
SHORT = [decode(f"{batch}q1s{window}", window) for window in SMALL_WINDOWS for batch in (1, 8)]
LONG = [replace(case, batch=tuple((1, 131072) for _ in case.batch)) for case in SHORT]
LATENCY = [decode("1q1s8k", window, head_dim) for window in (128, 512, 1024) for head_dim in (64, 128)]
PLAIN = decode("64q1s8k", 1024)
SINKS = [(replace(PLAIN, sinks=True), PLAIN)]
SINK_TOKENS = [(replace(PLAIN, num_sink_tokens=4), PLAIN)]
PER_HEAD = [(replace(PLAIN, per_head=True), PLAIN)]
PREFILL_WIDE = [attention("prefill", "q4ks16k", 4096), attention("prefill", "4q2ks32k", 8192)]
PREFILL_NARROW = [attention("prefill", "q4ks16k", 1024), attention("prefill", "4q2ks32k", 1024)]
WRITE = [attention("kv_write", "q8k"), attention("kv_write", "q16k")]
WRITE_FEW = [attention("rope_kv_write", "q1"), attention("rope_kv_write", "64q1s1")]


def _bf16_pairs(cases: Sequence[AttentionCase]) -> list[tuple[Case, Case]]:
    return [(replace(case, cache="bf16"), case) for case in cases]


ATTENTION_GOALS = (
    Goal("B1.1", "decode, FP8 cache, D 128, K and V ≥ 256 MB", "≥ 90 % of copy", share(BIG), 90, promise="P2"),
    Goal("B1.2", "the same", "≥ 1.3x vLLM's Triton attention", against(BIG, *VLLM), 1.3),
    Goal("B2.1", "the same, D 64", "≥ 80 % of copy", share(BIG_64), 80, promise="P3"),
    Goal("B2.2", "the same", "≥ 1.3x vLLM's Triton attention", against(BIG_64, *VLLM), 1.3),
    Goal("B3.1", "decode, bf16 cache, D 128, K and V ≥ 256 MB", "≥ 95 % of copy", share(BIG_BF16), 95),
    Goal("B3.2", "the same", "≥ 1.0x vLLM's Triton attention", against(BIG_BF16, "vllm_triton"), 1.0),
    Goal("B4.1", "FP8 against own bf16, K and V ≥ 256 MB", "≥ 1.6x", between(_bf16_pairs(BIG[:2])), 1.6),
    Goal(
        "B4.2", "the same, windows from 128, batch 1 to 128, D 64 and 128", "never < 1.0x",
        between(_bf16_pairs(NEVER_SLOWER)), 1.0, promise="P5",
    ),
    Goal(
        "B5.1", "windows 128 to 4,096, batch 1 and 8: context 128k against context = window", "≤ 1.1x the time",
        between(list(zip(LONG, SHORT, strict=True))), 1.1, True, promise="P4",
    ),
    Goal(
        "B5.2", "the same windows at context 128k", "≥ 2x vLLM's Triton attention", against(LONG, *VLLM), 2.0,
        promise="P7",
    ),
    Goal("B6.1", "batch 1, windows to 1,024", "≤ 8 µs", latency(LATENCY), 8, True, promise="P6"),
    Goal("B6.2", "the same", "≥ 1.5x vLLM's Triton attention", against(LATENCY, *VLLM), 1.5),
    Goal("B7.1", "learned sinks", "≤ 1.03x the time without", between(SINKS), 1.03, True),
    Goal("B7.2", "4 sink tokens beside a window of 1,024", "≤ one tile of 64 keys more",
         between(SINK_TOKENS), 1 + TILE / 1024, True),
    Goal("B7.3", "scales per head", "≤ 1.02x the time of one scale", between(PER_HEAD), 1.02, True),
    Goal("B8.1", "chunked prefill, window ≥ 4,096, D 128", "≥ 50 % of bf16 matmul", share(PREFILL_WIDE), 50),
    Goal("B8.2", "the same", "≥ 3x vLLM's Triton attention", against(PREFILL_WIDE, *VLLM), 3.0),
    Goal("B8.3", "the same", "≥ 1.2x flex_attention", against(PREFILL_WIDE, "flex_attention"), 1.2),
    Goal("B9.1", "the same, window 1,024", "≥ 35 % of bf16 matmul", share(PREFILL_NARROW), 35),
    Goal("B9.2", "the same", "≥ 3x vLLM's Triton attention", against(PREFILL_NARROW, *VLLM), 3.0),
    Goal("B10.1", "KV write, 8,192 and 16,384 tokens", "≥ 80 % of copy", share(WRITE), 80),
    Goal("B10.2", "the same", "≥ 1.0x vLLM's Triton write", against(WRITE, "vllm_write"), 1.0),
    Goal("B10.3", "the same", "≥ 2x torch operations", against(WRITE, "torch"), 2.0),
    Goal("B11.1", "rotation and KV write, 1 and 64 tokens", "1 launch", launches(WRITE_FEW), 1, True),
    Goal("B11.2", "the same", "≥ 3x fewer launches than torch", launches_against(WRITE_FEW, "torch"), 3.0),
)  # fmt: skip
GOALS = (*FFN_GOALS, *ATTENTION_GOALS)
BASELINES = (
    "torch_compile", "cublas", "scaled_mm", "vllm_block", "one_by_one", "one_by_one_cublas", "sdpa", "flex_attention",
    "vllm_triton", "vllm_triton_bf16q", "flash_attention_3", "flashinfer", "torch", "vllm_write", "two_launches",
)  # fmt: skip
VLLM_BASELINES = frozenset({"vllm_triton", "vllm_triton_bf16q", "vllm_write", "vllm_block", "flash_attention_3"})
# Many seconds at each shape: where a goal names them, and in a few cases besides.
SLOW_TO_COMPILE = frozenset({"torch_compile", "flex_attention"})
WITH_COMPILED = (BIG[0], LATENCY[1], PARALLEL_LARGE[0])


# One or two cases of each kind: does everything run, and where does it stand.
QUICK: tuple[Case, ...] = (
    *DECODE_BF16[1:2], *DECODE_FP8[1:2], DOWN[1], PARALLEL_SMALL[2], PREFILL_FFN[0], PREFILL_FP8[0], PREFILL_BLOCK[0],
    BIG[0], BIG_BF16[0], BIG_64[0], SHORT[0], LONG[0], LATENCY[1], PREFILL_WIDE[0], PREFILL_NARROW[0],
    WRITE[0], *WRITE_FEW, attention("fused_decode", "8q1s8k", 512), attention("verify", "64q4s4k", 1024),
)  # fmt: skip


def _ffn_sweep() -> list[Case]:
    """1 to 8 FFNs of each width, whole and as tensor-parallel shards, at decode."""
    found: list[Case] = []
    for width in (2816, 5632, 7168, 17920):
        for shards in (1, 2, 4, 8):
            for count in (1, 2, 4, 8):
                if 3 * 8192 * count * (width // shards) * 2 <= 6e9:
                    found += [FfnCase("ffn", m, 8192, width // shards, count=count) for m in (1, 16)]
    # The fused widths of Ultra-253B, an eighth each.
    return found + [FfnCase("gate_up", m, 16384, width, p) for width in (37632, 53248) for m in (1, 64)
                    for p in ("bf16", "fp8_channel")]  # fmt: skip


def _attention_sweep() -> list[Case]:
    """Windows by contexts by batches by head sizes by caches; verification, fused decode, prefill chunks, writes."""
    found: list[Case] = [
        decode(f"{batch}q1s{context}", window, head_dim, cache)
        for window in WINDOWS
        for context in (1024, 4096, 32768, 131072)
        if context >= window
        for batch in (1, 4, 16, 64, 128)
        for head_dim in (64, 128)
        for cache in ("bf16", "fp8")
    ]
    found += [attention("verify", f"{batch}q{query}s8k", 1024) for batch in (1, 16, 64) for query in (2, 4, 8)]
    found += [attention("fused_decode", f"{batch}q1s8k", window, head_dim)
              for batch in (1, 8, 64) for window in (128, 512) for head_dim in (64, 128)]  # fmt: skip
    found += [attention("prefill", f"q{chunk}s{context}", window, 128, cache)
              for chunk in (512, 2048, 8192) for context in (8192, 32768) for window in (128, 1024, 8192)
              for cache in ("bf16", "fp8")]  # fmt: skip
    found += [attention("prefill", "2q2k_32q1s8k", 1024), attention("prefill", "q2ks8k", None)]
    return found + [attention("rope_kv_write", f"q{tokens}") for tokens in (256, 2048, 8192)]


def goal_cases() -> list[Case]:
    """Every case of a goal, those of P1 to P7 first."""
    ordered = sorted(GOALS, key=lambda goal: goal.promise or "Q")
    return list({case.name: case for goal in ordered for case in goal.quantity.cases}.values())


def cases(is_quick: bool = False, with_sweep: bool = True) -> list[Case]:
    """The cases of a run, each once: one or two of each kind, then goals by weight, then the sweeps, so that a time
    limit cuts the least.
    """
    chosen: list[Case] = list(QUICK) if is_quick else [*QUICK, *goal_cases()]
    if with_sweep and not is_quick:
        chosen += _ffn_sweep() + _attention_sweep()
    return list({case.name: case for case in chosen}.values())


def find_goals(keys: Sequence[str]) -> list[Goal]:
    """Goals by the start of their key ("A", "B4", "B4.2") or their promise ("P5"). ConfigError for one of none."""
    found: dict[str, Goal] = {}
    for key in keys:
        matching = [goal for goal in GOALS if key in (goal.promise, goal.key, goal.key.split(".")[0], goal.key[0])]
        if not matching:
            raise ConfigError(f"`--goal`: found {key!r}, allowed: A, B, A1 to A8, B1 to B11, one as A1.1, P1 to P7")
        found |= {goal.key: goal for goal in matching}
    return list(found.values())


def goals_of(case: Case) -> tuple[Goal, ...]:
    """The goals that look at a case."""
    return _goals_by_name().get(case.name, ())


@cache
def _goals_by_name() -> dict[str, tuple[Goal, ...]]:
    found: dict[str, tuple[Goal, ...]] = {}
    for goal in GOALS:
        for name in {case.name for case in goal.quantity.cases}:
            found[name] = (*found.get(name, ()), goal)
    return found
