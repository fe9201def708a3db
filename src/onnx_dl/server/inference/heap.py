"""The heap of this process, which gives its free pages back when large requests are over.

grpcio allocates a message in many pieces, and so do lists of JSON: glibc keeps the pages of what was freed
between others, hundreds of megabytes after some large requests.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

from onnx_dl.system.heap import trim_heap

LARGE: Final = 1 << 20
"""Bytes of a request or a response from which on the heap is looked at afterwards."""
QUIET: Final = 3.0
"""Seconds without a large request after which it is."""


class HeapTrimmer:
    """Calls ``trim`` once when no large request came for a while.  Thread-safe.

    Its thread, started by the first large request, sleeps without a deadline while there is nothing to do.
    """

    def __init__(self, trim: Callable[[], object] = trim_heap, quiet: float = QUIET) -> None:
        self._trim = trim
        self._quiet = quiet
        self._last = 0.0
        self._is_due = threading.Event()
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def note(self) -> None:
        """Record that a large request ends now."""
        self._last = time.monotonic()
        if not self._is_due.is_set():
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
        while self._is_due.wait() and not self._closed.is_set():
            while (left := self._last + self._quiet - time.monotonic()) > 0:
                if self._closed.wait(left):
                    return
            # First: a request that ends meanwhile must not be overlooked.
            self._is_due.clear()
            self._trim()
