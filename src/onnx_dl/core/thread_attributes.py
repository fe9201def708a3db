"""Attributes that a thread inherits: processors, scheduling, umask."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

Mask = Annotated[bytes, Meta(max_length=1024)]
Nice = Annotated[int, Meta(ge=-20, le=19)]
Policy = Annotated[int, Meta(ge=0, le=255)]
Priority = Annotated[int, Meta(ge=0, le=99)]
Mode = Annotated[int, Meta(ge=0, le=0o777)]


class ThreadAttributes(msgspec.Struct, frozen=True, kw_only=True):
    """Attributes of one thread.  None: not known, so the worker's stays as it is.

    ``processors``: the CPU affinity, as a little-endian bit mask; ``policy`` and ``priority``: of the
    scheduler, such as SCHED_BATCH and 0.
    """

    processors: Mask | None = None
    nice: Nice | None = None
    policy: Policy | None = None
    priority: Priority = 0
    umask: Mode | None = None
