"""Thousands of seeded odd requests: a plan in the kind's own words, or one line. Nothing else comes out."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from scripted_upstream import COMMON, OWN_FIELDS
from vllm_puzzle.serving.dial.dialects import FIELDS
from vllm_puzzle.serving.dial.request import EFFORTS
from vllm_puzzle.serving.gateway.errors import MESSAGES_PATH, GatewayError
from vllm_puzzle.serving.gateway.kinds import KINDS
from vllm_puzzle.serving.gateway.other_apis import RESPONSES_PATH, translate
from vllm_puzzle.serving.gateway.plan import make_plan
from vllm_puzzle.serving.gateway.probe import Facts

NUM_BODIES = 2_000
VALUES: tuple[Any, ...] = (
    *(None, True, False, -2, -1, 0, 1, 7, 10**12, 2.5, float("inf"), "", "none", "auto", "enabled", "disabled"),
    *(*EFFORTS, [], [1], {}, {"type": "enabled"}, {"effort": "low"}, {"x": {"y": 1}}),
)
TEMPLATES = (None, "{{ messages }}", "{{ enable_thinking }}", "{{ low_effort }} detailed thinking", "{% generation %}")


def bodies(seed: int) -> Iterator[dict[str, Any]]:
    pick = random.Random(seed)

    def some(fields: Mapping[str, Any]) -> dict[str, Any]:
        chosen = pick.sample(list(fields), min(len(fields), pick.choice((0, 1, 1, 2, 3))))
        return {
            name: some(fields[name]) if isinstance(fields[name], dict) and pick.random() < 0.8 else pick.choice(VALUES)
            for name in chosen
        }

    for _ in range(NUM_BODIES):
        messages = pick.choice(([], None, [{"role": "system", "content": "detailed thinking off"}], [4]))
        yield {**some(FIELDS), "messages": messages}


def own_words(kind: str) -> set[str]:
    """Every name that a kind's chat requests may carry at the top."""
    return COMMON | OWN_FIELDS[kind] | {"vllm_xargs", "extra_body", "nvext", "custom_params", "chat_template_kwargs"}


@pytest.mark.parametrize("kind", OWN_FIELDS)
def test_a_chat_request_becomes_the_kinds_own_words_or_one_line(kind: str) -> None:
    refused = planned = 0
    for number, body in enumerate(bodies(seed=3)):
        facts = Facts(KINDS[kind], TEMPLATES[number % len(TEMPLATES)], "", bool(KINDS[kind].budget))
        before = json.dumps(body)
        try:
            plan = make_plan(body, facts)
        except GatewayError as error:
            assert error.status == 400
            assert "\n" not in str(error)
            refused += 1
        else:
            assert set(plan.body) <= own_words(kind), body
            reads = set(body) - {"messages", *own_words(kind)}
            assert not reads & set(plan.body), "another ecosystem's field went on"
            planned += 1
        assert json.dumps(body) == before, "the client's body was changed in place"
    assert min(refused, planned) > NUM_BODIES // 20


@pytest.mark.parametrize("path", [RESPONSES_PATH, MESSAGES_PATH])
def test_the_other_apis_get_their_own_words_or_one_line(path: str) -> None:
    own = {"messages", "reasoning", "chat_template_kwargs", "thinking", "output_config"}
    own |= {"vllm_xargs", "extra_body", "nvext", "custom_params"}
    refused = passed = 0
    for number, body in enumerate(bodies(seed=4)):
        kind = KINDS[list(KINDS)[number % len(KINDS)]]
        try:
            sent = translate(body, path, Facts(kind, None, "", bool(kind.budget)))
        except GatewayError as error:
            assert error.status == 400
            refused += 1
        else:
            assert set(sent) <= own
            passed += 1
    assert min(refused, passed) > NUM_BODIES // 20
