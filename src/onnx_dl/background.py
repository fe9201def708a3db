"""Work that several callers wait for, each for as long as it likes, and that is done once.

The first caller starts a thread.  A caller whose deadline passes goes on without the result, and the work
goes on for the next one.  What the work is, is not known here.
"""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from onnx_dl.deadline import Deadline, result_of

_T = TypeVar("_T")


class Background(Generic[_T]):
    """One piece of work and its result."""

    def __init__(self, work: Callable[[Deadline], _T], name: str) -> None:
        """Begins.  ``work`` is given a deadline that passes when nobody wants the result any more."""
        self._deadline = Deadline(None, movable=True)
        self._future: concurrent.futures.Future[_T] = concurrent.futures.Future()
        self._thread = threading.Thread(target=self._do, args=(work,), name=name, daemon=True)
        self._thread.start()

    def _do(self, work: Callable[[Deadline], _T]) -> None:
        try:
            self._future.set_result(work(self._deadline))
        except BaseException as error:
            self._future.set_exception(error)

    @property
    def done(self) -> bool:
        return self._future.done()

    def wait(self, deadline: Deadline | None, what: str) -> _T:
        """The result.

        Raises:
            DeadlinePassed: it was not there in time; ``what`` was waited for.
            BaseException: what the work raised.
        """
        result: _T = result_of(self._future, deadline, what)
        return result

    def end(self, timeout: float) -> None:
        """Has the work end before it is done, and waits for that, for so many seconds at most."""
        self._deadline.end()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout)
