"""Text and JSON data of all hosts of one name, for ``onnx-dl ps``: pure functions."""

from __future__ import annotations

from collections.abc import Sequence

from onnx_dl.transport import running_hosts
from onnx_dl.transport.running_hosts import RunningHost


def lines(found: Sequence[RunningHost]) -> list[str]:
    """One line for each host."""
    return [f"Host: {running_hosts.describe(host)}. {_remark(host, found)}".rstrip() for host in found]


def data(found: Sequence[RunningHost]) -> list[dict[str, object]]:
    """The hosts as plain data for JSON; times are Unix times in seconds."""
    return [
        {
            "name": host.name,
            "protocol": host.protocol,
            "package": host.package,
            "pid": host.pid,
            "since": host.since,
            "kept": host.managed,
            "reachable": host.reachable,
            "leaving": running_hosts.successor(host, found) is not None,
        }
        for host in found
    ]


def _remark(host: RunningHost, found: Sequence[RunningHost]) -> str:
    if not host.reachable:
        return f"This version of onnx-dl cannot connect to it. {running_hosts.outlook(host, found)}"
    return running_hosts.outlook(host, found) if running_hosts.successor(host, found) is not None else ""
