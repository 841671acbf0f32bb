"""KV write and fused decode equal their plain-PyTorch twins: codes to the bit, outputs to their dtype's rounding.

The cases run in one process under Triton's interpreter (kv_write_grid.py), on a GPU compiled.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from beside import Script, outcome
from vllm_puzzle.kernels import reference

SCRIPT = Path(__file__).with_name("kv_write_grid.py")
WRITES = (
    "one token, one head, D 64", "D 32, heads that do not fill a group", "D 96, per-head scales",
    "D 128, page 128, slices of qkv", "D 256, page 48", "float16 into e4m3", "float32 rotation of bfloat16",
    "bfloat16 cache", "float16 cache", "float32 cache", "K and V in caches of their own", "pages before heads",
    "int32 positions", "nothing but padding", "every special value", "an offset beyond 2³¹",
)  # fmt: skip
DECODES = (
    "float32, no window", "bfloat16, e4m3, window", "float16, e4m3, D 128, scales per head",
    "one KV head for twenty", "learned sinks", "sink tokens, inside and behind the window",
    "more sink tokens than a tile", "both kinds of sinks, D 256, page 48", "padding between sequences",
    "bfloat16 cache, slices of qkv",
)  # fmt: skip
Outcome = dict[str, dict[str, float]]
BESIDE = (Script(SCRIPT, ("cpu",)),)


@pytest.fixture(scope="module")
def interpreted() -> Outcome:
    return outcome(BESIDE[0])


@pytest.fixture(scope="module")
def compiled() -> Outcome:
    return outcome(Script(SCRIPT, ("cuda",)))


def check_write(outcome: Outcome, name: str) -> None:
    found = outcome[f"write: {name}"]
    assert found["codes"] == found["neighbours"] == 0, found
    assert found["q"] <= 1, found


def check_decode(outcome: Outcome, name: str, how: str = "decode") -> None:
    found = outcome[f"{how}: {name}"]
    assert found["codes"] == 0, found
    assert found["error"] <= 1, found


@pytest.mark.parametrize("name", WRITES)
def test_stored_codes_are_the_twins_to_the_bit_and_nothing_else_is_touched(interpreted: Outcome, name: str) -> None:
    check_write(interpreted, name)


@pytest.mark.parametrize("name", DECODES)
def test_one_launch_equals_rotation_write_and_attention(interpreted: Outcome, name: str) -> None:
    check_decode(interpreted, name)


def test_every_case_of_the_grid_is_looked_at(interpreted: Outcome) -> None:
    assert set(interpreted) == {f"write: {name}" for name in WRITES} | {f"decode: {name}" for name in DECODES}


@pytest.mark.gpu
@pytest.mark.parametrize("name", WRITES)
def test_compiled_stored_codes_are_the_twins_to_the_bit(compiled: Outcome, name: str) -> None:
    check_write(compiled, name)


@pytest.mark.gpu
@pytest.mark.parametrize("name", DECODES)
def test_compiled_one_launch_equals_rotation_write_and_attention(compiled: Outcome, name: str) -> None:
    check_decode(compiled, name)


@pytest.mark.gpu
@pytest.mark.parametrize("name", DECODES)
def test_a_cuda_graph_captured_on_padding_replays_any_batch(compiled: Outcome, name: str) -> None:
    check_decode(compiled, name, "graph")


def test_the_twin_saturates_rounds_to_even_and_keeps_nan() -> None:
    x = torch.tensor([449.0, -1e9, float("inf"), float("nan"), 1.0625, 1.1875, 2**-10, 3 * 2**-11, -0.0])
    codes = reference.quantize_e4m3(x, torch.ones(1))
    expected = [448.0, -448.0, 448.0, float("nan"), 1.0, 1.25, 0.0, 2**-9, -0.0]
    assert torch.equal(codes.float().nan_to_num(7.0), torch.tensor(expected).nan_to_num(7.0))


def test_the_twin_writes_what_attention_reads_back() -> None:
    k, v, caches = torch.randn(3, 2, 8), torch.randn(3, 2, 8), torch.zeros(2, 4, 2, 16, 8)
    slots = torch.tensor([5, -1, 63])
    reference.write_kv(k, v, caches[0], caches[1], slots)
    assert torch.equal(caches[0, 0, :, 5], k[0]) and torch.equal(caches[1, 3, :, 15], v[2])
    assert int((caches != 0).sum()) == 2 * 2 * 2 * 8


def good() -> dict[str, torch.Tensor]:
    return {
        "k": torch.zeros(2, 3, 64), "v": torch.zeros(2, 3, 64), "k_cache": torch.zeros(4, 3, 16, 64).byte(),
        "v_cache": torch.zeros(4, 3, 16, 64).byte(), "k_scale": torch.ones(1), "v_scale": torch.ones(3),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"k": torch.zeros(2, 2, 64)},
            r"shapes of k, v and caches: found .*, allowed: \[T, KH, D\], \[N, KH, page, D\]",
        ),
        ({"v_cache": torch.zeros(4, 3, 16, 32).byte()}, "shapes of k, v and caches: found"),
        ({"v": torch.zeros(2, 3, 128)[..., ::2]}, "last dimension: found 64 elements or gaps, allowed: even, without"),
        ({"v_cache": torch.zeros(4, 3, 16, 64)}, r"cache dtype: found \(torch.float8_e4m3fn, torch.float32\), allowed"),
        ({"k_scale": None}, r"k_scale: found nothing, allowed: float32, \[1\] or \[3\]"),
        ({"v_scale": torch.ones(2)}, r"v_scale: found torch.float32 \[2\], allowed: float32, \[1\] or \[3\]"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_tensors_that_do_not_fit_are_refused_in_one_line(changed: dict[str, torch.Tensor], message: str) -> None:
    from vllm_puzzle.kernels.kv_write import write_kv

    found = good() | changed
    slots = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"^KV write, {message}"):
        write_kv(slot_mapping=slots, **found)
