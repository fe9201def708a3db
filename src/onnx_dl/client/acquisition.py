"""Leases, and the requests for a worker on their behalf, made until a host grants one.

Threads that use one proxy wait for one request together.  Different proxies of a model have a request each,
and the supervisor answers all of them at once.  A thread that gives up at its own deadline leaves the others
waiting; the last one tells the supervisor, which goes on loading.
"""

from __future__ import annotations

import collections
import functools
import itertools
import os
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from onnx_dl.client.connection import Connection, Ticket
from onnx_dl.concurrency.deadline import Deadline, DeadlinePassed
from onnx_dl.core import load_output
from onnx_dl.core.model_files import bytes_of
from onnx_dl.core.settings import Settings
from onnx_dl.core.spec import ModelSpec
from onnx_dl.core.terms import Terms
from onnx_dl.errors import HostClosing, LoadTimeout, SupervisorDied, SupervisorTimeout
from onnx_dl.protocol import control as m
from onnx_dl.protocol import failures
from onnx_dl.system.thread_attributes import of_this_thread

LOAD_MARGIN: Final = 30.0
"""Seconds beyond the supervisor's own deadline for a load after which a client stops waiting."""

_Make = Callable[[int], m.Acquire]
"""Builds the request around the number of its ticket."""
Renew = Callable[[Connection, Deadline | None], None]
"""Moves the model to the next host, after the one of this connection is gone."""


_ids = itertools.count(1)


class Lease:
    """One proxy's claim to its model: its terms, and the worker that was granted on them."""

    def __init__(self, terms: Terms) -> None:
        self.id = next(_ids)
        self.terms = terms
        self.granted: m.Granted | None = None
        self.closed = False
        self.has_load_output = False
        """True if the prints and warnings of the load were repeated for this proxy."""

    def send_ttl(self, connection: Connection) -> None:
        """Tells the supervisor the TTL that is in force from now on."""
        connection.send(m.SetTtl(proxy=self.id, ttl=self.terms.ttl))

    def release(self, connection: Connection) -> None:
        """Gives up the worker until the next use."""
        self.granted = None
        connection.send(m.Release(proxy=self.id))


class SharedBlob:
    """Memory that a model is loaded from, held by the supervisor for as long as this object lives."""

    def __init__(self, connection: Connection, name: str, make: Callable[[], int]) -> None:
        """``make``: makes a descriptor of it, which is closed here."""
        fd = make()
        try:
            self.nbytes = os.fstat(fd).st_size
            number = connection.share_blob(name, fd)
        finally:
            os.close(fd)
        # The connection by a weak reference: it leads to listeners, and one of these may hold the model.
        weakref.finalize(self, _drop, weakref.ref(connection), number).atexit = False


def _drop(connection_ref: weakref.ref[Connection], number: int) -> None:
    """Has the supervisor drop memory that no model is loaded from any more."""
    if (connection := connection_ref()) is not None:
        connection.send(m.DropBlob(number=number))


class _Request:
    """One Acquire under way, and the threads that wait for its answer; the first of them has sent it.

    No lock: a thread that was interrupted would wait for itself.  A thread that joins says so before it looks
    whether the request is over; a thread that leaves says that it is over before it looks whether another
    joined.
    """

    def __init__(self, connection: Connection, ticket: Ticket) -> None:
        self.connection = connection
        self.ticket = ticket
        self._waiting = collections.deque([None])
        self.is_over = False

    def join(self, connection: Connection) -> bool:
        """Adds a thread that waits; false: the request is over, or was sent to another host."""
        if self.is_over or self.ticket.answer.done() or self.connection is not connection:
            return False
        self._waiting.append(None)
        if self.is_over:
            self.leave()
            return False
        return True

    def leave(self, withdrawal: m.Withdraw | None = None) -> None:
        """Removes a thread.  The last one withdraws the request, even if the answer has crossed that."""
        self._waiting.pop()
        if not self._waiting:
            self.is_over = True
            if not self._waiting and self.connection.forget(self.ticket) and withdrawal is not None:
                self.connection.send(withdrawal)


