"""The hosts of one name, of all versions of onnx-dl, as ``onnx-dl ps`` shows them: pure functions of what
was found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from onnx_dl.transport import running_hosts
from onnx_dl.transport.running_hosts import Sighting


def lines(found: Sequence[Sighting]) -> list[str]:
    """One for each host: the one that this version can ask, and the others."""
    return [f"Host: {running_hosts.told(seen)}. {_remark(seen, found)}".rstrip() for seen in found]


def data(found: Sequence[Sighting]) -> list[dict[str, Any]]:
    """The same as plain data; times as Unix time in seconds."""
    return [
        {
            "name": seen.name,
            "protocol": seen.protocol,
            "package": seen.package,
            "pid": seen.pid,
            "since": seen.since,
            "kept": seen.kept,
            "reachable": seen.reachable,
            "leaving": running_hosts.successor(seen, found) is not None,
        }
        for seen in found
    ]


def _remark(seen: Sighting, found: Sequence[Sighting]) -> str:
    if not seen.reachable:
        return f"This version of onnx-dl cannot ask it. {running_hosts.outlook(seen, found)}"
    return running_hosts.outlook(seen, found) if running_hosts.successor(seen, found) is not None else ""
