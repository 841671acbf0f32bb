"""KV capacity through vLLM's planner: published figures, vLLM's own Mamba classes, refusals to the byte."""

from __future__ import annotations

import os
import re
from collections import deque
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm_puzzle.model_configs.catalogue import find
from vllm_puzzle.model_configs.schema import Attention, ConfigError, GatedFFN, LayerRecord, Mamba2, ModelRecord, Rope
from vllm_puzzle.serving import kv_capacity as capacity
from vllm_puzzle.serving.kv_admission import held_requests
from vllm_puzzle.serving.kv_cache_groups import DISABLE
from vllm_puzzle.serving.kv_capacity import CacheSetup, kv_capacity, least_bytes

# The bytes that hold the reported tokens, to the block of ten FP8 layers; 38.72 GiB rounds them.
RTX_BYTES = 253_737 * 10 * 16 * 1024
FULL, SMALL, LARGE = (Attention(4, 2, 64, sliding_window=window) for window in (None, 40, 200))


def model(*attentions: Attention | Mamba2 | None) -> ModelRecord:
    layers = tuple(LayerRecord(attention, GatedFFN(64)) for attention in attentions)
    return ModelRecord("llama", "PuzzleForCausalLM", 128, 256, layers, 4096, 1e-5, Rope())


def planned(record: ModelRecord, available_bytes: int, setup: CacheSetup, **choices: bool) -> capacity.Capacity:
    names = ("max_model_len", "max_num_batched_tokens", "kv_dtype", "is_async", "has_prefix_caching")
    return kv_capacity(
        record, available_bytes=available_bytes, **{name: getattr(setup, name) for name in names}, **choices
    )


def test_gpt_oss_puzzle_has_the_tokens_that_an_engine_reported_with_our_groups_and_one_batch_in_flight() -> None:
    record = find("gpt-oss-puzzle-88b").record()
    ours, stock = (
        planned(record, RTX_BYTES, CacheSetup(131_072, 16_384, "fp8", is_async=False), is_stock=is_stock)
        for is_stock in (False, True)
    )
    assert (ours.tokens, round(ours.concurrency, 2)) == (2_819_653, 21.51)
    assert sorted(group.num_layers for group in ours.groups) == [8, 9, 9, 10]
    assert {group.num_layers for group in stock.groups} == {5, 6, 8}
    # By hand: 2 groups of 8 full layers, 3 of 6 short windows, 1 of 8 long ones, each block 8 layers wide.
    assert stock.bytes_per_request == (2 * 8192 + 3 * (1032 + 1) + 1536 + 1) * 8 * 16 * 1024


def test_async_scheduling_has_two_batches_in_flight_and_every_window_holds_both() -> None:
    record = find("gpt-oss-puzzle-88b").record()
    two, doubled = (
        planned(record, RTX_BYTES, CacheSetup(131_072, batched, "fp8", is_async=is_async)).concurrency
        for batched, is_async in ((4096, True), (8192, False))
    )
    assert two == doubled


@pytest.mark.parametrize(
    ("name", "kv_dtype", "num_bytes"),
    [
        ("llama-3.3-nemotron-super-49b-v1", "fp8", 100_352),
        ("llama-3.3-nemotron-super-49b-v1", "bf16", 200_704),
        ("llama-3.3-70b-instruct", "fp8", 163_840),
    ],
)
def test_a_token_of_full_attention_takes_its_keys_and_values_and_no_more(
    name: str, kv_dtype: str, num_bytes: int
) -> None:
    record, setup = find(name).record(), CacheSetup(1600, 512, kv_dtype)
    plan = planned(record, 1 << 33, setup)
    assert plan.block_bytes == 16 * num_bytes
    assert plan.bytes_per_request == plan.decoding_bytes == least_bytes(record, setup) == 1600 * num_bytes
    assert plan.tokens == (1 << 33) // plan.block_bytes * 16


@pytest.mark.parametrize("length", [16, 513, 9000, 131_072])
@pytest.mark.parametrize("name", ["gpt-oss-puzzle-88b", "gpt-oss-20b", "nemotron-3-nano-30b-a3b"])
def test_a_decoding_request_takes_at_least_its_bytes_and_at_most_what_it_was_admitted_with(
    name: str, length: int
) -> None:
    record, setup = find(name).record(), CacheSetup(length, 2048, "fp8")
    ours, stock = (planned(record, 1 << 38, setup, is_stock=is_stock) for is_stock in (False, True))
    assert least_bytes(record, setup) <= ours.decoding_bytes <= ours.bytes_per_request <= stock.bytes_per_request


NEMOTRON_3 = ["nemotron-3-nano-30b-a3b", "nemotron-3-super-120b-a12b-nvfp4", "nemotron-3-ultra-550b-a55b"]


