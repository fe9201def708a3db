"""An application's connection to a supervisor: requests with answers, notices without, events.

One thread owns the control socket; other threads hand it messages.  Which
models there are is not known here (:mod:`onnx_dl.client.remote_model`), nor who started the supervisor
(:mod:`onnx_dl.host.model_host`).
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import secrets
import select
import time
import weakref
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from onnx_dl.client.worker_output import Said, WorkerLines
from onnx_dl.concurrency import primitives, spawning
from onnx_dl.concurrency.deadline import Deadline, DeadlinePassed
from onnx_dl.concurrency.forking import Promise, refuse
from onnx_dl.concurrency.threads import Thread
from onnx_dl.core.events import ModelEvent
from onnx_dl.errors import (
    OnnxDLError,
    ProcessesExhausted,
    ProtocolError,
    SupervisorDied,
    SupervisorStartError,
    SupervisorTimeout,
    SupervisorUnreachable,
)
from onnx_dl.protocol import codec, control
from onnx_dl.system.owned_descriptors import keep_for_ever
from onnx_dl.transport import sockets
from onnx_dl.transport.dealer import Dealer
from onnx_dl.transport.sockets import Channel, Context, Waker

_GONE: Final = (
    "The onnx-dl supervisor process (pid {pid}) went away, and all models with it. "
    "The next use starts a new one."
)
_LOST: Final = (
    "This program closed descriptors of onnx-dl (os.closerange, or what makes a daemon of it), and with them "
    "its connection to the supervisor process (pid {pid}). The next use makes a new one."
)

TIDY_EVERY: Final = 5.0
"""Seconds after which what is idle gives its memory back."""

_LONGEST: Final = 1e9
"""Seconds; more than any wait takes."""

_AWAY: Final = 0.1
"""Seconds until a supervisor that sent us away is asked again."""

_LAST_WORDS: Final = 0.1
"""Seconds without a message after which a dead supervisor is taken to have said all."""


class Asked(NamedTuple):
    """A request on its way."""

    ticket: int
    future: Promise[Any]


class Connection:
    """To the supervisor at ``address``.  Thread-safe, except across fork: a child makes its own."""

    def __init__(
        self,
        address: str,
        secret: str,
        timeout: float,
        on_event: Callable[[ModelEvent], None],
        on_end: Callable[[Connection], None],
        tidy: Callable[[], bool],
        deadline: Deadline | None = None,
        lines: WorkerLines | None = None,
    ) -> None:
        """Connects.  ``on_end`` is called when this connection has ended, to close all lanes; ``tidy`` some
        seconds after :meth:`arm`, and again for as long as it says that something is left to do.  ``lines``
        takes what workers write on stderr.

        Raises:
            SupervisorUnreachable: nobody answers within ``timeout`` seconds, or by ``deadline``.
            SupervisorStartError: who answers refuses us.
        """
        self.timeout = timeout
        self.closed = False
        self.lost = False
        """Whether it is closed because the program closed its descriptors."""
        self.build = ""
        """The onnxruntime of a shared host."""
        self._on_event = on_event
        self._on_end = on_end
        self._tidy = tidy
        self._lines = lines or WorkerLines()
        self._armed = False
        self._heard_at = time.monotonic()
        self._identity = secrets.token_bytes(16)
        self._lifeline = self._greet(f"{address}/lifeline", secret, Deadline(timeout, outer=deadline))
        self.supervisor_pid = self._lifeline.peer_pid()
        self._contexts: dict[None, Context] = {}  # of one, or of none: each change is one step
        self._control = self._connect(f"{address}/control", Deadline(timeout, outer=deadline))
        self._waker = Waker()
        self._outbox: primitives.SimpleQueue[bytes] = primitives.SimpleQueue()
        self._tickets = itertools.count(1)
        self._pending: dict[int, Promise[Any]] = {}
        self.blobs: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
        """Memory that was handed over, by name; for whoever did."""
        self._thread = Thread(self._serve, "onnx-dl-client")
        try:
            spawning.start(self._thread, "The connection to a host")
        except ProcessesExhausted:  # the supervisor must not wait for us until we are collected
            self._lifeline.close()
            self._control.close()
            raise
        _connections[id(self)] = self

    def _greet(self, address: str, secret: str, deadline: Deadline) -> Channel:
        hello = control.ClientHello(version=codec.PROTOCOL_VERSION, secret=secret, client=self._identity)
        try:
            lifeline = Channel.connect(address, deadline)
        except OSError as error:
            raise SupervisorUnreachable(f"No onnx-dl supervisor answers: {error}.") from error
        try:
            lifeline.send(codec.encode(hello))
            self.build = _welcomed(lifeline, deadline)
        except BaseException as error:
            lifeline.close()
            if isinstance(error, OSError):
                raise SupervisorUnreachable(f"No onnx-dl supervisor answers: {error}.") from error
            raise
        return lifeline

    def _connect(self, address: str, deadline: Deadline) -> Dealer:
        try:
            sockets.check_descriptors("A connection to the supervisor")
            return Dealer(address, self._identity, deadline)
        except BaseException as error:
            self._lifeline.close()
            if isinstance(error, OSError) and not isinstance(error, OnnxDLError):
                raise SupervisorUnreachable(f"No onnx-dl supervisor answers: {error}.") from error
            raise

    # --- for any thread -----------------------------------------------------------------------------------

    @property
    def context(self) -> Context:
        """For lanes over ZeroMQ.

        Raises:
            SupervisorDied: the connection has ended.
            DescriptorsExhausted: this process may have too few more of them.
        """
        if (known := self._contexts.get(None)) is None and not self.closed:
            made = sockets.context()
            known = self._contexts.setdefault(None, made)
            if known is not made:  # another thread was faster
                made.term()
        if self.closed:  # looked at last: its end may have found no context
            self._end_context()
            raise self._died()
        assert known is not None
        return known

    def _end_context(self) -> None:
        context = self._contexts.pop(None, None)
        if self.lost:
            keep_for_ever(context)
        elif context is not None:
            # Waits for lanes that are in use; their callers close them, because their workers are dead.
            context.term()

    @property
    def usable(self) -> bool:
        """Whether something can be asked: it has not ended, and the program has not closed its descriptors,
        which is noticed here."""
        if self.closed:
            return False
        if self._lifeline.is_ours() and self._waker.is_ours() and self._control.is_ours():
            return True
        self.lose()
        return False

    def ask(
        self,
        make: Callable[[int], codec.Message],
        *,
        deadline: Deadline | None = None,
        patience: float | None = None,
    ) -> Any:
        """Sends the request that ``make`` builds around a ticket, and returns its answer.

        Args, Raises: see :meth:`await_answer`.
        """
        asked = self.begin(make)
        try:
            return self.await_answer(asked, deadline=deadline, patience=patience)
        finally:
            self.forget(asked)

    def begin(self, make: Callable[[int], codec.Message]) -> Asked:
        """Sends a request; whoever does :meth:`forget` it in the end.

        Raises:
            ReentrantUse: this thread is the one that answers come to.
            SupervisorDied: it went away.
        """
        self.check_thread()
        if not self.usable:
            raise self._died()
        asked = Asked(next(self._tickets), Promise(self._thread.number))
        self._pending[asked.ticket] = asked.future
        try:
            if self.closed:  # looked at last: whoever ends it says so before going through what is pending
                raise self._died()
            self.tell(make(asked.ticket))
        except BaseException:
            self.forget(asked)
            raise
        return asked

    def await_answer(
        self,
        asked: Asked,
        *,
        deadline: Deadline | None = None,
        patience: float | None = None,
        what: str = "the supervisor's answer",
    ) -> Any:
        """The answer.  Several threads may wait for it.

        Args:
            patience: seconds that the answer may take; None: as long as any control message (the
                connection's ``timeout``); infinity: as long as it takes.  A supervisor that says nothing else
                either is given up after two of these timeouts, whatever the patience.

            what: is waited for, in words, if the deadline passes.

        Raises:
            DeadlinePassed: ``deadline`` did.
            ReentrantUse: this thread is the one that answers come to.
            SupervisorDied: the supervisor went away before it answered.
            SupervisorTimeout: it does not answer at all.
            TimeoutError: the patience is at its end, and the supervisor lives.
        """
        limit = Deadline(self.timeout if patience is None else min(patience, _LONGEST), outer=deadline)
        while True:
            try:
                answer = asked.future.result(limit.step(self.timeout))
                self._lines.catch_up()  # what was written before the answer can be read before it
                return answer
            except TimeoutError:
                if asked.future.done():  # meanwhile, or the error is its own
                    return asked.future.result()
            if deadline is not None:
                deadline.check(what)
            if limit.passed:
                raise TimeoutError if patience is not None else self._mute()
            if time.monotonic() - self._heard_at >= self.timeout:
                self.ask(lambda ticket: control.AskStatus(ticket=ticket, measure=False), deadline=deadline)

    def forget(self, asked: Asked) -> bool:
        """Nobody waits for the answer any more; whether that is new."""
        return self._pending.pop(asked.ticket, None) is not None

    def check_thread(self) -> None:
        """Raises ReentrantUse in the thread of this connection, where somebody's ``__del__`` may run."""
        if self._thread.is_this:
            refuse("the one that takes in what the supervisor says")

    def tell(self, message: codec.Message) -> None:
        """Sends a notice.  May be called from finalizers: it takes no lock and does not wait."""
        if not self.closed:
            self._outbox.put(codec.encode(message))
            self._waker.wake()

    def arm(self) -> None:
        """There is something to tidy up once it has been idle for a while.  Takes no lock."""
        if not self._armed:
            self._armed = True
            self._waker.wake()

    def share_blob(self, name: str, fd: int) -> int:
        """Hands over memory that a model is loaded from; the supervisor has it before what is asked later.

        Returns:
            The number by which DropBlob names it.
        """
        number = next(self._tickets)
        if not self._lifeline.writable(self.timeout):  # it reads nothing: send() would wait for ever
            raise self._mute()
        try:
            self._lifeline.send(codec.encode(control.Blob(number=number, name=name)), (fd,))
        except OSError:
            if not self.closed:
                raise
            # It ended meanwhile, which whoever asks for the model hears.
        return number

    def close(self) -> None:
        """Lets go of the supervisor, which releases all that this application held."""
        self.end()
        if not self.lost and not self._thread.is_this:
            self._thread.join(self.timeout)
            self._lines.catch_up()

    def end(self) -> None:
        """Like :meth:`close`, without waiting."""
        if not self.usable:
            return
        self.closed = True
        self._waker.wake()

    def lose(self) -> None:
        """The program closed the descriptors.  A ZeroMQ context is abandoned: to end it would write to the
        numbers that it had, and close them, whoever has them now.

        The thread may sleep on for ever: its poll() waits for files that nothing else leads to.
        """
        if self.closed:
            return
        self.lost = True  # first: its own thread, which may see the end at any moment, must not tear it down
        self.closed = True
        self._end_context()
        self._fail_all()
        self._on_end(self)
        self._lines.end()

    def abandon(self) -> None:
        """In a forked child: the parent's threads and sockets are not ours to use or to close."""
        self.closed = True

    # --- the thread ---------------------------------------------------------------------------------------

    def _serve(self) -> None:
        try:
            self._attend()
        finally:  # whatever happened, nobody may wait for an answer that will not come
            self.end()
            if not self.lost:
                self._tear_down()

    def _attend(self) -> None:
        poll = primitives.poll()
        for end in (self._lifeline, self._waker):
            poll.register(end.fileno(), select.POLLIN)
        tidy_at = math.inf
        while not self.closed:
            tidy_at = self._tidy_if_due(tidy_at)
            poll.register(self._control.fileno(), self._control.awaits)
            sockets.sleep(poll, None if tidy_at == math.inf else tidy_at - time.monotonic())
            if not self.usable:
                return
            self._waker.clear()
            self._hear()
            self._send_all()
            if self._lifeline.is_dead():
                self._hear_last_words()
                return
            if self._control.gone:
                poll.unregister(self._control.fileno())
                self._come_again()

    def _come_again(self) -> None:
        """The supervisor had no descriptor left when we came; it sends away whoever it cannot let in."""
        if self._lifeline.readable(_AWAY):
            return
        with contextlib.suppress(OSError, DeadlinePassed):  # it is gone; the lifeline tells
            self._control.reconnect(Deadline(self.timeout))

    def _tidy_if_due(self, tidy_at: float) -> float:
        """When to look again; never, while there is nothing to tidy up."""
        now = time.monotonic()
        if now >= tidy_at:
            self._armed = False  # first: who arms it meanwhile must not be overlooked
            self._armed = self._tidy() or self._armed
            tidy_at = math.inf
        return min(tidy_at, now + TIDY_EVERY) if self._armed else math.inf

    def _hear_last_words(self) -> None:
        """Events and answers that were sent before the end."""
        poll = primitives.poll()
        poll.register(self._control.fileno(), select.POLLIN)
        while not self._control.gone and poll.poll(_LAST_WORDS * 1000):
            self._hear()

    def _send_all(self) -> None:
        while self._control.is_let_in:
            try:
                self._control.send(self._outbox.get_nowait())
            except primitives.Empty:
                return

    def _hear(self) -> None:
        for data in self._control.receive():
            self._heard_at = time.monotonic()
            with contextlib.suppress(ProtocolError):
                self._take_in(control.to_client(data))

    def _take_in(self, message: Any) -> None:
        if isinstance(message, control.Published):
            self._on_event(message.event)
        elif isinstance(message, control.Wrote):
            wrote = (message.worker_id, message.model, message.pid, message.text, message.last)
            self._lines.put(Said(*wrote))
        elif future := self._pending.get(message.ticket):
            future.set_result(message)

    def _tear_down(self) -> None:
        self._lifeline.close()
        self._control.close()
        self._fail_all()
        self._on_end(self)
        self._end_context()
        self._lines.end()

    def _fail_all(self) -> None:
        for future in list(self._pending.values()):
            if not future.done():
                future.set_exception(self._died())

    def _mute(self) -> SupervisorTimeout:
        return SupervisorTimeout(
            f"The onnx-dl supervisor (pid {self.supervisor_pid}) lives but did not answer within "
            f"{self.timeout:g} seconds (ONNX_DL_START_TIMEOUT). It is stopped, or the machine is too busy."
        )

    def _died(self) -> SupervisorDied:
        return SupervisorDied((_LOST if self.lost else _GONE).format(pid=self.supervisor_pid))


def _welcomed(lifeline: Channel, deadline: Deadline) -> str:
    """The supervisor's welcome: which onnxruntime its workers run, if it is shared.

    Raises:
        DeadlinePassed: it says nothing.
        SupervisorUnreachable: it went away.
        SupervisorStartError: it refuses us.
    """
    while True:
        try:
            received = lifeline.receive(deadline.step())
            break
        except TimeoutError:
            deadline.check("the supervisor to greet us")
    if received is None:
        raise SupervisorUnreachable("The onnx-dl supervisor went away before it answered.")
    answer = control.on_lifeline(received[0])
    if isinstance(answer, control.Welcome):
        return answer.build
    raise SupervisorStartError(f"The onnx-dl supervisor refused us: {getattr(answer, 'reason', answer)}.")


_connections: weakref.WeakValueDictionary[int, Connection] = weakref.WeakValueDictionary()


def _abandon_all() -> None:
    for ref in _connections.valuerefs():
        if (connection := ref()) is not None:
            connection.abandon()


os.register_at_fork(after_in_child=_abandon_all)