class Acquisition:
    """The requests of one model, and the host that they go to.  Thread-safe."""

    def __init__(
        self,
        spec: ModelSpec,
        connection: Connection,
        settings: Settings,
        blobs: Sequence[SharedBlob],
        *,
        is_shared: bool,
    ) -> None:
        """``blobs``: memory that the model is loaded from; ``is_shared``: whether the host is, so that
        callers are not told of its end."""
        self.spec = spec
        self.connection = connection
        self._blobs = blobs
        self._is_shared = is_shared
        self._patience = settings.load_timeout + settings.room_timeout + LOAD_MARGIN
        """Seconds after which a host that has not answered is taken not to load the model any more."""
        self._requests: dict[tuple[int, bool], _Request] = {}

    def move(self, connection: Connection, blobs: Sequence[SharedBlob]) -> None:
        """Asks this host from now on."""
        self.connection, self._blobs = connection, blobs

    def ask(
        self,
        lease: Lease,
        companions: Callable[[], Iterable[Acquisition]],
        renew: Renew,
        deadline: Deadline | None,
        *,
        for_host: bool = False,
    ) -> tuple[Connection, m.Granted]:
        """The worker that the host grants, or the next host, and the connection to that host.

        ``companions``: those of this application's models in the same group; ``renew``: called if the host is
        gone, unless callers must be told that it died; ``for_host``: the host itself is to hold the model.

        Raises:
            DeadlinePassed: ``deadline`` did.  The load goes on.
            LoadTimeout: the host took longer than it may.
            SupervisorError: the host is gone or does not answer.
            Exception: the reason why the load failed or was refused.
        """
        prepare = functools.partial(self._prepare, lease, companions, for_host)
        # A host did not die if only the program closed the descriptors of the connection to it.
        may_renew = self._is_shared or (not self.connection.usable and self.connection.lost)
        limit = Deadline(self._patience, outer=deadline)
        try:
            while True:
                present = self.connection
                try:
                    return present, self._ask_one((lease.id, for_host), present, prepare, deadline, limit)
                except (SupervisorDied, HostClosing):
                    # Nothing ran yet, so it may be asked for again.
                    if not may_renew or limit.passed:
                        raise
                renew(present, limit)
        except (DeadlinePassed, SupervisorTimeout, LoadTimeout):
            raise
        except TimeoutError:
            raise LoadTimeout(
                f"{self.spec.name} was not ready after {self._patience:g} seconds. If its load takes "
                "longer, raise ONNX_DL_LOAD_TIMEOUT. If a call or session() block still uses its old worker, "
                "which must end first: do not use a model for the first time inside a session() block of its "
                "group."
            ) from None

    def _prepare(
        self, lease: Lease, companions: Callable[[], Iterable[Acquisition]], for_host: bool
    ) -> _Make:
        others = [other for other in companions() if other is not self]
        thread_attributes = None if self._is_shared else of_this_thread()
        nbytes = self._file_bytes() + sum(other._file_bytes() for other in others)
        return lambda ticket: m.Acquire(
            ticket=ticket,
            proxy=lease.id,
            spec=self.spec,
            terms=lease.terms,
            file_bytes=nbytes,
            for_host=for_host,
            companions=[other.spec for other in others],
            thread_attributes=thread_attributes,
        )

    def _file_bytes(self) -> int:
        """Bytes of the model's files, external data included; 0 where they cannot be looked at."""
        path = self.spec.path
        files = bytes_of(os.path.join(self.spec.cwd, path)) if path else 0
        return files + sum(blob.nbytes for blob in self._blobs)

    def _ask_one(
        self,
        key: tuple[int, bool],
        connection: Connection,
        prepare: Callable[[], _Make],
        deadline: Deadline | None,
        limit: Deadline,
    ) -> m.Granted:
        request = self._join(key, connection, prepare)
        try:
            answer = connection.await_answer(
                request.ticket, deadline=deadline, patience=limit.left(), what="the model to load"
            )
        except BaseException as broken:  # Ctrl-C included
            keep = isinstance(broken, DeadlinePassed)
            request.leave(m.Withdraw(ticket=request.ticket.number, proxy=key[0], keep=keep))
            raise
        else:
            request.leave()
        finally:
            if request.is_over and self._requests.get(key) is request:
                self._requests.pop(key, None)  # if it is the next one by now, nobody joins that
        if isinstance(answer, m.Granted):
            return answer
        error = failures.rebuild(answer.failure)
        load_output.repeat(getattr(error, "remarks", None))
        raise error

    def _join(self, key: tuple[int, bool], connection: Connection, prepare: Callable[[], _Make]) -> _Request:
        request = self._requests.get(key)
        if request is not None and request.join(connection):
            return request
        make = prepare()
        request = self._requests.get(key)  # another thread may have been faster
        if request is None or not request.join(connection):
            # Two threads may come here at once: then there are two requests, and both are answered.
            request = self._requests[key] = _Request(connection, connection.begin(make))
        return request
