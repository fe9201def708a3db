"""``onnx-dl stop``: ends the shared host of a name, on request also the hosts of other versions."""

from __future__ import annotations

from onnx_dl.cli import hosts
from onnx_dl.cli.output import print_line
from onnx_dl.client import launcher
from onnx_dl.errors import SupervisorError
from onnx_dl.transport import running_hosts
from onnx_dl.transport.running_hosts import RunningHost


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
        with hosts.running(host.name) as connected:
            connected.stop()
    elif all_versions:
        launcher.terminate(host)
    else:
        return "left"
    return "ended"
