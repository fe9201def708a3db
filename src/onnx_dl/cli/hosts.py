"""The shared host that a command is about: finding it, and what may be asked of it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping

from onnx_dl.errors import SupervisorDied
from onnx_dl.host import connect as connect_module
from onnx_dl.host.model_host import ModelHost, Snapshot


def default_name(environ: Mapping[str, str] = os.environ) -> str:
    """The host that is meant where none is named."""
    return environ.get("ONNX_DL_HOST") or "default"


def connect(name: str, *, start: bool) -> ModelHost:
    """A connection to the shared host; everything that finds hosts is behind this function."""
    return connect_module.connect(name, start=start)


@contextlib.contextmanager
def running(name: str) -> Iterator[ModelHost]:
    """The shared host of that name, for the block.  Starts none.

    Raises:
        SupervisorError: none runs; the message says how one is started.
    """
    with contextlib.closing(connect(name, start=False)) as found:
        yield found


@contextlib.contextmanager
def started(name: str) -> Iterator[ModelHost]:
    """The shared host of that name, for the block, which starts it if it does not run."""
    with contextlib.closing(connect(name, start=True)) as found:
        yield found


def alive(snapshot: Snapshot) -> Snapshot:
    """The snapshot, of a host that runs.

    Raises:
        SupervisorDied: the host has ended since.
    """
    if snapshot.supervisor_pid is None:
        raise SupervisorDied("The host has ended, and its models with it.")
    return snapshot
