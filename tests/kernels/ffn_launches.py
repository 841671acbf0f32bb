"""What the FFN launcher would compile on a Hopper GPU, without one: `ffn_launches.py` prints JSON.

Triton binds the arguments of each launch as on the device and asks its cache hook before it compiles; the hook notes
the compiled form (types, alignment, constants) and declines. So the forms that CI compiles can be compared with those
that a server would.
"""

from __future__ import annotations

import itertools
import json
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from vllm_puzzle.kernels import ffn
from vllm_puzzle.kernels.ffn_table import MAX_SPLIT_TOKENS, TILES, Config

E4M3 = torch.float8_e4m3fn


class HopperDriver:
    """As much of a driver as binding needs."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def note(found: dict[str, Any], **event: Any) -> bool:
    compiled = event["compile"]
    form = {
        "kernel": event["fn"].name.rpartition(".")[2],
        "signature": {key: kind for key, kind in compiled["signature"].items() if kind != "constexpr"},
        "constexprs": {str(key): str(value) for key, value in compiled["constants"].items()},
        "is_aligned": any(attribute for attributes in compiled["configs"] for attribute in attributes.values()),
        "num_warps": compiled["num_warps"],
        "num_stages": compiled["num_stages"],
    }
    found[json.dumps(form, sort_keys=True)] = form
    return True


def calls() -> None:
    """Every tile, operation and kind of scale, over numbers that Triton likes to specialise on: 1, odd, 16 · n."""
    sizes = itertools.product((1, 16, 17, 64, 65, 1024), ((64, 64), (2816, 4096), (176, 352), (100, 36)))
    for m, (width, size) in sizes:
        for dtype, scales in ((torch.bfloat16, None), (E4M3, "tensor"), (E4M3, "channel"), (E4M3, "block")):
            x, gate_up = (torch.empty(rows, size, dtype=dtype) for rows in (m, 2 * width))
            hidden, down = (torch.empty(rows, width, dtype=dtype) for rows in (m, size))
            for config in (None, *(Config(tile) for tile in TILES), Config("skinny-16", 4), Config("skinny-64", 2)):
                for quantizes in (False, True):
                    out_scale = torch.ones(1) if quantizes else None
                    arguments = scale_arguments(scales, m, 2 * width, size, "x")
                    attempt(ffn.gate_up_silu, x, gate_up, config, out_scale=out_scale, **arguments)
                attempt(ffn.down, hidden, down, config, **scale_arguments(scales, m, size, width, "h"))


def scale_arguments(scales: str | None, m: int, rows: int, size: int, name: str) -> dict[str, torch.Tensor]:
    blocks = -(-size // 128)
    shapes = {"tensor": ((1,), (1,)), "channel": ((rows, 1), (m, 1)), "block": ((-(-rows // 128), blocks), (m, blocks))}
    if scales is None:
        return {}
    weight, x = shapes[scales]
    return {"weight_scale": torch.ones(weight), f"{name}_scale": torch.ones(x)}


def attempt(function: Any, x: torch.Tensor, weight: torch.Tensor, config: Config | None, **arguments: Any) -> None:
    try:
        function(x, weight, config=config, **arguments)
    except ValueError as error:  # a tile that does not fit this call
        if config is None or "config: found" not in str(error):
            raise
        assert config.tile != "skinny-64" or "aligned" in str(error) or x.shape[0] > MAX_SPLIT_TOKENS


def main() -> None:
    found: dict[str, Any] = {}
    triton.runtime.driver.set_active(HopperDriver())
    triton.knobs.runtime.jit_cache_hook = lambda **event: note(found, **event)
    ffn.why_unsupported = lambda device: None  # type: ignore[assignment]
    calls()
    print(json.dumps({"triton": triton.__version__, "forms": list(found.values())}))


if __name__ == "__main__":
    main()
