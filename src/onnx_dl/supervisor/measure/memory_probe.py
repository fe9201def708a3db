"""Measures the memory of processes and GPUs: the only importer of psutil and NVML.

The kernel's sums (``/proc/PID/smaps_rollup``) are read here, because psutil leaves out the one of anonymous
pages.  psutil adds up all mappings where a system has no such file (gVisor).
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import mmap
import os
import sys
import time
from typing import Final, NamedTuple

from onnx_dl.core.status import Usage
from onnx_dl.supervisor.policy.gpu_devices import HostGpus, MachineGpu

_KNOWN_FOR: Final = 0.05
"""Seconds for which the difference between resident bytes and PSS is taken as constant."""


class MemoryProbe:
    """Reads memory by process id.  GPU figures are None where NVML finds no GPU or has no figure.

    Where NVML has no figures by process (in many containers, WSL and MIG), the growth of the devices' used
    memory between :meth:`begin` and :meth:`loaded` is the estimate.
    """

    def __init__(self) -> None:
        self._gpus: list[object] = []
        with contextlib.suppress(Exception):  # no driver, library or permission: no figures
            self._gpus = _nvml_devices() if _has_nvml() else []
        self._known: HostGpus | None = None
        self._used_before: dict[int, dict[int, int]] = {}
        self._estimates: dict[int, dict[int, int]] = {}
        """Growth of the used memory of each device, by process id."""
        self._shared: dict[int, tuple[float, int]] = {}
        """Time and difference of resident bytes and PSS, of processes that load."""

    def begin(self, pid: int) -> None:
        """Called before the process loads a model on a GPU."""
        if used := self._of_devices("used"):
            self._used_before[pid] = used

    def loaded(self, pid: int) -> None:
        """Called when the process has loaded it."""
        before, used = self._used_before.pop(pid, None), self._of_devices("used")
        if before and used:
            self._estimates[pid] = {gpu: nbytes - before.get(gpu, 0) for gpu, nbytes in used.items()}

    def end(self, pid: int) -> None:
        """Called when the process is gone."""
        self._used_before.pop(pid, None)
        self._estimates.pop(pid, None)

    def measure(self, pid: int) -> Usage:
        """Memory of a process in bytes; zeros if it is gone or exits: then figures are wrong."""
        try:
            held = _resident(pid)
            shared = _tensor_bytes(pid)
            above = _above_present(pid)
        except OSError:
            return Usage()
        if above is None:
            return Usage()
        told = self._told_of(pid)
        estimate = None if told else self._estimates.get(pid)
        by_device = told or estimate or {}
        return Usage(
            rss=held.rss,
            private=held.private,
            gpu=max(0, sum(by_device.values())) if told or estimate else None,
            shared=shared,
            pss=held.pss,
            peak=held.pss + above,
            gpu_estimated=estimate is not None,
            inherited=held.inherited,
            gpus=self._numbered(by_device),
        )

    def weigh(self, pid: int, most: int) -> int:
        """Bytes that a process holds and did not inherit; an estimate if that is at most ``most``.

        Resident bytes are cheap (20 µs), but count shared memory in full.  Only if they exceed ``most``, PSS
        is read (1 ms per 500 MB, while the process gets no new pages); the difference is used for 0.05 s.
        """
        try:
            with open(f"/proc/{pid}/statm") as statm:
                resident = int(statm.read().split()[1]) * mmap.PAGESIZE
            at, shared = self._shared.get(pid, (0.0, 0))
            about = resident - (shared if time.monotonic() - at < _KNOWN_FOR else 0)
            if about <= most:
                return about
            held = _resident(pid)
        except OSError:  # it is gone
            self._shared.pop(pid, None)
            return 0
        own = held.pss - held.inherited
        self._shared[pid] = time.monotonic(), max(0, resident - own)
        return own

    def forget_peak(self, pid: int) -> None:
        """Resets the peak of a process that has loaded; has no effect where the kernel refuses it."""
        self._shared.pop(pid, None)
        with contextlib.suppress(OSError), open(f"/proc/{pid}/clear_refs", "w") as file:
            file.write("5")

    def gpu_total(self) -> int | None:
        """Memory of all GPUs in bytes."""
        found = self._of_devices("total")
        return sum(found.values()) if found else None

    def host_gpus(self) -> HostGpus:
        """The machine's GPUs, and which of them this process and its children see."""
        if self._known is None:
            known: list[MachineGpu] = []
            with contextlib.suppress(Exception):  # one of them does not tell: none is known
                known = [_known(gpu) for gpu in self._gpus]
            self._known = HostGpus.of(known, os.environ)
        return self._known

    def _numbered(self, figures: dict[int, int]) -> dict[int, int]:
        """Figures by NVML's number as figures by the host's."""
        found = self.host_gpus().by_number(figures) if figures else {}
        return {number: nbytes for number, nbytes in found.items() if nbytes > 0}

    def _of_devices(self, field: str) -> dict[int, int]:
        """A field of NVML's for each device that tells it: ``used`` or ``total``."""
        found: dict[int, int] = {}
        if self._gpus:
            import pynvml

            for number, gpu in enumerate(self._gpus):
                with contextlib.suppress(pynvml.NVMLError):
                    found[number] = int(getattr(pynvml.nvmlDeviceGetMemoryInfo(gpu), field))
        return found

    def gpu_bytes(self, pid: int) -> int | None:
        """Bytes that a process, or one that has ended, has on the GPUs; None: the driver does not list it."""
        told = self._told_of(pid)
        return sum(told.values()) if told else None

    def _told_of(self, pid: int) -> dict[int, int]:
        """Bytes of a process on each device for which the driver lists it with a figure."""
        used: dict[int, int] = {}
        if self._gpus:
            import pynvml

            for number, gpu in enumerate(self._gpus):
                with contextlib.suppress(pynvml.NVMLError):
                    for process in pynvml.nvmlDeviceGetComputeRunningProcesses(gpu):
                        if process.pid == pid and process.usedGpuMemory is not None:
                            used[number] = used.get(number, 0) + process.usedGpuMemory
        return used