class PagedBackend:
    """What vLLM's page alignment asks of an attention backend; kernels in blocks of 16, as FlashAttention's."""

    @staticmethod
    def get_supported_kernel_block_sizes() -> list[int]:
        return [16]

    @staticmethod
    def customize_spec(spec: Any) -> Any:
        return spec


@pytest.mark.parametrize("has_prefix_caching", [True, False])
@pytest.mark.parametrize("tensor_parallel_size", [1, 2])
@pytest.mark.parametrize("name", NEMOTRON_3)
def test_mamba_specs_and_pages_are_those_of_vllms_nemotron_h(
    name: str, tensor_parallel_size: int, has_prefix_caching: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.nemotron_h import NemotronHForCausalLM
    from vllm.platforms.interface import Platform

    record = find(name).record()
    setup = CacheSetup(
        8192, 512, "bf16", tensor_parallel_size=tensor_parallel_size, has_prefix_caching=has_prefix_caching
    )
    config = capacity._config(setup)
    attention = record.attentions[0]
    config.parallel_config = SimpleNamespace(
        tensor_parallel_size=tensor_parallel_size, pipeline_parallel_size=1, decode_context_parallel_size=1
    )
    config.model_config = SimpleNamespace(
        hf_config=SimpleNamespace(**find(name).config()),
        dtype=torch.bfloat16,
        use_mla=False,
        architecture="NemotronHForCausalLM",
        get_num_kv_heads=lambda _: max(1, attention.num_kv_heads // tensor_parallel_size),
        get_head_size=lambda: attention.head_dim,
    )
    cache = config.cache_config
    cache.mamba_ssm_cache_dtype = "float32"  # the configurations' own `mamba_ssm_cache_dtype`
    cache.mamba_cache_mode = "align" if has_prefix_caching else "none"
    monkeypatch.setattr(ModelRegistry, "resolve_model_cls", lambda *_, **__: (NemotronHForCausalLM, name))
    monkeypatch.setattr(Platform, "_find_non_ssm_backends", lambda _: [PagedBackend])
    Platform._align_hybrid_block_size(config, PagedBackend)
    ours = capacity._config(setup)
    specs = capacity.layer_specs(record, setup, ours)
    assert ours.cache_config.block_size == cache.block_size > 16
    assert ours.cache_config.mamba_page_size_padded == cache.mamba_page_size_padded
    mamba = next(spec for spec in specs.values() if hasattr(spec, "shapes"))
    assert mamba.shapes == NemotronHForCausalLM.get_mamba_state_shape_from_config(config)
    assert mamba.dtypes == NemotronHForCausalLM.get_mamba_state_dtype_from_config(config)
    assert mamba.block_size == (cache.block_size if has_prefix_caching else setup.max_model_len)
    assert {spec.page_size_bytes for spec in specs.values()} == {cache.mamba_page_size_padded}


def test_prefix_caching_keeps_two_mamba_states_of_a_request() -> None:
    record = find("nemotron-3-nano-30b-a3b").record()
    one, two = (
        planned(record, 1 << 36, CacheSetup(24_576, 8192, "fp8", has_prefix_caching=has)) for has in (False, True)
    )
    states = [sum(g.blocks_per_request for g in plan.groups if g.kind == "mamba") for plan in (one, two)]
    assert states == [4, 8]  # 23 layers in groups of at most the 6 of attention


@pytest.mark.parametrize("attentions", [(FULL,) * 3, (FULL, SMALL, SMALL, LARGE), (FULL, Mamba2(4, 16, 32, 2, 4))])
def test_bytes_are_refused_to_the_byte_and_named(attentions: tuple[Any, ...]) -> None:
    record, setup = model(*attentions), CacheSetup(1000, 64, "bf16")
    with pytest.raises(ConfigError) as refused:
        planned(record, 1, setup)
    message = str(refused.value)
    (needed,) = re.findall(r"found 1 bytes, allowed: at least ([\d,]+), for one request of 1,000 tokens$", message)
    enough = int(needed.replace(",", ""))
    assert planned(record, enough, setup).concurrency >= 1
    with pytest.raises(ConfigError):
        planned(record, enough - 1, setup)


def test_a_mistake_is_told_in_one_line() -> None:
    with pytest.raises(ConfigError, match="found no layer with a cache"):
        planned(model(None), 1 << 30, CacheSetup(100, 64, "bf16"))
    with pytest.raises(ConfigError, match="found 'fp4', allowed: bf16, fp8"):
        CacheSetup(100, 64, "fp4")
    with pytest.raises(ConfigError, match="max_model_len: found 0"):
        CacheSetup(0, 64, "fp8")


@pytest.mark.parametrize("value", ["1", None])
def test_the_users_choice_of_grouping_is_neither_used_nor_lost(
    value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(DISABLE, "1") if value else monkeypatch.delenv(DISABLE, raising=False)
    plan = planned(find("gpt-oss-puzzle-88b").record(), RTX_BYTES, CacheSetup(131_072, 16_384, "fp8", is_async=False))
    assert plan.tokens == 2_819_653
    assert os.environ.get(DISABLE) == value


@pytest.mark.parametrize("is_async", [True, False])
def test_full_attention_holds_what_is_reported_and_windows_hold_more(is_async: bool) -> None:
    setup = CacheSetup(1000, 256, "bf16", is_async=is_async)
    block = 2 * 2 * 64 * 2 * 16  # keys and values of 16 tokens in one layer
    # One block is vLLM's empty one: 5 requests of 63 blocks and one less than another.
    full = model(FULL, FULL)
    assert held_requests(full, setup, (1 + 6 * 63 - 1) * 2 * block) == 5
    assert held_requests(full, setup, (1 + 6 * 63) * 2 * block) == 6
    windows = model(FULL, SMALL, SMALL, LARGE)
    for is_stock in (True, False):
        plan = planned(windows, 1 << 23, setup, is_stock=is_stock)
        held = held_requests(windows, setup, 1 << 23, is_stock)
        # The last is admitted at its largest, those before hold what they decode with.
        largest, small = plan.bytes_per_request, plan.decoding_bytes
        room = (plan.num_blocks - 1) * plan.block_bytes
        assert plan.concurrency < held
        assert (room - largest) // small <= held <= room // small


def running_at_once(record: ModelRecord, setup: CacheSetup, available_bytes: int, is_stock: bool) -> int:
    """Requests that vLLM's own scheduler has running once more wait than fit, all of them at their full length."""
    from vllm import SamplingParams
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request
    from vllm.v1.structured_output import StructuredOutputManager

    config, plan = capacity.plan_cache(record, setup, available_bytes, is_stock)
    config.cache_config.num_gpu_blocks, config.cache_config.enable_prefix_caching = plan.num_blocks, False
    config.scheduler_config.max_num_seqs = 64
    scheduler = (AsyncScheduler if setup.is_async else Scheduler)(
        config, plan, StructuredOutputManager(config), block_size=setup.block_size
    )
    prompt = [0] * (setup.max_model_len - 6)
    for number in range(64):
        scheduler.add_request(Request(str(number), prompt, SamplingParams(max_tokens=9, ignore_eos=True), None))
    flying: deque[Any] = deque()
    for _ in range(2000):
        output = scheduler.schedule()
        assert not output.preempted_req_ids
        if output.num_scheduled_tokens:
            flying.append(output)
        elif not flying:
            break
        if len(flying) < (2 if setup.is_async else 1) and output.num_scheduled_tokens:
            continue
        done = flying.popleft()
        requests = [scheduler.requests[name] for name in done.num_scheduled_tokens]
        # A token each once the prompt is through, four in all: then it stays, and the windows have been trimmed.
        processed = [r.num_computed_tokens - r.num_in_flight_tokens for r in requests]
        tokens = [
            [0] if at + new >= len(prompt) and len(r.output_token_ids) < 4 else []
            for r, at, new in zip(requests, processed, done.num_scheduled_tokens.values(), strict=True)
        ]
        ids = [r.request_id for r in requests]
        scheduler.update_from_output(
            done, ModelRunnerOutput(ids, {name: i for i, name in enumerate(ids)}, sampled_token_ids=tokens)
        )
    else:
        raise AssertionError("the scheduler did not come to rest")
    assert scheduler.waiting and all(r.num_computed_tokens >= setup.max_model_len - 3 for r in scheduler.running)
    return len(scheduler.running)


@pytest.mark.parametrize("is_stock", [True, False])
@pytest.mark.parametrize("is_async", [True, False])
@pytest.mark.parametrize("attentions", [(FULL, FULL), (FULL, SMALL, SMALL, LARGE)])
def test_vllms_scheduler_runs_as_many_at_once_as_are_counted(
    attentions: tuple[Attention, ...], is_async: bool, is_stock: bool
) -> None:
    # Both windows begin in the same blocks at the last six tokens, at which the two come to rest.
    record, setup = model(*attentions), CacheSetup(1008, 128, "bf16", is_async=is_async)
    for mebibytes in (5, 9, 13):
        held = held_requests(record, setup, mebibytes << 20, is_stock)
        assert running_at_once(record, setup, mebibytes << 20, is_stock) == held > 0


def test_kv_heads_are_shared_out_over_tensor_parallel_ranks_and_repeated_where_they_are_too_few() -> None:
    record = model(replace(FULL, num_heads=8, num_kv_heads=2))
    sizes = [
        kv_capacity(
            record,
            available_bytes=1 << 30,
            max_model_len=512,
            max_num_batched_tokens=64,
            kv_dtype="fp8",
            tensor_parallel_size=size,
        ).block_bytes
        for size in (1, 2, 8)
    ]
    assert sizes == [2 * 2 * 64 * 16, 2 * 64 * 16, 2 * 64 * 16]
