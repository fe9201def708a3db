"""How many processors this process may really use: affinity and cgroup quota, not what the machine has.

Covers cgroup v2 (``cpu.max``) and v1 (``cpu.cfs_quota_us``), of this process's group and those around it
(https://docs.kernel.org/admin-guide/cgroup-v2.html, https://docs.kernel.org/scheduler/sched-bwc.html).
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath


def available(root: Path = Path("/")) -> int:
    """At least 1.  ``root``: where ``proc`` and ``sys`` lie."""
    quotas = [math.ceil(quota) for quota in _quotas(root)]
    return max(1, min([len(os.sched_getaffinity(0)), *quotas]))


def limited() -> int | None:
    """The processors this process may use, if these are fewer than the machine has; None: no limit."""
    count = available()
    return count if count < (os.cpu_count() or 1) else None


def _quotas(root: Path) -> Iterator[float]:
    """Processors that each of the groups around this process allows."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            yield from _along(root / "sys/fs/cgroup", path, _of_v2)
        elif "cpu" in controllers.split(","):
            yield from _along(root / "sys/fs/cgroup" / controllers, path, _of_v1)
            yield from _along(root / "sys/fs/cgroup/cpu", path, _of_v1)


def _along(mount: Path, path: str, read: object) -> Iterator[float]:
    """From the group itself up to the mount; in a container, the path is often that of the host."""
    assert callable(read)
    group = PurePosixPath(path.lstrip("/"))
    for part in (group, *group.parents):
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
            if (quota := read(mount / part)) is not None:
                yield quota


def _of_v2(group: Path) -> float | None:
    quota, period = (group / "cpu.max").read_text().split()
    return None if quota == "max" else int(quota) / int(period)


def _of_v1(group: Path) -> float | None:
    quota = int((group / "cpu.cfs_quota_us").read_text())
    return None if quota < 0 else quota / int((group / "cpu.cfs_period_us").read_text())
