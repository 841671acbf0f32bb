"""KV-cache groups need no more pages than vLLM's, fewer where they can, and serve the same numbers."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import checkpoints
import pytest
import torch
from parity import PROMPTS, Jobs, assert_equal_to
from vllm_puzzle.serving import kv_cache_groups as planner
from vllm_puzzle.serving import plugin

Kind = tuple[int | None, int, int]  # window, KV heads, layers
GPT_OSS_PUZZLE: list[Kind] = [(None, 8, 10), (128, 8, 18), (8192, 8, 8)]
# At 131,072 tokens in blocks of 16 with 2,048 in flight.
BETTER = {
    "gpt-oss-puzzle",
    "heads that do not divide",
    "odd counts",
    "more full than windowed",
    "widths padded by vLLM",
}
GEOMETRIES: dict[str, list[Kind]] = {
    "full only": [(None, 8, 32)],
    "one window only": [(128, 8, 17)],
    "gpt-oss-puzzle": GPT_OSS_PUZZLE,
    "gpt-oss-20b": [(None, 8, 12), (128, 8, 12)],
    "Gemma-like, 5 to 1": [(1024, 8, 25), (None, 8, 5)],
    "Gemma-like with a rest": [(1024, 8, 52), (None, 8, 10)],
    "five windows": [(None, 8, 19), (64, 8, 3), (128, 8, 3), (256, 8, 3), (512, 8, 2), (1024, 8, 2)],
    "variable KV heads": [(None, 8, 5), (None, 4, 7), (None, 1, 3)],
    "variable KV heads and windows": [(None, 8, 3), (None, 2, 5), (128, 8, 9), (128, 4, 4), (1024, 1, 7)],
    "heads that do not divide": [(None, 4, 6), (None, 3, 5), (256, 2, 11)],
    "odd counts": [(None, 8, 13), (128, 8, 7), (8192, 8, 23)],
    "one full layer": [(None, 8, 1), (128, 8, 31)],
    "more full than windowed": [(None, 8, 30), (128, 8, 18)],
    "widths padded by vLLM": [(None, 8, 14), (128, 8, 20)],
}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """vLLM's configuration of a tiny model; the tests change its lengths. Groups are planned through our patch."""
    from vllm.engine.arg_utils import EngineArgs

    plugin.register_classes()
    folder = tmp_path_factory.mktemp("groups")
    (folder / "config.json").write_text(json.dumps(checkpoints.deci_config([checkpoints.deci_block(1, 32)])))
    config = EngineArgs(str(folder), skip_tokenizer_init=True, enforce_eager=True).create_engine_config()
    config.cache_config.kv_cache_layout = "LBNHC"
    config.scheduler_config.async_scheduling = False
    return config


