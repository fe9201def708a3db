"""A snapshot as rows of text, for ``onnx-dl ps`` and ``top``, for ``print()`` and for notebooks.

Knows no terminal.  :mod:`onnx_dl.core.status` can import it: it needs nothing from there at run time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple

from onnx_dl.core.lifecycle import ModelState
from onnx_dl.core.parsing import KEEP
from onnx_dl.core.text import duration, format_bytes, printable, short_names

if TYPE_CHECKING:
    from onnx_dl.core.status import ModelStatus, Snapshot

NONE: Final = "-"
"""Text of a cell that has no value."""


class Column(NamedTuple):
    """A column beside the model's name.

    Attributes:
        title: its head.
        cell: returns its text for a model.
        worth: a narrow table omits the columns of least worth first.
        right: whether its cells are aligned to the right.
    """

    title: str
    cell: Callable[[ModelStatus], str]
    worth: int
    right: bool = True


def rows(snapshot: Snapshot) -> tuple[list[str], list[list[str]]]:
    """The head of the table, and one row of cells for each model; the first column is the model's name."""
    head = ["MODEL", *(column.title for column in COLUMNS)]
    cells = [
        [name, *(column.cell(status) for column in COLUMNS)]
        for name, status in zip(names(snapshot), snapshot.models, strict=True)
    ]
    return head, cells


def names(snapshot: Snapshot) -> list[str]:
    """A short name for each model of the snapshot."""
    found = short_names([(status.model, status.key) for status in snapshot.models])
    return [printable(name) for name in found]


def title(snapshot: Snapshot) -> str:
    """The line above the table: which host it is."""
    whose = f"Shared host {snapshot.host!r}" if snapshot.host else "Private host"
    if snapshot.supervisor_pid is None:
        return f"{whose}, {'no supervisor' if snapshot.models else 'not running'}"
    return f"{whose}, supervisor pid {snapshot.supervisor_pid}"


def memory_line(snapshot: Snapshot) -> str:
    """The line below the table: ``Memory: 312.4 MB in use of 2000.0 MB (16 %)``."""
    used, limit = snapshot.memory_in_use, snapshot.memory_limit
    if not limit:  # the supervisor knows the limit: while none runs, there is nothing to say about it
        known = "" if snapshot.supervisor_pid is None else ", no limit"
        return f"Memory: {format_bytes(used)} in use{known}"
    return f"Memory: {format_bytes(used)} in use of {format_bytes(limit)} ({used / limit * 100:.0f} %)"


def state(status: ModelStatus) -> str:
    """The state of a model; if it failed to load, the time until it is tried again; if it has no worker
    process, that it is in this one.
    """
    text = str(status.state)
    if status.state is ModelState.FAILED and status.retry_after > 0:
        text = f"failed, retry in {duration(status.retry_after)}"
    return text if status.isolated else f"{text}, in-process"


def _idle(status: ModelStatus) -> str:
    if status.pid is None:
        return NONE
    if status.idle is not None:
        return duration(status.idle)
    return "in use" if status.busy else "unused"


def _ttl_left(status: ModelStatus) -> str:
    if status.ttl is None or status.pid is None:
        return NONE
    if status.ttl == KEEP:
        return "stays"
    if status.ttl == 0:
        return "after use"
    return duration(max(0.0, status.ttl - (status.idle or 0.0)))


def _bytes(count: int | None) -> str:
    return format_bytes(count) if count else NONE


COLUMNS: Final = (
    Column("STATE", state, 9, right=False),
    Column("PID", lambda s: NONE if s.pid is None else str(s.pid), 5),
    Column("IDLE", _idle, 6),
    Column("TTL LEFT", _ttl_left, 7),
    Column("LEASES", lambda s: str(s.leases), 0),
    Column("RSS", lambda s: _bytes(s.usage.rss), 3),
    Column("PSS", lambda s: _bytes(s.usage.pss), 8),
    Column("GPU", lambda s: _bytes(s.usage.gpu), 1),
    Column("RUNS", lambda s: str(s.runs), 4),
    Column("P50", lambda s: NONE if s.p50 is None else duration(s.p50), 4),
    Column("PINNED", lambda s: "yes" if s.pinned else NONE, 2, right=False),
)
