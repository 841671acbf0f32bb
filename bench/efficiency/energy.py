"""Energy counters of this machine: NVML's for GPUs, RAPL's for processors. Standard library only.

Counters, not samples of power: their difference over a window misses nothing in between.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

NVML, RAPL = "nvml", "rapl"
POWERCAP = Path("/sys/class/powercap")
_NVML_LIBRARY = "libnvidia-ml.so.1"


@dataclass(slots=True)
class Rapl:
    """Processor packages. The counters wrap, so that they have to be read at least every few minutes."""

    folders: Sequence[Path]
    joules: float = 0.0
    _last: dict[Path, int] = field(default_factory=dict)

    @property
    def source(self) -> str:
        """What is read."""
        return RAPL

    def read(self) -> float:
        """Joules since the first reading. Raises OSError."""
        for folder in self.folders:
            now = int((folder / "energy_uj").read_text())
            limit = int((folder / "max_energy_range_uj").read_text())
            if folder in self._last:
                self.joules += (now - self._last[folder]) % (limit + 1) / 1e6
            self._last[folder] = now
        return self.joules


@dataclass(slots=True)
class Nvml:
    """NVIDIA GPUs, through the driver's own library."""

    library: ctypes.CDLL
    handles: Sequence[ctypes.c_void_p]

    @property
    def source(self) -> str:
        """What is read."""
        return NVML

    def read(self) -> float:
        """Joules of all these GPUs since the driver was loaded. Raises OSError."""
        millijoules = 0
        for handle in self.handles:
            value = ctypes.c_ulonglong()
            if self.library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(value)) != 0:
                raise OSError("NVML does not tell the energy")
            millijoules += value.value
        return millijoules / 1000


Meter = Rapl | Nvml


def find_meter(gpu_ids: Sequence[int] | None = None, powercap: Path = POWERCAP) -> Meter | None:
    """The GPUs' counter where there are GPUs (all, or those of `gpu_ids`), else the processors'; None if unreadable."""
    return _nvml(gpu_ids) or (_rapl(powercap) if not gpu_ids else None)


def _rapl(powercap: Path) -> Rapl | None:
    # Packages only: their parts, intel-rapl:0:0 and the like, are in them.
    folders = sorted(folder for folder in powercap.glob("intel-rapl:*") if folder.name.count(":") == 1)
    meter = Rapl(folders)
    try:
        meter.read()
    except (OSError, ValueError):
        return None
    return meter if folders else None


def _nvml(gpu_ids: Sequence[int] | None) -> Nvml | None:
    try:
        library = ctypes.CDLL(_NVML_LIBRARY)
    except OSError:
        return None
    count = ctypes.c_uint()
    if library.nvmlInit_v2() != 0 or library.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
        return None
    handles = []
    for index in range(count.value) if gpu_ids is None else gpu_ids:
        handle = ctypes.c_void_p()
        if library.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(handle)) != 0:
            return None
        handles.append(handle)
    meter = Nvml(library, handles)
    try:
        meter.read()
    except OSError:
        return None
    return meter if handles else None
