"""Plain-PyTorch definition of every op, written to be read: the specification that kernels and vLLM are held to.

No kernel, no cache, no batching trick. Statistics (norm, softmax) are taken in float32 and rounded to the
input's dtype where Hugging Face rounds, so that float32 results can be compared to the last bits.
"""

from __future__ import annotations

import math

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


def apply_rope(x: Tensor, positions: Tensor, inverse_frequencies: Tensor) -> Tensor:
    """Rotate halves (NeoX layout). x: [..., T, H, D], positions: [T] → [..., T, H, D]."""
    angles = positions.float()[:, None] * inverse_frequencies[None, :]
    cos, sin = angles.cos()[:, None].to(x.dtype), angles.sin()[:, None].to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def attention(q: Tensor, k: Tensor, v: Tensor, sliding_window: int | None = None) -> Tensor:
    """Causal attention of each sequence with itself; query head h reads KV head h // (H / KV).

    q: [..., T, H, D], k, v: [..., T, KV, D] → [..., T, H, D]. A window of w sees keys t − w + 1 … t.
    """
    num_tokens, num_heads, head_dim = q.shape[-3:]
    group = num_heads // k.shape[-2]
    k, v = k.repeat_interleave(group, dim=-2), v.repeat_interleave(group, dim=-2)
    scores = torch.einsum("...qhd,...khd->...hqk", q, k) * head_dim**-0.5
    steps = torch.arange(num_tokens, device=q.device)
    distance = steps[:, None] - steps[None, :]
    is_hidden = distance < 0
    if sliding_window is not None:
        is_hidden = is_hidden | (distance >= sliding_window)
    scores = scores.masked_fill(is_hidden, float("-inf"))
    return torch.einsum("...hqk,...khd->...qhd", scores.float().softmax(-1).to(q.dtype), v)
