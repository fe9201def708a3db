"""The process that workers come from, as the supervisor has it; what it does is
:mod:`onnx_dl.workers.template`'s.

The supervisor never waits for it.  One request is under way at a time, so there is always room for it in the
socket, and how long an answer may take is bounded.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from typing import Any, Final

from onnx_dl.concurrency import spawning
from onnx_dl.protocol import template as m
from onnx_dl.supervisor.processes.worker_process import WorkerProcess
from onnx_dl.system import boot
from onnx_dl.transport.sockets import Channel

# Read when numpy and onnxruntime are imported, so it must be there before.  OpenBLAS would start a pool of
# threads, and onnxruntime 1.29 and later a telemetry thread (with an SQLite file that all forks would share);
# a process with threads cannot fork safely.
SINGLE_THREADED: Final = {"OPENBLAS_NUM_THREADS": "1", "ORT_DISABLE_TELEMETRY": "1"}


class TemplateProcess:
    """One template, from its start until it is reaped or has become a worker."""

    def __init__(self, mode: str, now: float, patience: float) -> None:
        """``mode``: ``fork`` or ``exec``; ``patience``: seconds in which it answers, and becomes ready.

        Raises:
            OSError: the system has no process for it, or no descriptors.
        """
        self.forks = mode == "fork"
        self.was_ready = False
        self.given_up = False
        """Who waited for it has been told; who comes until it is reaped waits for the next one."""
        self.asked: WorkerProcess | None = None
        """The worker that it was asked for and has not told of."""
        self._patience = patience
        self.deadline: float | None = now + patience
        """When it must have answered; None: nothing is asked."""
        self.channel, theirs = Channel.pair()
        self._open = True
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
    def open(self) -> bool:
        """Whether it may still say something."""
        return self._open

    @property
    def is_free(self) -> bool:
        """Whether it can be asked for a worker."""
        return self._open and self.was_ready and self.asked is None

    def ask(self, worker: WorkerProcess, control: str, now: float) -> None:
        """Asks for a worker.

        Raises:
            OSError: the system refuses to send that.
        """
        if worker.request(self.channel, control):
            self.asked, self.deadline = worker, now + self._patience
        else:  # it is gone; who waits for the next one is asked for there
            raise BrokenPipeError("the template is gone")

    def heard(self) -> Iterator[Any]:
        """All messages that have come.  At its end it is not open any more.

        Raises:
            ProtocolError: it said something else.
        """
        with contextlib.suppress(TimeoutError):
            while self._open:
                received = self.channel.receive(0)
                if received is None:
                    self.close()
                else:
                    yield m.on_template(received[0])

    def became_ready(self) -> None:
        self.was_ready, self.deadline = True, None

    def answered(self) -> WorkerProcess | None:
        """It has told what became of the worker that it was asked for."""
        worker, self.asked, self.deadline = self.asked, None, None
        return worker

    def hurry(self, deadline: float) -> None:
        """Whoever waits for the answer waits until then at most."""
        self.deadline = deadline if self.deadline is None else min(deadline, self.deadline)

    def close(self) -> None:
        """Nothing is asked of it any more, nor heard."""
        self._open = False
        self.channel.close()

    def kill(self) -> None:
        """SIGKILL.  It is a child that is not reaped, so the number is its own."""
        self.deadline = None
        os.kill(self.pid, signal.SIGKILL)
