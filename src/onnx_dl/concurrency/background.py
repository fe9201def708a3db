"""Work that is done once, in a thread that the first caller starts, and that several callers wait for.

A caller whose deadline passes goes on without the result, and the work goes on for the next one.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable
from typing import Generic, TypeVar

from onnx_dl.concurrency import primitives, spawning
from onnx_dl.concurrency.deadline import Deadline
from onnx_dl.concurrency.forking import Promise
from onnx_dl.concurrency.spawning import Thread

_T = TypeVar("_T")


class Background(Generic[_T]):
    """One piece of work and its result."""

    def __init__(self, work: Callable[[Deadline], _T], name: str) -> None:
        """Starts nothing yet.  ``work`` gets a deadline that passes when nobody wants the result."""
        self._deadline = Deadline(None, movable=True)
        self._promise: Promise[_T] = Promise()
        self._to_do = collections.deque([work])
        self._name = name

    def begin(self) -> None:
        """Starts a thread, unless one has taken the work.

        A signal handler may interrupt a caller that is about to start the thread, and a ``__del__`` the
        thread before it takes the work.  Either would wait for ever for its own thread.  So each caller that
        finds the work still there starts a thread, and the first thread takes it.
        """
        if self._to_do:
            spawning.start(Thread(self._do, self._name), "This use of a model")

    def _do(self) -> None:
        try:
            work = self._to_do.popleft()
        except IndexError:
            return
        self._promise.giver = primitives.get_ident()
        try:
            self._promise.set_result(work(self._deadline))
        except BaseException as error:
            self._promise.set_exception(error)

    @property
    def done(self) -> bool:
        return self._promise.done()

    def wait(self, deadline: Deadline | None, what: str) -> _T:
        """The result.

        Raises:
            DeadlinePassed: it was not there in time; ``what`` was waited for.
            ReentrantUse: this thread does the work.
            BaseException: raised by the work.
        """
        self.begin()
        while True:
            try:
                return self._promise.result(None if deadline is None else deadline.step())
            except TimeoutError:
                if self._promise.done():  # meanwhile, or the error is its own
                    return self._promise.result()
                assert deadline is not None
                deadline.check(what)

    def end(self, timeout: float | None) -> None:
        """Ends the work early and waits for that, at most ``timeout`` seconds."""
        self._deadline.end()
        self._do()  # if it was not begun, it ends at once
        with contextlib.suppress(BaseException):  # ReentrantUse: this thread does the work
            self._promise.result(timeout)
