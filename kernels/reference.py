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
