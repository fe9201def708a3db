"""Asking a host for a worker until it gives one: who asks, who waits for the same answer, who gives up.

Threads that use one proxy wait for one request together; those of different proxies of a model have a request
each, and the supervisor answers all of them at once.  A thread that gives up at its own deadline leaves the
others waiting; the last one tells the supervisor, which goes on loading.  Lanes and calls are
:mod:`onnx_dl.client.remote_model`'s.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import TYPE_CHECKING

from onnx_dl.client.connection import Asked, Connection
from onnx_dl.concurrency.deadline import Deadline, DeadlinePassed
from onnx_dl.core import load_output
from onnx_dl.errors import HostClosing, SupervisorDied
from onnx_dl.protocol import control as m
from onnx_dl.protocol import failures

if TYPE_CHECKING:
    from onnx_dl.client.remote_model import Lease

Make = Callable[[int], m.Acquire]
Renew = Callable[[Connection, Deadline | None], None]


class _Request:
    """One Acquire on its way, and the threads that wait for its answer, of which the first has made it.

    No lock: a thread that was interrupted would wait for itself.  Who joins says so before looking whether it
    is over; who leaves says that it is over before looking whether somebody joined.
    """

    def __init__(self, connection: Connection, asked: Asked) -> None:
        self.connection = connection
        self.asked = asked
        self._waiting = collections.deque([None])
        self.is_over = False

    def join(self, connection: Connection) -> bool:
        """One thread more waits for the answer; false: this is over, or was asked elsewhere."""
        if self.is_over or self.asked.future.done() or self.connection is not connection:
            return False
        self._waiting.append(None)
        if self.is_over:
            self.leave()
            return False
        return True

    def leave(self, withdrawal: m.Withdraw | None = None) -> None:
        """One thread waits no more.  The last one says so, also where the answer may have crossed that."""
        self._waiting.pop()
        if not self._waiting:
            self.is_over = True
            if not self._waiting and self.connection.forget(self.asked) and withdrawal is not None:
                self.connection.tell(withdrawal)


class Acquisition:
    """The requests of one model.  Thread-safe."""

    def __init__(self, patience: float) -> None:
        """``patience``: seconds after which a host that has not answered does not load the model any more."""
        self._patience = patience
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
            keep = isinstance(broken, DeadlinePassed)
            request.leave(m.Withdraw(ticket=request.asked.ticket, proxy=key[0], keep=keep))
            raise
        else:
            request.leave()
        finally:
            if request.is_over and self._requests.get(key) is request:
                self._requests.pop(key, None)  # if it is the next one by now, nobody joins that
        if isinstance(answer, m.Denied):
            error = failures.rebuild(answer.failure)
            load_output.repeat(getattr(error, "remarks", None))
            raise error
        granted: m.Granted = answer
        return granted

    def _join(self, key: tuple[int, bool], connection: Connection, prepare: Callable[[], Make]) -> _Request:
        request = self._requests.get(key)
        if request is not None and request.join(connection):
            return request
        make = prepare()
        request = self._requests.get(key)  # another thread may have been faster
        if request is None or not request.join(connection):
            # Two threads may come here at once: then there are two requests, and both are answered.
            request = self._requests[key] = _Request(connection, connection.begin(make))
        return request
