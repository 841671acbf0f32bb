"""KV write and fused decode beside their twins, case by case: `kv_write_grid.py DEVICE` prints JSON, in a process of
its own.

A write case's numbers: cache bytes that differ from the twin's, bytes changed outside the slots, and the error of the
rotated q in units of its bound. A decode case's: bytes that differ, and the error of the output in units of its bound.
On `cpu` the kernels run under Triton's interpreter.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
POISON = 0xA5
# Of an output rounded once to its dtype, relative in the L2 norm; half a unit in the last place at most, so half of
# this is typical. kernels.md ("Accuracy") allows 3e-3 and 5e-4; float32 differs in the order of sums only.
BOUNDS = {torch.bfloat16: 3e-3, torch.float16: 5e-4, torch.float32: 1e-5}
Case = dict[str, Any]

WRITES: dict[str, Case] = {
    "one token, one head, D 64": {"T": 1, "KH": 1, "D": 64},
    "D 32, heads that do not fill a group": {"T": 5, "KH": 3, "H": 3, "D": 32},
    "D 96, per-head scales": {"T": 37, "KH": 2, "H": 10, "D": 96, "per_head": True},
    "D 128, page 128, slices of qkv": {"T": 33, "KH": 8, "H": 8, "D": 128, "page": 128, "sliced": True},
    "D 256, page 48": {"T": 7, "KH": 1, "H": 2, "D": 256, "page": 48},
    "float16 into e4m3": {"T": 40, "KH": 2, "H": 4, "D": 64, "dtype": torch.float16},
    "float32 rotation of bfloat16": {"T": 40, "KH": 2, "H": 4, "D": 64, "rope_dtype": torch.float32},
    "bfloat16 cache": {"T": 34, "KH": 2, "H": 4, "D": 64, "cache": torch.bfloat16, "sliced": True},
    "float16 cache": {"T": 3, "KH": 1, "H": 2, "D": 128, "cache": torch.float16, "dtype": torch.float16},
    "float32 cache": {"T": 9, "KH": 2, "H": 2, "D": 64, "cache": torch.float32, "dtype": torch.float32},
    "K and V in caches of their own": {"T": 20, "KH": 2, "H": 2, "D": 64, "apart": True},
    "pages before heads": {"T": 20, "KH": 3, "H": 3, "D": 64, "heads_inside": True, "per_head": True},
    "int32 positions": {"T": 6, "KH": 1, "H": 2, "D": 64, "positions": torch.int32},
    "nothing but padding": {"T": 6, "KH": 1, "H": 2, "D": 64, "padding": 1.0},
    "every special value": {"T": 64, "KH": 2, "H": 2, "D": 64, "special": True},
}
DECODES: dict[str, Case] = {
    "float32, no window": {"lengths": [1, 5, 70], "dtype": torch.float32, "cache": torch.float32},
    "bfloat16, e4m3, window": {"lengths": [9, 31, 32, 33, 150], "window": 32},
    "float16, e4m3, D 128, scales per head": {
        "lengths": [1, 127, 128, 129], "window": 128, "dtype": torch.float16, "D": 128, "KH": 3, "H": 15,
        "per_head": True,
    },
    "one KV head for twenty": {"lengths": [40, 7], "window": 16, "KH": 1, "H": 20, "D": 32},
    "learned sinks": {"lengths": [1, 200], "window": 128, "learned": True},
    "sink tokens, inside and behind the window": {"lengths": [3, 20, 21, 150], "window": 16, "sink_tokens": 5},
    "more sink tokens than a tile": {"lengths": [160, 90], "window": 8, "sink_tokens": 70, "D": 96},
    "both kinds of sinks, D 256, page 48": {
        "lengths": [130, 2], "window": 40, "sink_tokens": 4, "learned": True, "D": 256, "H": 2, "KH": 2, "page": 48
    },
    "padding between sequences": {"lengths": [12, 0, 33], "window": 20, "padded": [1]},
    "bfloat16 cache, slices of qkv": {"lengths": [65, 64], "window": 64, "cache": torch.bfloat16, "sliced": True},
}  # fmt: skip


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def caches(case: Case, num_blocks: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """(k_cache, v_cache, everything that they are views of), poisoned."""
    heads, page, head_dim, dtype = case["KH"], case.get("page", 16), case["D"], case.get("cache", E4M3)
    shape = [num_blocks, page, heads] if case.get("heads_inside") else [num_blocks, heads, page]
    width = head_dim if case.get("apart") else 2 * head_dim
    whole = torch.full((2 if case.get("apart") else 1, *shape, width * dtype.itemsize), POISON, dtype=torch.uint8)
    whole = whole.to(device)
    typed = whole if dtype == E4M3 else whole.view(dtype)  # e4m3 as bytes, as vLLM hands it over
    k_cache, v_cache = (typed[0], typed[1]) if case.get("apart") else typed[0].split(head_dim, dim=-1)
    if case.get("heads_inside"):
        k_cache, v_cache = k_cache.transpose(1, 2), v_cache.transpose(1, 2)
    return k_cache, v_cache, whole


def tokens(case: Case, count: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """(q, k, v), apart or as slices of one matrix."""
    heads, kv_heads, head_dim, dtype = case["H"], case["KH"], case["D"], case.get("dtype", torch.bfloat16)
    gap = 16 if case.get("sliced") else 0
    whole = torch.randn(count, (heads + 2 * kv_heads) * head_dim + gap).to(dtype).to(device)
    parts = whole[:, gap:].split([heads * head_dim, kv_heads * head_dim, kv_heads * head_dim], dim=-1)
    q, k, v = (part.unflatten(-1, (-1, head_dim)) for part in parts)
    return (q, k, v) if case.get("sliced") else (q.contiguous(), k.contiguous(), v.contiguous())


def special_values(dtype: torch.dtype) -> Tensor:
    """All that rounds oddly in e4m3 at scale 1: ties, subnormals, what saturates, infinities, NaN, zeros."""
    codes = torch.arange(0, 127, dtype=torch.uint8).view(E4M3).float()
    ties = (codes[1:] + codes[:-1]) / 2
    near = torch.cat([ties, torch.nextafter(ties, torch.tensor(0.0)), torch.nextafter(ties, torch.tensor(500.0))])
    edges = torch.tensor([448.0, 449, 464, 480, 1e4, 3e38, float("inf"), float("nan"), 2**-10, 2**-11, 1e-30, 0.0])
    values = torch.cat([codes, near, edges])
    return torch.cat([values, -values]).to(dtype)


def scales(case: Case, device: str) -> dict[str, Tensor | None]:
    if case.get("cache", E4M3) != E4M3:
        return {"k_scale": None, "v_scale": None}
    count = case["KH"] if case.get("per_head") else 1
    if case.get("special"):
        return dict.fromkeys(("k_scale", "v_scale"), torch.ones(1, device=device))
    return {name: (0.02 + torch.rand(count)).to(device) for name in ("k_scale", "v_scale")}


def rotation(case: Case, max_position: int, device: str) -> Tensor:
    angles = torch.rand(max_position, case["D"] // 2) * 6.3
    dtype = case.get("rope_dtype", case.get("dtype", torch.bfloat16))
    return torch.cat((angles.cos(), angles.sin()), dim=-1).to(dtype).to(device)


def write(case: Case, device: str) -> dict[str, float]:
    """Both ops of one case, with and without rotation."""
    from vllm_puzzle.kernels import kv_write, reference

    case = {"H": 2} | case
    page, count = case.get("page", 16), case["T"]
    q, k, v = tokens(case, count, device)
    if case.get("special"):
        values = special_values(k.dtype).to(device)
        v.view(-1)[: len(values)] = values
        k.view(-1)[-len(values) :] = values
    num_blocks = -(-count // page) + 3
    slots = torch.randperm(num_blocks * page)[:count].to(device)
    slots[torch.rand(count) < case.get("padding", 0.2)] = -1
    positions = torch.randint(0, 50, (count,)).to(case.get("positions", torch.int64)).to(device)
    table = rotation(case, 50, device)
    found = {"codes": 0, "neighbours": 0, "q": 0.0}
    for rotates in (False, True):
        by = scales(case, device)
        wholes, outs = [], []
        for module in (kv_write, reference):
            k_cache, v_cache, whole = caches(case, num_blocks, device)
            if not rotates:
                module.write_kv(k, v, k_cache, v_cache, slots, **by)
            else:
                out = torch.full_like(q, float("nan"))
                module.rope_and_write_kv(q, k, v, k_cache, v_cache, slots, positions, table, q_out=out, **by)
                outs.append(out)
            wholes.append(whole)
        ours, theirs = wholes
        found["codes"] += differing(ours, theirs, case.get("cache", E4M3))
        untouched = torch.full_like(theirs, POISON)
        found["neighbours"] += int(((theirs == untouched) & (ours != untouched)).sum())
        if rotates:
            exact = reference.rotate_from_cache(q, positions, table)
            bound = BOUNDS[q.dtype] * exact.norm()
            found["q"] = float((outs[0].float() - exact).norm() / bound)
    return found


def differing(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> int:
    """Bytes that differ; one NaN is as good as another."""
    same = ours == theirs
    if dtype == E4M3:
        same |= ((ours & 127) == 127) & ((theirs & 127) == 127)
    return int((~same).sum())


def far_away(device: str) -> dict[str, float]:
    """A page that begins 2³¹ elements and more behind the cache's first: memory that is reserved and not touched."""
    from vllm_puzzle.kernels import kv_write, reference

    case = {"T": 4, "KH": 1, "H": 1, "D": 64}
    _, k, v = tokens(case, 4, device)
    step, by = 2**29, scales(case, device)
    whole = torch.empty(5 * step, dtype=torch.uint8, device=device)
    k_cache, v_cache = whole.as_strided((5, 1, 16, 128), (step, 2048, 128, 1)).split(64, dim=-1)
    near_k, near_v, _ = caches(case, 5, device)
    slots = torch.tensor([64, 79, 70, -1], device=device)  # page 4
    kv_write.write_kv(k, v, k_cache, v_cache, slots, **by)
    reference.write_kv(k, v, near_k, near_v, slots, **by)
    rows = [0, 6, 15]
    differ = sum(int((a[4, 0, rows] != b[4, 0, rows]).sum()) for a, b in ((k_cache, near_k), (v_cache, near_v)))
    return {"codes": differ, "neighbours": 0, "q": 0.0}


