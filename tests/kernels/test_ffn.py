"""The FFN kernels against their plain twins, under Triton's interpreter or on a GPU; and what a launch compiles."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import triton.language as tl
from beside import Script, outcome
from vllm_puzzle.kernels import ffn, ffn_triton, reference
from vllm_puzzle.kernels.ffn_table import Config

sys.path.insert(0, str(Path(__file__).parent))
import ffn_grid

pytestmark = pytest.mark.slow
Found = dict[str, Any]
# Codes where two orders of summation round to different sides.
MOST_DIFFERING = 0.002


GRID, LAUNCHES = (Path(__file__).with_name(name) for name in ("ffn_grid.py", "ffn_launches.py"))
BESIDE = (Script(GRID, ("cpu",)), Script(LAUNCHES))


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Found]:
    return outcome(BESIDE[0])


@pytest.fixture(scope="module")
def compiled() -> dict[str, Found]:
    return outcome(Script(GRID, ("cuda",)))


def check(found: Found) -> None:
    assert found
    assert all(value for value in found.values() if isinstance(value, bool)), found
    assert found.get("error", 0) <= found.get("bound", 0), "at most twice the error of torch's own steps"
    assert found.get("outside", 0) == 0, found
    assert found.get("differing", 0) <= MOST_DIFFERING, found
    assert found.get("saturated", 1) > 0, "the largest values must saturate, or saturation was not seen"


@pytest.mark.parametrize("case", ffn_grid.cases("cpu"))
def test_the_kernels_compute_what_their_twins_say(interpreted: dict[str, Found], case: str) -> None:
    check(interpreted[case])


@pytest.mark.gpu
@pytest.mark.parametrize("case", ffn_grid.cases("cuda"))
def test_the_compiled_kernels_do_too(compiled: dict[str, Found], case: str) -> None:
    check(compiled[case])


def test_a_launch_compiles_exactly_the_forms_that_ci_compiles() -> None:
    """Whatever the number of tokens, the widths, the scales: types, alignment and constants are those of variants()."""
    launched = outcome(BESIDE[1])["forms"]
    shipped = [
        {
            "kernel": variant.kernel.fn.__name__,
            "signature": dict(variant.signature),
            "constexprs": {
                f"({variant.kernel.arg_names.index(key)},)": str(value) for key, value in variant.constexprs.items()
            },
            "num_warps": variant.num_warps,
            "num_stages": variant.num_stages,
        }
        for variant in ffn_triton.variants()
    ]
    assert {form.pop("is_aligned") for form in launched} == {False}
    launched, shipped = (sorted(json.dumps(form, sort_keys=True) for form in forms) for forms in (launched, shipped))
    assert launched == shipped
    assert len(shipped) <= 12
    assert {variant.constexprs["OUT"] for variant in ffn_triton.variants()} == {tl.bfloat16, tl.float8e4nv}


def test_the_plain_twin_is_the_gated_ffn() -> None:
    gate, up, down, x = torch.randn(6, 5), torch.randn(6, 5), torch.randn(5, 6), torch.randn(3, 5)
    found = reference.fused_ffn(x, torch.cat((gate, up)), down)
    assert torch.allclose(found, reference.gated_ffn(x, gate, up, down), atol=1e-6)
    scaled = reference.gate_up_silu(x, torch.cat((gate, up)), row_scale=torch.tensor([1.0, 2.0, 0.5]))
    by_row = torch.tensor([[1.0], [2.0], [0.5]]) * x
    assert torch.allclose(scaled, reference.gate_up_silu(by_row, torch.cat((gate, up))), atol=1e-6)


@pytest.mark.parametrize(
    ("shape", "rows_of", "columns_of"),
    [((1,), 300, 200), ((2,), 150, 200), ((300,), 1, 200), ((300, 1), 1, 200), ((3, 2), 128, 128)],
)
def test_the_twins_scales_cover_their_rows_and_columns(shape: tuple[int, ...], rows_of: int, columns_of: int) -> None:
    scale = torch.rand(shape) + 0.5
    found = reference.dequantize(torch.ones(300, 200), scale, is_gate_up=True)
    flat = scale.reshape(scale.shape[0], -1)
    for row, column in ((0, 0), (149, 127), (150, 128), (299, 199)):
        assert found[row, column] == flat[row // rows_of, column // columns_of]


def test_twin_codes_saturate_round_to_even_and_keep_nan() -> None:
    values = torch.tensor([500.0, -1e9, 17.0, 19.0, 2**-10, float("nan")])
    found = reference.quantize_e4m3(values, torch.ones(1)).float()
    assert found[:5].tolist() == [448, -448, 16, 20, 0] and found[5].isnan()


X, W, S = torch.ones(3, 32), torch.ones(64, 32), torch.ones(1)
X8, W8 = X.to(torch.float8_e4m3fn), W.to(torch.float8_e4m3fn)
BX, BW = X.bfloat16(), W.bfloat16()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": X}, r"x: found torch\.float32, allowed: torch\.bfloat16, torch\.float8_e4m3fn"),
        ({"x": BX.T}, r"x: found shape \(32, 3\), strides \(1, 32\), allowed: a matrix with contiguous rows"),
        ({"x": BX[:, :16]}, "weight: found 32 columns, allowed: x's 16"),
        ({"x": BX, "weight": W8}, "weight: found torch.float8_e4m3fn on cpu, allowed: x's torch.bfloat16"),
        ({"x": BX, "weight": BW[:63]}, "weight: found 63 rows, allowed: an even number"),
        ({"x": BX, "row_scale": torch.ones(4)}, r"row_scale: found torch.float32 \(4,\) on cpu, allowed: .* \[3\]"),
        ({"x": BX, "out_scale": torch.ones(3)}, "out_scale: found"),
        ({"x": BX, "x_scale": S}, "x_scale: found one for torch.bfloat16, allowed: one for float8, none"),
        ({"x": X8, "weight": W8, "x_scale": S}, "weight_scale: found none for torch.float8_e4m3fn"),
        ({"x": X8, "weight": W8, "x_scale": S, "weight_scale": torch.ones(3)}, r"weight_scale: found .* \[3\] on cpu"),
        ({"x": X8, "weight": W8, "weight_scale": S, "x_scale": S.half()}, "x_scale: found torch.float16"),
        ({"x": BX, "out": BX}, r"out: found torch.bfloat16 \(3, 32\).*|x: found a cpu device"),
        ({"x": BX, "out": torch.ones(3, 32)}, "out: found torch.float32"),
        ({"x": BX}, r"x: found a cpu device, allowed: an NVIDIA GPU of compute capability 9\.x"),
    ],
)
def test_a_wrong_argument_is_one_line_that_names_it(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        ffn.gate_up_silu(**({"weight": BW} | arguments))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Config("wide"), "for wide bf16 plain with bf16 scales, allowed: skinny-16 bf16"),
        (Config("skinny-16", 17), "allowed: up to 16 splits"),
        (Config("skinny-16", 0), "allowed: up to 16 splits"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(
    monkeypatch: pytest.MonkeyPatch, config: Config, message: str
) -> None:
    monkeypatch.setattr(ffn, "why_unsupported", lambda device: None)
    with pytest.raises(ValueError, match=message):
        ffn.down(BX, BW, config=config)


@pytest.mark.parametrize("with_scale", [False, True])
def test_fp8_hidden_values_need_a_static_scale_and_others_none(with_scale: bool) -> None:
    down = W8 if not with_scale else BW
    with pytest.raises(ValueError, match=r"hidden_scale: found (none|one), allowed: one for a float8"):
        ffn.fused_ffn(BX, BW, down, hidden_scale=S if with_scale else None)
