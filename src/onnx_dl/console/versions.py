"""The hosts of one name, of all versions of onnx-dl, as ``onnx-dl ps`` shows them: pure functions of what
was found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from onnx_dl import census
from onnx_dl.census import Sighting


def lines(found: Sequence[Sighting]) -> list[str]:
    """One for each host: the one that this version can ask, and the others."""
    return [f"Host: {census.told(seen)}. {_remark(seen, found)}".rstrip() for seen in found]


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
            "leaving": census.successor(seen, found) is not None,
        }
        for seen in found
    ]


def _remark(seen: Sighting, found: Sequence[Sighting]) -> str:
    if not seen.reachable:
        return f"This version of onnx-dl cannot ask it. {census.outlook(seen, found)}"
    return census.outlook(seen, found) if census.successor(seen, found) is not None else ""