class _Resident(NamedTuple):
    """Resident memory of a process in bytes, as :class:`.Usage` has it."""

    rss: int
    private: int
    pss: int
    inherited: int = 0


def _resident(pid: int) -> _Resident:
    """Sums over all mappings of a process.

    Anonymous pages are shared by forks only.  So what a worker's anonymous PSS exceeds its private pages by
    is its part of pages that are still the template's.  Dirty pages that are private are anonymous, or of a
    file or of shared memory: with these, the result is too small, never too large.

    Raises:
        OSError: the process is gone.
    """
    try:
        with open(f"/proc/{pid}/smaps_rollup") as rollup:
            next(rollup, None)  # the range of addresses
            fields = (line.split() for line in rollup)
            found = collections.Counter({name: int(kilobytes) * 1024 for name, kilobytes, *_ in fields})
    except FileNotFoundError:
        return _added_up(pid)
    private, pss = found["Private_Clean:"] + found["Private_Dirty:"], found["Pss:"]
    inherited = min(found["Pss_Anon:"] - found["Private_Dirty:"], pss - private)
    return _Resident(found["Rss:"], private, pss, max(0, inherited))


def _added_up(pid: int) -> _Resident:
    """The same without what is inherited, where the kernel has no sums."""
    import psutil

    try:
        full = psutil.Process(pid).memory_full_info()
    except psutil.Error as error:
        raise ProcessLookupError(str(error)) from error
    return _Resident(full.rss, full.uss, full.pss)


def _above_present(pid: int) -> int | None:
    """Bytes by which the peak of a process exceeds its resident memory; None: it has no memory any more."""
    with open(f"/proc/{pid}/status") as status:
        lines = (line.split() for line in status)
        found = {line[0]: int(line[1]) * 1024 for line in lines if line[0] in ("VmHWM:", "VmRSS:")}
    if not found.get("VmRSS:"):
        return None
    return max(0, found.get("VmHWM:", 0) - found["VmRSS:"])


class Gpu(NamedTuple):
    """One GPU, by NVML; ``memory`` in bytes."""

    name: str
    memory: int
    driver: str


def gpus() -> list[Gpu]:
    """The machine's GPUs.

    Raises:
        OSError: NVML does not work, and why.
    """
    try:
        import pynvml

        devices = _nvml_devices()
        driver = pynvml.nvmlSystemGetDriverVersion()
        return [
            Gpu(pynvml.nvmlDeviceGetName(gpu), pynvml.nvmlDeviceGetMemoryInfo(gpu).total, driver)
            for gpu in devices
        ]
    except Exception as error:  # errors of NVML differ by version and platform; the library may be broken
        raise OSError(str(error)) from error


def _tensor_bytes(pid: int) -> int:
    """Bytes of shared memory for tensors that a process has mapped."""
    total = 0
    with open(f"/proc/{pid}/maps") as maps:
        for line in maps:
            if "memfd:onnx-dl" in line:
                start, end = line.split(maxsplit=1)[0].split("-")
                total += int(end, 16) - int(start, 16)
    return total


def _has_nvml() -> bool:
    """Returns whether the driver's library is there.  Importing pynvml to find that out costs 1.9 MB."""
    if "pynvml" not in sys.modules:
        try:
            ctypes.CDLL("libnvidia-ml.so.1")  # as pynvml does
        except OSError:
            return False
    return True


def _known(gpu: object) -> MachineGpu:
    import pynvml

    uuid, kind = pynvml.nvmlDeviceGetUUID(gpu), pynvml.nvmlDeviceGetName(gpu)
    return MachineGpu(str(uuid), str(kind), int(pynvml.nvmlDeviceGetMemoryInfo(gpu).total))


def _nvml_devices() -> list[object]:
    import pynvml

    pynvml.nvmlInit()
    return [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
