"""The papers' derived KV figures beside vLLM's planner: same bytes available, same lengths, ours and vLLM's grouping.

The figures follow from the published shapes (49B: arXiv 2411.19146, 253B: 2505.00949, gpt-oss-puzzle-88B: 2602.11937,
Nemotron 3: 2512.20856) by arithmetic that is set up again here, so that a difference is the planner's: whole blocks,
groups padded to one width, tokens in flight. 21.51 and 2,819,653 tokens are what an engine reported (fakoli/
anvil-serving @5f4c7630, vLLM 0.23.1rc on an RTX PRO 6000).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from vllm_puzzle.model_configs.catalogue import find
from vllm_puzzle.model_configs.schema import ModelRecord
from vllm_puzzle.model_configs.tensors import num_parameters
from vllm_puzzle.serving.kv_admission import held_requests
from vllm_puzzle.serving.kv_capacity import CacheSetup, Capacity, kv_capacity, least_bytes

GIB, MIB = 1 << 30, 1 << 20
PARENT, SUPER = "llama-3.3-70b-instruct", "llama-3.3-nemotron-super-49b-v1"
PUZZLE, GPT_OSS = "gpt-oss-puzzle-88b", "gpt-oss-120b"
# The cards' GiB that reproduce the figures' own rounding: 0.95 of them less 2.5 GiB and the weights.
CARD_GIB = {"H100": 79.1, "H200": 140.0}
# gpt-oss-puzzle on an RTX PRO 6000: 2,819,653 tokens are 253,737 blocks of ten layers in FP8; 38.72 GiB rounds them.
RTX_BYTES = 253_737 * 10 * 16 * 1024
RTX_LENGTH = 131_072
BATCHED = {16_384: 21.51, 8192: 24.7, 2048: 27.9}
STEADY = 29.5
# GiB after weights; steady concurrency at the mean context of 64K/64K and 4K/4K.
KV_GIB = {"H100": {GPT_OSS: 12.4, PUZZLE: 22.5}, "H200": {GPT_OSS: 70.1, PUZZLE: 80.2}}
MEAN_CONTEXT = {"64K/64K": 98_304, "4K/4K": 6144}
CONCURRENCY = {
    ("H100", "64K/64K"): (3.7, 7.3, 11.2, 22.4),
    ("H100", "4K/4K"): (57.6, 115, 104, 209),
    ("H200", "64K/64K"): (20.7, 41.5, 40.0, 80.0),
    ("H200", "4K/4K"): (326, 651, 372, 745),
}
MIB_PER_REQUEST = {8192: (146, 146), 16_384: (226, 290), 32_768: (386, 578), 65_536: (706, 1154), 131_072: (1346, 2306)}
NEMOTRON_3 = {  # SSM state of one request in MB, KV bytes of a token in FP8
    "nemotron-3-nano-30b-a3b": (48.2, 3072),
    "nemotron-3-super-120b-a12b-nvfp4": (167.8, 4096),
    "nemotron-3-ultra-550b-a55b": (402.7, 6144),
}
PADDED = "groups of 9, 9 and 8 windowed layers take as much as the 10 full ones; whole blocks"

Row = dict[str, Any]


def paper_rows() -> list[Row]:
    """A row per figure: what, unit, paper, ours, stock, exact (without blocks, padding, tokens in flight).

    `why` says what sets ours apart from exact, `paper_differs` what sets the paper's figure apart from exact.
    """
    parts = (_token_bytes, _dense_tokens, _ultra_tokens, _concurrency, _reported, _mib_per_request, _mamba)
    return [row for part in parts for row in part()]


def admission_rows() -> list[Row]:
    """Windowed models in FP8 KV at their full length: what vLLM reports, and how many requests it then holds."""
    rtx = [(PUZZLE, "RTX PRO 6000", RTX_LENGTH, batched, is_async) for batched in BATCHED for is_async in (True, False)]
    small = [(PUZZLE, "RTX PRO 6000", RTX_LENGTH, 512, False)]
    short = [(model, card, 8192, 8192, True) for card in KV_GIB for model in (GPT_OSS, PUZZLE)]
    return [admission_row(*case) for case in (*rtx, *small, *short)]


def admission_row(model: str, card: str, length: int, batched: int, is_async: bool) -> Row:
    """One row of `admission_rows`, in the figures' bytes of that card."""
    record, setup = find(model).record(), CacheSetup(length, batched, "fp8", is_async=is_async)
    available = int(KV_GIB[card][model] * GIB) if card in KV_GIB else RTX_BYTES
    row: Row = {
        "model": model,
        "card": card,
        "max_model_len": length,
        "max_num_batched_tokens": batched,
        "is_async": is_async,
        "exact": round(available / least_bytes(record, setup), 2),
    }
    for name, is_stock in (("ours", False), ("stock", True)):
        row[f"{name}_reported"] = round(_capacity(record, available, setup, is_stock).concurrency, 2)
        row[f"{name}_held"] = held_requests(record, setup, available, is_stock)
    return row


