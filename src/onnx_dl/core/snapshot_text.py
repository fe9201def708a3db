"""A snapshot as a table of plain text, for ``print()``, and as one of HTML, for notebooks.

Imported when a snapshot is shown.
"""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from onnx_dl.core import snapshot_table
from onnx_dl.core.parsing import KEEP
from onnx_dl.core.snapshot_table import COLUMNS, NONE
from onnx_dl.core.text import file_name, format_bytes

if TYPE_CHECKING:
    from onnx_dl.core.status import ModelStatus, Snapshot

WIDTH: Final = 80
"""Columns of a terminal that the table fits in, with a name of ordinary length."""
_NAME: Final = 14
"""Least width of the model's name."""
_GAP: Final = 2
_NO_MODELS: Final = "No models."


def text(snapshot: Snapshot, width: int = WIDTH) -> str:
    """The host, a line for each model, and the memory in use, in ``width`` columns.

    The least important figures are left out if there is no room, those without any value first; then long
    names are shortened at their end.
    """
    lines = [snapshot_table.title(snapshot)]
    head, rows = snapshot_table.rows(snapshot)
    if rows:
        shown, name = _fitting(head, rows, width)
        sizes = [name, *(_size(head, rows, index) for index in shown)]
        for row in (head, *rows):
            cells = [_cut(row[0], name), *(row[index] for index in shown)]
            aligned = [
                _padded(cell, size, right=index > 0 and COLUMNS[index - 1].right)
                for cell, size, index in zip(cells, sizes, [0, *shown], strict=True)
            ]
            lines.append((" " * _GAP).join(aligned).rstrip())
    else:
        lines.append(_NO_MODELS)
    return "\n".join([*lines, snapshot_table.memory_line(snapshot)])


def as_html(snapshot: Snapshot) -> str:
    """The same as a table of HTML, with all columns in which any model has a value."""
    head, rows = snapshot_table.rows(snapshot)
    shown = [0, *(index for index in range(1, len(head)) if any(row[index] != NONE for row in rows))]
    lines = [
        '<table class="onnx-dl">',
        f'<caption style="text-align: left">{_escaped(snapshot_table.title(snapshot))}</caption>',
    ]
    if rows:
        lines.append(f"<thead>{_html_row('th', head, shown)}</thead>")
    body = [_html_row("td", row, shown) for row in rows] or [f"<tr><td>{_NO_MODELS}</td></tr>"]
    memory = _escaped(snapshot_table.memory_line(snapshot))
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
    return f"{_visible(file_name(status.model))}: {', '.join(parts)}"


def _fitting(head: list[str], rows: list[list[str]], width: int) -> tuple[list[int], int]:
    """Indexes of the columns that fit beside the name, in order, and the width of the name."""
    longest = max(map(_columns, [head[0], *(row[0] for row in rows)]))

    def worth(index: int) -> tuple[bool, int]:
        return any(row[index] != NONE for row in rows), COLUMNS[index - 1].worth

    shown = list(range(1, len(head)))
    while True:
        left = width - sum(_size(head, rows, index) + _GAP for index in shown)
        if len(shown) <= 1 or left >= min(_NAME, longest):
            return shown, max(1, min(longest, left))
        shown.remove(min(shown, key=worth))


def _size(head: list[str], rows: list[list[str]], index: int) -> int:
    return max(_columns(row[index]) for row in (head, *rows))


def _html_row(tag: str, row: Sequence[str], shown: Sequence[int]) -> str:
    cells = []
    for index in shown:
        side = "right" if index > 0 and COLUMNS[index - 1].right else "left"
        cells.append(f'<{tag} style="text-align: {side}">{_escaped(row[index])}</{tag}>')
    return f"<tr>{''.join(cells)}</tr>"


def _escaped(given: str) -> str:
    return html.escape(_visible(given))


def _visible(given: str) -> str:
    """Replaces characters that a terminal would obey, which a file's name may have."""
    return "".join(each if each.isprintable() else "?" for each in given)


def _columns(given: str) -> int:
    """Number of columns of a terminal that the text takes."""
    wide = sum(unicodedata.east_asian_width(each) in "WF" for each in given)
    return len(given) + wide - sum(map(bool, map(unicodedata.combining, given)))


def _cut(given: str, width: int) -> str:
    given = _visible(given)
    if _columns(given) <= width:
        return given
    while _columns(given) > width - 1:
        given = given[:-1]
    return f"{given}…"


def _padded(given: str, width: int, *, right: bool) -> str:
    space = " " * (width - _columns(given))
    return space + given if right else given + space
