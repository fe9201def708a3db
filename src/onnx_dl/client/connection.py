"""An application's connection to a supervisor: requests with answers, notices without, events.

One thread owns the control socket; other threads hand it messages.
"""

from __future__ import annotations

import itertools
import math
import select
import time
import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from onnx_dl.client.control_link import ControlLink
from onnx_dl.client.worker_output import WorkerOutput
from onnx_dl.concurrency import forking, primitives, spawning
from onnx_dl.concurrency.deadline import Deadline
from onnx_dl.concurrency.forking import Promise, refuse
from onnx_dl.concurrency.spawning import Thread
from onnx_dl.core.events import ModelEvent
from onnx_dl.errors import ProcessesExhausted, SupervisorDied, SupervisorTimeout
from onnx_dl.linux_only import register_at_fork
from onnx_dl.protocol import codec
from onnx_dl.protocol.control import AskStatus, Blob, Published, Wrote
from onnx_dl.system.owned_descriptors import keep_for_ever
from onnx_dl.transport import sockets

if TYPE_CHECKING:
    from onnx_dl.transport.zeromq import Context

_GONE: Final = (
    "The onnx-dl supervisor process (pid {pid}) ended, and all models with it. The next use starts a new one."
)
_LOST: Final = (
    "This program closed file descriptors of onnx-dl (by os.closerange, or when it became a daemon). This "
    "ended its connection to the supervisor process (pid {pid}). The next use opens a new one."
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
        self._due = math.inf

    def arm(self) -> bool:
        """Starts the time; whether that is new."""
        was_armed, self._armed = self._armed, True
        return not was_armed

    def run(self) -> float | None:
        """Tidies up if it is time; seconds until the next time, None: not before :meth:`arm`."""
        now = time.monotonic()
        if now >= self._due:
            self._armed = False  # first: an arm() meanwhile must not be overlooked
            is_left = self._tidy()
            self._armed = is_left or self._armed
            # What was used a moment ago is not left for as long again.
            self._due = now + TIDY_EVERY / 2 if is_left else math.inf
        self._due = min(self._due, now + TIDY_EVERY) if self._armed else math.inf
        return None if self._due == math.inf else self._due - now


class ConnectionListener(NamedTuple):
    """Functions that a connection calls in its thread; they must not wait."""

    on_event: Callable[[ModelEvent], None]
    on_end: Callable[[Connection], None]
    """The connection has ended: close all lanes."""
    tidy: Callable[[], bool]
    """Called some seconds after :meth:`Connection.arm`, and again while it returns true."""


class Ticket(NamedTuple):
    """A request under way.  The class of the request decides the class of its answer."""

    number: int
    answer: Promise[Any]


class Connection:
    """Thread-safe, except across fork: a child makes its own."""

    def __init__(
        self,
        address: str,
        secret: str,
        timeout: float,
        listener: ConnectionListener,
        output: WorkerOutput,
        deadline: Deadline | None = None,
    ) -> None:
        """Connects.  ``output`` takes the text that workers write on stderr.

        Raises:
            SupervisorUnreachable: no answer came within ``timeout`` seconds, or by ``deadline``.
            SupervisorStartError: the supervisor refuses this client.
        """
        self.timeout = timeout
        self.closed = False
        self.lost = False
        """True if it is closed because the program closed its descriptors."""
        self._listener = listener
        self._output = output
        self._timer = _TidyTimer(listener.tidy)
        self._link = ControlLink(address, secret, timeout, deadline)
        self.supervisor_pid = self._link.supervisor_pid
        self.build = self._link.build
        """The onnxruntime of a shared host."""
        self._contexts: dict[None, Context] = {}  # of one, or of none: each change is one step
        self._numbers = itertools.count(1)
        self._pending: dict[int, Promise[Any]] = {}  # of one step each: all threads change it
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
        if (known := self._contexts.get(None)) is None:
            made: Context = forking.importing("onnx_dl.transport.zeromq").context()
            known = self._contexts.setdefault(None, made)
            if known is not made:  # another thread was faster
                made.term()
        if self.closed:  # looked at once more: its end may have found no context
            self._end_context()
            raise self._died()
        return known

    def _end_context(self) -> None:
        context = self._contexts.pop(None, None)
        if self.lost:  # the program may have others under the numbers of its descriptors
            keep_for_ever(context)
        elif context is not None:
            # Waits for lanes that are in use; their callers close them, because their workers are dead.
            context.term()

    @property
    def usable(self) -> bool:
        """True if requests can be sent.  Notices here if the program has closed the descriptors."""
        if not (self.closed or self._link.is_ours()):
            self.lose()
        return not self.closed

    def ask(
        self,
        make: Callable[[int], codec.Message],
        *,
        deadline: Deadline | None = None,
        patience: float | None = None,
    ) -> Any:
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
        ticket = Ticket(next(self._numbers), Promise(self._thread.number))
        self._pending[ticket.number] = ticket.answer
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
    ) -> Any:
        """The answer.  Several threads may wait for it.

        ``patience``: seconds that the answer may take; None: the connection's ``timeout``; infinity: as long
        as it takes.  A supervisor that sends nothing at all for two timeouts is given up.  ``what``: names
        the thing that is waited for, if the deadline passes.

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
                self._output.catch_up()  # text written before the answer can be read before it
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
        return self._pending.pop(ticket.number, None) is not None

    def check_thread(self) -> None:
        """Raises ReentrantUse in the thread of this connection, where somebody's ``__del__`` may run."""
        if self._thread.is_this:
            refuse("the one that receives the supervisor's messages")

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
        number, lifeline = next(self._numbers), self._link.lifeline
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
            self._output.catch_up()

    def end(self) -> None:
        """Like :meth:`close`, without waiting."""
        if self.usable:
            self.closed = True
            self._link.waker.wake()

    def lose(self) -> None:
        """Ends a connection whose descriptors the program closed.  A ZeroMQ context is abandoned: ending it
        would write to its old numbers and close them, whatever they are now.
        The thread may sleep on for ever: its poll() waits for files that nothing else leads to."""
        if self.closed:
            return
        self.lost = True  # first: its own thread, which may see the end at any moment, must not tear it down
        self.closed = True
        self._tear_down()

    def _tear_down(self) -> None:
        for answer in list(self._pending.values()):
            if not answer.done():
                answer.set_exception(self._died())  # one for each: a traceback is added where it is raised
        self._listener.on_end(self)
        self._end_context()
        self._output.end()

    def _serve(self) -> None:
        try:
            self._receive_until_end()
        finally:  # whatever happened, no thread may wait for an answer that will not come
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

    def _dispatch(self, messages: Iterable[Any]) -> None:
        for message in messages:
            if isinstance(message, Published):
                self._listener.on_event(message.event)
            elif isinstance(message, Wrote):
                self._output.put(message)
            else:
                if answer := self._pending.get(message.ticket):
                    answer.set_result(message)

    def _died(self) -> SupervisorDied:
        return SupervisorDied((_LOST if self.lost else _GONE).format(pid=self.supervisor_pid))


def _silent(connection: Connection) -> SupervisorTimeout:
    return SupervisorTimeout(
        f"The onnx-dl supervisor (pid {connection.supervisor_pid}) is alive but did not answer within "
        f"{connection.timeout:g} seconds (ONNX_DL_START_TIMEOUT). It is stopped, or the machine is too busy."
    )


_connections: weakref.WeakValueDictionary[int, Connection] = weakref.WeakValueDictionary()


def _abandon_all() -> None:
    """Forgets the parent's threads and sockets in a forked child, which may not use or close them."""
    for ref in _connections.valuerefs():
        if (connection := ref()) is not None:
            connection.closed = True


register_at_fork(after_in_child=_abandon_all)
