"""Our flags among vLLM's: taken out of a command line before vLLM's parser sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class GivenFlag:
    """One flag as written. name: with dashes for underscores; value: after `=` (is_joined) or the next argument, None
    where the line ends."""

    head: str
    name: str
    value: str | None
    is_joined: bool

    @property
    def lacks_value(self) -> bool:
        """Whether nothing follows, or another flag."""
        return self.value is None or (not self.is_joined and self.value.startswith("--"))


def split_flags(argv: Sequence[str], is_ours: Callable[[str], bool]) -> tuple[list[str], list[GivenFlag]]:
    """(other arguments, our flags in order). Both `FLAG VALUE` and `FLAG=VALUE` are read."""
    rest: list[str] = []
    given: list[GivenFlag] = []
    arguments = iter(argv)
    for argument in arguments:
        head, equals, value = argument.partition("=")
        name = head.replace("_", "-")
        if is_ours(name):
            given.append(GivenFlag(head, name, value if equals else next(arguments, None), bool(equals)))
        else:
            rest.append(argument)
    return rest, given