@pytest.fixture
def sized(config: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets max_model_len and the tokens in flight for one test, and gives the configuration."""

    def sized(max_model_len: int = 131_072, in_flight: int = 2048, num_stages: int = 1) -> Any:
        monkeypatch.setattr(config.model_config, "max_model_len", max_model_len)
        # With pipeline stages vLLM has as many batches in flight.
        monkeypatch.setattr(config.scheduler_config, "max_num_batched_tokens", in_flight // num_stages)
        monkeypatch.setattr(config.parallel_config, "pipeline_parallel_size", num_stages)
        assert config.max_in_flight_tokens == in_flight
        return config

    return sized


def layers(kinds: list[Kind], block_size: int = 16, seed: int = 0) -> dict[str, Any]:
    """The layers' specs by name, in random order."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

    specs: list[Any] = []
    for window, num_kv_heads, count in kinds:
        sizes = {"block_size": block_size, "num_kv_heads": num_kv_heads, "head_size": 64, "dtype": torch.bfloat16}
        spec = FullAttentionSpec(**sizes) if window is None else SlidingWindowSpec(**sizes, sliding_window=window)
        specs += [spec] * count
    random.Random(seed).shuffle(specs)
    return {f"layers.{i}": spec for i, spec in enumerate(specs)}


def plan(
    config: Any, *workers: dict[str, Any], stock: bool = False, memory: tuple[int, ...] = (1 << 40, 1 << 40)
) -> Any:
    """The cache of the first worker, planned by vLLM from the start: groups, blocks, admission checks."""
    from vllm.v1.core.kv_cache_utils import get_kv_cache_configs

    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(planner.DISABLE, "1" if stock else "0")
        return get_kv_cache_configs(config, [dict(worker) for worker in workers], list(memory[: len(workers)]))[0]


def needed_bytes(config: Any, plan: Any) -> int:
    """vLLM's own count of the bytes one request of max_model_len needs."""
    from vllm.v1.core.kv_cache_utils import _max_memory_usage_bytes_from_groups

    return _max_memory_usage_bytes_from_groups(config, plan.kv_cache_groups)


def concurrency(config: Any, plan: Any) -> float:
    from vllm.v1.core.kv_cache_utils import get_kv_cache_capacity

    return get_kv_cache_capacity(config, plan)[1]


def assert_never_worse(config: Any, specs: dict[str, Any]) -> bool:
    """Compare with vLLM's own plan; returns whether ours is another one."""
    stock, ours = plan(config, specs, stock=True), plan(config, specs)
    assert sorted(name for group in ours.kv_cache_groups for name in group.layer_names) == sorted(specs)
    if ours.kv_cache_groups == stock.kv_cache_groups:
        return False
    page_size = {group.kv_cache_spec.page_size_bytes for group in ours.kv_cache_groups}
    assert {group.kv_cache_spec for group in ours.kv_cache_groups} == {g.kv_cache_spec for g in stock.kv_cache_groups}
    before, after = (planner.layer_pages(config, p.kv_cache_groups) for p in (stock, ours))
    assert [before * size for size in page_size] == [needed_bytes(config, stock)]
    assert [after * size for size in page_size] == [needed_bytes(config, ours)]
    assert planner.floor_pages(config, ours.kv_cache_groups) <= after < before
    decoding = [planner.layer_pages(config, p.kv_cache_groups, decoding=True) for p in (stock, ours)]
    assert decoding[1] <= decoding[0]
    num_added = len(ours.kv_cache_groups) - len(stock.kv_cache_groups)
    assert after < before * 0.95**num_added
    # The pool holds whole blocks: at most one part in its number of blocks (> 10,000) is lost by rounding down.
    assert concurrency(config, ours) / concurrency(config, stock) == pytest.approx(before / after, rel=1e-4)
    return True


def test_gpt_oss_puzzle_takes_at_most_0_64_of_vllms_pages_for_131072_tokens(sized: Any) -> None:
    config, specs = sized(131_072, in_flight=1), layers(GPT_OSS_PUZZLE)
    stock, ours = plan(config, specs, stock=True), plan(config, specs)
    page_size = 2 * 16 * 8 * 64 * 2  # K and V, tokens, heads, head size, bfloat16
    assert needed_bytes(config, stock) == 135_392 * page_size
    assert needed_bytes(config, ours) == 87_230 * page_size
    assert round(87_230 / 135_392, 2) == 0.64
    assert sorted(len(group.layer_names) for group in ours.kv_cache_groups) == [8, 9, 9, 10]


@pytest.mark.parametrize("in_flight", [2048, 8192, 16384])
def test_the_reported_concurrency_of_gpt_oss_puzzle_grows_as_the_pages_shrink(sized: Any, in_flight: int) -> None:
    config, specs = sized(131_072, in_flight), layers(GPT_OSS_PUZZLE)
    assert assert_never_worse(config, specs)
    assert concurrency(config, plan(config, specs)) > 1.42 * concurrency(config, plan(config, specs, stock=True))


@pytest.mark.parametrize("block_size", [16, 128])
@pytest.mark.parametrize("max_model_len", [512, 8192, 40_000, 131_072])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_no_geometry_is_worse_than_vllms(sized: Any, name: str, max_model_len: int, block_size: int) -> None:
    for in_flight in (1, 2048, 16384):
        is_better = assert_never_worse(sized(max_model_len, in_flight), layers(GEOMETRIES[name], block_size))
        if (max_model_len, block_size, in_flight) == (131_072, 16, 2048):
            assert is_better == (name in BETTER)


def test_no_random_geometry_is_worse_and_many_are_better(sized: Any) -> None:
    rng, num_better = random.Random(0), 0
    for seed in range(150):
        windows = rng.sample([None, 64, 128, 500, 1024, 8192], rng.randint(2, 4))
        kinds: list[Kind] = [(window, rng.choice([1, 2, 3, 4, 8]), rng.randint(1, 40)) for window in windows]
        config = sized(rng.choice([1000, 8192, 131_072]), rng.choice([1, 512, 2048, 16384]))
        num_better += assert_never_worse(config, layers(kinds, rng.choice([16, 32, 128]), seed))
    assert num_better >= 25


def test_an_added_group_must_save_5_percent(sized: Any) -> None:
    counts = {20: 2, 14: 3}  # full layers beside 20 windowed ones: groups
    for num_full, num_groups in counts.items():
        groups = plan(sized(in_flight=1), layers([(None, 8, num_full), (128, 8, 20)])).kv_cache_groups
        assert len(groups) == num_groups
    # Width 12 would make 3 groups of 2 and save 4.8 %.
    assert not assert_never_worse(sized(in_flight=4096), layers([(None, 8, 12), (128, 8, 13)]))


def test_a_grouping_good_for_prefills_but_worse_while_decoding_is_not_taken(sized: Any) -> None:
    # All windows still hold the whole request at admission, so only padding counts there: 3 · 12 < 4 · 10 slots.
    config, specs = sized(8192, in_flight=16384), layers([(None, 8, 10), (128, 8, 24)])
    twelve = planner._split(planner._layers_by_spec(plan(config, specs).kv_cache_groups, list(specs)), 12)
    assert planner.layer_pages(config, twelve) < planner.layer_pages(config, plan(config, specs).kv_cache_groups)
    assert not assert_never_worse(config, specs)


@pytest.mark.parametrize("cut", [14, 18, 22])
def test_pipeline_stages_share_one_grouping_and_serve_more_requests(sized: Any, cut: int) -> None:
    config, specs = sized(num_stages=2), layers(GPT_OSS_PUZZLE, seed=3)
    stages = [dict(list(specs.items())[:cut]), dict(list(specs.items())[cut:])]
    stock, ours = plan(config, *stages, stock=True), plan(config, *stages)
    assert (len(stock.kv_cache_groups), len(ours.kv_cache_groups)) == (6, 4)
    assert concurrency(config, ours) > 1.2 * concurrency(config, stock)


def test_uneven_pipeline_stages_with_uneven_memory_are_never_worse(sized: Any) -> None:
    rng, num_better, config = random.Random(1), 0, sized(num_stages=2)
    for seed in range(150):
        windows = rng.sample([None, 64, 128, 500, 1024, 8192], rng.randint(2, 4))
        specs = list(layers([(window, 8, rng.randint(2, 40)) for window in windows], seed=seed).items())
        cut = rng.randint(1, len(specs) - 1)
        stages, memory = [dict(specs[:cut]), dict(specs[cut:])], (1 << 40, rng.randint(1 << 39, 1 << 41))
        before, after = (
            concurrency(config, plan(config, *stages, stock=stock, memory=memory)) for stock in (True, False)
        )
        assert after >= before * (1 - 1e-4)  # whole blocks, as above
        num_better += after > 1.01 * before
    assert num_better >= 25


def test_unknown_pipeline_stages_keep_vllms_groups(sized: Any) -> None:
    from vllm_puzzle.serving.vllm_compat import plan_kv_cache_groups

    assert len(plan_kv_cache_groups(sized(), layers(GPT_OSS_PUZZLE))) == 4
    assert len(plan_kv_cache_groups(sized(num_stages=2), layers(GPT_OSS_PUZZLE))) == 6


def nemotron_h(_: Any) -> dict[str, Any]:
    """10 attention and 14 Mamba layers: vLLM's width is 14, and 10 would save pages if they were ours to plan."""
    from vllm.v1.kv_cache_interface import MambaSpec

    attention = layers([(None, 2, 10)], block_size=1024)
    page_size = attention["layers.0"].page_size_bytes
    state = MambaSpec(block_size=1024, shapes=((64, 64, 32),), dtypes=(torch.float32,), page_size_padded=page_size)
    return attention | {f"mamba.{i}": state for i in range(14)}


def with_a_connector(config: Any) -> dict[str, Any]:
    from vllm.config import KVTransferConfig

    config.kv_transfer_config = KVTransferConfig(kv_connector="OffloadingConnector", kv_role="kv_both")
    return layers(GPT_OSS_PUZZLE)


def with_speculation(config: Any) -> dict[str, Any]:
    from vllm.config import SpeculativeConfig

    config.speculative_config = SpeculativeConfig(
        method="ngram",
        num_speculative_tokens=2,
        target_model_config=config.model_config,
        target_parallel_config=config.parallel_config,
    )
    return layers(GPT_OSS_PUZZLE)


def block_outermost(config: Any) -> dict[str, Any]:
    config.cache_config.kv_cache_layout = "BLNHC"
    return layers(GPT_OSS_PUZZLE)


def without_hybrid_groups(config: Any) -> dict[str, Any]:
    config.scheduler_config.disable_hybrid_kv_cache_manager = True
    return layers([(None, 8, 10), (128, 8, 18)])


def with_blocks_counted_by_the_user(config: Any) -> dict[str, Any]:
    config.cache_config.num_gpu_blocks_override = 1 << 20
    return layers(GPT_OSS_PUZZLE)


def attention_free(_: Any) -> dict[str, Any]:
    return {}


@pytest.mark.parametrize(
    "case",
    [
        nemotron_h,
        with_a_connector,
        with_speculation,
        with_blocks_counted_by_the_user,
        block_outermost,
        without_hybrid_groups,
        attention_free,
    ],
)
def test_what_is_not_ours_to_plan_stays_vllms(sized: Any, case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = sized()
    for part, name in (
        (config, "kv_transfer_config"),
        (config, "speculative_config"),
        (config.cache_config, "kv_cache_layout"),
        (config.cache_config, "num_gpu_blocks_override"),
        (config.scheduler_config, "disable_hybrid_kv_cache_manager"),
    ):
        monkeypatch.setattr(part, name, getattr(part, name))  # put back afterwards
    specs = case(config)
    assert plan(config, specs).kv_cache_groups == plan(config, specs, stock=True).kv_cache_groups


def test_the_hook_of_vllm_0_33_plans_the_same_and_registering_again_wraps_nothing_twice(sized: Any) -> None:
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.engine import core
    from vllm_puzzle.serving.model import PuzzleForCausalLM

    config, specs = sized(), layers(GPT_OSS_PUZZLE)
    patched = kv_cache_utils.get_kv_cache_groups, kv_cache_utils.get_kv_cache_configs
    plugin.register()
    assert (kv_cache_utils.get_kv_cache_groups, kv_cache_utils.get_kv_cache_configs) == patched
    assert core.get_kv_cache_configs is patched[1]
    assert PuzzleForCausalLM.get_kv_cache_groups(config, dict(specs)) == plan(config, specs).kv_cache_groups


@pytest.mark.slow
def test_a_served_model_with_our_groups_equals_the_reference_and_vllm_reports_more_concurrency(tmp_path: Path) -> None:
    # 5 full, 9 and 4 windowed layers: vLLM's width is 4 in 6 groups, ours 5 in 4.
    windows = [None, 24, 24, 100, None, 24, 24, 100, 24, None, 24, 24, 100, None, 24, 24, 100, None]
    blocks = [checkpoints.deci_block(2, 32, window=window) for window in windows]
    reference = checkpoints.write_checkpoint(tmp_path / "model", checkpoints.deci_config(blocks))
    chunks = {"max_num_batched_tokens": 32, "block_size": 32, "max_model_len": 512, "enable_prefix_caching": True}
    jobs, rounds = Jobs(tmp_path), [PROMPTS, [PROMPTS[-1]]]
    for name, disabled in (("stock", "1"), ("ours", "0")):
        environment = {planner.DISABLE: disabled}
        arguments: dict[str, Any] = {"rounds": rounds, "prompt_logprobs": None, "environment": environment}
        jobs.add(name, tmp_path / "model", chunks, **arguments)
    outcomes = jobs.run()
    for name in ("stock", "ours"):
        assert_equal_to(reference, outcomes[name])
    assert outcomes["ours"][-1]["num_cached"] == outcomes["stock"][-1]["num_cached"] >= 64
    (line,) = re.findall(r"vllm-puzzle: (\d+) KV-cache groups in place of vLLM's (\d+): (\d+) .*, not (\d+)", jobs.log)
    num_groups, num_stock_groups, pages, stock_pages = map(int, line)
    assert (num_groups, num_stock_groups) == (4, 6)
    stock, ours = map(float, re.findall(r"Maximum concurrency for 512 tokens per request: ([\d.]+)x", jobs.log))
    # Printed with two digits after the point (numbers above 50), and pools hold whole blocks (thousands).
    assert ours / stock == pytest.approx(stock_pages / pages, rel=1e-3)
