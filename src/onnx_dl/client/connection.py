"""An application's connection to a supervisor: requests with answers, notices without, events.

One thread owns the control socket; other threads hand it messages.  Models are
:mod:`onnx_dl.client.remote_model`'s; the start of a supervisor is :mod:`onnx_dl.host.model_host`'s.
"""

from __future__ import annotations

import math
import os
import select
import time
import weakref
from collections.abc import Callable, Iterable
from typing import Any, Final, NamedTuple

from onnx_dl.client.control_link import Answer, ControlLink, Ticket, Tickets
from onnx_dl.client.worker_output import Piece, WorkerOutput
from onnx_dl.concurrency import primitives, spawning
from onnx_dl.concurrency.deadline import Deadline
from onnx_dl.concurrency.forking import refuse
from onnx_dl.concurrency.spawning import Thread
from onnx_dl.core.events import ModelEvent
from onnx_dl.errors import ProcessesExhausted, SupervisorDied, SupervisorTimeout
from onnx_dl.protocol import codec
from onnx_dl.protocol.control import AskStatus, Blob, Published, Wrote
from onnx_dl.system.owned_descriptors import keep_for_ever
from onnx_dl.transport import sockets, zeromq
from onnx_dl.transport.zeromq import Context

_GONE: Final = (
    "The onnx-dl supervisor process (pid {pid}) went away, and all models with it. "
    "The next use starts a new one."
)
_LOST: Final = (
    "This program closed descriptors of onnx-dl (os.closerange, or what makes a daemon of it), and with them "
    "its connection to the supervisor process (pid {pid}). The next use makes a new one."
)

TIDY_EVERY: Final = 5.0
"""Seconds after which idle lanes and arrays give their memory back."""

_LONGEST: Final = 1e9
"""Seconds; more than any wait takes."""


class _TidyTimer:
    """Calls ``tidy`` some seconds after :meth:`arm`, and again while ``tidy`` returns true."""

    def __init__(self, tidy: Callable[[], bool]) -> None:
        self._tidy = tidy
        self._armed = False
        self._at = math.inf

    def arm(self) -> bool:
        """Whether that is new."""
        was_armed, self._armed = self._armed, True
        return not was_armed

    def run(self) -> float | None:
        """Tidies up if it is time; seconds until the next time, None: not before :meth:`arm`."""
        now = time.monotonic()
        if now >= self._at:
            self._armed = False  # first: an arm() meanwhile must not be overlooked
            self._armed = self._tidy() or self._armed
            self._at = math.inf
        self._at = min(self._at, now + TIDY_EVERY) if self._armed else math.inf
        return None if self._at == math.inf else self._at - now


class _LaneContext:
    """The ZeroMQ context for lanes, made at the first use."""

    def __init__(self) -> None:
        self._contexts: dict[None, Context] = {}  # of one, or of none: each change is one step

    def get(self) -> Context:
        if (known := self._contexts.get(None)) is None:
            made = zeromq.context()
            known = self._contexts.setdefault(None, made)
            if known is not made:  # another thread was faster
                made.term()
        return known

    def end(self, *, lost: bool) -> None:
        """``lost``: the program closed its descriptors, and may have others under the same numbers."""
        context = self._contexts.pop(None, None)
        if lost:
            keep_for_ever(context)
        elif context is not None:
            # Waits for lanes that are in use; their callers close them, because their workers are dead.
            context.term()


class ConnectionListener(NamedTuple):
    """Functions that a connection calls in its thread; they must not wait."""

    on_event: Callable[[ModelEvent], None]
    on_end: Callable[[Connection], None]
    """The connection has ended: close all lanes."""
    tidy: Callable[[], bool]
    """Called some seconds after :meth:`Connection.arm`, and again while it returns true."""
    output: WorkerOutput
    """Takes the text that workers write on stderr."""


