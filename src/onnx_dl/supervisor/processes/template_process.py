"""One template process, as the supervisor sees it: what it was asked for, its answers, its end."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator

from onnx_dl.concurrency import spawning
from onnx_dl.protocol import template as m
from onnx_dl.supervisor.processes.first_template import SINGLE_THREADED, ForkedTemplate
from onnx_dl.supervisor.processes.worker_process import WorkerProcess
from onnx_dl.system import boot
from onnx_dl.transport.sockets import Channel


class TemplateProcess:
    """One template, from its start until it is reaped or has become a worker."""

    def __init__(self, mode: str, now: float, timeout: float, forked: ForkedTemplate | None = None) -> None:
        """See :class:`.SpawnQueue`.  ``forked``: it has started already."""
        self.was_ready = False
        self.became_worker = False
        self.given_up = False
        """All workers that waited for it have failed; later ones wait for the next template."""
        self.asked: WorkerProcess | None = None
        """The worker that it was asked for and has not reported."""
        self.open = True
        """True while more messages may arrive."""
        self._timeout = timeout
        self.deadline: float | None = now + timeout
        """Time when it must have answered; None: nothing is asked."""
        if forked is not None:
            self.pid, self.channel = forked
            return
        self.channel, theirs = Channel.pair()
        try:
            fd = theirs.fileno()
            os.set_inheritable(fd, True)
            launch = boot.launch("template", fd, mode, environ=os.environ | SINGLE_THREADED)
            self.pid = os.posix_spawn(*launch)
        except BaseException as error:
            self.channel.close()
            if isinstance(error, OSError) and spawning.is_shortage(error):
                raise spawning.exhausted("The template process") from None
            raise
        finally:
            theirs.close()

    @property
    def is_free(self) -> bool:
        """True if it can be asked for a worker."""
        return self.open and self.was_ready and self.asked is None

    def ask(self, worker: WorkerProcess, control: str, now: float) -> None:
        """Asks for a worker.

        Raises:
            BrokenPipeError: the template is gone.
            OSError: the system refuses to send the request.
        """
        if not worker.request(self.channel, control):
            raise BrokenPipeError("the template is gone")
        self.asked, self.deadline = worker, now + self._timeout

    def received(self) -> Iterator[object]:
        """All messages that have arrived.  At EOF the template is closed."""
        with contextlib.suppress(TimeoutError):
            while self.open:
                received = self.channel.receive(0)
                if received is None:
                    self.close()
                else:
                    yield m.on_template(received[0])

    def answered(self) -> WorkerProcess | None:
        """Takes the worker that the template was asked for, because the answer is there."""
        worker, self.asked, self.deadline = self.asked, None, None
        return worker

    def hurry(self, deadline: float) -> None:
        """Brings the deadline of the answer forward."""
        self.deadline = deadline if self.deadline is None else min(deadline, self.deadline)

    def close(self) -> None:
        self.open = False
        self.channel.close()

    def kill(self) -> None:
        """Sends SIGKILL.  It is a child that is not reaped, so its process id is not another's."""
        self.deadline = None
        os.kill(self.pid, signal.SIGKILL)

    def end(self) -> None:
        self.close()
        self.kill()