def launched(launch: Callable[[], None], changing: list[Tensor], in_graph: bool) -> None:
    """Launch now; or capture a CUDA graph while `changing` (slots, lengths) hold padding, and replay it."""
    if not in_graph:
        launch()
        return
    values = [tensor.clone() for tensor in changing]
    for tensor, padding in zip(changing, (-1, 1), strict=True):
        tensor.fill_(padding)
    launch()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    for tensor, value in zip(changing, values, strict=True):
        tensor.copy_(value)
    graph.replay()


def decode(case: Case, device: str, in_graph: bool = False) -> dict[str, float]:
    from vllm_puzzle.kernels import fused_decode, reference

    case = {"KH": 2, "H": 8, "D": 64} | case
    lengths, page = case["lengths"], case.get("page", 16)
    pages = -(-max(lengths) // page)
    q, k, v = tokens(case, len(lengths), device)
    num_blocks = pages * len(lengths) + 1
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device=device)
    table = torch.randperm(num_blocks - 1)[: pages * len(lengths)].view(len(lengths), pages).int().to(device) + 1
    last = (seq_lens.long() - 1).clamp(min=0)
    slots = table.gather(1, last[:, None] // page).squeeze(1) * page + last % page
    slots[case.get("padded", [])] = -1
    by = scales(case, device)
    shared = {
        "slot_mapping": slots, "positions": last, "cos_sin_cache": rotation(case, max(lengths) + 1, device),
        "block_table": table, "seq_lens": seq_lens, "softmax_scale": case["D"] ** -0.5,
        "sliding_window": case.get("window"), "num_sink_tokens": case.get("sink_tokens", 0),
        "sinks": torch.randn(case["H"], device=device) if case.get("learned") else None,
    } | by  # fmt: skip
    wholes, outputs = [], []
    for module in (fused_decode, reference):
        torch.manual_seed(7)
        k_cache, v_cache, whole = caches(case, num_blocks, device)
        fill(k_cache, v_cache, table, lengths, case)
        if module is fused_decode:
            out = torch.full_like(q, float("nan"))
            arguments = (q, k, v, k_cache, v_cache, out)
            launched(lambda: fused_decode.fused_decode(*arguments, **shared), [slots, seq_lens], in_graph)  # noqa: B023
        else:
            out = reference.fused_decode(q, k, v, k_cache, v_cache, **shared)
        wholes.append(whole)
        outputs.append(out.float())
    error = (outputs[0] - outputs[1]).norm() / (BOUNDS[q.dtype] * outputs[1].norm())
    return {"codes": differing(*wholes, case.get("cache", E4M3)), "error": float(error)}


def fill(k_cache: Tensor, v_cache: Tensor, table: Tensor, lengths: list[int], case: Case) -> None:
    """Older keys of each sequence in view; every other number is NaN."""
    page, window, kept = case.get("page", 16), case.get("window") or 10**9, case.get("sink_tokens", 0)
    for cache in (k_cache, v_cache):
        numbers = cache.view(E4M3) if cache.dtype == torch.uint8 else cache
        if numbers.dtype == E4M3:
            numbers.view(torch.uint8).fill_(127)
        else:
            numbers.fill_(float("nan"))
        for row, length in zip(table, lengths, strict=True):
            keys = torch.arange(max(length - 1, 0))
            keys = keys[(keys >= length - window) | (keys < kept)].to(table.device)
            values = torch.randn(len(keys), numbers.shape[1], numbers.shape[3]).to(numbers.dtype).to(table.device)
            raw = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[numbers.element_size()]
            numbers.view(raw)[row[keys // page].long(), :, keys % page] = values.view(raw)


def main(device: str) -> None:
    if device == "cpu":
        sys.path.insert(0, str(Path(__file__).parent))
        import interpreter

        interpreter.install()
    torch.set_num_threads(1)
    runs: dict[str, Callable[[], dict[str, float]]] = {
        **{f"write: {name}": lambda case=case: write(case, device) for name, case in WRITES.items()},
        "write: an offset beyond 2³¹": lambda: far_away(device),
        **{f"decode: {name}": lambda case=case: decode(case, device) for name, case in DECODES.items()},
        **{f"graph: {name}": lambda case=case: decode(case, device, True)
           for name, case in DECODES.items() if device != "cpu"},
    }  # fmt: skip
    found = {}
    for name, run in runs.items():
        torch.manual_seed(len(name))
        found[name] = run()
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