class Connection:
    """To the supervisor at ``address``.  Thread-safe, except across fork: a child makes its own."""

    def __init__(
        self,
        address: str,
        secret: str,
        timeout: float,
        listener: ConnectionListener,
        deadline: Deadline | None = None,
    ) -> None:
        """Connects.

        Raises:
            SupervisorUnreachable: nobody answers within ``timeout`` seconds, or by ``deadline``.
            SupervisorStartError: the supervisor refuses this client.
        """
        self.timeout = timeout
        self.closed = False
        self.lost = False
        """Whether it is closed because the program closed its descriptors."""
        self._listener = listener
        self._timer = _TidyTimer(listener.tidy)
        self._link = ControlLink(address, secret, timeout, deadline)
        self.supervisor_pid = self._link.supervisor_pid
        self.build = self._link.build
        """The onnxruntime of a shared host."""
        self._lane_context = _LaneContext()
        self._tickets = Tickets()
        self.blobs: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
        """Memory that was handed over, by name; for the module that did."""
        self._thread = Thread(self._serve, "onnx-dl-client")
        try:
            spawning.start(self._thread, "The connection to a host")
        except ProcessesExhausted:  # the supervisor must not wait for us until we are collected
            self._link.close()
            raise
        _connections[id(self)] = self

    @property
    def context(self) -> Context:
        """The ZeroMQ context for lanes.  Raises SupervisorDied or DescriptorsExhausted."""
        if self.closed:
            raise self._died()
        known = self._lane_context.get()
        if self.closed:  # looked at once more: its end may have found no context
            self._lane_context.end(lost=self.lost)
            raise self._died()
        return known

    @property
    def usable(self) -> bool:
        """Whether something can be asked.  Notices here if the program has closed the descriptors."""
        if self.closed:
            return False
        if self._link.is_ours():
            return True
        self.lose()
        return False

    def ask(
        self,
        make: Callable[[int], codec.Message],
        *,
        deadline: Deadline | None = None,
        patience: float | None = None,
    ) -> Answer:
        """Sends the request that ``make`` builds around a ticket's number; see :meth:`await_answer`."""
        ticket = self.begin(make)
        try:
            return self.await_answer(ticket, deadline=deadline, patience=patience)
        finally:
            self.forget(ticket)

    def begin(self, make: Callable[[int], codec.Message]) -> Ticket:
        """Sends a request; raises like :meth:`await_answer`.  The caller calls :meth:`forget` in the end."""
        self.check_thread()
        if not self.usable:
            raise self._died()
        ticket = self._tickets.add(self._thread.number)
        try:
            if self.closed:  # looked at last: the end is marked before the tickets are gone through
                raise self._died()
            self.send(make(ticket.number))
        except BaseException:
            self.forget(ticket)
            raise
        return ticket

    def await_answer(
        self,
        ticket: Ticket,
        *,
        deadline: Deadline | None = None,
        patience: float | None = None,
        what: str = "the supervisor's answer",
    ) -> Answer:
        """The answer.  Several threads may wait for it.

        Args:
            patience: seconds that the answer may take; None: the connection's ``timeout``; infinity: as long
                as it takes.  A supervisor that sends nothing at all for two timeouts is given up.
            what: is waited for, in words, if the deadline passes.

        Raises:
            DeadlinePassed: ``deadline`` did.
            ReentrantUse: this thread is the one that receives answers.
            SupervisorDied: the supervisor went away before it answered.
            SupervisorTimeout: it does not answer at all.
            TimeoutError: the patience is at its end, and the supervisor lives.
        """
        limit = Deadline(self.timeout if patience is None else min(patience, _LONGEST), outer=deadline)
        while True:
            try:
                answer = ticket.answer.result(limit.step(self.timeout))
                self._listener.output.catch_up()  # text written before the answer can be read before it
                return answer
            except TimeoutError:
                if ticket.answer.done():  # meanwhile, or the error is its own
                    return ticket.answer.result()
            if deadline is not None:
                deadline.check(what)
            if limit.passed:
                raise TimeoutError if patience is not None else _silent(self)
            if time.monotonic() - self._link.received_at >= self.timeout:
                self.ask(lambda number: AskStatus(ticket=number, measure=False), deadline=deadline)

    def forget(self, ticket: Ticket) -> bool:
        """Ends the wait for an answer; whether that is new."""
        return self._tickets.remove(ticket)

    def check_thread(self) -> None:
        """Raises ReentrantUse in the thread of this connection, where somebody's ``__del__`` may run."""
        if self._thread.is_this:
            refuse("the one that takes in what the supervisor says")

    def send(self, message: codec.Message) -> None:
        """Sends a notice.  May be called from finalizers: it takes no lock and does not wait."""
        if not self.closed:
            self._link.post(message)

    def arm(self) -> None:
        """Has the listener tidy up some seconds from now.  Takes no lock."""
        if self._timer.arm():
            self._link.waker.wake()

    def share_blob(self, name: str, fd: int) -> int:
        """Hands over memory for models, before later requests; returns its number for DropBlob."""
        number, lifeline = self._tickets.number(), self._link.lifeline
        if not lifeline.writable(self.timeout):  # the supervisor reads nothing: send() would wait for ever
            raise _silent(self)
        try:
            lifeline.send(codec.encode(Blob(number=number, name=name)), (fd,))
        except OSError:
            if not self.closed:
                raise
            # It ended meanwhile; the request for the model raises that.
        return number

    def close(self) -> None:
        """Leaves the supervisor, which releases all that this application held."""
        self.end()
        if not self.lost and not self._thread.is_this:
            self._thread.join(self.timeout)
            self._listener.output.catch_up()

    def end(self) -> None:
        """Like :meth:`close`, without waiting."""
        if self.usable:
            self.closed = True
            self._link.waker.wake()

    def lose(self) -> None:
        """Ends a connection whose descriptors the program closed.  A ZeroMQ context is abandoned: ending it
        would write to its old numbers and close them, whatever they are now.

        The thread may sleep on for ever: its poll() waits for files that nothing else leads to.
        """
        if self.closed:
            return
        self.lost = True  # first: its own thread, which may see the end at any moment, must not tear it down
        self.closed = True
        self._tear_down()

    def _tear_down(self) -> None:
        self._tickets.fail_all(self._died)
        self._listener.on_end(self)
        self._lane_context.end(lost=self.lost)
        self._listener.output.end()

    def _serve(self) -> None:
        try:
            self._receive_until_end()
        finally:  # whatever happened, nobody may wait for an answer that will not come
            self.end()
            if not self.lost:
                self._link.close()
                self._tear_down()

    def _receive_until_end(self) -> None:
        link, control, poll = self._link, self._link.control, primitives.poll()
        for end in (link.lifeline, link.waker):
            poll.register(end.fileno(), select.POLLIN)
        while not self.closed:
            seconds = self._timer.run()
            poll.register(control.fileno(), control.awaits)
            sockets.sleep(poll, seconds)
            if not self.usable:
                return
            link.waker.clear()
            self._dispatch(link.receive())
            link.send_all()
            if link.lifeline.is_dead():
                self._dispatch(link.receive_last())
                return
            if control.gone:
                poll.unregister(control.fileno())
                link.come_again(self.timeout)

    def _dispatch(self, messages: Iterable[Answer]) -> None:
        for message in messages:
            if isinstance(message, Published):
                self._listener.on_event(message.event)
            elif isinstance(message, Wrote):
                piece = (message.worker_id, message.model, message.pid, message.text, message.last)
                self._listener.output.put(Piece(*piece))
            else:
                self._tickets.answer(message.ticket, message)

    def _died(self) -> SupervisorDied:
        return SupervisorDied((_LOST if self.lost else _GONE).format(pid=self.supervisor_pid))


def _silent(connection: Connection) -> SupervisorTimeout:
    return SupervisorTimeout(
        f"The onnx-dl supervisor (pid {connection.supervisor_pid}) lives but did not answer within "
        f"{connection.timeout:g} seconds (ONNX_DL_START_TIMEOUT). It is stopped, or the machine is too busy."
    )


_connections: weakref.WeakValueDictionary[int, Connection] = weakref.WeakValueDictionary()


def _abandon_all() -> None:
    """In a forked child: the parent's threads and sockets are not ours to use or to close."""
    for ref in _connections.valuerefs():
        if (connection := ref()) is not None:
            connection.closed = True


os.register_at_fork(after_in_child=_abandon_all)
