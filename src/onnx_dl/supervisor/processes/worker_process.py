"""One worker process as the supervisor has it: its descriptors, its last words, its end.

When one is started and who asks for it is :mod:`onnx_dl.supervisor.processes.worker_processes`'s.
"""

from __future__ import annotations

import collections
import contextlib
import os
import signal
from collections.abc import Mapping
from typing import Final, NamedTuple

from onnx_dl.core.environment import NOTHING, Environment
from onnx_dl.core.thread_attributes import Standing
from onnx_dl.protocol import codec, template
from onnx_dl.transport import sockets
from onnx_dl.transport.gauges import Page
from onnx_dl.transport.sockets import MOST_DESCRIPTORS, Channel

MOST_BLOBS: Final = MOST_DESCRIPTORS - 3
"""That a worker is born with, beside what every one has."""
COST: Final = 6
"""Descriptors that the supervisor needs for one worker, beside its blobs, its control connection included."""
_TAIL: Final = 40
"""Lines of a worker's stderr that are kept for the error that tells of its death."""
_CHUNK: Final = 1 << 16


class StderrTail:
    """One worker's stderr: passed on as it comes, and its last lines kept."""

    def __init__(self) -> None:
        self._read_end, self.write_end = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._read_end, False)
        self._lines: collections.deque[bytes] = collections.deque(maxlen=_TAIL)
        self._partial = b""
        self.open = True

    def fileno(self) -> int:
        return self._read_end

    def pump(self) -> bytes:
        """Takes in what is there, up to a limit, so that one that never stops does not keep the others
        waiting; returns it for whoever passes it on."""
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


class Birth(NamedTuple):
    """What a worker begins with.

    ``model``: the name of what it is for; ``pristine``: it has made no session of the engine before;
    ``standing``: what it has from the thread that asked for it, None: from this process; ``environment``: its
    variables, beside this process's.
    """

    model: str = ""
    pristine: bool = False
    standing: Standing | None = None
    environment: Environment = NOTHING


class WorkerProcess:
    """From the request for it until it is reaped."""

    def __init__(
        self,
        worker_id: int,
        identity: bytes,
        blobs: Mapping[str, int],
        birth: Birth = Birth(),  # noqa: B008 - is immutable
    ) -> None:
        """``blobs``: descriptors of the memory that its model is loaded from, by name.

        Raises:
            OSError: the system has no descriptors or memory left; nothing is left open.
        """
        self.worker_id = worker_id
        self.identity = identity
        self.model = birth.model
        self._birth = birth
        self.pid: int | None = None
        self.condemned = False
        self.greeted = False
        """Whether it has said something: it has its connection to us."""
        self._pidfd: int | None = None
        self._theirs: list[int] = []
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
        """Asks a template for the process and hands over its ends of the descriptors.  Whether it was sent.

        Raises:
            OSError: the system refuses to send it.
        """
        assert self._lifeline_worker is not None
        message = template.Spawn(
            worker_id=self.worker_id,
            identity=self.identity,
            control=control,
            blobs=list(self._blobs),
            pristine=self._birth.pristine,
            standing=self._birth.standing,
            environment=self._birth.environment,
        )
        fds = (self._lifeline_worker.fileno(), self.stderr.write_end, self.page.fd, *self._blobs.values())
        sent = channel.send(codec.encode(message), fds)
        if sent:
            self._drop_ends()
        return sent

    @property
    def owed(self) -> int:
        """Descriptors that it will take and has not yet: one to watch it, one to talk to it."""
        return (self.pid is None) + (not self.greeted)

    def born(self, pid: int) -> None:
        self.pid = pid
        with contextlib.suppress(ProcessLookupError):  # already dead and reaped
            self._pidfd = os.pidfd_open(pid)
        if self.condemned:
            self.kill()

    def kill(self) -> None:
        """SIGKILL, also if the process has no pid yet.  By pidfd: a pid may mean another process by now."""
        self.condemned = True
        if self._pidfd is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def mute(self, error: Exception) -> None:
        """What it writes on stderr cannot be read: it is to go, and not to be asked again."""
        self.stderr.open = False
        self.kill()

    def _drop_ends(self) -> None:
        """Closes what is the worker's: our copies would hide its death from the other ends."""
        while self._blobs:
            os.close(self._blobs.popitem()[1])
        if self._lifeline_worker is not None:
            os.close(self.stderr.write_end)
            self._lifeline_worker.close()
            self._lifeline_worker = None

    def buried(self) -> tuple[str, bytes]:
        """It is reaped: its last lines on stderr, and what of it was not passed on yet."""
        self._drop_ends()
        rest = self.stderr.pump()  # all that a pipe holds; what it forked may go on writing
        self.stderr.close()
        self._lifeline.close()
        self.page.close()
        if self._pidfd is not None:
            os.close(self._pidfd)
        return self.stderr.text(), rest
