"""What metrics must know of a run besides its requests: the measured windows, devices, energy, price and limits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from vllm_puzzle.bench.efficiency.record import RequestRecord
from vllm_puzzle.bench.efficiency.slo import Slo
from vllm_puzzle.model_configs.schema import ConfigError


@dataclass(frozen=True, slots=True)
class Window:
    """A stretch of steady load: seconds on the clock of the records of this block.

    From the end of warm-up and ramp to the last arrival (open loop), or until fewer requests than the concurrency are
    in flight (closed loop). energy_j: difference of an energy counter over it, None without one.
    """

    start: float
    end: float
    block: int = 0
    energy_j: float | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.start) and math.isfinite(self.end) and self.start < self.end):
            raise ConfigError(f"window of block {self.block}: found {self.start} to {self.end}, allowed: start < end")

    @property
    def duration(self) -> float:
        """Seconds."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class RunFacts:
    """Facts of one arm under one load.

    windows: one per block. num_gpus, num_cores: what serves, None where unknown (a remote endpoint). idle_power_w: of
    all devices together. price_per_device_hour: dollars. slo, slo_by_task: limits, and those of single tasks.
    """

    windows: tuple[Window, ...]
    num_gpus: int | None = None
    num_cores: int | None = None
    idle_power_w: float | None = None
    price_per_device_hour: float | None = None
    slo: Slo | None = None
    slo_by_task: Mapping[str, Slo] = field(default_factory=dict)

    def __post_init__(self) -> None:
        blocks = [window.block for window in self.windows]
        if not blocks or len(set(blocks)) < len(blocks):
            raise ConfigError(
                f"run facts, key `windows`: found the blocks {blocks}, allowed: one window for each block"
            )
        for key in ("num_gpus", "num_cores", "idle_power_w", "price_per_device_hour"):
            value = getattr(self, key)
            if value is not None and not value > 0:
                raise ConfigError(f"run facts, key `{key}`: found {value!r}, allowed: above 0, or null")

    @property
    def duration(self) -> float:
        """Seconds of steady load, all windows together."""
        return math.fsum(window.duration for window in self.windows)

    @property
    def energy_j(self) -> float | None:
        """Joules over all windows; None when any of them has no reading."""
        readings = [window.energy_j for window in self.windows if window.energy_j is not None]
        return math.fsum(readings) if len(readings) == len(self.windows) else None

    @property
    def devices(self) -> tuple[int, str]:
        """What costs are counted in: GPUs, else cores, else the endpoint as one device."""
        if self.num_gpus is not None:
            return self.num_gpus, "GPU"
        return (self.num_cores, "core") if self.num_cores is not None else (1, "endpoint")

    def slo_of(self, record: RequestRecord) -> Slo | None:
        """The limits that a request has to meet."""
        return self.slo_by_task.get(record.task, self.slo)

    def window_of(self, record: RequestRecord) -> Window | None:
        """The window of the record's block."""
        return next((window for window in self.windows if window.block == record.block), None)

    def is_inside(self, record: RequestRecord) -> bool:
        """Whether the record ended within its block's window."""
        window = self.window_of(record)
        return window is not None and window.start < record.done <= window.end

    def ended_inside(self, records: Iterable[RequestRecord]) -> list[RequestRecord]:
        """The records that ended within their block's window, which rates are counted from.

        Those of the warm-up that ended inside are among them, those that the drain ended are not: under steady load
        one makes up for the other, while counting only what began inside would come short by what was in flight.
        """
        return [record for record in records if self.is_inside(record)]

    def to_object(self) -> dict[str, Any]:
        """The object under the key `facts` of a manifest."""
        return asdict(self)

    @classmethod
    def from_object(cls, found: Mapping[str, Any], where: str) -> RunFacts:
        """What `to_object` wrote. Raises ConfigError that names the key."""
        allowed = [field.name for field in fields(cls)]
        surplus = sorted(set(found) - set(allowed))
        if surplus or not isinstance(found.get("windows"), list):
            raise ConfigError(f"{where}: found the keys {sorted(found)}, allowed: `windows` and any of {allowed[1:]}")
        try:
            given = dict(found) | {"windows": tuple(Window(**window) for window in found["windows"])}
            if found.get("slo") is not None:
                given["slo"] = Slo.from_object(found["slo"], f"{where}, key `slo`")
            given["slo_by_task"] = {
                task: Slo.from_object(limits, f"{where}, key `slo_by_task`, task {task}")
                for task, limits in (found.get("slo_by_task") or {}).items()
            }
            return cls(**given)
        except TypeError as error:
            raise ConfigError(f"{where}: {error}") from None
