"""The plan from a matrix: caps, cuts, counts; its table, JSON and picture; the data; the command from end to end."""

from __future__ import annotations

import json
import random
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import checkpoints
import families
import pytest
from PIL import Image
from vllm_puzzle.model_configs.ffn_fusion import ffn_bytes, plan_fusion, read_fusion
from vllm_puzzle.model_configs.formats import read_model
from vllm_puzzle.model_configs.inspect_model import load_record
from vllm_puzzle.model_configs.json_values import read_object
from vllm_puzzle.model_configs.schema import ConfigError, ModelRecord
from vllm_puzzle.serving import cli
from vllm_puzzle.serving.fuse import data, heat_map, plan, report
from vllm_puzzle.serving.fuse.checkpoint import CheckpointTensors
from vllm_puzzle.serving.preflight import POCKET
from vllm_puzzle.serving.tokenizer_folder import load_tokenizer

PUZZLE = POCKET / "puzzle"
EMBEDDING = "model.embed_tokens.weight"
SUMS = [(a, b) for a in range(6) for b in range(3)]


def ffn_run(*widths: int) -> ModelRecord:
    """One layer with attention, then a run of FFNs."""
    blocks = [checkpoints.deci_block(1, 32), *(checkpoints.deci_block(None, width) for width in widths)]
    return read_model(checkpoints.deci_config(blocks))


def checkpoint_of(folder: Path) -> CheckpointTensors:
    config = read_object(folder / "config.json")
    return CheckpointTensors(folder, read_model(config), config)


def matrix_of(count: int, distances: dict[tuple[int, int], float] | None = None) -> list[list[float | None]]:
    """Zero for every pair that is not named."""
    named = distances or {}
    return [[named.get((i, j), 0.0) if i < j else None for j in range(count)] for i in range(count)]


def random_matrix(rng: random.Random, count: int) -> list[list[float | None]]:
    return [[rng.choice((0.1, 0.2, 0.3, 0.4)) if i < j else None for j in range(count)] for i in range(count)]


@pytest.mark.parametrize(
    ("strong", "text"),
    [((1, 2), "2-4"), ((2, 3), "1-2,3-4"), ((3, 4), "1-3"), ((1, 4), "1-2,3-4")],
)
def test_a_cap_cuts_a_run_where_its_blocks_need_each_other_most(strong: tuple[int, int], text: str) -> None:
    record = ffn_run(32, 32, 32, 32, 32)  # layers 1 to 5, of which 5 is left out
    distances = {(i, j): 0.1 for i in range(6) for j in range(i + 1, 6)} | {strong: 0.5}
    found = plan.plan(record, matrix_of(6, distances), ffn_bytes(record, 96), "own")  # three fit, four do not
    assert found.text == text


def test_the_sum_decides_where_the_greatest_distance_does_not() -> None:
    record = ffn_run(32, 32, 32, 32, 32)
    # 0.4 is inside whatever the cut (1-2 and 3-4 are neighbours on both sides of it); the rest differs.
    distances = {(1, 2): 0.4, (3, 4): 0.4, (2, 3): 0.4, (1, 3): 0.1, (2, 4): 0.3}
    found = plan.plan(record, matrix_of(6, distances), ffn_bytes(record, 96), "own")
    sums = {"2-4": 0.4 + 0.4 + 0.3, "1-2,3-4": 0.4 + 0.4, "1-3": 0.4 + 0.4 + 0.1}
    assert found.text == min(sums, key=lambda text: sums[text]) == "1-2,3-4"


def test_cuts_are_the_best_of_all_possible_ones() -> None:
    rng = random.Random(3)
    for _ in range(150):
        count = rng.randint(1, 7)
        sizes = {layer: rng.randint(1, 4) for layer in range(count)}
        cap, matrix = rng.randint(4, 12), random_matrix(rng, count)

        def cost(groups: list[tuple[int, ...]], matrix: list[list[float | None]] = matrix) -> tuple[int, float, float]:
            inside = [[matrix[i][j] or 0.0 for i, j in combinations(group, 2)] for group in groups]
            flat = [d for distances in inside for d in distances]
            return len(groups), max(flat, default=0.0), round(sum(flat), 9)

        options = []
        for number in range(count):
            for cuts in combinations(range(1, count), number):
                ends = [0, *cuts, count]
                groups = [tuple(range(a, b)) for a, b in pairwise(ends)]
                if all(sum(sizes[layer] for layer in group) <= cap for group in groups):
                    options.append(cost(groups))
        found = plan.cut(tuple(range(count)), sizes, cap, matrix)
        assert [layer for group in found for layer in group] == list(range(count))
        assert all(sum(sizes[layer] for layer in group) <= cap for group in found)
        assert cost(found) == min(options)


