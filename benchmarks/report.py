"""One table of figures with what was asked of them, the same as JSON, and a picture of what a call costs."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Final, NamedTuple

ADDED: Final = "µs+"
"""The unit of what a way adds to the call in-process."""


ALL_WAYS: Final = ", all ways"
"""How the work of a row ends that was measured beside what a user would pick instead."""


class Row(NamedTuple):
    """One figure.

    ``limit``: what it must not exceed, or must reach if ``at_least``; None: nothing is asked.  ``floor``: the
    least that the same work cost, in the same run, without onnx-dl but with the process boundary.  ``p99``:
    microseconds, over all calls.  ``note`` says why there is no ``value``, or what it is.
    """

    work: str
    way: str
    value: float | None
    unit: str = ""
    limit: float | None = None
    at_least: bool = False
    least: float | None = None
    most: float | None = None
    p99: float | None = None
    floor: float | None = None
    note: str = ""

    @property
    def met(self) -> bool | None:
        if self.limit is None or self.value is None:
            return None
        return self.value >= self.limit if self.at_least else self.value <= self.limit


def number(value: float | None) -> str:
    """Three digits that count, and no exponent."""
    if value is None:
        return ""
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:,.{digits}f}"


_HEAD: Final = ("work", "way", "figure", "", "(least, most)", "p99 µs", "floor", "asked", "")
_LEFT: Final = (0, 1, 3, 8)


def _cells(row: Row, work: str) -> tuple[str, ...]:
    spread = f"({number(row.least)}, {number(row.most)})" if row.least != row.most else ""
    asked = f"{'≥' if row.at_least else '≤'} {number(row.limit)}" if row.limit is not None else ""
    verdict = {None: row.note, True: f"met {row.note}", False: f"NOT MET {row.note}"}[row.met]
    figure = "-" if row.value is None else number(row.value)
    shown = "" if row.work == work else row.work
    return (shown, row.way, figure, row.unit, spread, number(row.p99), number(row.floor), asked, verdict)


def table(rows: Sequence[Row]) -> str:
    before = ["", *(row.work for row in rows)]
    cells = [_HEAD, *(_cells(row, work) for row, work in zip(rows, before, strict=False))]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for line in cells:
        padded = [
            cell.ljust(width) if column in _LEFT else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def write(rows: Sequence[Row], found: dict[str, Any], file: Path | None) -> None:
    """Add the rows and the present load of the machine to ``found``; write it as JSON if there is a file."""
    found["rows"] = [row._asdict() | {"met": row.met} for row in rows]
    found["machine"]["load_average_after"] = os.getloadavg()[0]
    if file:
        file.write_text(json.dumps(found, indent=1))


def machine() -> dict[str, Any]:
    """Where and on what this was measured."""
    installed = {}
    for name in ("onnxruntime", "onnxruntime-gpu", "numpy"):
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
        **installed,
    }


# --- the picture -----------------------------------------------------------------------------------------

_KINDS: Final = {"onnx-dl": "#1b7837", "floor: the least in Python": "#8c96a8", "other ways": "#d8985b"}


def _kind(way: str) -> str:
    if way.startswith("onnx-dl"):
        return "onnx-dl"
    return "floor: the least in Python" if way.startswith("floor") else "other ways"


def _bars(axes: Any, work: str, rows: list[Row]) -> None:
    """One kind of call; ways that added less than a microsecond are drawn as one."""
    rows = sorted(rows, key=lambda row: -(row.value or 0))
    values = [max(row.value or 0, 1.0) for row in rows]
    colors = [_KINDS[_kind(row.way)] for row in rows]
    axes.barh([row.way for row in rows], values, color=colors, height=0.7)
    axes.set_xscale("log")
    axes.set_xlim(1, 8 * max(values))
    axes.set_title(work.removesuffix(ALL_WAYS), fontsize=11, loc="left")
    axes.tick_params(axis="y", labelsize=9)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    for index, (row, value) in enumerate(zip(rows, values, strict=True)):
        axes.text(value * 1.12, index, number(row.value), va="center", fontsize=8.5)


def _drawn(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """What a way adds, by work: beside the others' ways if these were measured, else without."""
    added = [row for row in rows if row.unit == ADDED and row.value is not None]
    beside = [row for row in added if row.work.endswith(ALL_WAYS)]
    works: dict[str, list[Row]] = {}
    for row in beside or added:
        works.setdefault(row.work, []).append(row)
    return works


def draw(rows: Sequence[Row], target: Path) -> None:
    """What each way adds to a call, by kind of call, on a logarithmic axis; nothing if none was measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import patches, pyplot

    works = _drawn(rows)
    if not works:
        return
    heights = [len(mine) + 1 for mine in works.values()]
    size = (8, 0.27 * sum(heights) + 0.5 * len(works) + 0.8)
    figure, axes = pyplot.subplots(
        len(works), 1, figsize=size, dpi=110, height_ratios=heights, squeeze=False, layout="constrained"
    )
    for one, (work, mine) in zip(axes[:, 0], works.items(), strict=True):
        _bars(one, work, mine)
    axes[-1, 0].set_xlabel("µs added to the call in-process (p50, logarithmic)", fontsize=9)
    legend = [patches.Patch(color=color, label=kind) for kind, color in _KINDS.items()]
    figure.legend(handles=legend, loc="outside upper center", ncol=3, frameon=False, fontsize=9)
    figure.savefig(target)
    pyplot.close(figure)
