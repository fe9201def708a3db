"""Tables of a host's models and of their memory over time; knows no terminal but its width in columns."""

from __future__ import annotations

import collections
from typing import Final, NamedTuple

from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.text import Text

from onnx_dl.core import snapshot_text
from onnx_dl.core.snapshot_table import NONE
from onnx_dl.core.snapshot_text import GAP, plain_table, shortened
from onnx_dl.core.status import Snapshot
from onnx_dl.core.text import duration, format_bytes, printable, short_names, sparkline

_LEAST_NAME: Final = 14
_LINE: Final = 60
"""Largest width of a sparkline."""
_NO_MODELS: Final = "No models. Load one with: onnx-dl load MODEL"
_NO_CALLS: Final = "No calls yet. RUNS will count the calls of each model."


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
    return snapshot_text.overview(snapshot, width, _NO_MODELS)


def live(snapshot: Snapshot, history: History, width: int) -> RenderableType:
    """The screen of ``onnx-dl top``: the overview, and memory over time."""
    if not history.models():
        return overview(snapshot, width)
    parts = [overview(snapshot, width)]
    if snapshot.models and not any(status.runs for status in snapshot.models):
        parts.append(Text(_NO_CALLS))
    return Group(*parts, Text(), *_over_time(snapshot, history, width))


def _over_time(snapshot: Snapshot, history: History, width: int) -> list[RenderableType]:
    lines = history.models()
    names = [printable(name) for name in short_names([(line.model, line.key) for line in lines])]
    wide = max([len("all models"), *map(cell_len, names)])
    wide = min(wide, max(_LEAST_NAME, width // 3))
    bars = max(1, min(_LINE, width - wide - 2 * len("12345.6 MB") - 3 * GAP))
    top = max([1, *(value for line in lines for value in line.values)])
    table = plain_table()
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
