"""Connections of commands to the shared host that they name; ``onnx-dl stop``, which ends it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping

from onnx_dl.cli.output import print_line
from onnx_dl.client import launcher
from onnx_dl.core.settings import DEFAULT_HOST
from onnx_dl.core.status import Snapshot
from onnx_dl.errors import SupervisorDied, SupervisorError
from onnx_dl.host.connect import connect
from onnx_dl.host.model_host import ModelHost
from onnx_dl.transport import running_hosts
from onnx_dl.transport.running_hosts import RunningHost


def default_name(environ: Mapping[str, str] = os.environ) -> str:
    """The name of the host if the command has no ``--host``."""
    return environ.get("ONNX_DL_HOST") or DEFAULT_HOST


@contextlib.contextmanager
def connected(name: str, *, start: bool = False) -> Iterator[ModelHost]:
    """Connects to the shared host of this name, for the block.  Commands find hosts only through this.

    ``start``: starts it if it does not run.

    Raises:
        SupervisorError: it does not run; the message says how to start it.
    """
    with contextlib.closing(connect(name, start=start)) as found:
        yield found


def check_alive(snapshot: Snapshot) -> Snapshot:
    """Returns the snapshot.

    Raises:
        SupervisorDied: the host has ended.
    """
    if snapshot.supervisor_pid is None:
        raise SupervisorDied("The host has ended, and its models are unloaded.")
    return snapshot


def stop(name: str, *, all_versions: bool) -> None:
    """Ends the host of this name and version, and prints which hosts were ended and which not.

    ``all_versions``: also ends those of other versions, by SIGTERM, because their protocol is another.

    Raises:
        SupervisorError: no such host runs.
        TimeoutError: a host did not end in time.
    """
    found = running_hosts.running(name)
    others = [host for host in found if not host.reachable]
    if not any(host.reachable for host in found) and not (others and all_versions):
        raise SupervisorError(launcher.no_host(name, others))
    for host in found:
        print_line(f"{_end(host, all_versions=all_versions)}: host {name!r}, {running_hosts.describe(host)}")
    if others and not all_versions:
        print_line("onnx-dl stop --all-versions also ends those of other versions")


def _end(host: RunningHost, *, all_versions: bool) -> str:
    """Ends one host if it is to end; ``ended`` or ``left``."""
    if host.reachable:
        with connected(host.name) as found:
            found.stop()
    elif all_versions:
        launcher.terminate(host)
    else:
        return "left"
    return "ended"