def test_an_ffn_over_the_cap_stays_alone_and_ends_what_it_stands_in() -> None:
    record = ffn_run(32, 32, 640, 32, 32, 32)
    found = plan.plan(record, matrix_of(7), ffn_bytes(record, 64), "last")
    assert found.text == "1-2,4-5"
    assert [ffn.norm for ffn in found.ffns] == ["last", "last"]
    assert plan.plan(record, matrix_of(7), ffn_bytes(record, 32), "own").text == "off"


def test_empty_layers_are_passed_over() -> None:
    blocks = [checkpoints.deci_block(1, 32)] + [checkpoints.deci_block(None, w) for w in (32, None, 32, None, 32)]
    record = read_model(checkpoints.deci_config(blocks))
    found = plan.plan(record, [[0.1 if i < j else None for j in range(6)] for i in range(6)], 2**30, "own")
    assert found.text == "1-3"
    assert found.ffns[0].layers == (1, 3)


@pytest.mark.parametrize(
    ("width", "strong", "text"), [(107_520, (45, 46), "42-50,53-69"), (107_519, (45, 46), "42-45,46-50,53-69")]
)
def test_the_published_49b_is_fused_as_in_the_paper_until_the_cap_forbids_it(
    root: Path, width: int, strong: tuple[int, int], text: str
) -> None:
    record = load_record(root / "model_configs" / "published" / "llama-3.3-nemotron-super-49b-v1.json")
    cap = ffn_bytes(record, width)  # layers 42 to 50 have 107,520 columns together
    found = plan.plan(record, matrix_of(len(record.layers), {strong: 0.9}), cap, "own")
    assert found.text == text


def test_the_gain_is_counted_from_the_records_and_the_files() -> None:
    record = load_record(PUZZLE)
    checkpoint = checkpoint_of(PUZZLE)
    fusion = plan_fusion(record, read_fusion("5-6"))
    found = plan.gain(record, fusion, checkpoint.stored_bytes)
    assert (found.steps_removed, found.ffn_steps) == (1, 7)
    assert (found.launches_removed, found.all_reduces_removed) == (4, 1)
    # Widths 384, 384, 256, 256, none, 384, 256, 128; three matrices of 128 channels in 2 bytes.
    assert found.fused_ffn_bytes == 3 * 128 * 2 * (384 + 256)
    assert found.ffn_bytes == 3 * 128 * 2 * 2048
    assert found.weight_bytes == sum(checkpoint.stored_bytes.values())


def test_of_experts_only_the_chosen_ones_are_read(tmp_path: Path) -> None:
    checkpoints.write_checkpoint(tmp_path, families.FAMILIES["qwen3_moe"])
    checkpoint = checkpoint_of(tmp_path)
    found = plan.gain(checkpoint.record, plan_fusion(checkpoint.record, read_fusion("auto")), checkpoint.stored_bytes)
    # Four layers with experts of 64 channels in float32, and each one's router; layer 2 has none, layer 3 others.
    usual, other = 2 * 3 * 64 * 32 + 4 * 64, 3 * 3 * 64 * 64 + 6 * 64
    assert found.ffn_bytes == 4 * (3 * usual + other)
    assert found.weight_bytes < sum(checkpoint.stored_bytes.values()) - checkpoint.stored_bytes[EMBEDDING]


def test_an_estimate_needs_the_users_own_rates() -> None:
    gain = plan.Gain(10, 50, 0, 0, 8 * 10**9)
    assert plan.Rates(8).saved_us(gain) is None
    assert plan.Rates(8, 1000.0).weights_us(gain) == 1000.0  # a GB over 1000 GB/s
    assert plan.Rates(1, None, 2.0).saved_us(gain) == 80.0
    assert plan.Rates(8, None, 2.0, 15.0).saved_us(gain) == 80.0 + 150.0
    assert plan.Rates(1, None, None, 15.0).saved_us(gain) == 0.0


