"""Window attention against its twin over odd shapes; run in a process of its own: `attention_grid.py DEVICE`.

Prints JSON: case → error, worst row, bound, what else must hold. Every cache slot that no query may see holds a NaN,
pages with nothing visible are replaced by a block of NaNs in the block table, and the output is poisoned before.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
if sys.argv[1:] == ["cpu"]:
    import interpreter

    interpreter.install()

import torch
from torch import Tensor
from vllm_puzzle.kernels import reference
from vllm_puzzle.kernels.window_attention import Scratch, window_attention

FP8, BF16, FP16, FP32 = torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.float32
# Relative L2. Rounding to bf16 alone makes 1.65e-3 (uniform within 2^-8 of a mantissa between 1 and 2), and so do the
# weights beside a bf16 cache, before their errors average out; fp16 makes an eighth; float32 sums up to 1000 terms.
BOUNDS = {BF16: 3e-3, FP16: 5e-4, FP32: 2e-6}
Result = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A batch. query_lens: one each where empty. Padding: sequences of length 0, rows of no sequence."""

    seq_lens: tuple[int, ...]
    query_lens: tuple[int, ...] = ()
    heads: tuple[int, int] = (4, 2)
    head_dim: int = 64
    page: int = 16
    window: int | None = 200
    dtype: torch.dtype = FP16
    cache_dtype: torch.dtype = FP8
    has_sinks: bool = False
    num_sink_tokens: int = 0
    num_splits: int | None = None
    has_scale_per_head: bool = True
    is_packed: bool = False  # K and V as halves of one last axis (vLLM 0.32), q as a part of the QKV projection
    padding: tuple[int, int] = (0, 0)  # sequences, rows
    has_scratch: bool = False

    @property
    def lengths(self) -> tuple[int, ...]:
        return self.query_lens or (1,) * len(self.seq_lens)


AROUND = (1, 199, 200, 201, 400, 600, 777, 128)  # the window ∓ 1, its multiples, no multiple of a tile
MIXED = Case((90, 37, 204, 130, 301), (1, 37, 4, 130, 77), (10, 2), window=50, dtype=BF16)
CASES = {
    "decode, one head a group": Case(AROUND, heads=(2, 2)),
    "decode, five heads, pages of 48": Case(AROUND, heads=(5, 1), page=48, dtype=BF16),
    "decode, eight heads, D 128, packed": Case(AROUND, heads=(8, 1), head_dim=128, page=64, is_packed=True),
    "decode, D 96, a scale per layer": Case(AROUND, head_dim=96, page=32, dtype=BF16, has_scale_per_head=False),
    "decode, D 256": Case((1, 30, 31, 32, 70), head_dim=256, window=31, dtype=BF16),
    "decode, twenty heads": Case((300, 64), heads=(20, 1), window=100),
    "decode, seventy heads": Case((150, 64), heads=(70, 1), window=100, dtype=BF16),
    "decode, no window": Case((700, 1, 129), window=None, page=128),
    "decode, window of one": Case((1, 2, 300), window=1, dtype=BF16),
    "decode, exact": Case(AROUND, heads=(6, 2), head_dim=128, dtype=FP32),
    "sinks": Case(AROUND, has_sinks=True, dtype=BF16),
    "sinks, one pass and split alike": Case(AROUND, has_sinks=True, num_splits=3, dtype=FP32),
    "sink tokens": Case(AROUND, num_sink_tokens=4),
    "sink tokens over several tiles": Case((120, 600, 460, 462), window=160, num_sink_tokens=301, dtype=FP32),
    "sinks and sink tokens, D 128": Case(AROUND, head_dim=128, has_sinks=True, num_sink_tokens=20, dtype=BF16),
    "bfloat16 cache": Case(AROUND, dtype=BF16, cache_dtype=BF16, has_sinks=True, is_packed=True),
    "bfloat16 cache, D 128": Case(AROUND, head_dim=128, dtype=BF16, cache_dtype=BF16),
    "float16 cache": Case(AROUND, cache_dtype=FP16),
    "float32 cache": Case(AROUND, dtype=FP32, cache_dtype=FP32, num_sink_tokens=3),
    "two splits": Case(AROUND, num_splits=2, has_scratch=True),
    "more splits than tiles": Case(AROUND, num_splits=7, has_sinks=True, num_sink_tokens=5, dtype=FP32),
    "split without a window": Case((900, 1, 260, 130), head_dim=128, window=None, num_splits=17, dtype=BF16),
    "verify four, four heads": Case((4, 203, 204, 701), (4, 4, 3, 4), heads=(4, 1), dtype=FP32),
    "verify four, eight heads": Case((4, 203, 204, 701), (4, 4, 3, 4), heads=(8, 1), head_dim=128, dtype=BF16),
    "verify eight, five heads, split": Case((8, 203, 560), (8, 8, 5), (10, 2), num_splits=3, has_sinks=True),
    "verify, sink tokens in the window": Case((202, 203, 215), (4, 4, 8), (2, 1), num_sink_tokens=9, dtype=FP32),
    "prefill of one": Case((333,), (333,), heads=(5, 1), page=48, dtype=BF16),
    "prefill of one, one head": Case((150,), (9,), heads=(2, 2), window=70),
    "prefill, D 128, exact": Case((230, 129), (230, 129), heads=(8, 1), head_dim=128, window=97, dtype=FP32),
    "prefill, D 256": Case((75, 40), (60, 40), head_dim=256, window=33, dtype=BF16),
    "prefill, no window": Case((260,), (140,), head_dim=96, window=None, dtype=FP16),
    "mixed": MIXED,
    "mixed, sinks and sink tokens": replace(MIXED, has_sinks=True, num_sink_tokens=40, dtype=FP16, is_packed=True),
    "mixed, D 128, bfloat16 cache": replace(MIXED, heads=(8, 1), head_dim=128, cache_dtype=BF16),
    "mixed, many short": Case((5, 60, 9, 33, 1, 20, 64), (5, 20, 1, 33, 1, 17, 3), (3, 1), window=12, dtype=FP32),
    "mixed, exact, split": replace(MIXED, dtype=FP32, num_splits=2, padding=(2, 3)),
    "padded": Case((1, 199, 500), padding=(3, 5), dtype=BF16),
    "padded, split": Case((1, 199, 500), num_splits=2, padding=(2, 2)),
}  # fmt: skip


