"""The value of `puzzle_ffn_fusion` against a model: which FFNs become one, and what is refused in which words."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm_puzzle.model_configs.ffn_fusion import (
    KEY,
    FusionPlan,
    Part,
    attention_free_runs,
    ffn_bytes,
    fuse,
    parallel_ffns,
    plan_fusion,
    read_fusion,
    requested_plan,
)
from vllm_puzzle.model_configs.formats import read_model
from vllm_puzzle.model_configs.inspect_model import load_record
from vllm_puzzle.model_configs.schema import ConfigError, GatedFFN, LayerRecord, ModelRecord
from vllm_puzzle.model_configs.tensors import num_parameters

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "serving"))
from checkpoints import deci_block, deci_config
from families import DECI_MOE

CONFIGS = Path(__file__).resolve().parents[2] / "model_configs" / "published"
SUPER = load_record(CONFIGS / "llama-3.3-nemotron-super-49b-v1.json")
EMPTY = LayerRecord(None, None)


def experts() -> dict[str, Any]:
    block = deci_block(None, 48)
    block["ffn"] |= {"intermediate_size": None, "moe": DECI_MOE}
    return block


def parallel(*blocks: dict[str, Any]) -> dict[str, Any]:
    return {"attention": None, "ffn": None, "parallel_blocks": list(blocks)}


# 0 attention, 1 to 5 free (2 empty), 6 linear map, 7 to 8 free, 9 experts, 10 parallel, 11 linear FFN, 12 to 13 free.
TOY = read_model(
    deci_config(
        [
            deci_block(2, 48), deci_block(None, 33), deci_block(None, None), deci_block(None, 17), deci_block(None, 47),
            deci_block(None, 51), deci_block("linear", 40), deci_block(None, 21), deci_block(None, 95), experts(),
            parallel(deci_block(None, 33), deci_block(None, 17)), deci_block(None, "linear"), deci_block(None, None),
            deci_block(None, 11),
        ]
    )
)  # fmt: skip


def plan(value: Any, record: ModelRecord = TOY) -> FusionPlan:
    return requested_plan(record, {KEY: value})


def refusal(value: Any, record: ModelRecord = TOY) -> str:
    with pytest.raises(ConfigError) as caught:
        plan(value, record)
    message = str(caught.value)
    assert message.startswith(f"model, key `{KEY}`")
    assert "\n" not in message
    assert "found" in message
    assert "allowed" in message
    return message


@pytest.mark.parametrize("value", [None, "off", " off ", {"runs": "off"}, {"runs": "off", "norm": "last"}])
def test_off_changes_nothing(value: Any) -> None:
    assert plan(value) == FusionPlan()
    assert fuse(TOY, plan(value)) == TOY
    assert requested_plan(TOY, {}) == FusionPlan()


def test_the_runs_of_a_model_pass_over_empty_layers_and_end_at_everything_else() -> None:
    assert attention_free_runs(TOY) == ((1, 3, 4, 5), (7, 8), (13,))


def test_a_run_becomes_one_ffn_in_its_last_layer_and_the_other_layers_become_empty() -> None:
    found = plan("1-3+4-5, 7-8")
    assert [ffn.parts for ffn in found.ffns] == [
        (Part(1, 33), Part(3, 17)),
        (Part(4, 47), Part(5, 51)),
        (Part(7, 21), Part(8, 95)),
    ]
    assert [ffn.norm for ffn in found.ffns] == ["own"] * 3
    fused = fuse(TOY, found)
    assert len(fused.layers) == len(TOY.layers)
    expected = {1: EMPTY, 3: GatedFFN(50), 4: EMPTY, 5: GatedFFN(98), 7: EMPTY, 8: GatedFFN(116)}
    for index, layer in enumerate(fused.layers):
        kind = expected.get(index, TOY.layers[index])
        assert layer == (LayerRecord(None, kind) if isinstance(kind, GatedFFN) else kind), index
    # A norm less for each layer that became empty, and not one weight more or less.
    assert num_parameters(TOY) - num_parameters(fused) == 3 * TOY.hidden_size


def test_auto_leaves_the_last_ffn_of_each_run_out() -> None:
    assert plan("auto").text == "1-4"
    assert plan({"runs": "auto", "norm": "last"}).ffns[0].norm == "last"
    assert plan("auto", SUPER).text == "42-50,53-69"


def test_auto_finds_the_runs_of_the_paper_under_a_cap_and_cuts_them_evenly() -> None:
    """FFN Fusion §4.2 fuses 42-50 into one FFN, and 53-69 into two."""
    (first, second) = plan("auto", SUPER).ffns
    assert (first.width, second.width) == (107_520, 87_808)
    auto = read_fusion("auto")
    assert auto is not None
    cut = plan_fusion(SUPER, auto, cap_bytes=ffn_bytes(SUPER, 60_000))
    assert [ffn.width for ffn in cut.ffns] == [35_840, 35_840, 35_840, 42_496, 45_312]
    tight = plan_fusion(SUPER, auto, cap_bytes=ffn_bytes(SUPER, 14_336))
    assert max(ffn.width for ffn in tight.ffns) <= 14_336
    assert all(46 not in ffn.layers for ffn in tight.ffns), "layer 46 alone is over the cap, so it stays as it is"
    assert plan_fusion(SUPER, auto, cap_bytes=1) == FusionPlan()


def test_auto_does_not_join_what_ultra_has_fused_already() -> None:
    """Its four FFNs of up to 425,984 columns lie next to each other but for empty layers."""
    ultra = load_record(CONFIGS / "llama-3.1-nemotron-ultra-253b-v1.json")
    assert (125, 134, 143, 149, 150) in attention_free_runs(ultra)
    assert plan("auto", ultra).text == "100-105"
    assert ffn_bytes(ultra, 425_984) == 3 * 16_384 * 425_984 * 2


def test_a_plans_text_and_its_runs_are_one_and_the_same() -> None:
    for value in ("42-50,53-61+62-69", "auto", "off", "62-69, 42-50"):
        found = plan(value, SUPER)
        assert plan(found.text, SUPER) == found
    assert plan("62-69,42-50", SUPER).text == "42-50,62-69"


@given(st.lists(st.integers(0, 79), min_size=2, max_size=8, unique=True))
def test_any_accepted_plan_keeps_every_weight_once(cuts: list[int]) -> None:
    spans = ",".join(f"{first}-{last}" for first, last in pairwise(sorted(cuts)))
    try:
        found = plan(spans, SUPER)
    except ConfigError:
        return
    fused = fuse(SUPER, found)
    widths = [sum(layer.ffn.intermediate_size for layer in record.layers if layer.ffn) for record in (SUPER, fused)]  # type: ignore[union-attr]
    assert widths[0] == widths[1]
    assert [layer.attention for layer in fused.layers] == [layer.attention for layer in SUPER.layers]


def test_the_sentence_says_what_is_fused_how_and_that_answers_change() -> None:
    sentence = plan({"runs": "1-3,7-8", "norm": "last"}).sentence
    assert "layers 1-3 (2 FFNs, 50 wide), 7-8 (2 FFNs, 116 wide)" in sentence
    assert "last layer's norm" in sentence
    assert "changes what the model answers" in sentence
    assert "each FFN keeps its norm" in plan("1-3").sentence
    dense = read_model(deci_config([deci_block(2, 48)] * 2))
    assert "found no run" in plan("auto", dense).sentence


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("0-3", "run 0-3: found attention in layer 0, allowed: layers without attention that hold a gated FFN"),
        ("0-3", "here 1 to 5; 7 to 8"),
        ("5-7", "run 5-7: found a linear map in layer 6"),
        ("8-9", "run 8-9: found experts in layer 9"),
        ("8-13", "run 8-13: found experts in layer 9"),
        ("10-11", "run 10-11: found parallel blocks in layer 10"),
        ("11-13", "run 11-13: found a linear map in layer 11"),
        ("7-14", "run 7-14: found layer 14, allowed: 0 to 13"),
        ("12-13", "run 12-13: found 1 FFN, allowed: at least 2"),
        ("1-4,3-5", "found layer 3 in two runs, allowed: each layer once"),
        ("1-4,1-4", "found layer 1 in two runs"),
        ("1-3+5-5", "found 5-5, allowed: a lower number before a higher one"),
        ("1-3+7-8", "found 1-3+7-8, allowed: adjacent parts"),
        ("4-5+1-3", "found 4-5+1-3, allowed: adjacent parts"),
        ("5-4", "found 5-4, allowed: a lower number"),
        ("on", "found 'on' in 'on', allowed: off, auto, or runs of layers such as 42-50,53-61+62-69"),
        ("1-3,", "found '' in '1-3,'"),
        ("1-3;4-5", "found '1-3;4-5' in"),
        ("-1-3", "found '-1-3' in"),
        ("1-9999999", "found '1-9999999' in"),
        ("", "found '' in ''"),
        (True, "found True, allowed: off, auto"),
        (5, "found 5, allowed: off, auto"),
        (["1-3"], "found ['1-3'], allowed: off, auto"),
        ("1-3," * 5000, "found '1-3,1-3"),
        ({"norm": "last"}, "found no `runs`"),
        ({"runs": "1-3", "norm": "mean"}, "`norm`: found 'mean', allowed: own, last"),
        ({"runs": "1-3", "norms": "own"}, "found the key 'norms', allowed: `runs`, `norm`"),
        ({"runs": {"runs": "1-3"}}, "found {'runs': '1-3'}, allowed: off"),
    ],
)  # fmt: skip
def test_what_cannot_be_fused_is_refused_in_one_line(value: Any, message: str) -> None:
    assert message in refusal(value)


def test_a_model_without_any_run_says_so() -> None:
    assert "here none" in refusal("0-1", read_model(deci_config([deci_block(2, 48)] * 2)))


def test_parallel_ffns_are_one_ffn_and_blocks_with_anything_else_are_not() -> None:
    free, wide, none = deci_block(None, 33), deci_block(None, 96), deci_block(None, None)
    blocks = [parallel(free, none, wide), parallel(deci_block(1, 32), wide), parallel(none, none), parallel(experts())]
    record = read_model(deci_config([*blocks, deci_block(2, 48), parallel(deci_block(None, "linear"), free)]))
    (ffn,) = parallel_ffns(record).ffns
    assert ffn.parts == (Part(0, 33, 0), Part(0, 96, 2))
    assert [part.prefix for part in ffn.parts] == [f"model.layers.0.parallel_blocks.{block}" for block in (0, 2)]
    assert fuse(record, parallel_ffns(record)).layers == (LayerRecord(None, GatedFFN(129)), *record.layers[1:])
