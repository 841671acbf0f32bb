"""The plain-PyTorch ops against independent definitions: PyTorch's own functions and transformers' rotary code."""

from __future__ import annotations

import pytest
import torch
from vllm_puzzle.kernels import reference as ops

# Every comparison is float32 against float32 over sums of at most 200 terms of size about 1: each side rounds each
# term once, so they differ by at most about 200 · 2^-24 = 1.2e-5 of the result's scale.
TOLERANCE = 2e-5


@pytest.mark.parametrize("shape", [(1, 8), (3, 7, 33), (2, 5, 1, 96)], ids=str)
def test_rms_norm_equals_torchs(shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(shape), torch.randn(shape[-1])
    expected = torch.nn.functional.rms_norm(x, (shape[-1],), weight, eps=1e-5)
    torch.testing.assert_close(ops.rms_norm(x, weight, 1e-5), expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_rms_norm_of_small_numbers_feels_epsilon() -> None:
    x = torch.full((4,), 1e-4)
    assert ops.rms_norm(x, torch.ones(4), 1e-5).max() < 0.04  # 1e-4 / sqrt(1e-8 + 1e-5)


@pytest.mark.parametrize(("tokens", "hidden", "width"), [(1, 8, 8), (5, 33, 77)], ids=str)
def test_gated_ffn_is_down_of_silu_gate_times_up(tokens: int, hidden: int, width: int) -> None:
    x, gate, up, down = (
        torch.randn(shape, dtype=torch.float64)
        for shape in ((tokens, hidden), (width, hidden), (width, hidden), (hidden, width))
    )
    g = x @ gate.T
    expected = (g / (1 + torch.exp(-g)) * (x @ up.T)) @ down.T
    torch.testing.assert_close(ops.gated_ffn(x, gate, up, down), expected)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (5, 1)], ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 37])
@pytest.mark.parametrize("window", [None, 1, 5, 64])
def test_attention_equals_torchs_with_an_explicit_mask(
    heads: int, kv_heads: int, tokens: int, window: int | None
) -> None:
    q, k, v = (torch.randn(tokens, count, 16) for count in (heads, kv_heads, kv_heads))
    seen = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    if window is not None:
        seen = seen & ~torch.ones(tokens, tokens, dtype=torch.bool).tril(-window)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(0, 1) for x in (q, k, v)), attn_mask=seen, enable_gqa=True
    ).transpose(0, 1)
    torch.testing.assert_close(ops.attention(q, k, v, window), expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_a_batch_is_attended_sequence_by_sequence() -> None:
    q, k, v = torch.randn(3, 9, 4, 8), torch.randn(3, 9, 2, 8), torch.randn(3, 9, 2, 8)
    single = torch.stack([ops.attention(*sequence) for sequence in zip(q, k, v, strict=True)])
    torch.testing.assert_close(ops.attention(q, k, v), single, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("scaled", [False, True])
def test_rope_equals_transformers(scaled: bool) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    parameters = {"rope_type": "llama3" if scaled else "default", "rope_theta": 500.0} | (llama3 if scaled else {})
    config = LlamaConfig(hidden_size=64, num_attention_heads=2, rope_parameters=parameters)
    x, positions = torch.randn(50, 2, 32), torch.arange(50) * 3
    cos, sin = LlamaRotaryEmbedding(config)(x, positions[None])
    expected, _ = apply_rotary_pos_emb(x.transpose(0, 1)[None], x.transpose(0, 1)[None], cos, sin)
    frequencies = ops.rope_inverse_frequencies(32, 500.0, *(llama3.values() if scaled else ()))
    found = ops.apply_rope(x, positions, frequencies)
    # Angles reach 150: a float32 angle is off by up to 2^-17, and so are its sine and cosine.
    torch.testing.assert_close(found, expected[0].transpose(0, 1), rtol=0, atol=4 * 150 * 2**-24 * x.abs().max().item())


def test_rope_keeps_lengths_and_depends_on_distance_only() -> None:
    frequencies = ops.rope_inverse_frequencies(16, 100.0)
    q, k = torch.randn(1, 1, 16, dtype=torch.float64), torch.randn(1, 1, 16, dtype=torch.float64)
    score = [
        (ops.apply_rope(q, torch.tensor([a]), frequencies) * ops.apply_rope(k, torch.tensor([b]), frequencies)).sum()
        for a, b in ((3, 1), (11, 9))
    ]
    torch.testing.assert_close(score[0], score[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 1, 7, 40])
@pytest.mark.parametrize("num_sink_tokens", [0, 3, 30])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_paged_attention_is_attention_with_the_keys_elsewhere(
    window: int | None, num_sink_tokens: int, has_sinks: bool
) -> None:
    lengths, chunks, heads, kv_heads, dim, page = (37, 20), (5, 20), 6, 2, 24, 8
    sinks = torch.randn(heads) if has_sinks else None
    table = torch.randperm(11)[:10].view(2, 5).int()
    k_cache, v_cache = torch.full((11, kv_heads, page, dim), float("nan")), torch.full((11, kv_heads, page, dim), 0.5)
    k_scale, v_scale = torch.tensor([0.5, 2.0]), torch.tensor([3.0])
    queries, wanted = [], []
    for sequence, (length, chunk) in enumerate(zip(lengths, chunks, strict=True)):
        q, k, v = (torch.randn(length, number, dim) for number in (heads, kv_heads, kv_heads))
        keys = torch.arange(length)
        k_cache[table[sequence, keys // page], :, keys % page] = k / k_scale[:, None]
        v_cache[table[sequence, keys // page], :, keys % page] = v / v_scale
        queries.append(q[-chunk:])
        wanted.append(ops.attention(q, k, v, window, sinks, num_sink_tokens)[-chunk:])
    found = ops.paged_attention(
        torch.cat((*queries, torch.randn(2, heads, dim))), k_cache, v_cache,
        block_table=torch.cat((table, torch.zeros(1, 5, dtype=torch.int32))),
        seq_lens=torch.tensor([*lengths, 0]), query_start_loc=torch.tensor([0, 5, 25, 25]), softmax_scale=dim**-0.5,
        sliding_window=window, k_scale=k_scale, v_scale=v_scale, sinks=sinks, num_sink_tokens=num_sink_tokens,
    )  # fmt: skip
    torch.testing.assert_close(found[:25], torch.cat(wanted), rtol=TOLERANCE, atol=TOLERANCE)
    assert (found[25:] == 0).all()
