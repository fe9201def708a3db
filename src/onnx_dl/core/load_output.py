"""Output of a load: onnxruntime's prints and warnings, repeated in the application."""

from __future__ import annotations

import builtins
import contextlib
import io
import sys
import warnings
from collections.abc import Iterator
from typing import TypeAlias

Remarks: TypeAlias = list[list[str | int]]
"""``["warning", category, message, file, line]`` or ``["print", text]``, in order."""


@contextlib.contextmanager
def captured() -> Iterator[Remarks]:
    """Collects prints and warnings of the block as plain data; an exception gets them as ``remarks``."""
    remarks: Remarks = []
    printed = io.StringIO()
    with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stdout(printed):
        warnings.simplefilter("always")
        try:
            yield remarks
        except Exception as error:
            _collect(remarks, caught, printed)
            if remarks:
                error.remarks = remarks  # type: ignore[attr-defined]
            raise
    _collect(remarks, caught, printed)


def _collect(remarks: Remarks, caught: list[warnings.WarningMessage], printed: io.StringIO) -> None:
    remarks.extend(
        ["warning", entry.category.__name__, str(entry.message), entry.filename, entry.lineno]
        for entry in caught
    )
    if text := printed.getvalue():
        remarks.append(["print", text])


def repeat(remarks: object) -> None:
    """Repeats the prints and warnings of a worker in this process."""
    for remark in remarks if isinstance(remarks, list) else ():
        match remark:
            case ["warning", str(category), str(message), str(filename), int(line)]:
                found = getattr(builtins, category, None)
                if not (isinstance(found, type) and issubclass(found, Warning)):
                    found = UserWarning
                warnings.warn_explicit(message, found, filename, line)
            case ["print", str(text)]:
                print(text, end="", file=sys.stdout)
