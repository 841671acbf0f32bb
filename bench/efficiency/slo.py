"""Limits that a request must meet (a service-level objective), and the search for the highest rate that meets them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields

from vllm_puzzle.bench.efficiency.uncertainty import wilson
from vllm_puzzle.model_configs.schema import ConfigError

ATTAINMENT = 0.95
_ALIASES = {"e2el": "e2e"}  # as `vllm bench serve --goodput` spells it


@dataclass(frozen=True, slots=True)
class Slo:
    """Upper limits in seconds, None for no limit: first token, first answer token, time per answer token, whole."""

    ttft: float | None = None
    ttfat: float | None = None
    tpot: float | None = None
    e2e: float | None = None

    def __post_init__(self) -> None:
        for name, limit in self.limits().items():
            if isinstance(limit, bool) or not isinstance(limit, int | float) or not limit > 0:
                raise ConfigError(f"SLO, key `{name}`: found {limit!r}, allowed: seconds above 0")
        if not self.limits():
            raise ConfigError(f"SLO: found no limit, allowed: one or more of {', '.join(LIMITS)}")

    def limits(self) -> dict[str, float]:
        """The limits that are set."""
        return {field.name: value for field in fields(self) if (value := getattr(self, field.name)) is not None}

    @classmethod
    def from_object(cls, found: Mapping[str, float], where: str) -> Slo:
        """The limits as a manifest holds them."""
        surplus = sorted(set(found) - set(LIMITS))
        if surplus:
            raise ConfigError(f"{where}: found {surplus}, allowed: {', '.join(LIMITS)}")
        return cls(**found)

    @classmethod
    def parse(cls, items: Iterable[str]) -> Slo:
        """The limits as flags, `name:milliseconds` each, as `vllm bench serve --goodput` takes them."""
        limits: dict[str, float] = {}
        for item in items:
            name, _, value = item.partition(":")
            name = _ALIASES.get(name, name)
            try:
                limit = float(value) / 1000
            except ValueError:
                raise ConfigError(f"SLO: found {item!r}, allowed: NAME:MILLISECONDS") from None
            if name not in LIMITS or name in limits:
                raise ConfigError(f"SLO: found {item!r}, allowed: each of {', '.join(LIMITS)} once")
            limits[name] = limit
        return cls(**limits)


LIMITS = tuple(field.name for field in fields(Slo))


def attains(met: int, issued: int, share: float = ATTAINMENT) -> bool:
    """Whether at least this share meets the SLO, beyond doubt: by Wilson's lower bound."""
    return wilson(met, issued).low >= share


def max_rate(probes: Mapping[float, tuple[int, int]], share: float = ATTAINMENT) -> float | None:
    """The largest offered rate (requests/s) that attains the SLO, all smaller ones probed included; None without one.

    probes: rate → (requests that met the SLO, requests issued). A rate above one that failed does not count: it was
    luck.
    """
    best = None
    for rate in sorted(probes):
        if not attains(*probes[rate], share):
            break
        best = rate
    return best


def next_rate(
    probes: Mapping[float, tuple[int, int]], low: float, high: float, share: float = ATTAINMENT, tolerance: float = 0.05
) -> float | None:
    """The rate to probe next: `low`, then `high`, then bisected until the bracket is narrower than `tolerance` of it.

    None when there is nothing left to learn: `low` failed, `high` attained, or the bracket is narrow.
    """
    for end in (low, high):
        if end not in probes:
            return end
    if not attains(*probes[low], share) or attains(*probes[high], share):
        return None
    passed = max_rate(probes, share)
    assert passed is not None, "the lower end attained"
    failed = min(rate for rate in probes if rate > passed)
    return None if failed - passed <= tolerance * failed else (passed + failed) / 2
