"""``onnx-dl stop``: ends the shared host of a name, and on request those of other versions of onnx-dl."""

from __future__ import annotations

from onnx_dl.cli import hosts
from onnx_dl.cli.output import say
from onnx_dl.client import launcher
from onnx_dl.errors import SupervisorError
from onnx_dl.transport import running_hosts
from onnx_dl.transport.running_hosts import Sighting


def stop(name: str, *, all_versions: bool) -> None:
    """Ends the host of this name and version, and prints what was ended and what was not.

    ``all_versions``: and those of other versions, by SIGTERM, because this version cannot speak to them.

    Raises:
        SupervisorError: there is none.
        TimeoutError: one is still there.
    """
    found = running_hosts.running(name)
    others = [seen for seen in found if not seen.reachable]
    if not any(seen.reachable for seen in found) and not (others and all_versions):
        raise SupervisorError(launcher.no_host(name, others))
    for seen in found:
        say(f"{_end(name, seen, all_versions=all_versions)}: host {name!r}, {running_hosts.told(seen)}")
    if others and not all_versions:
        say("onnx-dl stop --all-versions ends those of other versions, too")


def _end(name: str, seen: Sighting, *, all_versions: bool) -> str:
    """What became of one."""
    if seen.reachable:
        with hosts.running(name) as host:
            host.stop()
    elif all_versions:
        launcher.terminate(seen)
    else:
        return "left"
    return "ended"
