"""Chat templates rendered as transformers renders them, to see what a variable changes. Pure jinja2."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

DEFAULTS = {"add_generation_prompt": True, "bos_token": "<s>", "eos_token": "</s>"}


class GenerationTag(Extension):
    """`{% generation %}…{% endgeneration %}`: marks a reply's tokens for training, and changes no text."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own way to say it)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The body alone."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", GenerationTag]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    # A fixed clock: two renderings must differ by what is asked only.
    environment.globals["strftime_now"] = lambda form: datetime(2026, 1, 1).strftime(form)
    return environment


def _raise(message: str) -> None:
    raise TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, **_: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators)


class Template:
    """A chat template that never fails: what cannot be rendered is None."""

    def __init__(self, source: str) -> None:
        environment = _environment()
        self.arguments: frozenset[str] = frozenset()
        self._template = None
        try:
            self.arguments = frozenset(meta.find_undeclared_variables(environment.parse(source)))
            self._template = environment.from_string(source)
        except (TemplateSyntaxError, RecursionError):
            pass

    def render(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str | None:
        """The prompt up to where the reply begins, or None when the template raises."""
        if self._template is None:
            return None
        try:
            return self._template.render(DEFAULTS | {"messages": messages, **variables})
        except Exception:  # a template is a program: it can raise anything, and says with it what it cannot do
            return None
