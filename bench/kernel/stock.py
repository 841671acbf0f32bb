"""vLLM's kernels for comparison: from the installed vLLM, or, without one, from a folder of its source files.

The second way needs a handful of files only. They import half of vLLM, so stand-ins take its place in `sys.modules`:
modules whose every attribute exists, and the few values that the kernels read.
"""

from __future__ import annotations

import enum
import importlib
import importlib.util
import logging
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from vllm_puzzle.bench.kernel.problem import Absent
from vllm_puzzle.kernels import kv_write
from vllm_puzzle.model_configs.schema import ConfigError
from vllm_puzzle.serving.stock_kernels import PLACES, find_stock

ATTENTION_FILES = ("triton_attention_helpers", "triton_unified_attention", "triton_reshape_and_cache_flash")
# Needed by the source folder: attention and write. The block-scaled product's file may be missing.
REQUIRED = tuple(f"v1/attention/ops/{name}.py" for name in ATTENTION_FILES)


class Stock:
    """vLLM's kernels by the names of PLACES."""

    def __init__(self, found: dict[str, Any], missing: dict[str, str], origin: str) -> None:
        self.found, self.missing, self.origin = found, missing, origin

    def get(self, name: str) -> Any:
        """The callable (or enum). Raises Absent with the reason."""
        if name not in self.found:
            raise Absent(self.missing[name])
        return self.found[name]


@cache
def find(source: str | None) -> Stock:
    """The kernels of the installed vLLM; of the source folder, where one is given and vLLM is not imported."""
    if source is not None and not is_installed():
        return from_source(Path(source))
    found, missing = {}, {}
    for name in PLACES:
        try:
            found[name] = find_stock(name)
        except Exception as error:  # an import of vLLM can fail in many ways; each is told, none ends the run
            missing[name] = f"vLLM's {name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return Stock(found, missing, "installed vLLM")


def is_installed() -> bool:
    """Whether a real vLLM can be imported."""
    module = sys.modules.get("vllm")
    if module is not None:
        return not isinstance(module, StandIn)
    return importlib.util.find_spec("vllm") is not None


class StandIn(ModuleType):
    """A module of vLLM that is not there: every attribute that is asked for is a decorator that changes nothing."""

    def __init__(self, name: str, **values: Any) -> None:
        super().__init__(name)
        self.__path__: list[str] = []
        self.__dict__.update(values)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _passes_through


def _passes_through(*arguments: Any, **_options: Any) -> Any:
    is_decorating = len(arguments) == 1 and callable(arguments[0])
    return arguments[0] if is_decorating else _passes_through


class KVQuantMode(enum.IntEnum):
    """The values of vLLM 0.32's enum that its kernels compare with."""

    NONE = 0
    FP8_PER_TENSOR = 1
    INT8_PER_TOKEN_HEAD = 2
    FP8_PER_TOKEN_HEAD = 3
    INT4_PER_TOKEN_HEAD = 4


class Platform:
    """What the kernels ask of the platform: a CUDA card."""

    def fp8_dtype(self) -> torch.dtype:
        """The FP8 format."""
        return torch.float8_e4m3fn

    def is_cuda(self) -> bool:
        """Always."""
        return True

    def is_rocm(self) -> bool:
        """Never; nor any other kind."""
        return False

    is_xpu = is_rocm

    def has_device_capability(self, _capability: Any) -> bool:
        """FP8 instructions exist; without them the launch fails and is reported."""
        return True

    def is_device_capability_family(self, _family: int) -> bool:
        """No special case for Blackwell."""
        return False

    def get_device_name(self, device: int = 0) -> str:
        """As vLLM names its tables."""
        return torch.cuda.get_device_name(device)


def from_source(folder: Path) -> Stock:
    """Load the files of vLLM's package folder. Raises ConfigError when one of REQUIRED is missing."""
    absent = [name for name in REQUIRED if not (folder / name).is_file()]
    if absent:
        raise ConfigError(f"vLLM source {folder}: found no {absent[0]}, allowed: vLLM 0.32's package folder")
    _install_stand_ins()
    ops = "vllm.v1.attention.ops"
    modules = [_load(f"{ops}.{name}", folder / f"v1/attention/ops/{name}.py") for name in ATTENTION_FILES]
    found: dict[str, Any] = {
        "KVQuantMode": KVQuantMode,
        "unified_attention": modules[1].unified_attention,
        "triton_reshape_and_cache_flash": modules[2].triton_reshape_and_cache_flash,
    }
    missing = {"flash_attn_varlen_func": "FlashAttention 3: vLLM's wheel is not installed"}
    name = PLACES["w8a8_triton_block_scaled_mm"]
    path = folder / (name.removeprefix("vllm.").replace(".", "/") + ".py")
    if path.is_file():
        found["w8a8_triton_block_scaled_mm"] = _load(name, path).w8a8_triton_block_scaled_mm
    else:
        missing["w8a8_triton_block_scaled_mm"] = f"vLLM's block-scaled product: {path.name} is not in the source folder"
    return Stock(found, missing, f"vLLM source files, without vLLM ({folder.name})")


def _install_stand_ins() -> None:
    # The Triton that our own kernels are built with: both sides of a ratio have one compiler.
    compiler = vars(kv_write)["triton"]
    platform = Platform()
    _stand_in("vllm.envs", VLLM_BATCH_INVARIANT=False)
    _stand_in("vllm.logger", init_logger=logging.getLogger)
    _stand_in("vllm.platforms", current_platform=platform)
    _stand_in("vllm.triton_utils", triton=compiler, tl=compiler.language)
    _stand_in("vllm.v1.kv_cache_interface", KVQuantMode=KVQuantMode)
    _stand_in("vllm.utils.torch_utils", is_quantized_kv_cache=lambda kind: kind.startswith("fp8"))
    _stand_in("vllm.utils.deep_gemm")
    _stand_in("vllm.utils.platform_utils", get_device_name_as_file_name=_table_name)
    _stand_in("vllm.v1.attention.ops")
    layers = "vllm.model_executor.layers.quantization.utils"
    _stand_in(f"{layers}.quant_utils", FP8_DTYPE=torch.float8_e4m3fn, get_fp8_min_max=lambda: (-448.0, 448.0))
    for name in (f"{layers}.w8a8_utils", "vllm.model_executor.parameter", "vllm.model_executor.utils"):
        _stand_in(name)


def _table_name() -> str:
    return torch.cuda.get_device_name().replace(" ", "_").replace("/", "_")


def _stand_in(name: str, **values: Any) -> None:
    """The module and those above it."""
    parent, _, own = name.rpartition(".")
    if parent and parent not in sys.modules:
        _stand_in(parent)
    module = StandIn(name, **values)
    sys.modules[name] = module
    if parent:
        setattr(sys.modules[parent], own, module)


def _load(name: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    execute: Callable[[ModuleType], None] = spec.loader.exec_module
    execute(module)
    return module
