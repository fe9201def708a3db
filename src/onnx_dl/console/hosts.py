"""The shared host that a command is about: finding it, and what may be asked of it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Protocol

from onnx_dl import hosts
from onnx_dl.errors import SupervisorDied, SupervisorError
from onnx_dl.events import EventStream
from onnx_dl.host import Snapshot
from onnx_dl.model import ModelStatus


class Host(Protocol):
    """What commands use of a :class:`~onnx_dl.ModelHost` that is shared."""

    def snapshot(self) -> Snapshot: ...

    def events(self) -> EventStream: ...

    def adopt(
        self,
        model: str,
        *,
        ttl: float | str | None = None,
        pin: bool | None = None,
        priority: int | None = None,
    ) -> ModelStatus: ...

    def unload(self, model: str, *, force: bool = False) -> bool: ...

    def stop(self) -> None: ...

    def close(self) -> None: ...


def default_name(environ: Mapping[str, str] = os.environ) -> str:
    """The host that is meant where none is named."""
    return environ.get("ONNX_DL_HOST") or "default"


def connect(name: str, *, start: bool) -> Host:
    """A connection to the shared host; everything that finds hosts is behind this function."""
    return hosts.connect(name, start=start)


@contextlib.contextmanager
def running(name: str) -> Iterator[Host]:
    """The shared host of that name, for the block.  Starts none.

    Raises:
        SupervisorError: none runs; the message says how one is started.
    """
    try:
        found = connect(name, start=False)
    except SupervisorError as error:
        if type(error) is not SupervisorError:  # it runs, and something else is wrong
            raise
        raise SupervisorError(none_runs(name)) from error
    with contextlib.closing(found):
        yield found


@contextlib.contextmanager
def started(name: str) -> Iterator[Host]:
    """The shared host of that name, for the block, which starts it if it does not run."""
    with contextlib.closing(connect(name, start=True)) as found:
        yield found


def none_runs(name: str) -> str:
    """What to do where no host of that name runs."""
    usual = name == default_name({})
    supervise, load = ("", "") if usual else (f" --name {name}", f" --host {name}")
    return (
        f"No shared host named {name!r} runs. Start one with: onnx-dl supervise{supervise}, or by loading a "
        f"model into it: onnx-dl load MODEL{load}. --host or ONNX_DL_HOST names another."
    )


def alive(snapshot: Snapshot) -> Snapshot:
    """The snapshot, of a host that runs.

    Raises:
        SupervisorDied: the host has ended since.
    """
    if snapshot.supervisor_pid is None:
        raise SupervisorDied("The host has ended, and its models with it.")
    return snapshot
