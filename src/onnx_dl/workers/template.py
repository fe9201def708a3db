"""The process that workers come from.

It imports the engine, makes and drops a throw-away session so that the code is warm, and waits.  For each
Spawn it forks a worker, which starts in a few milliseconds and shares the imported pages; where forking is
not possible, or not wanted, it becomes the worker itself.  It reaps its children and reports their wait
status: only a reaped worker is gone.

Fork is safe because this process has exactly one thread, checked after the imports, and has never opened a
ZeroMQ context, touched CUDA or kept a session.  Its environment sees to the single thread
(``_SINGLE_THREADED`` in :mod:`onnx_dl.supervisor.process`).  Knows nothing of models.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import selectors
import signal
import sys
import traceback
from typing import Final, NoReturn

from onnx_dl import recorder
from onnx_dl.transport import messages as m
from onnx_dl.transport.gauges import Page
from onnx_dl.transport.sockets import Channel
from onnx_dl.workers import memory
from onnx_dl.workers.kin import die_with_parent, name_process
from onnx_dl.workers.loop import Worker

# y = Identity(x), float32[1]: 65 bytes of ModelProto.
_THROW_AWAY: Final = (
    b'\x08\x08:7\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02'
    b"\x08\x01b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\r"
)

_REPLACED: Final = (
    "onnx-dl was replaced on disk by a version that speaks another protocol, while the supervisor ran. "
    "Restart the application, or the shared host."
)


class Template:
    """Serves the supervisor at the other end of ``channel`` until it is gone."""

    def __init__(self, channel: Channel, *, fork: bool) -> None:
        self._channel = channel
        self._fork = fork
        self._children: dict[int, int] = {}
        self._selector = selectors.DefaultSelector()
        self._wakeup = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def serve(self) -> NoReturn:
        wakeup = self._wakeup[0]
        signal.set_wakeup_fd(self._wakeup[1], warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self._selector.register(self._channel, selectors.EVENT_READ)
        self._selector.register(wakeup, selectors.EVENT_READ)
        self._tell(m.TemplateReady(forkable=self._fork))
        while True:
            ready = [key.fd for key, _ in self._selector.select()]
            if wakeup in ready:
                with contextlib.suppress(BlockingIOError):
                    os.read(wakeup, 4096)
                self._reap()
            if self._channel.fileno() in ready:
                self._spawn_one()

    def _spawn_one(self) -> None:
        received = self._channel.receive()
        if received is None:
            os._exit(0)
        data, fds = received
        spawn = m.on_template(data)
        if spawn.version != m.PROTOCOL_VERSION:  # what it would start cannot talk to anybody
            print(_REPLACED, file=sys.stderr, flush=True)  # the supervisor says where that can be read
            os._exit(1)
        if not self._fork:
            self._tell(m.Spawned(worker_id=spawn.worker_id, pid=os.getpid()))
            self._become(spawn, fds)
        try:
            pid = os.fork()
        except OSError as error:
            self._tell(m.SpawnFailed(worker_id=spawn.worker_id, reason=str(error)))
        else:
            if pid == 0:
                self._become(spawn, fds)
            self._children[pid] = spawn.worker_id
            self._tell(m.Spawned(worker_id=spawn.worker_id, pid=pid))
        for fd in fds:
            os.close(fd)

    def _become(self, spawn: m.Spawn, fds: list[int]) -> NoReturn:
        """The rest of this process's life is a worker's."""
        try:
            self._shed()
            lifeline, stderr, page, *blobs = fds
            os.dup2(stderr, 2)
            os.close(stderr)
            # The lifeline says so too, but one whose native code hangs with the GIL would not hear it.
            die_with_parent()
            faulthandler.enable()  # a crash leaves its stack in the last lines of stderr
            name_process(f"onnx-dl:{spawn.worker_id}")
            Worker(spawn, lifeline, Page(page).gauges, blobs).serve()
        except BaseException:
            traceback.print_exc()
            os._exit(70)

    def _shed(self) -> None:
        """Drops what belongs to the template only."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self._selector.close()
        for fd in self._wakeup:
            os.close(fd)
        self._channel.close()

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while self._children:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    return
                self._tell(m.Reaped(worker_id=self._children.pop(pid), status=status))

    def _tell(self, message: m.Message) -> None:
        if not self._channel.send(m.encode(message)):
            os._exit(0)


def _import_engine() -> None:
    """Everything that a worker will need, so that its children share it."""
    import onnxruntime

    import onnx_dl.workers.ort  # noqa: F401

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    onnxruntime.InferenceSession(_THROW_AWAY, options, providers=["CPUExecutionProvider"])


def _is_single_threaded() -> bool:
    return len(os.listdir("/proc/self/task")) == 1


def main(channel_fd: int, mode: str) -> NoReturn:
    """Entry point of the process; ``mode`` is ``fork`` or ``exec``."""
    die_with_parent()
    recorder.remove()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; it is the application's
    name_process("onnx-dl-template")
    channel = Channel.from_fd(channel_fd)
    with contextlib.suppress(Exception):  # a broken installation is told to whoever loads a model
        _import_engine()
    memory.share()
    Template(channel, fork=mode == "fork" and _is_single_threaded()).serve()
