"""A memory cgroup of a test's own, where the machine allows one.

Covers cgroup v2, where the kernel ends all processes of the group when one of them finds no memory, and v1,
where it ends one.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.support.waiting import eventually

_MOUNT: Final = Path("/sys/fs/cgroup")
_SWAP: Final = ("memory.swap.max", "memory.memsw.limit_in_bytes")
"""Not every kernel counts it."""


def enter(group: Path) -> None:
    """Moves this process there; what it starts from then on begins there."""
    (group / "cgroup.procs").write_text(str(os.getpid()))


def ended_by_kernel(group: Path) -> int:
    """The number of processes of the group that were ended for want of memory."""
    name = "memory.events" if (group / "memory.events").exists() else "memory.oom_control"
    found = dict(line.split() for line in (group / name).read_text().splitlines())
    return int(found["oom_kill"])


@contextlib.contextmanager
def memory_group(limit: int) -> Iterator[Path]:
    """A group for so many bytes, without swap; removed at the end, when all its processes must go.

    The test is skipped where no group can be made.
    """
    group = _make(limit)
    try:
        yield group
    finally:
        eventually(lambda: not (group / "cgroup.procs").read_text(), "all processes of the group end")
        group.rmdir()


def _make(limit: int) -> Path:
    reasons = []
    for parent, settings in _places(limit):
        group = parent / f"onnx-dl-test-{os.getpid()}"
        try:
            group.mkdir()
            _set(group, settings)
            return group
        except OSError as error:
            reasons.append(str(error))
            with contextlib.suppress(OSError):  # it was never made
                group.rmdir()
    pytest.skip(f"no memory cgroup can be made here: {'; '.join(reasons) or 'no memory controller'}")


def _set(group: Path, settings: dict[str, int]) -> None:
    for name, value in settings.items():
        if (group / name).exists() or name not in _SWAP:
            (group / name).write_text(str(value))


def _places(limit: int) -> Iterator[tuple[Path, dict[str, int]]]:
    """Groups in which to try, and what a group in them is told: the present one, and with v2 the one around
    it, because a group that has processes gives its controllers to no other."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            here = _MOUNT / path.lstrip("/")
            v2 = {"memory.max": limit, "memory.swap.max": 0, "memory.oom.group": 1}
            yield from ((place, v2) for place in (here, here.parent) if _gives_memory(place))
        elif "memory" in controllers.split(","):
            v1 = {"memory.limit_in_bytes": limit, "memory.memsw.limit_in_bytes": limit}
            yield _MOUNT / controllers / path.lstrip("/"), v1


def _gives_memory(place: Path) -> bool:
    """Whether groups in this one have limits of memory."""
    with contextlib.suppress(OSError):
        return "memory" in (place / "cgroup.subtree_control").read_text().split()
    return False
