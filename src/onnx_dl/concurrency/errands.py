"""Brief work that nobody waits for, in a few threads of its own.

An event loop's default threads may all be held by work that takes long, such as runs.
"""

from __future__ import annotations

import collections
import contextlib
import os
from collections.abc import Callable
from typing import Final

from onnx_dl.concurrency import spawning
from onnx_dl.concurrency.forking import Guard
from onnx_dl.concurrency.spawning import Thread


class Errands:
    """The work and its threads, which start when there is some and end when there is none.  Thread-safe."""

    def __init__(self, name: str, most: int) -> None:
        """``name``: of the threads, of which there are ``most`` at a time."""
        self._name = name
        self._most = most
        self._guard = Guard()
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._waiting: collections.deque[Callable[[], object]] = collections.deque()
        self._running = 0

    def add(self, work: Callable[[], object]) -> None:
        """Have a thread do ``work``, which raises nothing that matters.

        Raises:
            ProcessesExhausted: there is no thread for it.
            RuntimeError: the interpreter is shutting down.
        """
        with self._guard:
            if self._pid != os.getpid():  # a forked child has none of the threads; the work is its parent's
                self._begin()
            self._waiting.append(work)
            if self._running >= self._most:
                return
            self._running += 1
            try:
                spawning.start(Thread(self._do, self._name), "The end of a call")
            except BaseException:
                self._running -= 1
                if self._running:  # another thread will do it
                    return
                self._waiting.remove(work)
                raise

    def _do(self) -> None:
        while (work := self._next()) is not None:
            with contextlib.suppress(Exception):
                work()

    def _next(self) -> Callable[[], object] | None:
        # In one section: work that is added while a thread ends would be left lying.
        with self._guard:
            if self._waiting:
                return self._waiting.popleft()
            self._running -= 1
            return None


ABORTS: Final = Errands("onnx-dl-abort", 16)
"""Ends of calls whose callers have gone.  Each takes a third of a second at most."""
