"""Our attention backend inside vLLM's engine: log-probabilities equal the plain-PyTorch reference's.

Without a GPU the whole engine runs in one process with Triton's interpreter, in vLLM's V2 model runner (see
window_attention_run.py); what differs on a GPU (compiled kernels, CUDA graphs, FlashAttention beside ours) is in
test_window_attention_gpu.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import checkpoints
import families
import pytest
import torch
from parity import Jobs, assert_equal_to
from safetensors.torch import load_file, save_file
from vllm_puzzle.kernels import reference as ops
from vllm_puzzle.model_configs.inspect_model import load_record
from vllm_puzzle.serving import reference_model
from vllm_puzzle.serving.reference_model import ReferenceModel
from vllm_puzzle.serving.window_attention_mode import VARIABLE

pytestmark = pytest.mark.slow
POCKET = Path(reference_model.__file__).parent.parent / "model_configs" / "pocket" / "puzzle"
# Below, at and above the windows of 7, 16 and 24, one that crosses 24 while it decodes; several pages of 16.
PROMPTS = [[(7 * i + 3 * n) % 97 for i in range(n)] for n in (2, 22, 53)]
# Repeats itself, so that n-gram drafts are proposed.
REPEATING = [([5, 9, 17, 33] * 12)[:n] for n in (34, 41)]
ALL_WINDOWED = [checkpoints.deci_block(2, 48, window=16), checkpoints.deci_block(4, 32, window=24)]
SCALES = ((0.05, 0.03), (0.02, 0.04))  # (k, v) of each layer
V2 = {VARIABLE: "on", "VLLM_USE_V2_MODEL_RUNNER": "1"}
CHUNKS = {"max_num_batched_tokens": 20, "block_size": 32, "enable_prefix_caching": True}
DRAFTS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 3}
KV_SCHEME = {
    "quant_method": "compressed-tensors", "format": "dense", "config_groups": {}, "ignore": [],
    "kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("window_attention")


@pytest.fixture(scope="module")
def models(folder: Path) -> dict[str, ReferenceModel]:
    configs = {
        "deci": checkpoints.deci_config(checkpoints.ALL_KINDS),
        "gpt-oss": families.FAMILIES["gpt_oss"],
        "sink tokens": families.UNSERVED["sink tokens"],
        "fp8": checkpoints.deci_config(ALL_WINDOWED),
    }
    found = {name: checkpoints.write_checkpoint(folder / name, config) for name, config in configs.items()}
    (folder / "fp8" / "config.json").write_text(json.dumps(configs["fp8"] | {"quantization_config": KV_SCHEME}))
    weights = folder / "fp8" / "model.safetensors"
    scales = {
        f"model.layers.{index}.self_attn.{of}_scale": torch.tensor(scale)
        for index, pair in enumerate(SCALES)
        for of, scale in zip("kv", pair, strict=True)
    }
    save_file(load_file(weights) | scales, weights)
    pocket = ReferenceModel(load_record(POCKET))
    pocket.load_tensors({name: tensor.float() for name, tensor in load_file(POCKET / "model.safetensors").items()})
    return found | {"pocket": pocket}


@pytest.fixture(scope="module")
def outcomes(folder: Path, models: dict[str, ReferenceModel]) -> dict[str, Any]:
    jobs = Jobs(folder, Path("/tmp/dev_run.py"))
    jobs.environment |= {VARIABLE: "on"}

    def add(name: str, model: str, llm: dict[str, Any] | None = None, **job: Any) -> None:
        path = POCKET if model == "pocket" else folder / model
        jobs.add(name, path, llm, **{"environment": V2, "rounds": [PROMPTS], "max_tokens": 5} | job)

    add("prefill and decode", "deci")
    add("chunks", "deci", CHUNKS, rounds=[PROMPTS, [PROMPTS[-1]]], prompt_logprobs=None)
    add("drafts", "pocket", {"speculative_config": DRAFTS}, rounds=[REPEATING], max_tokens=8, prompt_logprobs=None)
    add("compiled", "deci", {"enforce_eager": False}, max_tokens=2, environment=V2 | {"VLLM_CPU_CI_ENV": "1"})
    for name in ("gpt-oss", "sink tokens", "fp8"):
        add(name, name)
    return jobs.run()


def launches(result: dict[str, Any]) -> dict[str, int]:
    return result[0]["launches"]


@pytest.mark.parametrize("name", ["prefill and decode", "chunks", "compiled"])
def test_two_windows_among_all_block_kinds(
    models: dict[str, ReferenceModel], outcomes: dict[str, Any], name: str
) -> None:
    assert_equal_to(models["deci"], outcomes[name])
    print(name, launches(outcomes[name]), outcomes[name][0]["layers"])


def test_drafts(models: dict[str, ReferenceModel], outcomes: dict[str, Any]) -> None:
    assert_equal_to(models["pocket"], outcomes["drafts"])
    print(launches(outcomes["drafts"]))


@pytest.mark.parametrize("name", ["gpt-oss", "sink tokens"])
def test_x(models: dict[str, ReferenceModel], outcomes: dict[str, Any], name: str) -> None:
    assert_equal_to(models[name], outcomes[name])


def test_fp8(models: dict[str, ReferenceModel], outcomes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    results = outcomes["fp8"]
    assert isinstance(results, list), results
    model = models["fp8"]
    exact = [model(torch.tensor(r["ids"])).log_softmax(-1)[-1 - len(r["logprobs"]) : -1] for r in results]
    attention, calls = ops.attention, iter(range(10**6))

    def quantized(q, k, v, *rest):  # type: ignore[no-untyped-def]
        scales = (torch.tensor(scale) for scale in SCALES[next(calls) % len(SCALES)])
        k, v = (ops.quantize_e4m3(x, scale).float() * scale for x, scale in zip((k, v), scales, strict=True))
        return attention(q, k, v, *rest)

    monkeypatch.setattr(reference_model.ops, "attention", quantized)
    meant = [model(torch.tensor(r["ids"])).log_softmax(-1)[-1 - len(r["logprobs"]) : -1] for r in results]
    for r, e, m in zip(results, exact, meant, strict=True):
        print((r["logprobs"] - m).abs().max(), (m - e).abs().max())
    print(launches(results), results[0]["layers"])
