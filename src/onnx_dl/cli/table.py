"""Tables of a host's models and of their memory over time; knows no terminal but its width in columns."""

from __future__ import annotations

import collections
from typing import Final, NamedTuple

from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from onnx_dl.core import snapshot_table
from onnx_dl.core.lifecycle import ModelState
from onnx_dl.core.snapshot_table import COLUMNS, NONE, Column
from onnx_dl.core.status import ModelStatus, Snapshot
from onnx_dl.core.text import duration, format_bytes, short_names, sparkline

_GAP: Final = 2
"""Characters between two columns of a table."""
_NAME: Final = 24
"""Width of the model's name for which columns are omitted."""
_LEAST_NAME: Final = 14
_LINE: Final = 60
"""Largest width of a sparkline."""
_NO_MODELS: Final = "No models. Load one with: onnx-dl load MODEL"
_NO_CALLS: Final = "No calls yet. RUNS will count the calls of each model."
_STYLES: Final = {
    ModelState.READY: "green",
    ModelState.LOADING: "yellow",
    ModelState.DRAINING: "yellow",
    ModelState.FAILED: "bold red",
    ModelState.UNLOADED: "dim",
}


class _MemoryAt(NamedTuple):
    at: float
    in_use: int
    pss: dict[tuple[str, str], int]


class Line(NamedTuple):
    """Bytes of one model, from the oldest sample to the newest; 0 while it was not loaded."""

    model: str
    key: str
    values: list[int]


class History:
    """The last ``length`` samples."""

    def __init__(self, length: int) -> None:
        self._samples: collections.deque[_MemoryAt] = collections.deque(maxlen=length)

    def add(self, snapshot: Snapshot, now: float) -> None:
        """Adds a sample.  ``now``: seconds of any monotonic clock."""
        pss = {(status.model, status.key): status.usage.pss for status in snapshot.models}
        self._samples.append(_MemoryAt(now, snapshot.memory_in_use, pss))

    @property
    def seconds(self) -> float:
        """The time from the oldest sample to the newest."""
        return self._samples[-1].at - self._samples[0].at if self._samples else 0.0

    @property
    def in_use(self) -> list[int]:
        """Bytes of all models together, by sample."""
        return [sample.in_use for sample in self._samples]

    def models(self) -> list[Line]:
        """All models of any sample, including those that are unloaded now."""
        return [
            Line(model, key, [sample.pss.get((model, key), 0) for sample in self._samples])
            for model, key in dict.fromkeys(pair for sample in self._samples for pair in sample.pss)
        ]


# --- tables ------------------------------------------------------------------------------------------------


def overview(snapshot: Snapshot, width: int) -> RenderableType:
    """The output of ``onnx-dl ps``: the host, its models, and their memory."""
    return Group(
        Text(snapshot_table.title(snapshot), style="bold"),
        _models(snapshot, width),
        Text(snapshot_table.memory_line(snapshot)),
    )


def live(snapshot: Snapshot, history: History, width: int) -> RenderableType:
    """The screen of ``onnx-dl top``: the overview, and memory over time."""
    if not history.models():
        return overview(snapshot, width)
    parts = [overview(snapshot, width)]
    if snapshot.models and not any(status.runs for status in snapshot.models):
        parts.append(Text(_NO_CALLS))
    return Group(*parts, Text(), *_over_time(snapshot, history, width))


def _models(snapshot: Snapshot, width: int) -> RenderableType:
    if not snapshot.models:
        return Text(_NO_MODELS)
    names = snapshot_table.names(snapshot)
    columns = _fitting(snapshot.models, width - min(_NAME, max(map(cell_len, names))))
    left = width - sum(_width(column, snapshot.models) + _GAP for column in columns)
    table = _plain_table()
    table.add_column("MODEL", no_wrap=True, overflow="ellipsis", max_width=max(1, left))
    for column in columns:
        table.add_column(
            column.title, no_wrap=True, overflow="ellipsis", justify="right" if column.right else "left"
        )
    for name, status in zip(names, snapshot.models, strict=True):
        table.add_row(Text(shortened(name, max(1, left))), *(_cell(column, status) for column in columns))
    return table


def _fitting(models: list[ModelStatus], width: int) -> list[Column]:
    """The columns that fit beside the name, in order, without those that have no value for any model."""
    shown = [column for column in COLUMNS if any(column.cell(status) != NONE for status in models)]
    while len(shown) > 1 and sum(_width(column, models) + _GAP for column in shown) > width:
        shown.remove(min(shown, key=lambda column: column.worth))
    return shown


def _width(column: Column, models: list[ModelStatus]) -> int:
    return max(cell_len(column.title), *(cell_len(column.cell(status)) for status in models))


def shortened(name: str, width: int) -> str:
    """A name without its middle if it is too wide: names of similar models differ at the end."""
    if cell_len(name) <= width:
        return name
    tail = max(0, (width - 1) * 2 // 3)
    head = width - 1 - tail
    while head + tail and cell_len(name[:head] + name[len(name) - tail :]) > width - 1:  # wide characters
        head, tail = (head - 1, tail) if head else (head, tail - 1)
    return f"{name[:head]}…{name[len(name) - tail :]}"


def _cell(column: Column, status: ModelStatus) -> Text:
    return Text(
        column.cell(status), style=_STYLES[status.state] if column.cell is snapshot_table.state else ""
    )


def _plain_table(*, header: bool = True) -> Table:
    return Table(box=None, show_header=header, header_style="bold", pad_edge=False, padding=(0, _GAP, 0, 0))


def _over_time(snapshot: Snapshot, history: History, width: int) -> list[RenderableType]:
    lines = history.models()
    names = short_names([(line.model, line.key) for line in lines])
    wide = max([len("all models"), *map(cell_len, names)])
    wide = min(wide, max(_LEAST_NAME, width // 3))
    bars = max(1, min(_LINE, width - wide - 2 * len("12345.6 MB") - 3 * _GAP))
    top = max([1, *(value for line in lines for value in line.values)])
    table = _plain_table()
    table.add_column("MEMORY", no_wrap=True, overflow="ellipsis", max_width=wide)
    table.add_column(_span(history), no_wrap=True)
    table.add_column("NOW", justify="right", no_wrap=True)
    table.add_column("PEAK", justify="right", no_wrap=True)
    for name, line in zip(names, lines, strict=True):
        table.add_row(Text(shortened(name, wide)), *_line(line.values, bars, top))
    limit = snapshot.memory_limit or max([1, *history.in_use])
    table.add_row(Text("all models", style="bold"), *_line(history.in_use, bars, limit))
    return [table, Text(_scale(top, snapshot), style="dim")]


def _span(history: History) -> str:
    return f"LAST {duration(history.seconds)}" if history.seconds else "OVER TIME"


def _line(values: list[int], bars: int, top: int) -> tuple[Text, str, str]:
    line = Text(sparkline(values, min(bars, len(values)), top).rjust(bars), style="cyan")
    return line, format_bytes(values[-1]) if values else NONE, format_bytes(max(values, default=0))


def _scale(top: int, snapshot: Snapshot) -> str:
    whole = "the limit" if snapshot.memory_limit else "their peak"
    return f"A full bar is {format_bytes(top)} for one model, and {whole} for all models."
