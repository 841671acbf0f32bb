"""What is measured: cases, suites and the parts of them that can be asked for."""

from __future__ import annotations

from dataclasses import replace

import pytest
from vllm_puzzle.bench.engine.case import DECODE, FIT, FULL, PREFILL, Case, EngineVariant, Load, Shape, parse_shape
from vllm_puzzle.bench.engine.model_folder import record_of
from vllm_puzzle.bench.engine.suites import SUITES, Suite, find_suite
from vllm_puzzle.model_configs.schema import ConfigError, MoE

VARIANT = EngineVariant("a", "llama-h512", flags={"max_num_batched_tokens": 108})


@pytest.mark.parametrize("text", ["128", "128/", "/8", "0/8", "128x8", "1/-1", "9999999/1"])
def test_a_wrong_shape_is_one_line(text: str) -> None:
    with pytest.raises(ConfigError, match="allowed: ") as error:
        parse_shape(text)
    assert "\n" not in str(error.value)


def test_a_shape_reads_back_as_it_is_named() -> None:
    assert parse_shape(" 128/1024 ") == Shape(128, 1024) == parse_shape(Shape(128, 1024).name)
    assert Shape(128, 1024).total == 1152


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EngineVariant("A b", "m"), "key `name`: found 'A b'"),
        (lambda: EngineVariant("a", "m", weights="int3"), "key `weights`: found 'int3', allowed: stored, bf16"),
        (lambda: EngineVariant("a", "m", kv_dtype="int8"), "key `kv_dtype`: found 'int8', allowed: auto, bf16, fp8"),
        (lambda: Load(Shape(1, 1), ()), "key `batches`: found \\(\\)"),
        (lambda: Load(Shape(1, 1), (2, 2)), "key `batches`"),
        (lambda: Load(Shape(1, 1), (-1,)), "key `batches`: found -1"),
        (lambda: Load(Shape(1, 1), (1,), "other"), "key `role`: found 'other'"),
        (lambda: Suite("s", "", (VARIANT, VARIANT), ()), "key `variants`"),
        (lambda: Suite("s", "", (VARIANT,), (), pairs=(("a", "b"),)), "key `pairs`: found \\['b'\\]"),
    ],
)
def test_wrong_descriptions_are_refused_by_name(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(ConfigError, match=message):
        make()


def test_short_replies_are_repeated_and_decoding_gets_the_steps_of_the_prompts() -> None:
    full = Case(VARIANT, Shape(128, 100), 8, FULL).request(8, 5)
    assert full == {
        "input_len": 128, "output_len": 100, "num_requests": 24, "max_concurrency": 8, "seed": 5, "temperature": 0.0
    }  # fmt: skip
    assert Case(VARIANT, Shape(128, 1024), 8).request(8, 0)["num_requests"] == 8
    # 8 requests decode beside the chunks: 8 · 250 tokens of prompts, 100 a step.
    decode = Case(VARIANT, Shape(250, 7), 8, DECODE).request(8, 0)
    assert (decode["output_len"], decode["num_requests"]) == (7 + 20, 8)
    assert Case(VARIANT, Shape(250, 1), 2, PREFILL).request(2, 0)["num_requests"] == 6
    assert Case(VARIANT, Shape(8, 32), 16, waves=1).request(16, 0)["num_requests"] == 16


def test_a_warm_up_reads_few_tokens() -> None:
    warm = Case(VARIANT, Shape(98304, 512), FIT, DECODE).warm_up(80, 1)
    assert (warm["num_requests"], warm["output_len"]) == (1, 8)
    assert Case(VARIANT, Shape(128, 1), 16).warm_up(16, 1)["num_requests"] == 16


@pytest.mark.parametrize("has_gpu", [False, True])
@pytest.mark.parametrize("name", list(SUITES))
def test_every_suite_can_be_listed_and_its_requests_fit_its_engines(name: str, has_gpu: bool) -> None:
    suite = find_suite(name, has_gpu)
    for variant in suite.variants:
        cases = suite.cases(variant)
        assert len({case.name for case in cases}) == len(cases) > 0
        for case in cases:
            batch = case.batch or variant.flags["max_num_seqs"]
            request = case.request(batch, 0)
            # As many requests as fit never fill the longest length: what they take, they take together.
            longest = request["input_len"] + (case.shape.output_len if case.batch == FIT else request["output_len"])
            assert longest <= variant.flags["max_model_len"], case.name
            assert batch <= variant.flags["max_num_seqs"], case.name
    assert (suite.device == "cpu") == (name == "cpu-smoke" or (name == "overhead" and not has_gpu))


def test_models_with_experts_are_evened_and_sampled_and_only_those() -> None:
    for name in SUITES:
        for variant in find_suite(name, True).variants:
            has_experts = any(isinstance(layer.ffn, MoE) for layer in record_of(variant).layers)
            assert variant.is_evened == has_experts == find_suite(name, True).has_routing, variant.name
            assert Case(variant, Shape(8, 8), 1).request(1, 0)["temperature"] == float(has_experts)


def test_an_unknown_suite_is_one_line() -> None:
    with pytest.raises(
        ConfigError, match=r"found suite 'super', allowed: overhead, super49, fusion, gptoss, nano3, cpu"
    ):
        find_suite("super", True)


def test_a_part_of_a_suite_keeps_its_engines_settings() -> None:
    whole = find_suite("super49", True)
    part = whole.choose(("49b-fp8",), (Shape(128, 1024),), (256,))
    (variant,) = part.variants
    assert variant.flags == whole.variants[0].flags
    assert [case.name for case in part.cases(variant)] == ["49b-fp8 128/1024 b256"]
    assert whole.choose((), (), ()) == whole
    # A batch that only some shapes have leaves the others out.
    assert [load.batches for load in whole.choose((), (), (1, 64)).loads] == [(1, 64), (64,), (1, 64)]


@pytest.mark.parametrize(
    ("only", "shapes", "batches", "message"),
    [
        (("x",), (), (), r"`--only`: found 'x', allowed: 49b-fp8, 70b-fp8"),
        ((), (Shape(1, 2),), (), r"`--shapes`: found '1/2', allowed: 128/128, 128/1024, 2048/128"),
        ((), (), (3,), r"`--batches`: found '3', allowed: 1, 16, 64, 128, 256"),
        ((), (Shape(128, 1024),), (1,), r"found no case of these shapes and batches"),
    ],
)
def test_a_part_that_a_suite_does_not_have_is_refused(
    only: tuple[str, ...], shapes: tuple[Shape, ...], batches: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        find_suite("super49", True).choose(only, shapes, batches)


def test_of_a_comparison_both_engines_are_needed() -> None:
    suite = find_suite("overhead", False)
    assert suite.choose(("stock-h512", "ours-h512"), (), ()).pairs == (("stock-h512", "ours-h512"),)
    with pytest.raises(ConfigError, match="allowed: both of stock-h512,ours-h512 or stock-h1024,ours-h1024"):
        suite.choose(("ours-h512",), (), ())


def test_our_class_and_vllms_get_the_same_engine_in_the_overhead_suite() -> None:
    for has_gpu in (False, True):
        suite = find_suite("overhead", has_gpu)
        variants = {variant.name: variant for variant in suite.variants}
        for first, second in suite.pairs:
            assert replace(variants[second], name=first, as_decilm=False) == variants[first]
            assert variants[second].as_decilm
