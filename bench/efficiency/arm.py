"""What is measured and under which load: an arm is a setting of one server, a load is how requests arrive."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from vllm_puzzle.model_configs.schema import ConfigError

CLOSED, POISSON, GAMMA, CONSTANT, TRACE = "closed", "poisson", "gamma", "constant", "trace"
KINDS = (CLOSED, POISSON, GAMMA, CONSTANT, TRACE)
RAMPS = ("linear", "exponential")
THINKING = ("on", "off", "auto")
# A fixed output length hides the tokens that a shorter thought saves.
NO_STOP = "ignore_eos"
FORBIDDEN = (NO_STOP, "min_tokens", "stream", "stream_options", "messages", "model", "n")
TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class Arm:
    """One setting: a server, a model, and what its requests say besides the question.

    base_url: as of `vllm bench serve`, with or without `/v1`. fields: request fields of the mode, effort or budget, and
    any others. sampling: temperature and its like; none are sent that are not named. max_tokens: None leaves it to the
    server, whose own limit is the most generous. budget: thinking tokens asked for, to hold the reply to. headers: are
    never written to a file. timeout_s: after which the client gives a request up. is_continuous: asks for the counts
    with every chunk.
    """

    name: str
    base_url: str
    model: str
    endpoint: str = "/v1/chat/completions"
    fields: Mapping[str, Any] = field(default_factory=dict)
    sampling: Mapping[str, Any] = field(default_factory=dict)
    max_tokens: int | None = None
    budget: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    timeout_s: float = TIMEOUT_S
    is_continuous: bool = True

    def __post_init__(self) -> None:
        refuse_forbidden(f"arm {self.name}", self.fields)
        refuse_forbidden(f"arm {self.name}", self.sampling)
        if not self.base_url.startswith(("http://", "https://")):
            raise ConfigError(f"arm {self.name}, base URL: found {self.base_url!r}, allowed: http://… or https://…")
        _positive(f"arm {self.name}", timeout_s=self.timeout_s)
        if self.max_tokens is not None:
            _positive(f"arm {self.name}", max_tokens=self.max_tokens)

    @property
    def root(self) -> str:
        """The server's address without `/v1`, where /metrics and /version are."""
        return self.base_url.rstrip("/").removesuffix("/v1")

    @property
    def url(self) -> str:
        """Where requests go."""
        return self.root + self.endpoint

    def body(self, messages: list[dict[str, Any]], fields: Mapping[str, Any]) -> dict[str, Any]:
        """A request's body; `fields` are the question's own. Nested objects of both are merged."""
        options = {"include_usage": True} | ({"continuous_usage_stats": True} if self.is_continuous else {})
        base: dict[str, Any] = {"model": self.model, "messages": messages}
        if self.max_tokens is not None:
            base["max_tokens"] = self.max_tokens
        return merged(base, self.sampling, self.fields, fields) | {"stream": True, "stream_options": options}

    def described(self) -> dict[str, Any]:
        """For the manifest: all but the headers' values, which may be keys."""
        found = asdict(self) | {"headers": sorted(self.headers), "endpoint": self.url}
        return {"arm": found.pop("name"), **found}


def thinking_fields(arm: str, thinking: str, effort: str | None, budget: int | None) -> dict[str, Any]:
    """A mode as request fields, in the names that vLLM and most servers take. Raises ConfigError where two clash."""
    if thinking not in THINKING:
        raise ConfigError(f"arm {arm}, thinking: found {thinking!r}, allowed: {', '.join(THINKING)}")
    is_off = thinking == "off"
    if is_off and (budget or effort not in (None, "none")):
        raise ConfigError(f"arm {arm}: found thinking off beside effort {effort} and budget {budget}, allowed: one")
    if thinking == "on" and effort == "none":
        raise ConfigError(f"arm {arm}: found thinking on beside effort none, allowed: one")
    if budget is not None and budget < 0:
        raise ConfigError(f"arm {arm}, budget: found {budget}, allowed: 0 or more")
    fields: dict[str, Any] = {}
    if effort is not None or is_off:
        fields["reasoning_effort"] = effort or "none"
    if thinking == "on":
        fields["chat_template_kwargs"] = {"enable_thinking": True}
    if budget is not None and not is_off:
        fields["thinking_token_budget"] = budget
    return fields