# --- report and picture --------------------------------------------------------------------------------------------


def report_of(rates: plan.Rates, cap: int = 2**30, norm: str = "own") -> report.Report:
    record, matrix = load_record(PUZZLE), random_matrix(random.Random(5), 8)
    fusion = plan.plan(record, matrix, cap, norm)
    provenance = {
        "model": "puzzle", "data": "a.txt", "num_tokens": 1234, "dtype": "float32", "config_sha256": "abc",
    }  # fmt: skip
    gain = plan.gain(record, fusion, checkpoint_of(PUZZLE).stored_bytes)
    return report.Report(record, matrix, fusion, norm, cap, gain, rates, provenance)


def test_the_table_ends_with_the_flags_and_estimates_nothing_unasked() -> None:
    text = report.format_report(report_of(plan.Rates()))
    assert text.splitlines()[-1] == "--puzzle-ffn-fusion 5-6"
    assert "estimate" not in text
    assert "layer 7 stays as it is: last of its run" in text
    text = report.format_report(report_of(plan.Rates(2, 100.0, 3.0, 10.0), norm="last"))
    assert text.splitlines()[-1] == "--puzzle-ffn-fusion 5-6 --puzzle-ffn-fusion-norm last"
    assert "estimate, not measured         22.0 µs less per step = 4 launches · 3 µs + 1 all-reduces · 10 µs" in text
    text = report.format_report(report_of(plan.Rates(), cap=1000))
    assert text.splitlines()[-1] == "--puzzle-ffn-fusion off"
    assert "layer 5 stays as it is: no partner under the cap" in text


def test_the_json_holds_the_plan_and_gives_the_matrix_back(tmp_path: Path) -> None:
    made, file = report_of(plan.Rates()), tmp_path / "plan.json"
    file.write_text(json.dumps(made.to_json()))
    written = json.loads(file.read_text())
    again = plan_fusion(made.record, read_fusion(written["puzzle_ffn_fusion"]))
    assert again == made.fusion
    distance = made.matrix[5][6]
    assert written["runs"] == [
        {"layers": [5, 6], "widths": [384, 256], "gib": ffn_bytes(made.record, 640) / 2**30, "max_distance": distance,
         "max_between": [5, 6], "sum_distance": distance}
    ]  # fmt: skip
    matrix, provenance = report.read_matrix(file, 8, "abc")
    assert (matrix, provenance) == (made.matrix, made.provenance)
    with pytest.raises(ConfigError, match="found the plan of another config"):
        report.read_matrix(file, 8, "abd")
    with pytest.raises(ConfigError, match="found no plan of 9 layers"):
        report.read_matrix(file, 9, "abc")


