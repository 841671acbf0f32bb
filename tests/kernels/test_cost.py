"""Floors against examples worked by hand, and against counting every pair and key one by one."""

from __future__ import annotations

import itertools

import pytest
from vllm_puzzle.kernels import cost
from vllm_puzzle.kernels.cost import Cost

H100_COPY, H200_COPY = 3.0e12, 4.3e12  # bytes/s, measured
H100_BF16, H200_BF16 = 798e12, 788e12  # FLOP/s, measured
MICRO = 1e6


def test_a_wide_ffn_at_decode_takes_470_us_in_bf16_and_half_in_fp8() -> None:
    for num_tokens in (1, 64):
        # 3 · 8192 · 28672 · 2 = 1.409 GB; activations add up to 1 %.
        bf16 = cost.ffn(num_tokens, 8192, 28672)
        fp8 = cost.ffn(num_tokens, 8192, 28672, weight_bytes=1, activation_bytes=1, scales="tensor")
        assert bf16.seconds(H100_COPY, H100_BF16) * MICRO == pytest.approx(470, rel=0.01)
        assert bf16.seconds(H200_COPY, H200_BF16) * MICRO == pytest.approx(328, rel=0.01)
        assert fp8.seconds(H100_COPY, 2 * H100_BF16) * MICRO == pytest.approx(235, rel=0.01)
        assert fp8.seconds(H200_COPY, 2 * H200_BF16) * MICRO == pytest.approx(164, rel=0.01)
        assert bf16.is_memory_bound(H100_COPY, H100_BF16)


def test_the_same_ffn_over_8192_tokens_is_bound_by_the_matrix_units_at_14_5_ms() -> None:
    whole = cost.ffn(8192, 8192, 28672)
    assert whole.flops == 6 * 8192 * 8192 * 28672
    assert not whole.is_memory_bound(H100_COPY, H100_BF16)
    assert whole.seconds(H100_COPY, H100_BF16) * 1e3 == pytest.approx(14.5, rel=0.01)


def test_bytes_of_gate_up_and_down_by_hand() -> None:
    # M 3, d 256, I 384: 2·256·384·2 weights, 3·256·2 in, 3·384·2 out.
    assert cost.gate_up(3, 256, 384) == Cost(393_216 + 1_536 + 2_304, 4 * 3 * 256 * 384)
    assert cost.down(3, 256, 384) == Cost(196_608 + 2_304 + 1_536, 2 * 3 * 256 * 384)
    assert cost.ffn(3, 256, 384) == cost.gate_up(3, 256, 384) + cost.down(3, 256, 384)
    assert cost.linear(3, 256) == Cost(131_072 + 3_072, 2 * 3 * 256 * 256)


@pytest.mark.parametrize(("scales", "expected"), [(None, 0), ("tensor", 4), ("channel", 8 * 384), ("block", 4 * 6 * 2)])
def test_scales_of_gate_and_up_are_counted(scales: str | None, expected: int) -> None:
    with_scales = cost.gate_up(3, 256, 384, 1, 1, 2, scales)
    assert with_scales.num_bytes - (2 * 256 * 384 + 3 * 256 + 3 * 384 * 2) == expected


def test_an_unknown_granularity_of_scales_is_refused() -> None:
    with pytest.raises(ValueError, match="found 'row', allowed: None, 'tensor', 'channel', 'block'"):
        cost.weight_scales(2, 2, "row")


@pytest.mark.parametrize(
    ("hidden", "h100", "h200"), [(4096, 1.097, 1.067), (8192, 1.049, 1.034), (16384, 1.024, 1.017)]
)
def test_the_most_that_a_fused_activation_gains_in_prefill(hidden: int, h100: float, h200: float) -> None:
    # 1 + 1.5 · TF / (BW · d): the activation's 6·M·I bytes beside the products' 4·M·d·I operations.
    for copy, matmul, expected in ((H100_COPY, H100_BF16, h100), (H200_COPY, H200_BF16, h200)):
        products = cost.gate_up(8192, hidden, 4 * hidden).flops / matmul
        activation = cost.activation(8192, 4 * hidden).num_bytes / copy
        assert (products + activation) / products == pytest.approx(expected, abs=1e-3)


def test_decode_attention_examples() -> None:
    def microseconds(batch: int, window: int, head_dim: int) -> float:
        keys = cost.attention([(1, 131072)] * batch, window, 64, 8, head_dim, cache_bytes=1)
        queries = batch * 4 * 64 * head_dim + batch * 4 * window // 16
        return (keys.num_bytes - queries) / H100_COPY * MICRO

    assert microseconds(1, 1024, 128) == pytest.approx(0.70, abs=0.005)
    assert microseconds(128, 1024, 128) == pytest.approx(89, abs=0.6)
    assert microseconds(1, 128, 64) == pytest.approx(0.04, abs=0.005)
    assert microseconds(64, 128, 64) == pytest.approx(2.8, abs=0.01)
    assert microseconds(128, 4096, 128) == pytest.approx(358, abs=1)


def test_the_intensity_of_decode_is_twice_the_group_over_the_bytes_of_an_element() -> None:
    many = cost.attention([(1, 8192)], 4096, 64, 8, 128, cache_bytes=1)
    assert many.flops / many.num_bytes == pytest.approx(16, rel=0.01)


def test_writing_8192_tokens_moves_50_mb() -> None:
    write = cost.kv_write(8192, 8, 128)
    assert write.num_bytes == 8192 * 8 * 128 * 2 * 3 + 8 * 8192
    assert write.seconds(H100_COPY, H100_BF16) * MICRO == pytest.approx(17, abs=0.3)


SIZES = list(itertools.product((1, 2, 5), (0, 1, 7), (None, 1, 3, 6, 40), (0, 2)))


@pytest.mark.parametrize(("query", "context", "window", "sinks"), SIZES)
def test_pairs_and_keys_equal_a_count_one_by_one(query: int, context: int, window: int | None, sinks: int) -> None:
    seq = query + context

    def sees(position: int, key: int) -> bool:
        return key <= position and (window is None or position - key < window or key < sinks)

    pairs = [(p, k) for p in range(context, seq) for k in range(seq) if sees(p, k)]
    assert cost.visible_pairs(query, seq, window, sinks) == len(pairs)
    assert cost.live_keys(query, seq, window, sinks) == len({key for _, key in pairs})


def test_a_batch_costs_the_sum_of_its_sequences() -> None:
    first, second = (1, 100), (7, 33)
    arguments = (17, 6, 2, 64, 1, 16)
    assert cost.attention([first, second], *arguments) == cost.attention([first], *arguments) + cost.attention(
        [second], *arguments
    )


def test_a_fused_decode_moves_less_than_its_two_launches() -> None:
    lengths = [100, 2000, 7]
    fused = cost.fused_decode(lengths, 128, 64, 8, 128)
    apart = cost.attention([(1, n) for n in lengths], 128, 64, 8, 128, 1) + cost.rope_and_write_kv(3, 64, 8, 128)
    assert cost.attention([(1, n) for n in lengths], 128, 64, 8, 128, 1).num_bytes < fused.num_bytes < apart.num_bytes
