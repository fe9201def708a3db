"""Connections of commands to the shared host that they name."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping

from onnx_dl.core.settings import DEFAULT_HOST
from onnx_dl.core.status import Snapshot
from onnx_dl.errors import SupervisorDied
from onnx_dl.host import connect as connect_module
from onnx_dl.host.model_host import ModelHost


def default_name(environ: Mapping[str, str] = os.environ) -> str:
    """The name of the host if the command has no ``--host``."""
    return environ.get("ONNX_DL_HOST") or DEFAULT_HOST


def connect(name: str, *, start: bool) -> ModelHost:
    """Connects to the shared host.  Commands find hosts only through this function."""
    return connect_module.connect(name, start=start)


@contextlib.contextmanager
def running(name: str) -> Iterator[ModelHost]:
    """Connects to the shared host of this name, for the block.  Does not start it.

    Raises:
        SupervisorError: it does not run; the message says how to start it.
    """
    with contextlib.closing(connect(name, start=False)) as found:
        yield found


@contextlib.contextmanager
def started(name: str) -> Iterator[ModelHost]:
    """Connects to the shared host of this name, for the block.  Starts it if it does not run."""
    with contextlib.closing(connect(name, start=True)) as found:
        yield found


def check_alive(snapshot: Snapshot) -> Snapshot:
    """Returns the snapshot.

    Raises:
        SupervisorDied: the host has ended.
    """
    if snapshot.supervisor_pid is None:
        raise SupervisorDied("The host has ended, and all its models.")
    return snapshot
