"""Standard output, which may be closed, full, or without anybody who reads it; and the terminal's size.

All that commands write goes through here: :func:`guarded` is around each of them.
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from rich.console import Console

_LEAST: Final = 20
"""Columns of the narrowest terminal that tables are made for."""
_LOWEST: Final = 2


def guarded(command: Callable[[], int]) -> int:
    """Runs a command to the end of its output, and returns its exit code.

    1, without a word, where nobody reads stdout any more (``| head``); 1, with the error's words on stderr,
    where it cannot be written, or for any other ``OSError``.
    """
    with _prepared():
        try:
            try:
                return command()
            finally:
                sys.stdout.flush()  # here, because an error at the interpreter's exit is beyond us
        except BrokenPipeError:
            _let_go()
        except OSError as error:
            _let_go()
            complain(error)
        return 1


def complain(error: object) -> None:
    """What went wrong, on stderr, if that can be written."""
    with contextlib.suppress(OSError):
        print(f"onnx-dl: {error}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Writes at the end of the block what it has printed.  For argparse, which ignores that it cannot write.

    Raises:
        OSError: nobody reads it, or it cannot be written.
    """
    text = io.StringIO()
    try:
        with contextlib.redirect_stdout(text):
            yield
    finally:
        if said := text.getvalue():  # to write nothing on a full disk is an error, too
            print(said, end="", flush=True)


@contextlib.contextmanager
def _prepared() -> Iterator[None]:
    """Streams that are closed take everything, and a stdout of few characters shows the others as ``?``."""
    with contextlib.ExitStack() as opened:
        for name in ("stdout", "stderr"):
            if getattr(sys, name) is None:
                setattr(sys, name, opened.enter_context(open(os.devnull, "w")))
                opened.callback(setattr, sys, name, None)
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")
        yield


def _let_go() -> None:
    """The interpreter's exit flushes stdout once more, which must not fail."""
    try:
        sys.stdout.flush()
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def say(line: str) -> None:
    """One line, at once.

    Raises:
        OSError: nobody reads it, or it cannot be written.
    """
    print(line, flush=True)


def is_read(fd: int) -> bool:
    """Whether somebody can still read what is written there; always true of what is no pipe or socket."""
    poll = select.poll()
    poll.register(fd, 0)  # what is asked for is nothing: errors are told anyway
    return not any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


def console() -> Console:
    """The terminal, or a file of 100 columns."""
    from rich.console import Console

    columns, lines = _terminal()
    width = extent(os.environ.get("COLUMNS"), columns, _LEAST, 100 if columns is None else 80)
    height = extent(os.environ.get("LINES"), lines, _LOWEST, 25)
    return Console(width=width, height=height, highlight=False)


def extent(told: str | None, terminal: int | None, least: int, usual: int) -> int | None:
    """How many columns or lines to fill; None: as many as the terminal has at that moment.

    Args:
        told: what the environment says.  Where it says less than ``least``, or nothing that makes sense, it
            has not been told.
        terminal: how many it has now; 0: it does not know.  None: there is none.
        usual: what there is where neither is known.
    """
    if told is not None and told.isdecimal() and int(told) >= least:
        return int(told)
    if terminal is None or terminal < least:
        return usual
    return None if told is None else terminal


def _terminal() -> tuple[int | None, int | None]:
    """Columns and lines of the terminal that stdout is."""
    if not sys.stdout.isatty():
        return None, None
    try:
        return os.get_terminal_size(sys.stdout.fileno())
    except OSError:
        return 0, 0
