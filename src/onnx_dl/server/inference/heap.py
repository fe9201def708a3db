"""The heap of this process, which gives its free pages back after large messages.

grpcio allocates a message in many pieces, and so do lists of JSON: glibc keeps the pages of what was freed
between others, hundreds of megabytes after some large requests.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

from onnx_dl.system.heap import trim_heap

LARGE: Final = 1 << 20
"""Bytes of a message from which on the heap is trimmed after it."""
PAUSE: Final = 3.0
"""Seconds from a large message to the trim, which takes milliseconds.  Under load, it is for all that came
meanwhile."""


class HeapTrimmer:
    """The only caller of ``trim``: once, some time after the first large message since the last one.
    Thread-safe.

    Its thread, started by the first large message, sleeps without a deadline while there is nothing to do.
    """

    def __init__(self, trim: Callable[[], object] = trim_heap, pause: float = PAUSE) -> None:
        self._trim = trim
        self._pause = pause
        self._is_due = threading.Event()
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def note(self, nbytes: int) -> None:
        """Take note of a message of this size, or of its end."""
        if nbytes < LARGE or self._is_due.is_set():
            return
        with self._lock:
            self._is_due.set()
            if self._thread is None and not self._closed.is_set():
                self._thread = threading.Thread(target=self._serve, name="onnx-dl-heap", daemon=True)
                self._thread.start()

    def close(self) -> None:
        """End the thread."""
        with self._lock:
            self._closed.set()
            self._is_due.set()
            thread = self._thread
        if thread is not None:
            thread.join()

    def _serve(self) -> None:
        while self._is_due.wait() and not self._closed.wait(self._pause):
            with self._lock:
                if self._closed.is_set():  # since the wait: cleared, nothing would end the next one
                    return
                # First: a message that comes during the trim is followed by another.
                self._is_due.clear()
            self._trim()
