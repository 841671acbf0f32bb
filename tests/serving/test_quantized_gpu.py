"""On a GPU: every quantized checkpoint is served and compared, those without a CPU kernel included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import quantized_checkpoints as quantized
from parity import Jobs
from quantized_checkpoints import KINDS, KV_SCALES, QuantizedReference
from test_quantized import assert_as_accurate_as_bfloat16

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
# NVFP4's fixture has shapes only.
SERVED = [name for name in KINDS if "nvfp4" not in name]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quantized")


@pytest.fixture(scope="module")
def references(folder: Path) -> dict[str, QuantizedReference]:
    return {name: quantized.write(folder / name, name) for name in SERVED}


@pytest.fixture(scope="module")
def outcomes(folder: Path, references: dict[str, QuantizedReference]) -> dict[str, Any]:
    jobs = Jobs(folder)
    for name in SERVED:
        # The reference does not round the KV cache; a second run of those with scales shows that they arrive.
        jobs.add(name, folder / name, {"dtype": "bfloat16", "kv_cache_dtype": "bfloat16"}, describe_layers=True)
        if KINDS[name].kv_spelling is not None:
            jobs.add(f"{name}, cached", folder / name, {"dtype": "bfloat16"}, describe_layers=True)
    return jobs.run()


@pytest.mark.parametrize("name", SERVED)
def test_it_is_as_accurate_as_plain_pytorch_in_bfloat16(
    references: dict[str, QuantizedReference], outcomes: dict[str, Any], name: str
) -> None:
    assert_as_accurate_as_bfloat16(references[name], outcomes[name])


@pytest.mark.parametrize("name", [name for name in SERVED if KINDS[name].kv_spelling is not None])
def test_each_attention_caches_with_its_own_scales(outcomes: dict[str, Any], name: str) -> None:
    results = outcomes[f"{name}, cached"]
    assert isinstance(results, list), results
    found = [scales for scales in results[0]["layers"].values() if isinstance(scales, tuple)]
    expected = [((n + 1) * KV_SCALES["k"], (n + 1) * KV_SCALES["v"]) for n in range(len(found))]
    assert found == [pytest.approx(pair, rel=2**-23) for pair in expected]  # float32
    assert all(result["logprobs"].isfinite().all() for result in results)
