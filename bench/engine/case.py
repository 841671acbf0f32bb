"""What is measured: an engine (model, precision, flags, environment) under a load (lengths, batch)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm_puzzle.model_configs.schema import ConfigError

# stored: as the configuration says. Any other word makes the model folder say so (model_folder.py).
WEIGHTS = ("stored", "bf16", "fp8", "mxfp4", "nvfp4")
KV_DTYPES = ("auto", "bf16", "fp8")
# What a case is for. full: its throughput is the result. decode: long prompts, few output tokens; only the steps in
# which every request decodes count. prefill: replies of one token; seconds per prompt count.
FULL, DECODE, PREFILL = "full", "decode", "prefill"
ROLES = (FULL, DECODE, PREFILL)
FIT = 0  # as a batch: as many requests as the engine's KV cache holds
# A wave is one request per place of the batch. Short replies are repeated until a place has decoded so many tokens.
MIN_STEPS = 256
WAVES = {DECODE: 1, PREFILL: 3}
WARM_UP_TOKENS = 2**15
MAX_LENGTH, MAX_BATCH = 2**22, 2**16
NAME = re.compile(r"[a-z0-9][a-z0-9.+-]*")


@dataclass(frozen=True, slots=True)
class Shape:
    """Tokens of each prompt and of each reply."""

    input_len: int
    output_len: int

    def __post_init__(self) -> None:
        for key in ("input_len", "output_len"):
            _check_whole(f"shape, key `{key}`", getattr(self, key), MAX_LENGTH)

    @property
    def name(self) -> str:
        """As papers write it: 128/1024."""
        return f"{self.input_len}/{self.output_len}"

    @property
    def total(self) -> int:
        """Tokens of a whole request."""
        return self.input_len + self.output_len


def parse_shape(text: str) -> Shape:
    """`128/1024` → its shape. Raises ConfigError."""
    match = re.fullmatch(r"\s*(\d{1,8})/(\d{1,8})\s*", text)
    if match is None:
        raise ConfigError(f"shape: found {text!r}, allowed: input/output tokens, as 128/1024")
    return Shape(int(match[1]), int(match[2]))


@dataclass(frozen=True, slots=True)
class Load:
    """One shape at several batches; FIT among them stands for as many requests as fit. `role`: one of ROLES. `waves`:
    requests per place of the batch; 0: by the role.
    """

    shape: Shape
    batches: tuple[int, ...]
    role: str = FULL
    waves: int = 0

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ConfigError(f"load {self.shape.name}, key `role`: found {self.role!r}, allowed: {', '.join(ROLES)}")
        if not self.batches or len(set(self.batches)) < len(self.batches):
            raise ConfigError(f"load {self.shape.name}, key `batches`: found {self.batches}, allowed: each once")
        for batch in self.batches:
            if batch != FIT:
                _check_whole(f"load {self.shape.name}, key `batches`", batch, MAX_BATCH)


@dataclass(frozen=True, slots=True)
class EngineVariant:
    """One engine. `model`: a name of the catalogue, or one of model_folder.OWN. `flags`: keyword arguments of vLLM's
    `LLM`; `env`: environment variables of its process; `as_decilm`: the same model under DeciLM's description, so that
    our class serves it. `is_evened`: norms of 1, no biases and a temperature of 1, without which a router with random
    weights sends every token to the same experts.
    """

    name: str
    model: str
    weights: str = "stored"
    kv_dtype: str = "auto"
    flags: Mapping[str, Any] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    as_decilm: bool = False
    is_evened: bool = False

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise ConfigError(f"variant, key `name`: found {self.name!r}, allowed: small letters, digits, . + -")
        for key, allowed in (("weights", WEIGHTS), ("kv_dtype", KV_DTYPES)):
            if getattr(self, key) not in allowed:
                found = getattr(self, key)
                raise ConfigError(f"variant {self.name}, key `{key}`: found {found!r}, allowed: {', '.join(allowed)}")


@dataclass(frozen=True, slots=True)
class Case:
    """A variant under one batch of one shape."""

    variant: EngineVariant
    shape: Shape
    batch: int
    role: str = FULL
    waves: int = 0

    @property
    def name(self) -> str:
        """Unique within a suite."""
        return f"{self.variant.name} {self.shape.name} {'fit' if self.batch == FIT else f'b{self.batch}'}"

    def request(self, batch: int, seed: int) -> dict[str, int | float]:
        """What the measuring process is asked for; `batch` is the number behind FIT.

        The first request of a decoding case decodes while the others' prompts are still read, a step for each chunk of
        them; its reply is longer by so many tokens, so that all decode together for `output_len` steps.
        """
        waves = self.waves or WAVES.get(self.role) or -(-MIN_STEPS // self.shape.output_len)
        chunk = max(1, int(self.variant.flags.get("max_num_batched_tokens", self.shape.input_len)) - batch)
        ramp = -(-batch * self.shape.input_len // chunk) if self.role == DECODE else 0
        return {
            "input_len": self.shape.input_len,
            "output_len": self.shape.output_len + ramp,
            "num_requests": waves * batch,
            "max_concurrency": batch,
            "seed": seed,
            "temperature": 1.0 if self.variant.is_evened else 0.0,
        }

    def warm_up(self, batch: int, seed: int) -> dict[str, int | float]:
        """A short request of the same shape: what is compiled or tuned at first sight is done before the clock runs."""
        few = max(1, min(batch, WARM_UP_TOKENS // self.shape.input_len))
        return {
            "input_len": self.shape.input_len,
            "output_len": min(8, self.shape.output_len),
            "num_requests": few,
            "max_concurrency": few,
            "seed": seed,
            "temperature": 1.0 if self.variant.is_evened else 0.0,
        }


def _check_whole(where: str, value: int, most: int) -> None:
    if type(value) is not int or not 1 <= value <= most:
        raise ConfigError(f"{where}: found {value!r}, allowed: an integer from 1 to {most}")
