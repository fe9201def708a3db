"""``onnx-dl events``: what happens in a host, as it happens."""

from __future__ import annotations

import contextlib
import math
import os
import select
import sys
import time
from collections.abc import Callable, Iterator
from typing import Final

import msgspec

from onnx_dl.cli.hosts import alive
from onnx_dl.cli.output import is_read, say
from onnx_dl.client.event_stream import EventStream
from onnx_dl.core.events import ModelEvent
from onnx_dl.errors import SupervisorDied
from onnx_dl.host.model_host import ModelHost

_PATIENCE: Final = 0.5
"""Seconds without an event after which it is looked whether anybody is left to tell, or to be told."""


def events(host: ModelHost, *, as_json: bool, seconds: float | None = None) -> None:
    """Prints each event from now on as one line, for so many seconds; None: until Ctrl-C.

    Raises:
        SupervisorDied: the host has ended.
        BrokenPipeError: nobody reads stdout any more.
    """
    with host.events() as stream, _watched(host) as has_ended:

        def check() -> None:
            if has_ended():
                raise SupervisorDied("The host has ended: there are no more events.")
            if not is_read(sys.stdout.fileno()):
                raise BrokenPipeError

        follow(stream, lambda event: say(_as_json(event) if as_json else str(event)), check, seconds)


def follow(
    stream: EventStream,
    tell: Callable[[ModelEvent], object],
    check: Callable[[], None],
    seconds: float | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Tells events until ``seconds`` are over or the stream ends; ``check`` ends it by raising.

    It is asked in pauses only, so that what came before the end of a host is told.
    """
    end = math.inf if seconds is None else clock() + seconds
    while (left := end - clock()) > 0:
        try:
            tell(stream.get(min(left, _PATIENCE)))
        except TimeoutError:
            check()
        except StopIteration:
            return


def _as_json(event: ModelEvent) -> str:
    return msgspec.json.encode(event).decode()


@contextlib.contextmanager
def _watched(host: ModelHost) -> Iterator[Callable[[], bool]]:
    """Tells whether the host's supervisor has ended.  By its pidfd, which costs the host nothing."""
    pid = alive(host.snapshot()).supervisor_pid
    assert pid is not None
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        yield lambda: True
        return
    try:
        yield lambda: bool(select.select([fd], [], [], 0)[0])
    finally:
        os.close(fd)
