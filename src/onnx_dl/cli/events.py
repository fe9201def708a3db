"""``onnx-dl events``: prints the last events of a host, and new ones as they happen."""

from __future__ import annotations

import contextlib
import datetime
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

_FEW: Final = 10
"""Past events that are shown before new ones."""
_ALL: Final = 1_000_000
_CHECK_INTERVAL: Final = 0.5
"""Seconds without an event after which host and reader are checked."""


def events(
    host: ModelHost, *, as_json: bool, lines: int | None = None, follows: bool, seconds: float | None = None
) -> None:
    """Prints the last events of a host, one per line, and new ones if ``follows``.

    Args:
        as_json: one JSON object per line, else the local time and the event's text.
        lines: number of past events; None: a few if ``follows``, else all that the host keeps.
        seconds: time after which ``follows`` ends; None: at Ctrl-C.

    Raises:
        SupervisorDied: the host has ended.
        BrokenPipeError: stdout has no reader any more.
    """

    def show(event: ModelEvent) -> None:
        print_line(msgspec.json.encode(event).decode() if as_json else event_line(event))

    if not follows:
        check_alive(host.snapshot())
        past = host.recent_events(_ALL if lines is None else lines)
        for event in past:
            show(event)
        if not past and lines != 0 and not as_json:
            print_line("No events yet. Load a model with: onnx-dl load MODEL")
        return
    # The stream comes first, so that nothing is missed; events that are in both are shown once.
    with host.events() as stream, _watched(host) as has_ended:
        past = host.recent_events(_FEW if lines is None else lines)
        for event in past:
            show(event)
        shown = past[-1].seq if past else 0

        def check() -> None:
            if has_ended():
                raise SupervisorDied("The host has ended: there are no more events.")
            if not has_reader(sys.stdout.fileno()):
                raise BrokenPipeError

        follow(stream, lambda event: show(event) if event.seq > shown else None, check, seconds)


def event_line(event: ModelEvent) -> str:
    """Local time and text of an event."""
    at = datetime.datetime.fromtimestamp(event.at).isoformat(" ", "seconds")
    return f"{at}  {event}"


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
