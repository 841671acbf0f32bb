"""Flags and files → arms, loads, sweeps and mock settings; mistakes in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from vllm_puzzle.bench.efficiency.arm import CLOSED, CONSTANT, GAMMA, POISSON, TRACE, Arm, Load, thinking_fields
from vllm_puzzle.bench.efficiency.flags import arm_from, load_from, make_parser, tokenizer_from
from vllm_puzzle.bench.efficiency.mock import behaviour_from
from vllm_puzzle.bench.efficiency.mock_behaviour import Behaviour
from vllm_puzzle.bench.efficiency.question import work_list
from vllm_puzzle.bench.efficiency.record import CORRECT, EMPTY, NO_PARSE, WRONG
from vllm_puzzle.bench.efficiency.sweep_config import configured, listed_arms, listed_loads
from vllm_puzzle.bench.efficiency.tasks.registry import TASKS, find_task
from vllm_puzzle.bench.pocket_tasks import CELLS
from vllm_puzzle.model_configs.schema import ConfigError

PARSER = make_parser("run", "")


def arm(*flags: str) -> Arm:
    return arm_from(PARSER.parse_args(["--out", "out", *flags]), "model")


def load(*flags: str) -> Load:
    return load_from(PARSER.parse_args(["--out", "out", *flags]))


@pytest.mark.parametrize(
    ("flags", "name", "fields", "budget"),
    [
        ([], "auto", {}, None),
        (["--thinking", "off"], "off", {"reasoning_effort": "none"}, None),
        (["--thinking", "on"], "on", {"chat_template_kwargs": {"enable_thinking": True}}, None),
        (["--effort", "low"], "effort-low", {"reasoning_effort": "low"}, None),
        (["--budget", "32"], "budget-32", {"thinking_token_budget": 32}, 32),
        (["--effort", "high", "--budget", "0"], "effort-high-budget-0",
         {"reasoning_effort": "high", "thinking_token_budget": 0}, 0),
        (["--chat-template-kwargs", '{"low_effort": true}', "--thinking", "on", "--label", "x"], "x",
         {"chat_template_kwargs": {"low_effort": True, "enable_thinking": True}}, None),
        (["--extra-body", '{"include_reasoning": true, "chat_template_kwargs": {"a": 1}}', "--thinking", "on"], "on",
         {"include_reasoning": True, "chat_template_kwargs": {"a": 1, "enable_thinking": True}}, None),
    ],
)  # fmt: skip
def test_a_mode_becomes_request_fields(flags: list[str], name: str, fields: dict[str, Any], budget: int | None) -> None:
    found = arm(*flags)
    assert (found.name, found.fields, found.budget) == (name, fields, budget)
    body = found.body([{"role": "user", "content": "q"}], {"response_format": {"type": "json_object"}})
    for key, value in {**fields, "response_format": {"type": "json_object"}, "model": "model", "stream": True}.items():
        assert body[key] == value
    assert body["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}


def test_the_address_is_the_same_with_and_without_v1() -> None:
    for base in ("http://h:1", "http://h:1/", "http://h:1/v1", "http://h:1/v1/"):
        found = arm("--base-url", base)
        assert (found.root, found.url) == ("http://h:1", "http://h:1/v1/chat/completions")
    assert arm("--no-continuous-usage").body([], {})["stream_options"] == {"include_usage": True}


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        (("off", "low", None), "thinking off beside effort low"),
        (("off", None, 8), "beside effort None and budget 8"),
        (("on", "none", None), "thinking on beside effort none"),
        (("auto", None, -1), "budget: found -1, allowed: 0 or more"),
        (("maybe", None, None), "thinking: found 'maybe', allowed: on, off, auto"),
    ],
)
def test_modes_that_contradict_themselves_are_refused(mode: tuple[str, str | None, int | None], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        thinking_fields("arm", *mode)


def test_loads_are_named_as_in_vllm_bench() -> None:
    assert load() == Load(CLOSED, concurrency=8)
    assert load("--max-concurrency", "3", "--request-rate", "inf") == Load(CLOSED, concurrency=3)
    assert load("--request-rate", "4") == Load(POISSON, rate=4.0)
    assert load("--request-rate", "4", "--burstiness", "0.5", "--max-concurrency", "9") == Load(
        GAMMA, concurrency=9, rate=4.0, burstiness=0.5
    )
    ramp = load("--ramp-up-strategy", "linear", "--ramp-up-start-rps", "1", "--ramp-up-end-rps", "8", "--constant")
    assert ramp == Load(CONSTANT, ramp="linear", rate_start=1.0, rate_end=8.0)
    names = [each.name for each in (load(), load("--request-rate", "0.5"), ramp)]
    assert names == ["c8", "poisson-0.5", "constant-1to8"]


def test_a_trace_is_read_in_both_spellings(tmp_path: Path) -> None:
    plain, objects, bad = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    plain.write_text("0.5\n\n2\n")
    objects.write_text('{"timestamp": 500, "input_length": 7}\n{"timestamp": 2000}\n')
    for path in (plain, objects):
        assert load("--trace", str(path)) == Load(TRACE, times=(0.5, 2.0))
    for text in ("1\nsoon\n", '{"time": 1}\n', "nan\n"):
        bad.write_text(text)
        with pytest.raises(ConfigError, match=r"line \d: found .*, allowed: seconds or a JSON timestamp"):
            load("--trace", str(bad))


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "burst"}, {"kind": CLOSED}, {"kind": POISSON}, {"kind": POISSON, "rate": 0.0}, {"kind": TRACE},
        {"kind": CLOSED, "concurrency": True}, {"kind": POISSON, "rate": float("nan")},
        {"kind": CLOSED, "concurrency": 1, "ramp": "linear"}, {"kind": POISSON, "ramp": "cubic"},
    ],
)  # fmt: skip
def test_a_load_that_makes_no_sense_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="allowed"):
        Load(**settings)


def sweep_parser() -> Any:
    parser = make_parser("sweep", "")
    for name in ("--thinkings", "--efforts", "--budgets", "--concurrencies", "--request-rates"):
        parser.add_argument(name, default="")
    return parser


def test_a_sweep_lists_arms_and_loads_in_flags_or_in_a_file(tmp_path: Path) -> None:
    parser = sweep_parser()
    flags = ["--out", "o", "--thinkings", "off,on", "--efforts", "low", "--budgets", "0, 32", "--concurrencies", "2,4",
             "--request-rates", "1.5"]  # fmt: skip
    options = parser.parse_args(flags)
    arms = [{"thinking": "off"}, {"thinking": "on"}, {"effort": "low"}, {"budget": 0}, {"budget": 32}]
    assert listed_arms(options) == arms
    closed = [{"max_concurrency": limit, "request_rate": None} for limit in (2, 4)]
    assert listed_loads(options) == [*closed, {"request_rate": 1.5}]
    file = tmp_path / "s.yaml"
    file.write_text(
        "out: results\ntask: repeat\nseed: 5\ngoodput: ['ttft:5']\nextra_body: {a: 1}\n"
        "arms: [{thinking: off}, {budget: 4, temperature: 0.6}]\nloads: [{request_rate: 2}]\n"
    )
    parser = sweep_parser()
    arms, loads = configured(parser, ["--config", str(file)])
    options = parser.parse_args(["--seed", "6"])
    assert (arms, loads) == ([{"thinking": "off"}, {"budget": 4, "temperature": 0.6}], [{"request_rate": 2}])
    # A flag beats the file, and a file gives what would otherwise be required.
    assert (options.seed, options.out, options.task, options.goodput) == (6, Path("results"), "repeat", ["ttft:5"])
    made = [arm_from(options, "m", **changes) for changes in arms]
    assert [(each.name, each.fields, each.sampling) for each in made] == [
        ("off", {"a": 1, "reasoning_effort": "none"}, {}),
        ("budget-4", {"a": 1, "thinking_token_budget": 4}, {"temperature": 0.6}),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense: 1", "found the key 'nonsense', allowed: "),
        ("arms: {a: 1}", "key `arms`: found {'a': 1}, allowed: a list of mappings"),
        ("arms: [{budget: many}]", "key `arms`, key `budget`: found 'many', allowed: a number"),
        ("loads: [{constant: 1}]", "key `constant`: found 1, allowed: true or false"),
        ("thinking: sometimes", "key `thinking`: found 'sometimes', allowed: one of on, off, auto"),
        ("goodput: ttft:5", "key `goodput`: found 'ttft:5', allowed: a list"),
        ("- 1", "found list, allowed: a mapping of flags"),
        ("a: [", "allowed: a YAML file"),
    ],
)
def test_a_mistake_in_a_file_is_named(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as raised:
        configured(sweep_parser(), ["--config", str(file)])
    assert message in str(raised.value) and "\n" not in str(raised.value)


def test_the_mock_is_set_by_file_and_by_words_and_refuses_others(tmp_path: Path) -> None:
    file = tmp_path / "m.yaml"
    file.write_text("prefill: 0.5\nthinking_tokens: [1, 2]\n")
    found = behaviour_from(file, ["prefill=0.25", "usage=none", "accept=[0.5, 0.25]"])
    assert (found.prefill, found.thinking_tokens, found.usage, found.accept) == (0.25, (1, 2), "none", (0.5, 0.25))
    for words, message in (
        (["speed=1"], r"found \['speed'\], allowed: seed, model"),
        (["wrong=2"], "key `wrong`: found 2, allowed: 0 to 1"),
        (["usage=some"], "key `usage`: found 'some', allowed: continuous, end, none"),
        (["bundle=0"], "key `bundle`: found 0"),
        (["prefill"], "found 'prefill', allowed: KEY=VALUE"),
    ):
        with pytest.raises(ConfigError, match=message):
            behaviour_from(None, words)


def test_the_mock_refuses_what_vllm_refuses() -> None:
    for salt in ("a/b", "a@b", "a\\b", "a\0b", "a" * 129):
        with pytest.raises(ValueError, match="cache_salt: found"):
            Behaviour().script({"cache_salt": salt}, 0)
    assert Behaviour().script({"cache_salt": "a-0"}, 0).status == 200


def test_a_tokenizer_counts_without_special_tokens() -> None:
    pocket = Path(__file__).resolve().parents[3] / "model_configs" / "pocket" / "parent"
    count = tokenizer_from(pocket)
    # One byte is one token there.
    assert count is not None and [count(text) for text in ("", "ok", "12+3=15")] == [0, 2, 7]


def test_tasks_have_different_questions_that_do_not_change_with_their_number() -> None:
    for task in (TASKS["pocket"], TASKS["repeat"]):
        few, many = task.questions(30, seed=9), task.questions(130, seed=9)
        assert [question.digest for question in many[:30]] == [question.digest for question in few]
        assert len({question.digest for question in many}) == len({(q.task, q.id) for q in many}) == 130
        assert {question.digest for question in task.questions(30, seed=10)} != {q.digest for q in few}
        assert all(0 <= question.chance < 1 for question in many)
    with pytest.raises(ConfigError, match="task: found 'gsm8k', allowed: pocket, "):
        find_task("gsm8k")


def test_the_pocket_ladder_grades_the_exact_answer_and_tells_wrong_from_none() -> None:
    questions = find_task("pocket").questions(len(CELLS), seed=2)
    assert [(question.task, question.level) for question in questions] != []
    assert {(q.task.removeprefix("pocket-"), q.level) for q in questions} == set(CELLS)
    (sums,) = [q for q in questions if q.task == "pocket-chain" and q.level == 3]
    expression = "".join(letter for letter in sums.messages[0]["content"] if letter in "0123456789+-")
    right = str(eval(expression))
    assert [sums.grade(text) for text in (right, f" {right}\n", "777", f"It is {right}.", "", " ")] == [
        CORRECT, CORRECT, WRONG, NO_PARSE, EMPTY, EMPTY]  # fmt: skip


def test_a_work_list_asks_each_question_once_before_any_twice() -> None:
    questions = find_task("repeat").questions(7, seed=0)
    asks = work_list(questions, 17, seed=3)
    assert [ask.order for ask in asks] == list(range(17))
    assert [ask.repeat for ask in asks] == [0] * 7 + [1] * 7 + [2] * 3
    assert len({ask.question.id for ask in asks[:7]}) == len({ask.question.id for ask in asks[7:14]}) == 7
    assert asks[:7] == work_list(questions, 7, seed=3) and asks != work_list(questions, 17, seed=4)
