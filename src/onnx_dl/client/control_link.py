"""Descriptors between an application and its supervisor, and outgoing messages."""

from __future__ import annotations

import contextlib
import secrets
import select
import time
from collections.abc import Iterator
from typing import Final

from onnx_dl.concurrency import primitives
from onnx_dl.concurrency.deadline import Deadline, DeadlinePassed
from onnx_dl.errors import OnnxDLError, ProtocolError, SupervisorStartError, SupervisorUnreachable
from onnx_dl.protocol import codec, control
from onnx_dl.transport import sockets
from onnx_dl.transport.dealer import Dealer
from onnx_dl.transport.sockets import Channel, Waker

_SENT_AWAY: Final = 0.1
"""Seconds until the client connects again to a supervisor that had no descriptor left for it."""

_LAST_WORDS: Final = 0.1
"""Seconds without a message after which a dead supervisor is taken to have sent all."""


class ControlLink:
    """Lifeline, control socket and outbox of a connection, and the waker of its thread."""

    def __init__(self, address: str, secret: str, timeout: float, deadline: Deadline | None) -> None:
        """Connects; raises like :class:`Connection`."""
        identity = secrets.token_bytes(16)
        hello = control.ClientHello(version=codec.PROTOCOL_VERSION, secret=secret, client=identity)
        opening = Deadline(timeout, outer=deadline)
        try:
            self.lifeline = Channel.connect(f"{address}/lifeline", opening)
            try:
                self.lifeline.send(codec.encode(hello))
                self.build = _await_welcome(self.lifeline, opening)
                """The onnxruntime of a shared host."""
                sockets.check_descriptors("A connection to the supervisor")
                self.control = Dealer(f"{address}/control", identity, Deadline(timeout, outer=deadline))
            except BaseException:
                self.lifeline.close()
                raise
        except OSError as error:
            if isinstance(error, OnnxDLError):
                raise
            raise SupervisorUnreachable(f"No onnx-dl supervisor answers: {error}.") from error
        self.supervisor_pid = self.lifeline.peer_pid()
        self.waker = Waker()
        self._outbox: primitives.SimpleQueue[bytes] = primitives.SimpleQueue()
        self.received_at = time.monotonic()
        """Time of the last message."""

    def is_ours(self) -> bool:
        """True if the program has not closed a descriptor."""
        return self.lifeline.is_ours() and self.waker.is_ours() and self.control.is_ours()

    def post(self, message: codec.Message) -> None:
        """Has the thread send a message.  Takes no lock and does not wait."""
        self._outbox.put(codec.encode(message))
        self.waker.wake()

    def send_all(self) -> None:
        """Sends what was posted, once the supervisor has let this client in."""
        while self.control.is_let_in:
            try:
                self.control.send(self._outbox.get_nowait())
            except primitives.Empty:
                return

    def receive(self) -> Iterator[codec.Message]:
        """The messages that have come; does not wait.  Skips what is none."""
        for data in self.control.receive():
            self.received_at = time.monotonic()
            try:
                message = control.to_client(data)
            except ProtocolError:
                continue
            yield message

    def receive_last(self) -> Iterator[codec.Message]:
        """The messages that a dead supervisor sent before its end."""
        poll = primitives.poll()
        poll.register(self.control.fileno(), select.POLLIN)
        while not self.control.gone and poll.poll(_LAST_WORDS * 1000):
            yield from self.receive()

    def come_again(self, timeout: float) -> None:
        """Connects the control socket again, after a supervisor without a free descriptor closed it."""
        if self.lifeline.readable(_SENT_AWAY):
            return
        with contextlib.suppress(OSError, DeadlinePassed):  # it is gone; the lifeline tells
            self.control.reconnect(Deadline(timeout))

    def close(self) -> None:
        self.lifeline.close()
        self.control.close()


def _await_welcome(lifeline: Channel, deadline: Deadline) -> str:
    """A shared supervisor's onnxruntime.  Raises like :class:`Connection`, and DeadlinePassed."""
    while True:
        try:
            received = lifeline.receive(deadline.step())
            break
        except TimeoutError:
            deadline.check("the supervisor's greeting")
    if received is None:
        raise SupervisorUnreachable("The onnx-dl supervisor ended before it answered.")
    answer = control.on_lifeline(received[0])
    if isinstance(answer, control.Welcome):
        return answer.build
    reason = answer.reason if isinstance(answer, control.Refused) else str(answer)
    raise SupervisorStartError(f"The onnx-dl supervisor refused the connection: {reason.rstrip('.')}.")
