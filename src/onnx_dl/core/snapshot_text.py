"""A snapshot as a table for terminals and ``print()``, and as one of HTML for notebooks.

Imported when a snapshot is shown: rich takes some milliseconds.
"""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from onnx_dl.core import snapshot_table
from onnx_dl.core.lifecycle import ModelState
from onnx_dl.core.parsing import KEEP
from onnx_dl.core.snapshot_table import COLUMNS, NONE, Column
from onnx_dl.core.text import file_name, format_bytes, printable

if TYPE_CHECKING:
    from onnx_dl.core.status import ModelStatus, Snapshot

GAP: Final = 2
"""Characters between two columns of a table."""
_WIDTH: Final = 80
"""Columns of a printed snapshot."""
_NAME: Final = 24
"""Width of the model's name for which columns are omitted."""
_NO_MODELS: Final = "No models."
_STYLES: Final = {
    ModelState.READY: "green",
    ModelState.LOADING: "yellow",
    ModelState.DRAINING: "yellow",
    ModelState.FAILED: "bold red",
    ModelState.UNLOADED: "dim",
}


def overview(snapshot: Snapshot, width: int, no_models: str = _NO_MODELS) -> RenderableType:
    """The host, a line for each model, and the memory in use; ``no_models``: stands for the table."""
    return Group(
        Text(snapshot_table.title(snapshot), style="bold"),
        _models(snapshot, width) if snapshot.models else Text(no_models),
        Text(snapshot_table.memory_line(snapshot)),
    )


def text(snapshot: Snapshot) -> str:
    """The overview in 80 columns, without colours."""
    file = io.StringIO()
    console = Console(file=file, width=_WIDTH, color_system=None, force_terminal=False, force_jupyter=False)
    console.print(overview(snapshot, _WIDTH))
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


def as_html(snapshot: Snapshot) -> str:
    """The same as a table of HTML, with all columns in which any model has a value."""
    head, rows = snapshot_table.rows(snapshot)
    shown = [0, *(index for index in range(1, len(head)) if any(row[index] != NONE for row in rows))]
    lines = [
        '<table class="onnx-dl">',
        f'<caption style="text-align: left">{html.escape(snapshot_table.title(snapshot))}</caption>',
    ]
    if rows:
        lines.append(f"<thead>{_html_row('th', head, shown)}</thead>")
    body = [_html_row("td", row, shown) for row in rows] or [f"<tr><td>{_NO_MODELS}</td></tr>"]
    memory = html.escape(snapshot_table.memory_line(snapshot))
    foot = f'<tr><td colspan="{len(shown)}" style="text-align: left">{memory}</td></tr>'
    return "\n".join([*lines, "<tbody>", *body, "</tbody>", f"<tfoot>{foot}</tfoot>", "</table>"])


def line(status: ModelStatus) -> str:
    """One model in one line: ``asr.onnx: ready, pid 4711, PSS 31.2 MB, ttl 60 s``."""
    parts = [snapshot_table.state(status)]
    if status.pid is not None:
        parts += [f"pid {status.pid}", f"PSS {format_bytes(status.usage.pss)}"]
    if status.usage.gpu:
        parts.append(f"GPU {format_bytes(status.usage.gpu)}")
    if status.ttl is not None:
        parts.append("stays" if status.ttl == KEEP else f"ttl {status.ttl:g} s")
    if status.pinned:
        parts.append("pinned")
    return f"{printable(file_name(status.model))}: {', '.join(parts)}"


def plain_table(*, header: bool = True) -> Table:
    """A table without lines, whose cells are not wrapped."""
    return Table(box=None, show_header=header, header_style="bold", pad_edge=False, padding=(0, GAP, 0, 0))


def shortened(name: str, width: int) -> str:
    """A name without its middle if it is too wide: names of similar models differ at the end."""
    if cell_len(name) <= width:
        return name
    tail = max(0, (width - 1) * 2 // 3)
    head = width - 1 - tail
    while head + tail and cell_len(name[:head] + name[len(name) - tail :]) > width - 1:  # wide characters
        head, tail = (head - 1, tail) if head else (head, tail - 1)
    return f"{name[:head]}…{name[len(name) - tail :]}"


def _models(snapshot: Snapshot, width: int) -> Table:
    names = snapshot_table.names(snapshot)
    columns = _fitting(snapshot.models, width - min(_NAME, max(map(cell_len, names))))
    left = width - sum(_width(column, snapshot.models) + GAP for column in columns)
    table = plain_table()
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
    while len(shown) > 1 and sum(_width(column, models) + GAP for column in shown) > width:
        shown.remove(min(shown, key=lambda column: column.worth))
    return shown


def _width(column: Column, models: list[ModelStatus]) -> int:
    return max(cell_len(column.title), *(cell_len(column.cell(status)) for status in models))


def _cell(column: Column, status: ModelStatus) -> Text:
    return Text(
        column.cell(status), style=_STYLES[status.state] if column.cell is snapshot_table.state else ""
    )


def _html_row(tag: str, row: Sequence[str], shown: Sequence[int]) -> str:
    cells = []
    for index in shown:
        side = "right" if index > 0 and COLUMNS[index - 1].right else "left"
        cells.append(f'<{tag} style="text-align: {side}">{html.escape(row[index])}</{tag}>')
    return f"<tr>{''.join(cells)}</tr>"