@pytest.mark.parametrize("count", [1, 2, 8, 80, 162])
def test_the_heat_map_is_a_png_that_shows_every_pair_and_outlines_every_fused_ffn(tmp_path: Path, count: int) -> None:
    matrix = random_matrix(random.Random(count), count)
    groups = [(count // 2, count - 1)] if count > 2 else []
    heat_map.write_heat_map(tmp_path / "a.png", matrix, groups, "a model with a name " * 9)
    image = Image.open(tmp_path / "a.png")
    image.load()
    assert (image.format, image.size) == ("PNG", heat_map.image_size(count))
    cell, greatest = heat_map.cell_size(count), max((d or 0.0 for row in matrix for d in row), default=0.0)

    def pixel(i: int, j: int, dx: int, dy: int) -> tuple[int, ...]:
        return image.getpixel((heat_map.LEFT + j * cell + dx, heat_map.TOP + i * cell + dy))

    for i, row in enumerate(matrix):
        for j, distance in enumerate(row):
            inside = pixel(i, j, cell // 2 if cell < 40 else 5, cell // 2 if cell < 40 else 5)  # beside the number
            expected = heat_map.NO_PAIR if distance is None else heat_map.colour(distance, greatest)
            assert inside == expected
    for group in groups:
        assert pixel(group[0], group[0], 0, 0) == pixel(group[-1], group[-1], cell - 1, cell - 1) == heat_map.OUTLINE
    assert (tmp_path / "a.png").stat().st_size < 100_000


def test_colours_darken_from_nothing_to_the_greatest_distance() -> None:
    light = [sum(heat_map.colour(step / 50, 1.0)) for step in range(51)]
    assert light == sorted(light, reverse=True)
    assert heat_map.colour(0.0, 0.0) == heat_map.STOPS[0]
    assert heat_map.colour(2.0, 1.0) == heat_map.STOPS[-1]


# --- data and command ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> data.Tokenizer:
    return load_tokenizer(PUZZLE, "model")


def read(tokenizer: data.Tokenizer, file: Path, text: str | bytes, max_tokens: int = 1000) -> list[str]:
    """What a file's sequences say; one byte is one token here."""
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    found = data.read_data(file, tokenizer, max_tokens, 16, 272)
    assert found.num_tokens == sum(map(len, found.sequences)) <= max_tokens
    return [tokenizer.decode(list(ids)) for ids in found.sequences]  # type: ignore[attr-defined]


def test_data_of_every_form_is_read(tokenizer: data.Tokenizer, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "1+2"}, {"role": "assistant", "content": "3"}]
    lines = [
        {"text": "abc"},
        {"prompt": "ab", "completion": "cd"},
        {"prompt": "xyz"},
        {"messages": turns},
        {"prompt": turns[:1], "completion": turns[1:]},
    ]
    found = read(tokenizer, tmp_path / "a.jsonl", "\n\n".join(map(json.dumps, lines)))
    chat = "<|user|>1+2<|end|><|assistant|><think></think>3<|end|>"
    assert found == ["abc", "abcd", "xyz", chat, chat]
    assert read(tokenizer, tmp_path / "a.txt", '{"text": 1}\nä') == ['{"text": 1}\nä']
    long = "".join(map(str, range(30)))
    assert read(tokenizer, tmp_path / "b.txt", long) == [long[:16], long[16:32], long[32:48], long[48:]]
    assert read(tokenizer, tmp_path / "b.txt", long, max_tokens=20) == [long[:16], long[16:20]]
    assert read(tokenizer, tmp_path / "c.jsonl", '{"text": "abc"}\n{"text": "defg"}\nno json', 5) == ["abc", "de"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"text": "a"}\nplain', r"a.jsonl, line 2: found 'plain', allowed: an object with"),
        ("a.jsonl", '{"content": "a"}', r"line 1: found keys content, allowed: an object with"),
        ("a.jsonl", "[1, 2]", r"line 1: found \[1, 2\], allowed: an object with"),
        ("a.jsonl", '{"text": 5}', r"line 1: found keys text, allowed"),
        ("a.jsonl", '{"messages": []}', r"line 1: found keys messages, allowed"),
        ("a.jsonl", '{"prompt": "a", "completion": 5}', r"line 1: found keys prompt, completion, allowed"),
        ("a.jsonl", '{"messages": [{"role": "oracle", "content": "a"}]}', r"the chat template refuses \(role 'oracle'"),
        ("a.txt", "", "found no text in .*a.txt"),
        ("a.jsonl", "\n", "found no text in .*a.jsonl"),
        ("a.txt", b"\xff\xfe", "which is not UTF-8"),
        ("a.jsonl", b'{"text": "\xff"}', "which is not UTF-8"),
    ],
)
def test_data_that_is_none_gives_one_clear_line(
    tokenizer: data.Tokenizer, tmp_path: Path, name: str, text: str | bytes, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        read(tokenizer, tmp_path / name, text)
    assert "\n" not in str(caught.value)


def test_a_token_beyond_the_vocabulary_is_refused(tokenizer: data.Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc")
    with pytest.raises(ConfigError, match="found token 99, allowed: below the model's 98"):
        data.read_data(tmp_path / "a.txt", tokenizer, 9, 9, 98)


def fuse(*arguments: object) -> int:
    return cli.main(["fuse", *map(str, arguments)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "fuse: found nothing, allowed: plan"),
        (("plot",), "fuse: found 'plot', allowed: plan"),
        (("plan",), "the following arguments are required: MODEL"),
        (("plan", PUZZLE, "--colour", "red"), "unrecognized arguments: --colour red"),
        (("plan", "/nowhere"), "model /nowhere: found no such directory"),
        (("plan", PUZZLE), "flag --data: found nothing, allowed: a JSONL or text file"),
        (("plan", PUZZLE, "--data", "/nowhere"), "flag --data: found /nowhere (No such file or directory)"),
        (("plan", PUZZLE, "--data", "/"), "flag --data: found / (Is a directory)"),
        (("plan", PUZZLE, "--dtype", "int4"), "flag --dtype: found 'int4', allowed: float32, bfloat16"),
        (("plan", PUZZLE, "--norm", "first"), "flag --norm: found 'first', allowed: own, last"),
        (("plan", PUZZLE, "--max-gib", "-1"), "flag --max-gib: found '-1', allowed: a number above 0"),
        (("plan", PUZZLE, "--max-gib", "nan"), "flag --max-gib: found 'nan', allowed: a number above 0"),
        (("plan", PUZZLE, "--data", "x", "--max-tokens", "0"), "flag --max-tokens: found '0', allowed: an integer of"),
        (("plan", PUZZLE, "--launch-us", "fast"), "flag --launch-us: found 'fast', allowed: a number above 0"),
        (("plan", PUZZLE, "--all-reduce-us", "9"), "flag --all-reduce-us: found with one GPU"),
        (("plan", PUZZLE, "--out", "/nowhere/a.json"), "flag --out: found /nowhere/a.json, allowed: a .json file"),
        (("plan", PUZZLE, "--out", "a.txt"), "flag --out: found a.txt, allowed: a .json file"),
        (("plan", PUZZLE, "--matrix", "/nowhere"), "flag --matrix: found no file /nowhere"),
    ],
)
def test_a_mistake_is_one_line_and_status_one(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: tuple[Any, ...], message: str
) -> None:
    extra = () if "--out" in arguments or len(arguments) < 2 else ("--out", tmp_path / "plan.json")
    assert fuse(*arguments, *extra) == 1
    out, error = capsys.readouterr()
    assert out == ""
    assert error.count("\n") == 1
    assert message in error
    assert not list(tmp_path.iterdir())


def test_a_model_that_the_reference_does_not_define_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(families.UNSERVED["mamba"]))
    (tmp_path / "a.txt").write_text("abc")
    assert fuse("plan", tmp_path, "--data", tmp_path / "a.txt", "--out", tmp_path / "plan.json") == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_a_folder_that_names_remote_code_is_planned_without_it_and_not_without_a_tokenizer(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model, file = tmp_path / "model", tmp_path / "plan.json"
    config = checkpoints.deci_config(checkpoints.ALL_KINDS[:3], vocab_size=272)
    assert "auto_map" in config
    checkpoints.write_checkpoint(model, config)
    (tmp_path / "a.txt").write_text("some words")
    arguments = ("plan", model, "--data", tmp_path / "a.txt", "--out", file)
    assert fuse(*arguments) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"model {model}: found no tokenizer" in error
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).write_text((PUZZLE / name).read_text())
    assert fuse(*arguments) == 0
    out, error = capsys.readouterr()
    assert out.startswith("model: 3 layers, 10 tokens of a.txt, float32\n\nnothing to fuse: ")
    assert out.splitlines()[-1] == "--puzzle-ffn-fusion off"


