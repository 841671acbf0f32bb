"""Plain-PyTorch definition of every op, written to be read: the specification that kernels and vLLM are held to.

No kernel, no cache, no batching trick. Statistics (norm, softmax) are taken in float32 and rounded to the
input's dtype where Hugging Face rounds, so that float32 results can be compared to the last bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / rms(x) · weight` over the last dimension. x: [..., D], weight: [D] → [..., D]."""
    variance = x.float().pow(2).mean(-1, keepdim=True)
    return weight * (x.float() * torch.rsqrt(variance + eps)).to(x.dtype)


def gated_ffn(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    down: Tensor,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """`down · (silu(gate · x) · (up · x))`. x: [..., D], gate, up: [F, D], down: [D, F] → [..., D]; biases are added
    after each product. gate_bias, up_bias: [F], down_bias: [D].
    """
    linear = torch.nn.functional.linear
    activated = torch.nn.functional.silu(linear(x, gate, gate_bias)) * linear(x, up, up_bias)
    return linear(activated, down, down_bias)


def rope_inverse_frequencies(
    head_dim: int,
    theta: float,
    factor: float | None = None,
    low_freq_factor: float | None = None,
    high_freq_factor: float | None = None,
    original_max_position: int | None = None,
) -> Tensor:
    """Rotary inverse frequencies, [head_dim / 2] float32; with the last four given, Llama 3's scaling.

    Llama 3 (Hugging Face `modeling_rope_utils._compute_llama3_parameters`): wavelengths longer than
    original/low are divided by `factor`, shorter than original/high stay, those between are interpolated.
    """
    inverse = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if factor is None:
        return inverse
    if low_freq_factor is None or high_freq_factor is None or original_max_position is None:
        raise ValueError("Llama 3 rope scaling needs factor, low_freq_factor, high_freq_factor and the original length")
    wavelength = 2 * math.pi / inverse
    smooth = (original_max_position / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor)
    smooth = smooth.clamp(0, 1)
    return (1 - smooth) * inverse / factor + smooth * inverse


def yarn_frequencies(
    head_dim: int,
    theta: float,
    factor: float,
    original_max_position: int,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    attention_factor: float | None = None,
    truncate: bool = True,
) -> tuple[Tensor, float]:
    """YaRN (Peng et al. 2023, §3.2–3.4): inverse frequencies [head_dim / 2] and the factor on cos and sin.

    Dimensions that turn more than `beta_fast` times over the original length stay, those below `beta_slow` turns are
    divided by `factor`, a linear ramp lies between; `truncate` rounds its ends outwards (gpt-oss does not).
    """
    inverse = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)

    def dimension(turns: float) -> float:
        return head_dim * math.log(original_max_position / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(beta_fast), dimension(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high += 0.001 if low == high else 0.0
    ramp = (torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)
    ramp = ramp.clamp(0, 1)
    scale = attention_factor if attention_factor is not None else 0.1 * math.log(max(factor, 1.0)) + 1.0
    return inverse / factor * ramp + inverse * (1 - ramp), scale


def apply_rope(x: Tensor, positions: Tensor, inverse_frequencies: Tensor, scale: float = 1.0) -> Tensor:
    """Rotate halves (NeoX layout), cos and sin times `scale`. x: [..., T, H, D], positions: [T] → [..., T, H, D]."""
    angles = positions.float()[:, None] * inverse_frequencies[None, :]
    cos, sin = (scale * angles.cos())[:, None].to(x.dtype), (scale * angles.sin())[:, None].to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sliding_window: int | None = None,
    sinks: Tensor | None = None,
    num_sink_tokens: int = 0,
) -> Tensor:
    """Causal attention of each sequence with itself; query head h reads KV head h // (H / KV).

    q: [..., T, H, D], k, v: [..., T, KV, D] → [..., T, H, D]. A window of w sees keys t − w + 1 … t, and with
    `num_sink_tokens` the first keys too. sinks: [H], one logit per head that takes part in the softmax only.
    """
    num_tokens, num_heads, head_dim = q.shape[-3:]
    group = num_heads // k.shape[-2]
    k, v = k.repeat_interleave(group, dim=-2), v.repeat_interleave(group, dim=-2)
    scores = torch.einsum("...qhd,...khd->...hqk", q, k) * head_dim**-0.5
    steps = torch.arange(num_tokens, device=q.device)
    distance = steps[:, None] - steps[None, :]
    is_hidden = distance < 0
    if sliding_window is not None:
        is_hidden = is_hidden | ((distance >= sliding_window) & (steps[None, :] >= num_sink_tokens))
    scores = scores.masked_fill(is_hidden, float("-inf")).float()
    if sinks is not None:
        column = sinks.float()[:, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, column), dim=-1)
    weights = scores.softmax(-1)[..., :num_tokens]
    return torch.einsum("...hqk,...khd->...qhd", weights.to(q.dtype), v)


