"""Work that several callers wait for, each for as long as it likes, and that is done once.

The first caller starts a thread.  A caller whose deadline passes goes on without the result, and the work
goes on for the next one.  What the work is, is not known here.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable
from typing import Generic, TypeVar

from onnx_dl.concurrency import primitives, spawning
from onnx_dl.concurrency.deadline import Deadline, result_of
from onnx_dl.concurrency.forking import Promise
from onnx_dl.concurrency.threads import Thread

_T = TypeVar("_T")


class Background(Generic[_T]):
    """One piece of work and its result."""

    def __init__(self, work: Callable[[Deadline], _T], name: str) -> None:
        """Begins nothing yet.  ``work`` is given a deadline that passes when nobody wants the result."""
        self._deadline = Deadline(None, movable=True)
        self._promise: Promise[_T] = Promise()
        self._to_do = collections.deque([work])
        self._name = name

    def begin(self) -> None:
        """Begins, unless it is begun.

        A signal handler may interrupt whoever is about to start the thread, and a ``__del__`` the thread
        before it takes the work: either would wait for ever for what only its own thread goes on to do.  So
        whoever finds the work undone starts a thread, and the first of them has it.
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
            ReentrantUse: it is this thread that does the work.
            BaseException: what the work raised.
        """
        self.begin()
        result: _T = result_of(self._promise, deadline, what)
        return result

    def end(self, timeout: float | None) -> None:
        """Has the work end before it is done, and waits for that, for so many seconds at most; None:
        for as long as it takes."""
        self._deadline.end()
        self._do()  # if nobody has begun it: it ends at once
        with contextlib.suppress(BaseException):  # ReentrantUse: it is this thread that does the work
            self._promise.result(timeout)