def _capacity(record: ModelRecord, available_bytes: int, setup: CacheSetup, is_stock: bool = False) -> Capacity:
    return kv_capacity(
        record,
        available_bytes=available_bytes,
        max_model_len=setup.max_model_len,
        max_num_batched_tokens=setup.max_num_batched_tokens,
        kv_dtype=setup.kv_dtype,
        is_stock=is_stock,
        tensor_parallel_size=setup.tensor_parallel_size,
        is_async=setup.is_async,
        has_prefix_caching=setup.has_prefix_caching,
    )


def _row(
    figure: str, unit: str, paper: float, ours: float, why: str = "", paper_differs: str = "", **more: float
) -> Row:
    numbers = {"paper": paper, **{name: round(value, 3) for name, value in {"ours": ours, **more}.items()}}
    return {"figure": figure, "unit": unit, **numbers, "why": why, "paper_differs": paper_differs}


def _steady(length: int, kv_dtype: str, tensor_parallel_size: int = 1) -> CacheSetup:
    """One token in flight: a request that only decodes."""
    return CacheSetup(
        length,
        1,
        kv_dtype,
        tensor_parallel_size=tensor_parallel_size,
        is_async=False,
        has_prefix_caching=False,
    )


def _token_bytes() -> Iterator[Row]:
    figures = {(SUPER, "fp8"): 100_352, (SUPER, "bf16"): 200_704, (PARENT, "fp8"): 163_840, (PARENT, "bf16"): 327_680}
    for (model, kv_dtype), paper in figures.items():
        block = _capacity(find(model).record(), 1 << 40, _steady(4096, kv_dtype)).block_bytes
        yield _row(f"{model}, KV of a token, {kv_dtype}", "bytes", paper, block / 16)


def _weights(record: ModelRecord, bytes_per_parameter: int) -> int:
    """Weights with embeddings and output matrix in bf16, as the figures have them."""
    kept = (2 - bytes_per_parameter) * record.vocab_size * record.hidden_size
    return num_parameters(record) * bytes_per_parameter + kept * (1 if record.tie_word_embeddings else 2)


def _left(record: ModelRecord, card: str, bytes_per_parameter: int = 1, num_gpus: int = 1) -> int:
    return int((0.95 * CARD_GIB[card] - 2.5) * GIB) - _weights(record, bytes_per_parameter) // num_gpus


def _dense_tokens() -> Iterator[Row]:
    figures = {(SUPER, "H100"): 259e3, (PARENT, "H100"): 33e3, (SUPER, "H200"): 878e3, (PARENT, "H200"): 412e3}
    for (model, card), paper in figures.items():
        record = find(model).record()
        tokens = _capacity(record, _left(record, card), _steady(4096, "fp8")).tokens
        yield _row(f"{model}, FP8 KV in what is left of one {card}", "tokens", paper, tokens)


def _ultra_tokens() -> Iterator[Row]:
    record = find("llama-3.1-nemotron-ultra-253b-v1").record()
    for weights, bytes_per_parameter, kv_dtype, paper in (("FP8", 1, "fp8", 3e6), ("bf16", 2, "bf16", 600e3)):
        available = _left(record, "H100", bytes_per_parameter, num_gpus=8)
        tokens = _capacity(record, available, _steady(4096, kv_dtype, 8)).tokens
        differs = "it states neither utilisation nor activations, nor the KV's dtype beside bf16 weights"
        figure = f"Ultra-253B in {weights}, {kv_dtype} KV on 8 x H100"
        yield _row(figure, "tokens", paper, tokens, paper_differs=differs)