def test_the_pocket_model_is_planned_from_end_to_end_and_again_from_its_matrix(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = "".join(f"<|user|>{a}+{b}<|end|><|assistant|><think>{a}+{b}={a + b}</think>{a + b}<|end|>" for a, b in SUMS)
    (tmp_path / "sums.txt").write_text(text)
    first, second = tmp_path / "plan.json", tmp_path / "again.json"
    assert fuse("plan", PUZZLE, "--data", tmp_path / "sums.txt", "--max-tokens", 250, "--out", first) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "--puzzle-ffn-fusion 5-6"
    written = json.loads(first.read_text())
    assert written["provenance"]["num_tokens"] == 250
    assert written["provenance"]["model"] == "puzzle"
    assert str(tmp_path) not in first.read_text()
    assert plan_fusion(load_record(PUZZLE), read_fusion(written["puzzle_ffn_fusion"])).text == "5-6"
    distances = [d for row in written["matrix"] for d in row if d is not None]
    assert len(distances) == 28
    assert all(0 < d < 2 for d in distances)
    with Image.open(tmp_path / "plan.png") as image:
        assert image.size == heat_map.image_size(8)
    assert fuse("plan", PUZZLE, "--matrix", first, "--max-gib", 1e-6, "--out", second) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "--puzzle-ffn-fusion off"
    assert json.loads(second.read_text())["matrix"] == written["matrix"]
