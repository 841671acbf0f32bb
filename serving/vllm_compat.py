"""Every private symbol of vLLM that we touch, each with its ledger entry; nothing else reaches below vLLM's surface.

`LEDGER` is checked by `tests/serving/test_vllm_compat.py` against the installed vLLM: an upgrade that moves a
symbol fails there, with one message.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SUPPORTED_VLLM = ((0, 32), (0, 34))


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """One private symbol: where it is, why we need it, what upstream says, when our use can go."""

    target: str
    why: str
    upstream: str
    remove_when: str


LEDGER = (
    LedgerEntry(
        target="vllm.transformers_utils.model_arch_config_convertor:MODEL_ARCH_CONFIG_CONVERTORS",
        why="vLLM takes a DeciLM model's KV heads from its first live attention block, which fails on a linear map "
        "and is not the maximum; the table has no registration function, so the entry is replaced.",
        upstream="https://github.com/vllm-project/vllm/pull/49797 (per-layer configurations)",
        remove_when="vLLM registers convertors for plugins, or reads DeciLM blocks as per-layer configurations",
    ),
    LedgerEntry(
        target="vllm.transformers_utils.model_arch_config_convertor:ModelArchConfigConvertorBase",
        why="base class of the replaced entry",
        upstream="as above",
        remove_when="as above",
    ),
)


def check_vllm_version() -> None:
    """Raise RuntimeError when the installed vLLM is outside the supported range."""
    import vllm

    found = vllm.__version__
    low, high = SUPPORTED_VLLM
    try:
        version = tuple(int(part) for part in found.split(".")[:2])
    except ValueError:
        return  # a development build of vLLM without a number: the user knows
    if not low <= version < high:
        allowed = f">={low[0]}.{low[1]},<{high[0]}.{high[1]}"
        raise RuntimeError(f"vllm-puzzle: found vLLM {found}, allowed: {allowed}")


def use_record_sizes(model_type: str) -> None:
    """Make vLLM take the whole-model KV-head count of `model_type` from our records (the largest layer's)."""
    from vllm.transformers_utils import model_arch_config_convertor as module

    from vllm_puzzle.model_configs.schema import Attention
    from vllm_puzzle.serving.hf_config import model_record

    class RecordSizesConvertor(module.ModelArchConfigConvertorBase):  # type: ignore[misc]
        def get_total_num_kv_heads(self) -> int:
            layers = model_record(self.hf_text_config).layers
            # vLLM divides by this number; a model without any attention has no KV heads to shard.
            return max((a.num_kv_heads for layer in layers if isinstance(a := layer.attention, Attention)), default=1)

    module.MODEL_ARCH_CONFIG_CONVERTORS[model_type] = RecordSizesConvertor


def resolve(target: str) -> Any:
    """The object a ledger entry names (`module:attribute`); AttributeError or ImportError when it is gone."""
    import importlib

    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def fork_engine_core() -> None:
    """Start EngineCore by fork, so that it inherits the imported vLLM instead of importing it again (CPU only).

    vLLM's CPU platform sets the spawn method inside `create_engine_config`, after any setting of ours.
    """
    import multiprocessing

    from vllm.v1.engine import utils as engine_utils

    engine_utils.get_mp_context = lambda: multiprocessing.get_context("fork")
