"""Properties of this system: whether onnx-dl can run; processors and memory that a process may use.

There may be no /proc, as in a bare chroot.  Limits are those of affinity and of cgroups, v2 (``cpu.max``,
``memory.max``) and v1 (``cpu.cfs_quota_us``, ``memory.limit_in_bytes``), of this process's group and its
parents (https://docs.kernel.org/admin-guide/cgroup-v2.html,
https://docs.kernel.org/scheduler/sched-bwc.html, https://docs.kernel.org/admin-guide/cgroup-v1/memory.html).
"""

from __future__ import annotations

import contextlib
import math
import os
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Final

from onnx_dl import linux_only
from onnx_dl.concurrency import waits
from onnx_dl.errors import PlatformError

_CLONE_THREAD: Final = 0x10000

Read = Callable[[Path], float | None]


def is_platform() -> bool:
    """Returns whether models can have worker processes on this operating system; else they run in-process."""
    return sys.platform == "linux" and hasattr(os, "memfd_create") and hasattr(os, "pidfd_open")


def check_platform() -> None:
    """Raises :class:`~onnx_dl.errors.PlatformError` where worker processes are impossible."""
    if not is_platform():
        raise PlatformError(
            f"Worker processes need Linux 5.3 or newer (memfd, pidfd, abstract Unix sockets); this is "
            f"{sys.platform}. By default, models run in-process here: leave out isolation=True and "
            "ONNX_DL_ISOLATION=on."
        )
    if (why := waits.refusal()) is not None:
        raise PlatformError(why)


def is_proc_mounted() -> bool:
    """Returns whether /proc has this process."""
    return os.path.exists("/proc/self/statm")


def proc_missing(what: str) -> PlatformError:
    """The error for a feature that needs /proc; ``what``: its name, such as "max_memory"."""
    return PlatformError(
        f"{what} needs /proc, to read the memory of processes, and it is not mounted here. Mount it "
        f"(mount -t proc proc /proc) or set no such limit; everything else works without it."
    )


def has_one_thread() -> bool:
    """Returns whether this process has exactly one thread.  False if that cannot be found out."""
    with contextlib.suppress(OSError):
        return len(os.listdir("/proc/self/task")) == 1
    # unshare(CLONE_THREAD) has no effect in a process of one thread, and fails in others.
    return bool(linux_only.libc().unshare(_CLONE_THREAD) == 0)


def is_eventfd(fd: int) -> bool:
    """Returns whether this is an eventfd."""
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:[eventfd]"
    # Of the anonymous inodes only an eventfd can be written to.  This adds 0 to its counter.
    with contextlib.suppress(OSError):
        return stat.S_IFMT(os.fstat(fd).st_mode) == 0 and os.write(fd, bytes(8)) == 8
    return False


def processors(root: Path = Path("/")) -> int:
    """The number of usable processors, at least 1.  ``root``: the folder with ``proc`` and ``sys``."""
    quotas = [math.ceil(quota) for quota in _limits(root, "cpu", _cpu_v2, _cpu_v1)]
    return max(1, min([linux_only.usable_processors(), *quotas]))


def fewer_processors() -> int | None:
    """The number of usable processors if it is less than the machine has; None: all are usable."""
    count = processors()
    return count if count < (os.cpu_count() or 1) else None


def memory(root: Path = Path("/")) -> int | None:
    """Usable bytes of memory: the machine's, or the least that a cgroup allows; None: not known."""
    limits = [int(limit) for limit in _limits(root, "memory", _memory_v2, _memory_v1)]
    return min([*limits, *_installed(root)], default=None)


def installed_memory(root: Path = Path("/")) -> int | None:
    """Bytes of memory of the machine, without regard to cgroups; None: not known."""
    return next(iter(_installed(root)), None)


def cgroup_version(root: Path = Path("/")) -> int | None:
    """The version of the mounted cgroup file system, 2 or 1; None: none is mounted."""
    if (root / "sys/fs/cgroup/cgroup.controllers").exists():
        return 2
    return 1 if (root / "sys/fs/cgroup/memory").exists() or (root / "sys/fs/cgroup/cpu").exists() else None


def _installed(root: Path) -> list[int]:
    with contextlib.suppress(OSError, ValueError):
        lines = (root / "proc/meminfo").read_text().splitlines()
        return [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal:")]
    return []


def _limits(root: Path, controller: str, v2: Read, v1: Read) -> Iterator[float]:
    """The limits of this process's cgroup and its parents."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    mount = root / "sys/fs/cgroup"
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            yield from _along(mount, path, v2)
        elif controller in controllers.split(","):
            yield from _along(mount / controllers, path, v1)
            yield from _along(mount / controller, path, v1)


def _along(mount: Path, path: str, read: Read) -> Iterator[float]:
    """The limits from the group up to the mount.  In a container, the path may be that of the host."""
    group = PurePosixPath(path.lstrip("/"))
    for part in (group, *group.parents):
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
            if (limit := read(mount / part)) is not None:
                yield limit


def _cpu_v2(group: Path) -> float | None:
    quota, period = (group / "cpu.max").read_text().split()
    return None if quota == "max" else int(quota) / int(period)


def _cpu_v1(group: Path) -> float | None:
    quota = int((group / "cpu.cfs_quota_us").read_text())
    return None if quota < 0 else quota / int((group / "cpu.cfs_period_us").read_text())


def _memory_v2(group: Path) -> float | None:
    text = (group / "memory.max").read_text().strip()
    return None if text == "max" else int(text)


def _memory_v1(group: Path) -> float | None:
    return int((group / "memory.limit_in_bytes").read_text())  # without a limit: a huge number
