"""The operator's flags reach a running server: default, effort map, ceiling, text switches."""

from __future__ import annotations

from typing import Any

import openai
import pytest
import server

pytestmark = pytest.mark.slow

QUESTION = {"role": "user", "content": "12+30-5"}
FLAGS = {
    "default": "low",
    "budgets.low": 5,
    "budgets.pocket-puzzle.low": 7,
    "budgets.pocket-puzzle.high": 11,
    "budgets.pocket-puzzle.max": -1,
    "ceiling": 13,
    "grace": 0,
    "answer_reserve": 0,
    "soft_switches": "false",
}


def test_defect_2_2_the_servers_default_and_ceiling_hold_for_every_request(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    flags = [f"--puzzle-reasoning.{key}={value}" for key, value in FLAGS.items()]
    with server.running(tmp_path_factory.mktemp("policy") / "log.txt", *flags) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")

        def tokens(knob: dict[str, Any], *before: dict[str, str]) -> int:
            messages: Any = [*before, QUESTION]
            reply: Any = client.chat.completions.create(
                model="pocket-puzzle", messages=messages, temperature=0, extra_body=knob
            )
            assert reply.choices[0].message.content.strip()
            return int(reply.usage.completion_tokens_details.reasoning_tokens)

        # One byte is one token, and this thought is longer than the ceiling.
        assert tokens({}) == 7, "the default level's budget of this model"
        assert tokens({"reasoning_effort": "low"}) == 7
        assert tokens({"reasoning_effort": "medium"}) == 11, "the nearest level's"
        assert tokens({"reasoning_effort": "max"}) == 13, "no limit is the ceiling"
        assert tokens({"thinking_budget": -1}) == tokens({"thinking_budget": 500}) == 13
        assert tokens({"thinking_budget": 3}) == 3
        assert tokens({"think": False}) == 0
        assert tokens({}, {"role": "system", "content": "detailed thinking off"}) == 7, "text does not count here"
        assert tokens({"chat_template_kwargs": {"reasoning_budget": 900}}) == 13
