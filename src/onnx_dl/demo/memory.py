"""A thread that records memory over time, for the demo."""

from __future__ import annotations

import threading
import time
from typing import Final, NamedTuple, Self

import psutil

_PERIOD: Final = 0.2  # reading private memory walks the page tables, which slows down a process that loads


class MemorySample(NamedTuple):
    """Bytes at one moment; ``at`` in seconds since the start.

    ``application``: the resident set of this process; ``others``: the private memory of supervisor, template
    and workers (USS, without shared pages).
    """

    at: float
    application: int
    others: int


class Recorder:
    """Records memory five times a second within its block."""

    def __init__(self) -> None:
        self.readings: list[MemorySample] = []
        self._stop = threading.Event()
        self._started = time.monotonic()
        self._me = psutil.Process()
        self._thread = threading.Thread(target=self._record, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def _record(self) -> None:
        while not self._stop.wait(_PERIOD):
            self.readings.append(self.read())

    def read(self) -> MemorySample:
        """The present memory."""
        others = sum(map(_private_bytes, self._me.children(recursive=True)))
        return MemorySample(time.monotonic() - self._started, self._me.memory_info().rss, others)


def _private_bytes(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().uss)
    except psutil.Error:  # it has just ended
        return 0