def visible(case: Case, sequence: int) -> Tensor:
    """Which keys of a sequence some query of it sees, by the definition: bool [seq_len]."""
    seq_len, query_len = case.seq_lens[sequence], case.lengths[sequence]
    keys = torch.arange(seq_len)
    first = 0 if case.window is None else seq_len - query_len - case.window + 1
    return (keys >= first) | (keys < case.num_sink_tokens)


def nans(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if dtype == FP8:
        return torch.full(shape, 0x7F, dtype=torch.uint8).view(FP8)
    return torch.full(shape, float("nan"), dtype=dtype)


def make_caches(case: Case, scales: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """K and V cache and block table: pages shuffled, block 0 all NaN, and NaN wherever nothing may be seen."""
    pages = [-(-length // case.page) for length in case.seq_lens]
    kv_heads, dim = case.heads[1], case.head_dim
    table = torch.zeros(len(pages) + case.padding[0], max(pages) + 2, dtype=torch.int32)
    blocks = iter((1 + torch.randperm(sum(pages) + 3)).tolist())
    shape = (sum(pages) + 4, kv_heads, case.page, dim)
    halves = nans((*shape[:3], 2 * dim), case.cache_dtype)
    caches = [halves[..., :dim], halves[..., dim:]] if case.is_packed else [nans(shape, case.cache_dtype) for _ in "kv"]
    for sequence, seq_len in enumerate(case.seq_lens):
        keys = torch.arange(seq_len)[visible(case, sequence)]
        for page in sorted(set((keys // case.page).tolist())):
            table[sequence, page] = next(blocks)
        where = table[sequence, keys // case.page].long()
        for cache, scale in zip(caches, scales, strict=True):
            values = torch.randn(len(keys), kv_heads, dim)
            if case.cache_dtype == FP8:
                values = values / scale[:, None]
            cache[where, :, keys % case.page] = values.to(case.cache_dtype)
    return caches[0], caches[1], table


def make(case: Case, device: str) -> dict[str, Any]:
    """The twin's arguments."""
    torch.manual_seed(len(case.seq_lens) + case.head_dim)
    heads, kv_heads = case.heads
    num_scales = kv_heads if case.has_scale_per_head else 1
    scales = torch.rand(num_scales) * 0.02 + 0.01, torch.rand(num_scales) * 0.02 + 0.02
    k_cache, v_cache, table = make_caches(case, scales)
    starts = torch.tensor((0, *case.lengths, *(0,) * case.padding[0])).cumsum(0).int()
    rows = int(starts[-1]) + case.padding[1]
    q = torch.randn(rows, heads + 2 * kv_heads, case.head_dim).to(case.dtype)
    q = q[:, :heads] if case.is_packed else q[:, :heads].contiguous()
    arguments = {
        "q": q, "k_cache": k_cache, "v_cache": v_cache, "block_table": table, "query_start_loc": starts,
        "seq_lens": torch.tensor((*case.seq_lens, *(0,) * case.padding[0]), dtype=torch.int32),
        "sinks": torch.randn(heads) + 2 if case.has_sinks else None,
    } | ({"k_scale": scales[0], "v_scale": scales[1]} if case.cache_dtype == FP8 else {})  # fmt: skip
    moved = {name: tensor if tensor is None else on(tensor, device) for name, tensor in arguments.items()}
    return moved | {
        "softmax_scale": case.head_dim**-0.5,
        "sliding_window": case.window,
        "num_sink_tokens": case.num_sink_tokens,
    }


def on(tensor: Tensor, device: str) -> Tensor:
    """The same strides on a device."""
    size = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    flat = tensor.as_strided((size,), (1,), tensor.storage_offset()).to(device)
    return flat.as_strided(tensor.shape, tensor.stride())


def attend(case: Case, arguments: dict[str, Any], out: Tensor | None = None) -> Tensor:
    """The kernels' output, in `out` where given; it and the scratch are poisoned."""
    q = arguments["q"]
    out = torch.empty_like(q) if out is None else out
    out.fill_(float("nan"))
    scratch = Scratch.allocate(len(case.seq_lens), *q.shape[1:], device=q.device) if case.has_scratch else None
    if scratch is not None:
        scratch.outputs.fill_(float("nan"))
        scratch.statistics.fill_(float("nan"))
    named = {name: value for name, value in arguments.items() if name not in ("q", "k_cache", "v_cache")}
    window_attention(
        q, arguments["k_cache"], arguments["v_cache"], out, **named, max_query_len=max(case.lengths), scratch=scratch,
        num_splits=case.num_splits,
    )  # fmt: skip
    return out


def relative(found: Tensor, wanted: Tensor) -> tuple[float, float]:
    """Relative L2 error of all, and of the worst row of a token and head."""
    difference, wanted = found.float() - wanted, wanted
    rows = difference.norm(dim=-1) / wanted.norm(dim=-1)
    return float(difference.norm() / wanted.norm()), float(rows.max())


def compare(case: Case, arguments: dict[str, Any]) -> Result:
    out, wanted = attend(case, arguments), reference.paged_attention(**arguments)
    used = int(arguments["query_start_loc"][-1])
    error, worst = relative(out[:used], wanted[:used])
    return {
        "error": error, "worst": worst, "bound": BOUNDS[case.dtype],
        "holds": bool(out[used:].isnan().all()),  # rows of no sequence are left alone
    }  # fmt: skip


def same(first: Tensor, second: Tensor) -> Result:
    return {"error": 0.0, "worst": 0.0, "bound": 0.0, "holds": torch.equal(first, second) and not first.isnan().any()}


def permuted(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same batch with its blocks elsewhere."""
    order = torch.randperm(len(arguments["k_cache"]), device=arguments["q"].device)
    moved = {name: torch.empty_like(arguments[name]) for name in ("k_cache", "v_cache")}
    for name, cache in moved.items():
        cache.view(torch.uint8)[order] = arguments[name].view(torch.uint8)
    return arguments | moved | {"block_table": order[arguments["block_table"].long()].int()}


def far_blocks(device: str) -> Result:
    """Blocks whose elements lie beyond 2^31. The memory before them is never touched, so it costs nothing on a CPU."""
    arguments = make(Case((33, 150), window=100, is_packed=True), device)
    k_cache, v_cache = (arguments[name].view(torch.uint8) for name in ("k_cache", "v_cache"))
    blocks, kv_heads, page, dim = k_cache.shape
    first = 2**31 // k_cache.stride(0) + 5
    far = torch.empty((first + blocks, kv_heads, page, 2 * dim), dtype=torch.uint8, device=device)
    far[first:] = torch.cat((k_cache, v_cache), dim=-1)
    moved = {  # as codes, which the launcher takes too
        "k_cache": far[..., :dim], "v_cache": far[..., dim:], "block_table": arguments["block_table"] + first
    }  # fmt: skip
    case = Case((33, 150))
    return same(attend(case, arguments), attend(case, arguments | moved))


def far_rows(device: str) -> Result:
    """Query and output rows whose elements lie beyond 2^31."""
    case = Case((33, 150, 90), window=100)
    arguments = make(case, device)
    q = arguments["q"]
    stride = 2**30 + 64
    memory = torch.empty(2 * stride + 2 * q[0].numel(), dtype=q.dtype, device=device)
    far_q, far_out = (memory.as_strided(q.shape, (stride, *q.stride()[1:]), start) for start in (0, q[0].numel()))
    far_q.copy_(q)
    attend(case, arguments | {"q": far_q}, far_out)
    return same(attend(case, arguments), far_out)


def properties(device: str) -> dict[str, Result]:
    results: dict[str, Result] = {}
    for name, case in {
        "decode": Case((70, 300, 301), heads=(8, 2), window=None, head_dim=128),
        "prefill": Case((70, 140), (70, 90), window=None),
    }.items():
        arguments = make(case, device)
        whole = attend(case, arguments)
        wide = attend(case, arguments | {"sliding_window": max(case.seq_lens)})
        results[f"{name}: no window is a window as long as the context"] = same(whole, wide)
        none = torch.full((case.heads[0],), float("-inf"), device=device)
        results[f"{name}: a sink of minus infinity is none"] = same(whole, attend(case, arguments | {"sinks": none}))
        results[f"{name}: where pages lie changes nothing"] = same(whole, attend(case, permuted(arguments)))
    for name, case in {"few": Case(AROUND), "many": Case((300, 501), (8, 6), (16, 2))}.items():
        arguments = make(case, device)
        single = attend(replace(case, num_splits=1), arguments)
        for splits in (2, 3):
            split = attend(replace(case, num_splits=splits), arguments)
            error, worst = relative(split, single.float())
            key = f"{name} rows: {splits} splits say what one says"
            results[key] = {"error": error, "worst": worst, "bound": BOUNDS[FP16], "holds": True}
    case = Case(AROUND, dtype=BF16)
    arguments = make(case, device)
    arguments["q"][..., 0] = 2.0**20  # beyond fp16: the largest keys win alike, whether it is cut there or not
    arguments["q"][..., 1:] = 0
    results["a query beyond float16's range"] = compare(case, arguments)
    results["blocks beyond 2^31"] = far_blocks(device)
    results["rows beyond 2^31"] = far_rows(device)
    return results


def sensitivity(case: Case) -> dict[str, float]:
    """How far the twin's worst row moves under one mistake each; what the bound must lie well below."""
    arguments = make(case, "cpu")
    right = reference.paged_attention(**arguments)
    changes: dict[str, dict[str, Any]] = {}
    # One key more is a NaN here, by construction; one less must show.
    if case.window is not None and case.window > 1 and max(case.seq_lens) > case.window:
        changes["window"] = {"sliding_window": case.window - 1}
    if case.cache_dtype == FP8:
        changes["v_scale"] = {"v_scale": arguments["v_scale"] * 1.02}
    if case.cache_dtype == FP8 and case.window != 1:
        changes["k_scale"] = {"k_scale": arguments["k_scale"] * 1.1}
    if case.has_sinks:
        changes["sinks"] = {"sinks": arguments["sinks"] * arguments["softmax_scale"]}
    if case.num_sink_tokens:
        changes["sink tokens"] = {"num_sink_tokens": case.num_sink_tokens - 1}
    used = int(arguments["query_start_loc"][-1])
    moved = {name: reference.paged_attention(**(arguments | change)) for name, change in changes.items()}
    return {name: relative(other[:used], right[:used])[1] for name, other in moved.items()}


def main(device: str) -> None:
    results = {
        name: compare(case, make(case, device)) | {"sensitivity": sensitivity(case)}
        for name, case in CASES.items()
        if device == "cpu"
        or case.dtype != FP32  # float32 is the interpreter's: it shows the algorithm without rounding
    }
    print(json.dumps(results | properties(device)))


if __name__ == "__main__":
    main(sys.argv[1])
