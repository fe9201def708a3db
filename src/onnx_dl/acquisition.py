"""Asking a host for a worker until it gives one: who asks, who waits for the same answer, who gives up.

Threads that use one proxy wait for one request together; those of different proxies of a model have a request
each, and the supervisor answers all of them at once.  A thread that gives up at its own deadline leaves the
others waiting; the last one tells the supervisor, which goes on loading.  Lanes and calls are
:mod:`onnx_dl.client`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from onnx_dl import remarks
from onnx_dl.connection import Asked, Connection
from onnx_dl.deadline import Deadline, DeadlinePassed
from onnx_dl.errors import HostClosing, SupervisorDied
from onnx_dl.forking import Guard
from onnx_dl.transport import failures
from onnx_dl.transport import messages as m

if TYPE_CHECKING:
    from onnx_dl.client import Lease

Make = Callable[[int], m.Acquire]
Renew = Callable[[Connection, Deadline | None], None]


class _Request:
    """One Acquire on its way, and how many threads wait for its answer."""

    is_shared = True

    def __init__(self, connection: Connection, asked: Asked) -> None:
        self.connection = connection
        self.asked = asked
        self.waiting = 0


class _Private(_Request):
    """One that no other thread waits for."""

    is_shared = False


class Acquisition:
    """The requests of one model.  Thread-safe; its lock is held for moments only."""

    def __init__(self, patience: float) -> None:
        """``patience``: seconds after which a host that has not answered does not load the model any more."""
        self._patience = patience
        self._lock = Guard()
        self._requests: dict[tuple[int, bool], _Request] = {}

    def ask(
        self,
        lease: Lease,
        connection: Callable[[], Connection],
        prepare: Callable[[], Make],
        renew: Renew | None,
        deadline: Deadline | None,
        *,
        for_host: bool = False,
    ) -> tuple[Connection, m.Granted]:
        """The worker that this host grants, or the one that comes after it.

        Args:
            connection: the one to the present host.
            prepare: what builds the request around a ticket; it may look at files.
            renew: finds the next host after one that is gone; None: there is none.

        Returns:
            The connection to the host that answered, and its answer.

        Raises:
            DeadlinePassed: ``deadline`` did.  The load goes on.
            LoadTimeout: the host took longer than it may.
            SupervisorError: the host is gone or does not answer.
            Exception: the load failed, or why there is none.
        """
        limit = Deadline(self._patience, outer=deadline)
        while True:
            present = connection()
            try:
                return present, self._ask_one((lease.id, for_host), present, prepare, deadline, limit)
            except (SupervisorDied, HostClosing):
                # Nothing ran yet, so it may be asked for again.
                if renew is None or limit.passed:
                    raise
            renew(present, limit)

    def _ask_one(
        self,
        key: tuple[int, bool],
        connection: Connection,
        prepare: Callable[[], Make],
        deadline: Deadline | None,
        limit: Deadline,
    ) -> m.Granted:
        request = self._join(key, connection, prepare)
        try:
            answer = connection.await_answer(
                request.asked, deadline=deadline, patience=limit.left(), what="the model to load"
            )
        except BaseException as broken:  # Ctrl-C included
            self._leave(key, request, withdraw=True, keep=isinstance(broken, DeadlinePassed))
            raise
        self._leave(key, request)
        if isinstance(answer, m.Denied):
            error = failures.rebuild(answer.failure)
            remarks.repeat(getattr(error, "remarks", None))
            raise error
        granted: m.Granted = answer
        return granted

    def _join(self, key: tuple[int, bool], connection: Connection, prepare: Callable[[], Make]) -> _Request:
        if self._lock.is_mine:
            # A handler has interrupted this thread in one of the sections below.
            return _Private(connection, connection.begin(prepare()))
        with self._lock:
            if (request := self._under_way(key, connection)) is not None:
                return request
        make = prepare()
        with self._lock:
            request = self._under_way(key, connection)  # another thread may have been faster
            if request is None:
                request = self._requests[key] = _Request(connection, connection.begin(make))
                request.waiting = 1
            return request

    def _under_way(self, key: tuple[int, bool], connection: Connection) -> _Request | None:
        request = self._requests.get(key)
        if request is None or request.asked.future.done() or request.connection is not connection:
            return None
        request.waiting += 1
        return request

    def _leave(
        self, key: tuple[int, bool], request: _Request, *, withdraw: bool = False, keep: bool = False
    ) -> None:
        """One thread waits no more.  The last one says so, also where the answer may have crossed that."""
        if not request.is_shared:
            _end(request, key[0], withdraw, keep)
            return
        with self._lock:
            request.waiting -= 1
            if request.waiting:
                return
            if self._requests.get(key) is request:
                del self._requests[key]
            _end(request, key[0], withdraw, keep)


def _end(request: _Request, proxy: int, withdraw: bool, keep: bool) -> None:
    request.connection.forget(request.asked)
    if withdraw:
        request.connection.tell(m.Withdraw(ticket=request.asked.ticket, proxy=proxy, keep=keep))
