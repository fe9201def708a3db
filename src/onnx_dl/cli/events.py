"""``onnx-dl events``: prints the events of a host as they happen."""

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

from onnx_dl.cli.hosts import check_alive
from onnx_dl.cli.output import has_reader, print_line
from onnx_dl.client.event_dispatch import EventStream
from onnx_dl.core.events import ModelEvent
from onnx_dl.errors import SupervisorDied
from onnx_dl.host.model_host import ModelHost

_CHECK_INTERVAL: Final = 0.5
"""Seconds without an event after which host and reader are checked."""


def events(host: ModelHost, *, as_json: bool, seconds: float | None = None) -> None:
    """Prints each event from now on as one line, for ``seconds``; None: until Ctrl-C.

    Raises:
        SupervisorDied: the host has ended.
        BrokenPipeError: stdout has no reader any more.
    """

    def show(event: ModelEvent) -> None:
        print_line(msgspec.json.encode(event).decode() if as_json else str(event))

    with host.events() as stream, _watched(host) as has_ended:

        def check() -> None:
            if has_ended():
                raise SupervisorDied("The host has ended: there are no more events.")
            if not has_reader(sys.stdout.fileno()):
                raise BrokenPipeError

        follow(stream, show, check, seconds)


def follow(
    stream: EventStream,
    show: Callable[[ModelEvent], object],
    check: Callable[[], None],
    seconds: float | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Shows events until ``seconds`` are over or the stream ends; ``check`` can end it by raising.

    ``check`` is called only when no event waits, so that all events before the end of a host are shown.
    """
    end = math.inf if seconds is None else clock() + seconds
    while (left := end - clock()) > 0:
        try:
            show(stream.get(min(left, _CHECK_INTERVAL)))
        except TimeoutError:
            check()
        except StopIteration:
            return


@contextlib.contextmanager
def _watched(host: ModelHost) -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether the host's supervisor has ended, by its pidfd."""
    pid = check_alive(host.snapshot()).supervisor_pid
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
