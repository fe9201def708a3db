"""One worker process, as the supervisor sees it: its descriptors, its stderr, its end."""

from __future__ import annotations

import collections
import contextlib
import os
import signal
from collections.abc import Mapping
from typing import Final, NamedTuple

from onnx_dl.core.environment import NOTHING, Environment, ThreadAttributes
from onnx_dl.core.spec import Confinement
from onnx_dl.protocol import codec, template
from onnx_dl.supervisor.policy.outcomes import ExitStatus
from onnx_dl.transport import sockets
from onnx_dl.transport.gauges import Page
from onnx_dl.transport.sockets import MOST_DESCRIPTORS, Channel

MOST_BLOBS: Final = MOST_DESCRIPTORS - 3
"""Blobs that a worker can be given at its start."""
COST: Final = 6
"""Descriptors that the supervisor needs for one worker: its control connection included, its blobs not."""
_TAIL: Final = 40
"""Lines of a worker's stderr that are kept for the error about its death."""
_CHUNK: Final = 1 << 16


class StderrTail:
    """Reads one worker's stderr, and keeps its last lines."""

    def __init__(self) -> None:
        self._read_end, self.write_end = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._read_end, False)
        self._lines: collections.deque[bytes] = collections.deque(maxlen=_TAIL)
        self._partial = b""
        self.open = True

    def fileno(self) -> int:
        return self._read_end

    def pump(self) -> bytes:
        """Reads and returns what is there.  The amount is limited, so that a worker that never stops writing
        does not block the others."""
        try:
            data = os.read(self._read_end, _CHUNK)
        except BlockingIOError:
            return b""
        self.open = bool(data)
        *lines, self._partial = (self._partial + data).split(b"\n")
        self._partial = self._partial[-_CHUNK:]
        self._lines.extend(lines)
        return data

    def text(self) -> str:
        lines = [*self._lines, *([self._partial] if self._partial else [])]
        return b"\n".join(lines).decode(errors="replace")

    def close(self) -> None:
        self.open = False
        os.close(self._read_end)


class StartConditions(NamedTuple):
    """Properties with which a worker starts.

    ``model``: the name of its model; ``pristine``: its process must not have made a session of the engine
    before; ``thread_attributes``: those of the thread that asked for it, None: this process's;
    ``environment``: its variables, added to those of this process; ``sandbox``: rights that it keeps, None:
    all.
    """

    model: str = ""
    pristine: bool = False
    thread_attributes: ThreadAttributes | None = None
    environment: Environment = NOTHING
    sandbox: Confinement | None = None
    standby: bool = False
    """True: it prepares all but the model, and takes another worker's place later."""

    @property
    def may_be_late(self) -> bool:
        """True if a process may take them that has started without them."""
        return not (self.pristine or self.environment or self.sandbox or self.standby)


class WorkerProcess:
    """One worker, from the request for it until it is reaped."""

    def __init__(
        self,
        worker_id: int,
        identity: bytes,
        blobs: Mapping[str, int],
        conditions: StartConditions = StartConditions(),  # noqa: B008 - is immutable
    ) -> None:
        """``blobs``: descriptors of the memory that its model is loaded from, by name.

        Raises:
            OSError: the system has no descriptors or memory left; nothing is left open.
        """
        self.worker_id = worker_id
        self.identity = identity
        self.model = conditions.model
        self.conditions = conditions
        self.pid: int | None = None
        self.kill_requested = False
        self.greeted = False
        """True if it is connected to the control socket."""
        self._pidfd: int | None = None
        self._blobs: dict[str, int] = {}
        with contextlib.ExitStack() as undo:
            undo.callback(lambda: sockets.close_all(self._blobs.values()))
            for name, fd in blobs.items():  # copies: the client may drop its own while this waits
                self._blobs[name] = os.dup(fd)
            self.stderr = StderrTail()
            undo.callback(lambda: sockets.close_all([self.stderr.write_end]))
            undo.callback(self.stderr.close)
            self.page = Page()
            undo.callback(self.page.close)
            self._lifeline, lifeline = Channel.pair()
            self._lifeline_worker: Channel | None = lifeline
            undo.pop_all()

    def request(self, channel: Channel, control: str) -> bool:
        """Asks a template for the process and hands over its descriptors; false: the template is gone."""
        assert self._lifeline_worker is not None
        message = template.Spawn(
            worker_id=self.worker_id,
            identity=self.identity,
            control=control,
            blobs=list(self._blobs),
            pristine=self.conditions.pristine,
            thread_attributes=self.conditions.thread_attributes,
            environment=self.conditions.environment,
            sandbox=self.conditions.sandbox,
            standby=self.conditions.standby,
        )
        fds = (self._lifeline_worker.fileno(), self.stderr.write_end, self.page.fd, *self._blobs.values())
        sent = channel.send(codec.encode(message), fds)
        if sent:
            self._drop_ends()
        return sent

    def assign(self, standby: WorkerProcess) -> bool:
        """Asks a standby worker to take this one's place; false: it is gone, or does not read."""
        attributes = self.conditions.thread_attributes
        message = template.Assign(
            worker_id=self.worker_id, blobs=list(self._blobs), thread_attributes=attributes
        )
        return standby._lifeline.post(codec.encode(message), tuple(self._blobs.values()))

    def adopt(self, standby: WorkerProcess) -> None:
        """Takes over the process and the descriptors of a standby worker that has taken this one's place."""
        self._drop_ends()
        self.stderr.close()
        self.page.close()
        self._lifeline.close()
        self.stderr, self.page, self._lifeline = standby.stderr, standby.page, standby._lifeline
        self.pid, self._pidfd = standby.pid, standby._pidfd

    @property
    def owed(self) -> int:
        """Descriptors that it will still need: a pidfd and its control connection."""
        return (self.pid is None) + (not self.greeted)

    def on_spawned(self, pid: int) -> None:
        """Notes its process id; kills it if that was asked for before."""
        with contextlib.suppress(ProcessLookupError):  # already dead and reaped
            self._pidfd = os.pidfd_open(pid)
        self.pid = pid  # only now: a process that cannot be killed is not waited for
        if self.kill_requested:
            self.kill()

    def kill(self) -> None:
        """Sends SIGKILL, as soon as it has a pid.  By pidfd: the pid may belong to another process by now."""
        self.kill_requested = True
        if self._pidfd is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def stop_reading(self, error: Exception) -> None:
        """Ends a worker whose stderr cannot be read, and reads it no more."""
        self.stderr.open = False
        self.kill()

    def _drop_ends(self) -> None:
        """Closes our copies of the worker's descriptors: they would hide its death from the other ends."""
        while self._blobs:
            os.close(self._blobs.popitem()[1])
        if self._lifeline_worker is not None:
            os.close(self.stderr.write_end)
            self._lifeline_worker.close()
            self._lifeline_worker = None

    def release(self) -> tuple[str, bytes]:
        """Closes all of a reaped worker; returns the last lines of its stderr, and its unread part."""
        self._drop_ends()
        rest = self.stderr.pump()  # once: as much as a pipe holds; its children may go on writing
        self.stderr.close()
        self._lifeline.close()
        self.page.close()
        if self._pidfd is not None:
            os.close(self._pidfd)
        return self.stderr.text(), rest


def exit_status(wait_status: int) -> ExitStatus:
    """Decodes what ``waitpid`` returns."""
    code = os.waitstatus_to_exitcode(wait_status)
    if code >= 0:
        return ExitStatus(code)
    name = f"signal {-code}"
    with contextlib.suppress(ValueError):  # a real-time signal has no name
        name = signal.Signals(-code).name
    return ExitStatus(None, -code, name)