def route(logits: Tensor, top_k: int, routing: str) -> tuple[Tensor, Tensor]:
    """Router logits [N, E] → (weights, experts), both [N, top_k]. `routing` as in `model_configs/schema.ROUTINGS`."""
    if routing == "softmax":
        weights, experts = logits.float().softmax(-1).topk(top_k, dim=-1)
        return weights, experts
    chosen, experts = logits.float().topk(top_k, dim=-1)
    return (chosen.softmax(-1) if routing == "renormalize" else chosen.sigmoid()), experts


def moe(x: Tensor, weights: Tensor, experts: Tensor, run: Callable[[int, Tensor], Tensor], on_input: bool) -> Tensor:
    """Sum of the chosen experts' outputs. x: [N, D], weights, experts: [N, K] → [N, D].

    `run(e, rows)` applies expert e to rows [n, D]. A weight scales the expert's input where `on_input`, else its
    output.
    """
    output = torch.zeros_like(x)
    for expert in experts.unique().tolist():
        rows, slots = (experts == expert).nonzero(as_tuple=True)
        weight = weights[rows, slots, None].to(x.dtype)
        result = run(expert, x[rows] * weight) if on_input else run(expert, x[rows]) * weight
        output.index_add_(0, rows, result)
    return output


def swiglu_oai(gate_up: Tensor, alpha: float = 1.702, limit: float = 7.0) -> Tensor:
    """gpt-oss's clamped activation (Hugging Face `GptOssExperts`): columns alternate gate, up. [..., 2F] → [..., F]."""
    gate, up = gate_up[..., ::2].clamp(max=limit), gate_up[..., 1::2].clamp(-limit, limit)
    return (up + 1) * gate * torch.sigmoid(alpha * gate)