@dataclass(frozen=True, slots=True)
class Load:
    """How requests arrive.

    closed: `concurrency` at a time, the next when one ends. poisson, constant: at `rate` per second; gamma: the same
    with `burstiness` as vLLM's (the shape of the gaps' gamma distribution: 1 is Poisson, less is burstier). trace: at
    `times`, seconds from the first. concurrency: in an open load, at most so many at once; who waits is counted from
    when it should have been sent. ramp: how the rate goes from `rate_start` to `rate_end` over the run.
    """

    kind: str
    concurrency: int | None = None
    rate: float | None = None
    burstiness: float = 1.0
    ramp: str | None = None
    rate_start: float | None = None
    rate_end: float | None = None
    times: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"load, key `kind`: found {self.kind!r}, allowed: {', '.join(KINDS)}")
        if self.kind == CLOSED and self.concurrency is None:
            raise ConfigError("load, key `concurrency`: found none, allowed: a number for a closed load")
        if self.kind == TRACE and not self.times:
            raise ConfigError("load, key `times`: found none, allowed: at least one for a trace")
        if self.ramp is not None:
            self._check_ramp()
        elif self.kind in (POISSON, GAMMA, CONSTANT) and self.rate is None:
            raise ConfigError(f"load, key `rate`: found none, allowed: a number for a {self.kind} load")
        known = {key: getattr(self, key) for key in ("concurrency", "rate", "burstiness", "rate_start", "rate_end")}
        _positive("load", **{key: value for key, value in known.items() if value is not None})

    def _check_ramp(self) -> None:
        if self.ramp not in RAMPS:
            raise ConfigError(f"load, key `ramp`: found {self.ramp!r}, allowed: {', '.join(RAMPS)}")
        if self.kind not in (POISSON, GAMMA, CONSTANT) or self.rate_start is None or self.rate_end is None:
            raise ConfigError(
                "load, key `ramp`: found without an open load's `rate_start` and `rate_end`, allowed: both"
            )

    @property
    def is_open(self) -> bool:
        """Whether requests have a time of their own, whatever the server does."""
        return self.kind != CLOSED

    @property
    def name(self) -> str:
        """Short, for folders and tables: c8, poisson-4, gamma-4-b0.5, trace."""
        if self.kind == CLOSED:
            return f"c{self.concurrency}"
        rate = f"{self.rate_start:g}to{self.rate_end:g}" if self.ramp else "" if self.rate is None else f"{self.rate:g}"
        parts = [self.kind, rate, f"b{self.burstiness:g}" if self.kind == GAMMA else ""]
        return "-".join(part for part in [*parts, f"max{self.concurrency}" if self.concurrency else ""] if part)


def refuse_forbidden(where: str, fields: Mapping[str, Any]) -> None:
    """Raises ConfigError for request fields that would spoil the measurement, however deep the first of them lies."""
    for key, value in fields.items():
        if key in FORBIDDEN:
            raise ConfigError(f"{where}, request fields: found {key!r}, allowed: any but {', '.join(FORBIDDEN)}")
        if isinstance(value, Mapping) and NO_STOP in json.dumps(value, default=str):
            raise ConfigError(f"{where}, request fields: found {NO_STOP!r} in {key!r}, allowed: a natural stop only")


def merged(*parts: Mapping[str, Any]) -> dict[str, Any]:
    """Later keys win; objects under the same key are merged."""
    result: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            old = result.get(key)
            both = isinstance(old, Mapping) and isinstance(value, Mapping)
            result[key] = merged(old, value) if both else value  # type: ignore[arg-type]
    return result


def json_object(text: str, where: str) -> dict[str, Any]:
    """A flag's JSON object. Raises ConfigError."""
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ConfigError(f"{where}: found {text!r}, allowed: a JSON object")
    return value


def _positive(where: str, **values: Any) -> None:
    for key, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise ConfigError(f"{where}, key `{key}`: found {value!r}, allowed: a number above 0")