def _concurrency() -> Iterator[Row]:
    for (card, load), figures in CONCURRENCY.items():
        cases = [(model, kv_dtype) for model in (GPT_OSS, PUZZLE) for kv_dtype in ("bf16", "fp8")]
        for (model, kv_dtype), paper in zip(cases, figures, strict=True):
            record, setup = find(model).record(), _steady(MEAN_CONTEXT[load], kv_dtype)
            available = int(KV_GIB[card][model] * GIB)
            yield _row(
                f"{model}, {kv_dtype} KV, {card}, {load}, at the mean context",
                "requests",
                paper,
                _capacity(record, available, setup).concurrency,
                PADDED if model == PUZZLE else "",
                stock=_capacity(record, available, setup, is_stock=True).concurrency,
                exact=available / least_bytes(record, setup),
                of_gib=KV_GIB[card][model],
            )


def _reported() -> Iterator[Row]:
    record = find(PUZZLE).record()
    for batched, paper in BATCHED.items():
        setup = CacheSetup(RTX_LENGTH, batched, "fp8", is_async=False)
        stock = _capacity(record, RTX_BYTES, setup, is_stock=True).concurrency
        figure = f"{PUZZLE}, RTX PRO 6000, {batched:,} batched tokens"
        yield _row(figure, "requests", paper, _capacity(record, RTX_BYTES, setup).concurrency, stock=stock)
    tokens = _capacity(record, RTX_BYTES, CacheSetup(RTX_LENGTH, 16_384, "fp8", is_async=False)).tokens
    yield _row(f"{PUZZLE}, RTX PRO 6000, 16,384 batched tokens", "tokens", 2_819_653, tokens)
    setup = _steady(RTX_LENGTH, "fp8")
    yield _row(
        f"{PUZZLE}, RTX PRO 6000, steady",
        "requests",
        STEADY,
        _capacity(record, RTX_BYTES, setup).concurrency,
        PADDED,
        "rounded from 1.412 GB a request",
        stock=_capacity(record, RTX_BYTES, setup, is_stock=True).concurrency,
        exact=RTX_BYTES / least_bytes(record, setup),
    )


def _mib_per_request() -> Iterator[Row]:
    for length, figures in MIB_PER_REQUEST.items():
        for model, paper in zip((PUZZLE, GPT_OSS), figures, strict=True):
            record, setup = find(model).record(), _steady(length, "fp8")
            ours, stock = (_capacity(record, 1 << 40, setup, is_stock).decoding_bytes for is_stock in (False, True))
            exact = least_bytes(record, setup) / MIB
            figure = f"{model}, {length:,} tokens, FP8 KV"
            why = PADDED if model == PUZZLE else ""
            yield _row(figure, "MiB", paper, ours / MIB, why, stock=stock / MIB, exact=exact)


def _mamba() -> Iterator[Row]:
    for model, (state, token) in NEMOTRON_3.items():
        record = find(model).record()
        for has_prefix_caching in (False, True):
            setup = CacheSetup(73_728, 8192, "fp8", has_prefix_caching=has_prefix_caching)
            plan = _capacity(record, 1 << 40, setup)
            states = sum(group.blocks_per_request for group in plan.groups if group.kind == "mamba")
            name = f"{model}, Mamba state of a request, prefix caching {'on' if has_prefix_caching else 'off'}"
            why = "states padded to an attention block, groups to one width"
            why += "; two states a request" if has_prefix_caching else ""
            exact = (least_bytes(record, _steady(1, "fp8")) - token) / 1e6
            differs = "without the convolution's state"
            yield _row(name, "MB", state, states * plan.block_bytes / 1e6, why, differs, exact=exact)
        (block_size,) = {group.block_size for group in plan.groups if group.kind == "full"}
        yield _row(f"{model}, KV of a token, fp8", "bytes", token, plan.block_bytes / block_size)


def paper_table(rows: Sequence[Row]) -> str:
    """Rows of `paper_rows` as a Markdown table."""
    lines = ["| figure | paper | exact | ours | vLLM's grouping | ours | paper |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        cells = [_number(row.get(key)) for key in ("paper", "exact", "ours", "stock")]
        cells += [row["why"], row["paper_differs"]]
        lines.append(f"| {row['figure']}, {row['unit']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def admission_table(rows: Sequence[Row]) -> str:
    """Rows of `admission_rows` as a Markdown table."""
    lines = [
        "| model, card, request | batched tokens | exact | reported | held | vLLM's grouping, reported | held |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        batched = f"{row['max_num_batched_tokens']:,}, {'async' if row['is_async'] else 'sync'}"
        cells = [row[key] for key in ("exact", "ours_reported", "ours_held", "stock_reported", "stock_held")]
        name = f"{row['model']}, {row['card']}, {row['max_model_len']:,}"
        lines.append(f"| {name} | {batched} | {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
