"""Processors, memory and GPUs of this machine, as Triton's metrics have them.

Of other systems than Linux, and where a file or NVML has no figure, the figure is None.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

_T = TypeVar("_T")

_IDLE: Final = (3, 4)
"""Columns of /proc/stat in which a processor does nothing: idle, and waiting for I/O."""
_COLUMNS: Final = 8
"""Columns before those of guests, which are counted in the first ones, too."""


class GpuFigures(NamedTuple):
    """One GPU.  Power is in watts, energy in joules since the driver was loaded; ``utilization`` is from 0 to
    1."""

    uuid: str
    power_usage: float | None = None
    power_limit: float | None = None
    energy: float | None = None
    utilization: float | None = None
    memory_total: int | None = None
    memory_used: int | None = None


class MachineFigures(NamedTuple):
    """``utilization``: share of all processors' time that was used since the last reading, 0 to 1.  Memory is
    in bytes."""

    utilization: float | None = None
    memory_total: int | None = None
    memory_used: int | None = None
    gpus: tuple[GpuFigures, ...] = ()


class Machine:
    """Reads the figures.  Thread-safe.  ``proc``: where /proc is."""

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self._proc = proc
        self._lock = threading.Lock()
        self._last = (0, 0)
        self._gpus: list[tuple[str, object]] | None = None

    def read(self) -> MachineFigures:
        """Return the present figures."""
        with self._lock:
            total, used = _memory(self._text("meminfo"))
            if self._gpus is None:
                self._gpus = _devices()
            gpus = tuple(_gpu(uuid, device) for uuid, device in self._gpus)
            return MachineFigures(self._utilization(), total, used, gpus)

    def _text(self, name: str) -> str:
        with contextlib.suppress(OSError):
            return (self._proc / name).read_text()
        return ""

    def _utilization(self) -> float | None:
        times = processor_times(self._text("stat"))
        if times is None:
            return None
        (all_before, idle_before), self._last = self._last, times
        elapsed = times[0] - all_before
        idle = times[1] - idle_before
        return min(1.0, max(0.0, 1 - idle / elapsed)) if elapsed > 0 else 0.0


def processor_times(stat: str) -> tuple[int, int] | None:
    """Return the time of all processors, and the part of it in which they were idle, of /proc/stat; None: it
    does not say."""
    for line in stat.splitlines():
        if line.startswith("cpu "):
            times = [int(each) for each in line.split()[1 : 1 + _COLUMNS]]
            if len(times) > max(_IDLE):
                return sum(times), sum(times[column] for column in _IDLE)
    return None


def _memory(meminfo: str) -> tuple[int | None, int | None]:
    """Return total and used bytes."""
    found = {}
    for line in meminfo.splitlines():
        name, _, rest = line.partition(":")
        if name in ("MemTotal", "MemAvailable"):
            found[name] = int(rest.split()[0]) * 1024
    total, available = found.get("MemTotal"), found.get("MemAvailable")
    return total, None if total is None or available is None else total - available


def _devices() -> list[tuple[str, object]]:
    """Return UUIDs and handles of the GPUs; none without a driver."""
    with contextlib.suppress(Exception):  # no library, driver, or permission
        ctypes.CDLL("libnvidia-ml.so.1")  # to import pynvml without it would cost 1.9 MB
        import pynvml

        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(n) for n in range(pynvml.nvmlDeviceGetCount())]
        return [(str(pynvml.nvmlDeviceGetUUID(handle)), handle) for handle in handles]
    return []


def _gpu(uuid: str, device: object) -> GpuFigures:
    import pynvml

    def ask(question: Callable[[object], Any], make: Callable[[Any], _T]) -> _T | None:
        with contextlib.suppress(pynvml.NVMLError):  # this GPU, or a part of one, has no such figure
            return make(question(device))
        return None

    memory = ask(pynvml.nvmlDeviceGetMemoryInfo, lambda found: (int(found.total), int(found.used)))
    return GpuFigures(
        uuid,
        power_usage=ask(pynvml.nvmlDeviceGetPowerUsage, lambda milliwatts: milliwatts / 1000),
        power_limit=ask(pynvml.nvmlDeviceGetEnforcedPowerLimit, lambda milliwatts: milliwatts / 1000),
        energy=ask(pynvml.nvmlDeviceGetTotalEnergyConsumption, lambda millijoules: millijoules / 1000),
        utilization=ask(pynvml.nvmlDeviceGetUtilizationRates, lambda rates: rates.gpu / 100),
        memory_total=None if memory is None else memory[0],
        memory_used=None if memory is None else memory[1],
    )


MACHINE: Final = Machine()
"""Figures of this machine, for the whole process: utilization is that since the last scrape."""
