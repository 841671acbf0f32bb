"""Our attention backend inside vLLM's engine: log-probabilities equal the plain-PyTorch reference's.

Without a GPU the whole engine runs in one process under Triton's interpreter (window_attention_run.py); with one, the
last tests compare the compiled kernels in CUDA graphs with vLLM's own backend.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

import checkpoints
import families
import pytest
import torch
from parity import Jobs, assert_equal_to, bound
from safetensors.torch import load_file, save_file
from vllm_puzzle.kernels import reference as ops
from vllm_puzzle.model_configs.inspect_model import load_record
from vllm_puzzle.serving import reference_model
from vllm_puzzle.serving.reference_model import ReferenceModel
from vllm_puzzle.serving.window_attention_mode import VARIABLE

pytestmark = pytest.mark.slow
RUNNER = Path(__file__).with_name("window_attention_run.py")
POCKET = Path(reference_model.__file__).parent.parent / "model_configs" / "pocket" / "puzzle"
# Below, at and above the windows of 7, 16 and 24; one crosses 24 while it decodes.
PROMPTS = [[(7 * i + 3 * n) % 97 for i in range(n)] for n in (2, 22, 70)]
# What the pocket model was trained on (its chat template, bytes as tokens), so that it repeats itself and drafts are
# accepted.
QUESTIONS = [[258, *text, 256, 259, 261] for text in (b"How much is 3+4+0+3+5+6?", b"what is 0+9+6-5+3+8+2")]
SCALES = ((0.05, 0.03), (0.02, 0.04))  # (k, v) of each layer
# A full layer, one with sink tokens, one with a window: two cache groups.
KEPT = [
    checkpoints.deci_block(2, 48),
    checkpoints.deci_block(2, 48, window=16),
    checkpoints.deci_block(4, 32, window=9),
]
KEPT[1]["attention"] |= {"num_sink_tokens": 4, "unshifted_sink": True}
CHUNKS = {"max_num_batched_tokens": 20, "block_size": 32, "enable_prefix_caching": True}
DRAFTS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 3}
KV_SCHEME = {
    "quant_method": "compressed-tensors", "format": "dense", "config_groups": {}, "ignore": [],
    "kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True},
}  # fmt: skip
Results = list[dict[str, Any]]


def write_fp8(folder: Path, **changes: Any) -> ReferenceModel:
    """A model of window layers only, with the scales of an FP8 cache."""
    blocks = [checkpoints.deci_block(2, 48, window=16), checkpoints.deci_block(4, 32, window=24)]
    config = checkpoints.deci_config(blocks, **changes)
    model = checkpoints.write_checkpoint(folder, config)
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": KV_SCHEME}))
    scales = {
        f"model.layers.{index}.self_attn.{of}_scale": torch.tensor(scale)
        for index, pair in enumerate(SCALES)
        for of, scale in zip("kv", pair, strict=True)
    }
    save_file(load_file(folder / "model.safetensors") | scales, folder / "model.safetensors")
    return model


@contextmanager
def quantized_cache() -> Iterator[None]:
    """The reference attends to keys and values as an e4m3 cache holds them, layer after layer by its scales."""
    attention, layers = ops.attention, cycle(SCALES)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> torch.Tensor:
        scales = map(torch.tensor, next(layers))
        k, v = (ops.quantize_e4m3(x, by).float() * by for x, by in zip((k, v), scales, strict=True))
        return attention(q, k, v, *rest)

    ops.attention = attend
    try:
        yield
    finally:
        ops.attention = attention


@torch.no_grad()
def expected(model: ReferenceModel, result: dict[str, Any]) -> torch.Tensor:
    table = model(torch.tensor(result["ids"])).log_softmax(-1)
    return table[-1 - len(result["logprobs"]) : -1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("window_attention")


@pytest.fixture(scope="module")
def models(folder: Path) -> dict[str, ReferenceModel]:
    pocket = ReferenceModel(load_record(POCKET))
    pocket.load_tensors({name: tensor.float() for name, tensor in load_file(POCKET / "model.safetensors").items()})
    return {
        "deci": checkpoints.write_checkpoint(folder / "deci", checkpoints.deci_config(checkpoints.ALL_KINDS)),
        "gpt-oss": checkpoints.write_checkpoint(folder / "gpt-oss", families.FAMILIES["gpt_oss"]),
        "sink tokens": checkpoints.write_checkpoint(folder / "sink tokens", checkpoints.deci_config(KEPT)),
        "fp8": write_fp8(folder / "fp8"),
        "pocket": pocket,
    }


@pytest.fixture(scope="module")
def outcomes(folder: Path, models: dict[str, ReferenceModel]) -> dict[str, Any]:
    jobs = Jobs(folder, RUNNER)

    def add(name: str, model: str, llm: dict[str, Any] | None = None, **job: Any) -> None:
        path = POCKET if model == "pocket" else folder / model
        environment = {VARIABLE: "on", "VLLM_USE_V2_MODEL_RUNNER": "1"} | job.pop("environment", {})
        jobs.add(name, path, llm, environment=environment, **{"rounds": [PROMPTS], "max_tokens": 5} | job)

    chunked = {"rounds": [PROMPTS, [PROMPTS[-1]]], "prompt_logprobs": None}
    add("V2 runner", "deci")
    add("V1 runner", "deci", max_tokens=3, environment={"VLLM_USE_V2_MODEL_RUNNER": "0"})
    add("compiled", "deci", {"enforce_eager": False}, max_tokens=2, environment={"VLLM_CPU_CI_ENV": "1"})
    add("whole model", "deci", {"attention_backend": "CUSTOM"}, max_tokens=3, environment={VARIABLE: "off"})
    drafts = {"rounds": [QUESTIONS], "max_tokens": 20, "prompt_logprobs": None}
    add("drafts", "pocket", {"speculative_config": DRAFTS}, **drafts)
    add("gpt-oss", "gpt-oss")
    add("sink tokens", "sink tokens", CHUNKS, **chunked)
    # Compiled too: here no layer is left that rotates, so that the graph has no use for the positions.
    add("fp8", "fp8", {"enforce_eager": False}, environment={"VLLM_CPU_CI_ENV": "1"})
    return jobs.run()


def ours(results: Results) -> list[int]:
    """The numbers of the layers that our backend computed."""
    return [int(name.split(".")[2]) for name, backend in results[0]["layers"].items() if backend == "CUSTOM"]


@pytest.mark.parametrize("name", ["V2 runner", "V1 runner", "compiled"])
def test_window_layers_take_our_backend_and_the_model_is_the_references(
    models: dict[str, ReferenceModel], outcomes: dict[str, Any], name: str
) -> None:
    results = outcomes[name]
    assert_equal_to(models["deci"], results)
    assert ours(results) == [3, 8], "the layers with a window; full attention keeps vLLM's"
    launched, steps = results[0]["launches"], len(results[0]["ids"]) - len(PROMPTS[0])
    assert launched == {"rope_and_write_kv": 2, "window_attention": 2, "fused_decode": 2 * (steps - 1)}


def test_attention_backend_custom_computes_every_layer(
    models: dict[str, ReferenceModel], outcomes: dict[str, Any]
) -> None:
    results = outcomes["whole model"]
    assert_equal_to(models["deci"], results)
    assert ours(results) == [2, 3, 5, 7, 8]
    assert results[0]["launches"].keys() == {"write_kv", "window_attention"}, "q and k come rotated"


def test_drafts_are_verified_across_the_window(models: dict[str, ReferenceModel], outcomes: dict[str, Any]) -> None:
    results = outcomes["drafts"]
    assert_equal_to(models["pocket"], results)
    steps = sum(results[0]["launches"].get(kernel, 0) for kernel in ("window_attention", "fused_decode"))
    assert steps < 20, "as many steps as tokens: no draft was accepted"
    assert results[0]["launches"]["window_attention"] > 1


def test_learned_sinks_and_two_windows_of_gpt_oss(models: dict[str, ReferenceModel], outcomes: dict[str, Any]) -> None:
    assert_equal_to(models["gpt-oss"], outcomes["gpt-oss"])
    assert ours(outcomes["gpt-oss"]) == [1, 2, 4]


def test_sink_tokens_in_chunks_and_after_a_prefix_cache_hit(
    models: dict[str, ReferenceModel], outcomes: dict[str, Any]
) -> None:
    results = outcomes["sink tokens"]
    assert_equal_to(models["sink tokens"], results)
    assert ours(results) == [1, 2]
    assert results[-1]["num_cached"] >= 64, "the second round must reuse a block, else this shows nothing"


def test_an_fp8_cache_with_scales_per_layer(models: dict[str, ReferenceModel], outcomes: dict[str, Any]) -> None:
    results, model = outcomes["fp8"], models["fp8"]
    assert isinstance(results, list), results
    exact = [expected(model, result) for result in results]
    with quantized_cache():
        meant = [expected(model, result) for result in results]
    for result, plain, quantized in zip(results, exact, meant, strict=True):
        error = (result["logprobs"] - quantized).abs().max()
        # A sum in another order may round to the next code: one key's or value's step, 2^-4 of it, in one dimension.
        assert error <= bound(model, plain) + 0.02 * (quantized - plain).abs().max()


CASES = {"bfloat16": {}, "fp8": {"kv_cache_dtype": "fp8"}, "drafts": {"speculative_config": DRAFTS}}
COMPILED_PROMPTS = [[(7 * i + 3 * n) % 97 for i in range(n)] for n in (1, 15, 22, 23, 40, 150, 200)]


@pytest.fixture(scope="module")
def on_gpu(folder: Path) -> tuple[ReferenceModel, dict[str, Any]]:
    """bfloat16, D = 64, compiled and in CUDA graphs (vLLM's default), by our backend and by vLLM's."""
    model = write_fp8(folder / "gpu", torch_dtype="bfloat16", head_dim=64, hidden_size=128)
    jobs = Jobs(folder, RUNNER)
    for name, llm in CASES.items():
        llm = {"enforce_eager": False, "dtype": "bfloat16", "kv_cache_dtype": "bfloat16"} | llm
        for mode in ("on", "off"):
            rest = {"rounds": [COMPILED_PROMPTS], "max_tokens": 40, "prompt_logprobs": None}
            jobs.add(f"{name} {mode}", folder / "gpu", llm, environment={VARIABLE: mode}, **rest)
    return model, jobs.run()


def rms_error(model: ReferenceModel, results: Results) -> float:
    errors = [(result["logprobs"] - expected(model, result)).flatten() for result in results]
    return float(torch.cat(errors).pow(2).mean().sqrt())


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_compiled_and_in_cuda_graphs_it_is_as_accurate_as_vllms_backend(
    on_gpu: tuple[ReferenceModel, dict[str, Any]], name: str
) -> None:
    model, found = on_gpu
    on, off = found[f"{name} on"], found[f"{name} off"]
    assert isinstance(on, list) and isinstance(off, list), (on, off)
    assert ours(on) == [0, 1] and ours(off) == []
    # Both round in bfloat16, over some 27,000 values.
    if name != "fp8":
        assert rms_error(model, on) <= 1.2 * rms_error(model, off)
        return
    with quantized_cache():
        assert rms_error(model, on) <= 1.2 * rms_error(model, off)
