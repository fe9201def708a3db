"""Standard output, whose reader may leave at any time."""

from __future__ import annotations

import contextlib
import io
import os
import select
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


@contextlib.contextmanager
def quiet_end() -> Iterator[None]:
    """Where nobody reads stdout any more (``| head``), the block ends the program, with exit code 1 and
    without a word."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        let_go()
        raise SystemExit(1) from None


def prepare() -> None:
    """A stdout that is closed takes everything, and one of few characters shows the others as ``?``."""
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def let_go() -> None:
    """The interpreter's exit flushes stdout once more, which must not fail."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


def say(line: str) -> None:
    """One line, at once.

    Raises:
        BrokenPipeError: nobody reads it.
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

    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 100
    return Console(width=width, highlight=False)
