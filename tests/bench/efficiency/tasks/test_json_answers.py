"""JSON answers: strict parsing, our subset of JSON Schema against the package jsonschema, right values only."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm_puzzle.bench.efficiency.record import CORRECT, NO_PARSE, WRONG
from vllm_puzzle.bench.efficiency.tasks import json_schema
from vllm_puzzle.bench.efficiency.tasks.json_answers import Typed, build, pocket
from vllm_puzzle.bench.efficiency.tasks.registry import find_task

DIGIT = {"type": "integer", "minimum": 0, "maximum": 9}
SCHEMAS = [
    DIGIT,
    {"type": "boolean"},
    {"type": "number"},
    {"type": "string", "enum": ["a", "b"]},
    {"type": "string", "pattern": "^[ab]+$"},
    {"enum": [1, True, None]},
    {"type": "array", "items": DIGIT, "minItems": 1, "maxItems": 2},
    {"type": "object", "properties": {"a": DIGIT}, "required": ["a"], "additionalProperties": False},
    {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "string"}}}, "required": ["b"]},
]
SCALARS = (
    st.none() | st.booleans() | st.integers(-2, 11) | st.sampled_from([0.5, 1.0, 9.0]) | st.text("abc", max_size=3)
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
)


@given(VALUES, st.sampled_from(SCHEMAS))
def test_fits_says_what_the_package_jsonschema_says(value: Any, schema: dict[str, Any]) -> None:
    assert json_schema.fits(value, schema) == jsonschema.Draft202012Validator(schema).is_valid(value)


@given(VALUES)
def test_a_value_equals_itself_after_a_trip_through_text(value: Any) -> None:
    assert json_schema.equal(json_schema.parse(f" \n{json.dumps(value)}\n"), value)


@pytest.mark.parametrize(
    "reply",
    ["", "7", "```json\n{}\n```", "Answer: {}", "{} {}", "{'a': 1}", '{"a": NaN}', '{"a": 1, "a": 1}', "[" * 9999],
)
def test_what_is_not_the_object_is_not_right(reply: str) -> None:
    question = build("t", [Typed("1+1", "a", 2, DIGIT, 0.1)], 1, True)
    assert question.grade(reply or "x") in ((NO_PARSE,) if reply != "7" else (WRONG,))


def test_valid_json_is_right_only_under_the_schema_and_with_the_value() -> None:
    parts = [Typed("1+1", "a", 2, DIGIT, 0.1), Typed("sorted", "b", [1, 2], {"type": "array", "items": DIGIT}, 0.5)]
    question = build("t", parts, 2, True)
    assert question.grade('{"b_2": [1, 2], "a_1": 2}') == CORRECT
    assert question.grade('{"b_2": [1, 2], "a_1": 2.0}') == CORRECT
    for wrong in (
        '{"a_1": 2, "b_2": [2, 1]}',
        '{"a_1": 2}',
        '{"a_1": 2, "b_2": [1, 2], "c": 0}',
        '{"a_1": "2", "b_2": [1, 2]}',
    ):
        assert question.grade(wrong) == WRONG
    assert question.chance == pytest.approx(0.05)


def test_the_schema_goes_into_the_request_only_where_it_is_enforced() -> None:
    enforced, prompted = pocket("enforced", 9, 1), pocket("prompted", 9, 1)
    for one, other in zip(enforced, prompted, strict=True):
        assert one.messages == other.messages and other.fields == {}
        schema = one.fields["response_format"]["json_schema"]["schema"]
        jsonschema.Draft202012Validator.check_schema(schema)
        assert json.dumps(schema) in one.messages[0]["content"]
        assert one.digest != other.digest


@pytest.mark.parametrize("name", ["json-pocket", "format"])
def test_every_question_of_the_task_takes_one_value_and_no_other(name: str) -> None:
    for question in find_task(name).questions(60, 3):
        schema, value = (cell.cell_contents for cell in question.grader.__closure__ or ())
        assert json_schema.fits(value, schema)
        assert question.grade(json.dumps(value)) == CORRECT
        assert question.grade("no idea") == NO_PARSE
        assert question.grade("{}") == WRONG
