"""The output of ``onnx-dl doctor``: findings as a list, or as JSON."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Final

import msgspec
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from onnx_dl.cli.doctor.checks import Finding, Mark
from onnx_dl.cli.output import console, print_line

_STYLES: Final = {Mark.OK: "green", Mark.WARNING: "yellow", Mark.PROBLEM: "bold red"}


def show(findings: Sequence[Finding], *, as_json: bool) -> None:
    """Prints the findings on stdout."""
    if as_json:
        print_line(msgspec.json.encode({"ok": not has_problems(findings), "findings": findings}).decode())
    else:
        console().print(checklist(findings))


def checklist(findings: Sequence[Finding]) -> RenderableType:
    """One row for each finding, its advice below it, and the numbers of each mark at the end."""
    table = Table.grid(padding=(0, 2, 0, 0))
    for _ in range(2):
        table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        mark = Text(finding.mark, style=_STYLES[finding.mark])
        table.add_row(mark, finding.check, Text(finding.found))
        if finding.advice:
            table.add_row("", "", Text(finding.advice, style="bold"))
    return Group(table, Text(summary(findings), style="bold"))


def summary(findings: Sequence[Finding]) -> str:
    """``12 ok, 1 warning, no problem``."""
    counts = collections.Counter(finding.mark for finding in findings)
    return ", ".join(_counted(counts[mark], mark) for mark in Mark)


def has_problems(findings: Sequence[Finding]) -> bool:
    """Returns whether there is a finding that keeps models from being used as the settings say."""
    return any(finding.mark is Mark.PROBLEM for finding in findings)


def _counted(count: int, mark: Mark) -> str:
    plural = "s" if count > 1 and mark is not Mark.OK else ""
    return f"{count or 'no'} {mark}{plural}"
