"""Output of commands to stdout, which may be closed, full or without a reader; and the terminal's size.

:func:`run_guarded` runs each command.
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final, TextIO

if TYPE_CHECKING:
    from rich.console import Console

_LEAST: Final = 20
"""Columns of the narrowest terminal that tables fit."""
_LOWEST: Final = 2


def run_guarded(command: Callable[[], int]) -> int:
    """Runs a command, flushes its output, and returns its exit code.

    The code is 1, without a message, if stdout has lost its reader (``| head``); and 1, with the error on
    stderr, if stdout cannot be written, or for any other ``OSError``.
    """
    with _prepared():
        try:
            try:
                return command()
            finally:
                sys.stdout.flush()  # now: an error at the interpreter's exit could not be handled
        except BrokenPipeError:
            _discard_stdout()
        except OSError as error:
            _discard_stdout()
            print_error(error)
        return 1


def print_error(error: object) -> None:
    """Prints an error on stderr, if that can be written; on a terminal, wraps lines between words."""
    text = f"onnx-dl: {error}"
    with contextlib.suppress(OSError):
        if sys.stderr.isatty():
            columns, _ = _terminal(sys.stderr)
            text = wrapped(
                text, size_to_fill(os.environ.get("COLUMNS"), columns, _LEAST, 80) or columns or 80
            )
        print(text, file=sys.stderr, flush=True)


def wrapped(text: str, width: int) -> str:
    """Text whose lines have at most ``width`` characters; longer words, such as paths, stay whole."""
    return "\n".join(
        textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False)
        for line in text.splitlines()
    )


@contextlib.contextmanager
def buffered_stdout() -> Iterator[None]:
    """Writes the output of the block at its end.  For argparse, which ignores write errors.

    Raises:
        OSError: stdout has no reader, or cannot be written.
    """
    text = io.StringIO()
    try:
        with contextlib.redirect_stdout(text):
            yield
    finally:
        if written := text.getvalue():  # on a full disk, even writing nothing is an error
            print(written, end="", flush=True)


@contextlib.contextmanager
def _prepared() -> Iterator[None]:
    """Replaces closed streams by the null device; makes stdout print ``?`` for what its encoding lacks."""
    with contextlib.ExitStack() as opened:
        for name in ("stdout", "stderr"):
            if getattr(sys, name) is None:
                setattr(sys, name, opened.enter_context(open(os.devnull, "w")))
                opened.callback(setattr, sys, name, None)
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")
        yield


def _discard_stdout() -> None:
    """Makes sure that the flush of stdout at the interpreter's exit does not fail."""
    try:
        sys.stdout.flush()
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def print_line(line: str) -> None:
    """Prints one line and flushes it.

    Raises:
        OSError: stdout has no reader, or cannot be written.
    """
    print(line, flush=True)


def has_reader(fd: int) -> bool:
    """Returns whether a pipe or socket still has a reader; always true for other files."""
    poll = select.poll()
    poll.register(fd, 0)  # no events asked for: errors are reported anyway
    return not any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


def console() -> Console:
    """A console for stdout: as wide as the terminal, or 100 columns."""
    from rich.console import Console

    columns, lines = _terminal(sys.stdout)
    width = size_to_fill(os.environ.get("COLUMNS"), columns, _LEAST, 100 if columns is None else 80)
    height = size_to_fill(os.environ.get("LINES"), lines, _LOWEST, 25)
    return Console(width=width, height=height, highlight=False)


def size_to_fill(variable: str | None, terminal: int | None, least: int, default: int) -> int | None:
    """The number of columns or lines to fill; None: as many as the terminal has at each moment.

    Args:
        variable: value of the environment variable; ignored if it is not a number, or less than ``least``.
        terminal: present size of the terminal; 0: not known; None: stdout is not a terminal.
        default: the result if neither is known.
    """
    if variable is not None and variable.isdecimal() and int(variable) >= least:
        return int(variable)
    if terminal is None or terminal < least:
        return default
    return None if variable is None else terminal


def _terminal(stream: TextIO) -> tuple[int | None, int | None]:
    """Columns and lines of the terminal; None: the stream is not a terminal; 0: not known."""
    if not stream.isatty():
        return None, None
    try:
        return os.get_terminal_size(stream.fileno())
    except OSError:
        return 0, 0
