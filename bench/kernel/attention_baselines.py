"""Other implementations of paged window attention, on the same inputs: torch's, vLLM's, FlashInfer's.

SDPA and flex_attention know no pages (torch 2.11): they get the live keys as dense bf16 tensors, gathered and
dequantised beforehand and not counted, which favours them. A query that a baseline wants in FP8 is quantised
beforehand too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from vllm_puzzle.bench.kernel import stock
from vllm_puzzle.bench.kernel.problem import Absent, Prepare, as_bits, compiled
from vllm_puzzle.bench.kernel.timing import Call

if TYPE_CHECKING:
    from vllm_puzzle.bench.kernel.attention import AttentionProblem, Inputs

SEGMENTS = 16  # vLLM's split of a decode; off where num_seqs exceeds LAUNCH_GRID / KV heads
LAUNCH_GRID = 128
E4M3_MAX = 448.0
FLASHINFER_WORKSPACE = 256 << 20
FLASHINFER_PLANS = 1024  # a plan for each input set, 8 MiB each


def baselines(problem: AttentionProblem) -> Mapping[str, Prepare]:
    """By name."""
    found: dict[str, Prepare] = {
        "sdpa": partial(sdpa, problem),
        "flex_attention": partial(flex, problem),
        "vllm_triton": partial(vllm_triton, problem, problem.is_quantized),
        "flash_attention_3": partial(flash_attention_3, problem),
        "flashinfer": partial(flashinfer, problem),
    }
    if problem.is_quantized:
        found["vllm_triton_bf16q"] = partial(vllm_triton, problem, False)
    return found


def dense(problem: AttentionProblem, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q [B, H, q, D], live k and v [B, KH, L, D] in q's dtype, and the live keys' positions [L]. Raises Absent for
    sequences of several lengths.
    """
    case = problem.case
    if len(set(case.batch)) != 1:
        raise Absent("sequences of several lengths are no dense tensor")
    (query, seq), size = case.batch[0], len(case.batch)
    first = 0 if case.window is None else max(0, seq - query - case.window + 1)
    keys = torch.arange(seq, device=problem.device)
    keys = keys[(keys >= first) | (keys < case.num_sink_tokens)]
    blocks = inputs.block_table[:, keys // case.page].long()

    def gather(cache: Tensor, scale: Tensor | None) -> Tensor:
        rows = as_bits(cache)[blocks, :, keys % case.page].view(cache.dtype)  # [B, L, KH, D]
        rows = rows.to(inputs.q.dtype) if scale is None else (rows.float() * scale[:, None]).to(inputs.q.dtype)
        return rows.transpose(1, 2).contiguous()

    q = inputs.q.view(size, query, case.num_heads, case.head_dim).transpose(1, 2)
    return q, gather(problem.k_cache, problem.k_scale), gather(problem.v_cache, problem.v_scale), keys


def is_visible(problem: AttentionProblem, keys: Tensor) -> Tensor | None:
    """Which live key each query sees, [q, L], None where all do."""
    case = problem.case
    query, seq = case.batch[0]
    distance = torch.arange(seq - query, seq, device=keys.device)[:, None] - keys
    seen = distance >= 0
    if case.window is not None:
        seen &= (distance < case.window) | (keys < case.num_sink_tokens)
    return None if bool(seen.all()) else seen


def _as_rows(out: Tensor) -> Tensor:
    """[B, H, q, D] → [B · q, H, D]."""
    return out.transpose(1, 2).flatten(0, 1)


def sdpa(problem: AttentionProblem) -> Sequence[Call]:
    """`F.scaled_dot_product_attention` on gathered keys; the fastest backend that torch finds for the mask."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if problem.sinks is not None:
        raise Absent("SDPA has no learned sinks")
    mask: Tensor | None = None
    fused = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    # Without a fused backend it would hold all scores in memory; a CPU has only that.
    allowed = fused if problem.device.startswith("cuda") else [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]

    def attend(q: Tensor, k: Tensor, v: Tensor, is_grouped: bool) -> Tensor:
        with sdpa_kernel(allowed):
            return _as_rows(
                torch.nn.functional.scaled_dot_product_attention(
                    q, k, v, attn_mask=mask, scale=problem.softmax_scale, enable_gqa=is_grouped
                )
            )

    calls: list[Call] = []
    group = problem.case.num_heads // problem.case.num_kv_heads
    is_grouped: bool | None = None
    for inputs in problem.sets:
        q, k, v, keys = dense(problem, inputs)
        mask = is_visible(problem, keys) if not calls else mask
        if is_grouped is None:
            is_grouped = _runs(partial(attend, q, k, v, True))
        if not is_grouped:  # the memory-efficient backend takes no groups: give it each head's keys
            k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        calls.append(partial(attend, q, k, v, is_grouped))
    return calls


def _runs(call: Call) -> bool:
    try:
        call()
    except RuntimeError:
        return False
    return True


def flex(problem: AttentionProblem) -> Sequence[Call]:
    """flex_attention, compiled (eager on a CPU), on gathered keys, with a block mask; learned sinks by its
    log-sum-exp: softmax over keys times sigmoid(lse − sink).
    """
    from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

    case = problem.case
    query, seq = case.batch[0]
    op = compiled(flex_attention, problem.device.startswith("cuda"))
    grouped = {"scale": problem.softmax_scale, "enable_gqa": True}
    mask = None

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if problem.sinks is None:
            return _as_rows(op(q, k, v, block_mask=mask, **grouped))
        out, statistics = op(q, k, v, block_mask=mask, return_aux=AuxRequest(lse=True), **grouped)
        return _as_rows(out * torch.sigmoid(statistics.lse - problem.sinks[:, None])[..., None].to(out.dtype))

    calls: list[Call] = []
    for inputs in problem.sets:
        q, k, v, keys = dense(problem, inputs)
        if not calls and is_visible(problem, keys) is not None:
            sees = _mask_mod(keys, seq - query, seq if case.window is None else case.window, case.num_sink_tokens)
            mask = create_block_mask(sees, None, None, query, len(keys), device=problem.device)
        calls.append(partial(attend, q, k, v))
    return calls


def _mask_mod(keys: Tensor, first_query: int, window: int, num_sink_tokens: int) -> Callable[..., Tensor]:
    """`is_visible` as flex_attention asks for it: by row of the query and column of `keys`."""

    def sees(_b: Tensor, _h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        distance = row + first_query - keys[column]
        return (distance >= 0) & ((distance < window) | (keys[column] < num_sink_tokens))

    return sees


def _token_major(cache: Tensor) -> Tensor:
    """[blocks, KH, page, D] as vLLM's kernels take it: [blocks, page, KH, D], the same memory."""
    return cache.transpose(1, 2)


def _quantized_query(inputs: Inputs) -> tuple[Tensor, Tensor]:
    scale = inputs.q.float().abs().amax() / E4M3_MAX
    return (inputs.q.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale.reshape(1)


def vllm_triton(problem: AttentionProblem, quantizes_query: bool) -> Sequence[Call]:
    """vLLM's unified attention as its Triton backend calls it: 16 segments at decode where the batch is small."""
    case = problem.case
    if case.num_sink_tokens:
        raise Absent("vLLM's Triton attention reads the whole sequence when it keeps first tokens")
    if case.per_head:
        raise Absent("vLLM's Triton attention reads one scale for all heads")
    ops = stock.find(problem.vllm_source)
    attend, modes = ops.get("unified_attention"), ops.get("KVQuantMode")
    limit = LAUNCH_GRID // case.num_kv_heads
    padded = 1 << (case.head_dim - 1).bit_length()
    shape = (limit, case.num_heads, SEGMENTS)
    partials = torch.empty(*shape, padded, device=problem.device)
    maxima, sums = (torch.empty(shape, device=problem.device) for _ in range(2))
    one = torch.ones(1, device=problem.device)
    calls = []
    for inputs in problem.sets:
        q, q_scale = _quantized_query(inputs) if quantizes_query else (inputs.q, None)
        out = torch.empty_like(inputs.q)

        def call(q: Tensor = q, q_scale: Tensor | None = q_scale, out: Tensor = out, inputs: Inputs = inputs) -> Tensor:
            attend(
                q=q, k=_token_major(problem.k_cache), v=_token_major(problem.v_cache), out=out,
                cu_seqlens_q=problem.query_start_loc, max_seqlen_q=problem.max_query_len,
                seqused_k=problem.seq_lens, max_seqlen_k=problem.max_seq_len, softmax_scale=problem.softmax_scale,
                causal=True, window_size=(-1, -1) if case.window is None else (case.window - 1, 0),
                block_table=inputs.block_table, softcap=0, q_descale=q_scale,
                k_descale=one if problem.k_scale is None else problem.k_scale,
                v_descale=one if problem.v_scale is None else problem.v_scale,
                seq_threshold_3D=limit, num_par_softmax_segments=SEGMENTS, softmax_segm_output=partials,
                softmax_segm_max=maxima, softmax_segm_expsum=sums, sinks=problem.sinks,
                kv_quant_mode=modes.FP8_PER_TENSOR if problem.is_quantized else modes.NONE,
            )  # fmt: skip
            return out

        calls.append(call)
    return calls


def flash_attention_3(problem: AttentionProblem) -> Sequence[Call]:
    """FlashAttention 3 from vLLM's wheel; with an FP8 cache its query is FP8 too."""
    case = problem.case
    if case.num_sink_tokens:
        raise Absent("FlashAttention has no sink tokens")
    attend = stock.find(None).get("flash_attn_varlen_func")
    shape = (len(case.batch), case.num_kv_heads)
    calls = []
    for inputs in problem.sets:
        q, scales = inputs.q, {}
        if problem.k_scale is not None and problem.v_scale is not None:
            q, q_scale = _quantized_query(inputs)
            named = {"q_descale": q_scale, "k_descale": problem.k_scale, "v_descale": problem.v_scale}
            scales = {name: scale.expand(shape) for name, scale in named.items()}
        out = torch.empty_like(inputs.q)

        def call(
            q: Tensor = q, scales: dict[str, Tensor] = scales, out: Tensor = out, inputs: Inputs = inputs
        ) -> Tensor:
            attend(
                q=q, k=_token_major(problem.k_cache), v=_token_major(problem.v_cache), out=out,
                cu_seqlens_q=problem.query_start_loc, max_seqlen_q=problem.max_query_len,
                seqused_k=problem.seq_lens, max_seqlen_k=problem.max_seq_len, softmax_scale=problem.softmax_scale,
                causal=True, window_size=[-1, -1] if case.window is None else [case.window - 1, 0],
                block_table=inputs.block_table, fa_version=3,
                s_aux=None if problem.sinks is None else problem.sinks.bfloat16(), **scales,
            )  # fmt: skip
            return out

        calls.append(call)
    return calls


def flashinfer(problem: AttentionProblem) -> Sequence[Call]:
    """FlashInfer's paged wrappers, planned beforehand; one plan for each input set."""
    case = problem.case
    try:
        library = __import__("flashinfer")
    except ImportError as error:
        raise Absent(f"flashinfer is not installed ({error})") from None
    if case.sinks or case.num_sink_tokens or case.per_head:
        raise Absent("not asked of FlashInfer: sinks, sink tokens, scales per head")
    if len(problem.sets) > FLASHINFER_PLANS:
        raise Absent(f"found {len(problem.sets)} input sets, allowed: {FLASHINFER_PLANS} plans")
    workspace = torch.empty(FLASHINFER_WORKSPACE, dtype=torch.uint8, device=problem.device)
    is_decode = problem.max_query_len == 1
    wrapper_class = (
        library.BatchDecodeWithPagedKVCacheWrapper if is_decode else library.BatchPrefillWithPagedKVCacheWrapper
    )
    pages = torch.tensor([0] + [-(-seq // case.page) for _, seq in case.batch]).cumsum(0).int()
    last = torch.tensor([(seq - 1) % case.page + 1 for _, seq in case.batch], dtype=torch.int32)
    scales = {
        "k_scale": None if problem.k_scale is None else float(problem.k_scale),
        "v_scale": None if problem.v_scale is None else float(problem.v_scale),
    }
    calls = []
    for inputs in problem.sets:
        counts = torch.diff(pages).tolist()
        indices = torch.cat([row[:count] for row, count in zip(inputs.block_table, counts, strict=True)])
        wrapper = wrapper_class(workspace, kv_layout="HND", **({"use_tensor_cores": True} if is_decode else {}))
        table = (pages.to(problem.device), indices, last.to(problem.device))
        heads = (case.num_heads, case.num_kv_heads, case.head_dim, case.page)
        kinds = {"q_data_type": inputs.q.dtype, "kv_data_type": problem.k_cache.dtype}
        window = {"window_left": -1 if case.window is None else case.window - 1, "sm_scale": problem.softmax_scale}
        if is_decode:
            wrapper.plan(*table, *heads, **window, **kinds)
        else:
            wrapper.plan(problem.query_start_loc, *table, *heads, causal=True, **window, **kinds)
        calls.append(partial(wrapper.run, inputs.q, (problem.k_cache, problem.v_cache), **scales))
    return calls