# The 16 values of FP4 E2M1, by code; the high bit is the sign (OCP Microscaling Formats 1.0, §5.3.3).
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def mxfp4_dequantize(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """MXFP4 → `dtype`. blocks: [..., G, 16] uint8, two values to a byte, low half first; scales: [..., G] uint8, a
    power of two with bias 127 (E8M0) → [..., 32 · G]. Exact in bfloat16 and float32.
    """
    values = torch.tensor(FP4_VALUES, dtype=torch.float32, device=blocks.device)
    pairs = torch.stack((values[(blocks & 15).long()], values[(blocks >> 4).long()]), dim=-1).flatten(-2)
    return torch.ldexp(pairs, scales.int()[..., None] - 127).flatten(-2).to(dtype)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    softmax_scale: float,
    sliding_window: int | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    sinks: Tensor | None = None,
    num_sink_tokens: int = 0,
) -> Tensor:
    """Causal attention of each sequence's last tokens with its paged cache. q: [T, H, D] → float32 [T, H, D].

    k_cache, v_cache: [blocks, KV, page, D]; key n of sequence b is `cache[block_table[b, n // page], :, n % page]`
    times its scale ([1] or [KV]; None: 1). Sequence b's queries are the rows from `query_start_loc[b]` up to the next
    one, at positions that end with `seq_lens[b] - 1`. Window, `sinks` and `num_sink_tokens` as in `attention`. A
    sequence of length 0 is padding. Rows of no sequence are 0.
    """
    output = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    num_heads, head_dim = q.shape[1:]
    num_kv_heads, page = k_cache.shape[1:3]
    starts = query_start_loc.tolist()
    for sequence, seq_len in enumerate(seq_lens.tolist()):
        rows = slice(starts[sequence], starts[sequence + 1])
        query_len = rows.stop - rows.start
        if seq_len == 0 or query_len == 0:
            continue
        keys = torch.arange(seq_len, device=q.device)
        distance = keys[seq_len - query_len :, None] - keys
        is_visible = distance >= 0
        if sliding_window is not None:
            is_visible &= (distance < sliding_window) | (keys < num_sink_tokens)
        # Only keys that some query sees are read: the others' pages may be gone.
        keys, is_visible = keys[is_visible.any(0)], is_visible[:, is_visible.any(0)]
        blocks = block_table[sequence, keys // page].long()
        k = k_cache[blocks, :, keys % page].float() * (1.0 if k_scale is None else k_scale[:, None])
        v = v_cache[blocks, :, keys % page].float() * (1.0 if v_scale is None else v_scale[:, None])
        grouped = q[rows].float().reshape(query_len, num_kv_heads, -1, head_dim)
        scores = torch.einsum("qkgd,nkd->kgqn", grouped, k) * softmax_scale
        scores = scores.masked_fill(~is_visible, float("-inf"))
        if sinks is not None:
            column = sinks.float().reshape(num_kv_heads, -1, 1, 1).expand(-1, -1, query_len, 1)
            scores = torch.cat((scores, column), dim=-1)
        weights = scores.softmax(-1)[..., : len(keys)]
        output[rows] = torch.einsum("kgqn,nkd->qkgd", weights, v).reshape(query_len, num_heads, head_dim)
    return output


# The largest finite e4m3 value: what lies beyond is stored as this.
E4M3_MAX = 448.0


def quantize_kv(x: Tensor, scale: Tensor) -> Tensor:
    """x / scale as e4m3: to nearest even, ±448 at most, NaN stays NaN. `scale` broadcasts against x."""
    return (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def rotate_from_cache(x: Tensor, positions: Tensor, cos_sin_cache: Tensor) -> Tensor:
    """Rotate halves (NeoX layout) in float32. x: [T, H, D], positions: [T], cos_sin_cache: [max_position, D], D / 2
    cosines before D / 2 sines → [T, H, D] float32.
    """
    cos, sin = cos_sin_cache[positions].float()[:, None].chunk(2, dim=-1)
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def write_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Store each token's k and v, [T, KH, D], in its slot of paged caches [num_blocks, KH, page, D]: slot s is row
    s % page of page s // page, a negative slot none. An e4m3 cache (or uint8, read as e4m3) holds them divided by their
    scale, [1] or [KH] float32; others as they are.
    """
    page_size, is_stored = k_cache.shape[2], slot_mapping >= 0
    block, row = slot_mapping[is_stored] // page_size, slot_mapping[is_stored] % page_size
    for x, cache, scale in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
        cache = cache.view(torch.float8_e4m3fn) if cache.dtype == torch.uint8 else cache
        if cache.dtype == torch.float8_e4m3fn:
            assert scale is not None
            x = quantize_kv(x, scale[:, None])
        # Through integers of the same size: torch has no indexed assignment of FP8.
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[cache.element_size()]
        cache.view(bits)[block, :, row] = x.to(cache.dtype)[is_stored].view(bits)


def rope_and_write_kv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    positions: Tensor,
    cos_sin_cache: Tensor,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    q_out: Tensor,
) -> None:
    """`write_kv` of k rotated in float32 (and not rounded before it is quantised), q rotated into `q_out`. Every q is,
    also a token's that is not stored. q, q_out: [T, H, D]; the rest as in `rotate_from_cache` and `write_kv`.
    """
    q_out.copy_(rotate_from_cache(q, positions, cos_sin_cache))
    rotated = rotate_from_cache(k, positions, cos_sin_cache)
    write_kv(rotated, v, k_cache, v_cache, slot_mapping, k_scale=k_scale, v_scale=v_scale)


def fused_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    slot_mapping: Tensor,
    positions: Tensor,
    cos_sin_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    softmax_scale: float,
    sliding_window: int | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    sinks: Tensor | None = None,
    num_sink_tokens: int = 0,
) -> Tensor:
    """`rope_and_write_kv`, then `paged_attention`, for one new token per sequence. q: [B, H, D], k, v: [B, KH, D] →
    float32 [B, H, D]; q is rounded to its dtype between the two. A sequence with slot −1 or length 0 is padding: zeros.
    """
    if k_cache.dtype == torch.uint8:
        k_cache, v_cache = k_cache.view(torch.float8_e4m3fn), v_cache.view(torch.float8_e4m3fn)
    if k_cache.dtype != torch.float8_e4m3fn:
        k_scale = v_scale = None
    rotated = torch.empty_like(q)
    rope_and_write_kv(
        q, k, v, k_cache, v_cache, slot_mapping, positions, cos_sin_cache,
        k_scale=k_scale, v_scale=v_scale, q_out=rotated,
    )  # fmt: skip
    return paged_attention(
        rotated, k_cache, v_cache, block_table=block_table, seq_lens=torch.where(slot_mapping < 0, 0, seq_lens),
        query_start_loc=torch.arange(len(q) + 1, device=q.device), softmax_scale=softmax_scale,
        sliding_window=sliding_window, k_scale=k_scale, v_scale=v_scale, sinks=sinks, num_sink_tokens=num_sink_tokens,
    )  # fmt: skip


def dequantize(matrix: Tensor, scale: Tensor | None, is_gate_up: bool = False) -> Tensor:
    """A matrix [R, K] with its scales applied, in float32 (float64 stays).

    scale: None, one number, one for each row ([R], [R, 1]), one for each 128 of K in each row or block of 128 rows
    ([R or ⌈R/128⌉, ⌈K/128⌉]), or, with is_gate_up, [2]: one for the gate half of the rows, one for the up half.
    """
    wide = matrix if matrix.dtype == torch.float64 else matrix.float()
    if scale is None or scale.numel() == 1:
        return wide if scale is None else wide * scale.reshape(())
    rows, columns = matrix.shape
    if is_gate_up and scale.shape == (2,):
        return wide * scale.repeat_interleave(rows // 2)[:, None]
    scale = scale[:, None] if scale.dim() == 1 else scale
    if scale.shape[0] != rows:
        scale = scale.repeat_interleave(128, dim=0)[:rows]
    if scale.shape[1] != 1:
        scale = scale.repeat_interleave(128, dim=1)[:, :columns]
    return wide * scale


def quantize_e4m3(values: Tensor, scale: Tensor) -> Tensor:
    """`values · (1 / scale)` to e4m3: saturating at ±448, to the nearest, ties to the even code, NaN stays NaN."""
    return (values * (1.0 / scale)).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)


def gate_up_silu(
    x: Tensor,
    weight: Tensor,
    *,
    row_scale: Tensor | None = None,
    weight_scale: Tensor | None = None,
    x_scale: Tensor | None = None,
    out_scale: Tensor | None = None,
) -> Tensor:
    """The gated half of an FFN: `silu(g) · u` with `[g, u] = row_scale · (x · weightᵀ)`, in float32.

    x: [M, d], weight: [2I, d], gate rows first, row_scale: [M], scales as in `dequantize` → [M, I]. With out_scale, a
    number, the result is e4m3.
    """
    both = dequantize(x, x_scale) @ dequantize(weight, weight_scale, is_gate_up=True).T
    if row_scale is not None:
        both = both * row_scale[:, None]
    gate, up = both.chunk(2, dim=-1)
    hidden = torch.nn.functional.silu(gate) * up
    return hidden if out_scale is None else quantize_e4m3(hidden, out_scale)


def down(h: Tensor, weight: Tensor, *, weight_scale: Tensor | None = None, h_scale: Tensor | None = None) -> Tensor:
    """The down projection `h · weightᵀ` in float32. h: [M, I], weight: [d, I] → [M, d]."""
    return dequantize(h, h_scale) @ dequantize(weight, weight_scale).T


def fused_ffn(
    x: Tensor,
    gate_up_weight: Tensor,
    down_weight: Tensor,
    *,
    row_scale: Tensor | None = None,
    gate_up_scale: Tensor | None = None,
    x_scale: Tensor | None = None,
    hidden_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
) -> Tensor:
    """Both halves. x: [M, d], gate_up_weight: [2I, d], down_weight: [d, I] → [M, d], float32; with hidden_scale the
    hidden values between them are e4m3. n FFNs side by side (gates stacked, then ups) sum their outputs.
    """
    hidden = gate_up_silu(
        x, gate_up_weight, row_scale=row_scale, weight_scale=gate_up_scale, x_scale=x_scale, out_scale=hidden_scale
    )
    return down(hidden, down_weight, weight_scale=down_scale, h_scale=hidden_scale)
