"""The process that workers come from.

It imports the engine, makes and drops a throw-away session so that the code is warm, and waits.  For each
Spawn it forks a worker, which starts in a few milliseconds and shares the imported pages; where forking is
not possible, or not wanted, it becomes the worker itself.  What onnxruntime does once per process, for its
first session, the throw-away session has used up: a worker whose model asks for that begins anew as a fresh
interpreter.  A worker is a grandchild whose parent ends at
once, so the supervisor takes it in and reaps it, and the end of this process is not the worker's.

Fork is safe because this process has exactly one thread, checked after the imports, and has never opened a
ZeroMQ context, touched CUDA or kept a session.  Its environment sees to the single thread
(``SINGLE_THREADED`` in :mod:`onnx_dl.supervisor.processes.template_process`).  Knows nothing of models.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import time
import traceback
from typing import Final, NoReturn

import msgspec

from onnx_dl.concurrency import spawning
from onnx_dl.core.environment import NOTHING
from onnx_dl.errors import ProcessesExhausted
from onnx_dl.ort import recorder
from onnx_dl.protocol import codec
from onnx_dl.protocol.template import Spawn, Spawned, SpawnFailed, TemplateReady, on_template
from onnx_dl.system import boot, frozen, process_setup, procfs, thread_attributes
from onnx_dl.system.prctl import die_with_parent, name_process
from onnx_dl.transport import sockets
from onnx_dl.transport.gauges import Page
from onnx_dl.transport.sockets import Channel
from onnx_dl.workers import heap
from onnx_dl.workers.worker import Worker

# y = Identity(x), float32[1]: 65 bytes of ModelProto.
_THROW_AWAY: Final = (
    b'\x08\x08:7\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02'
    b"\x08\x01b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\r"
)

_REPLACED: Final = (
    "onnx-dl was replaced on disk by a version that speaks another protocol, while the supervisor ran. "
    "Restart the application, or the shared host."
)

_CALLED_LATE: Final = (
    "onnx-dl: models load about ten times slower than they could, because this program starts threads before "
    "it calls onnx_dl.freeze_support(). Call that first, before numpy and onnxruntime are imported."
)

_WORKER: Final = "worker"
_OOM_SCORE: Final = 900
"""A worker can be had again: it goes before an application that is larger, and after one that saves."""


class Template:
    """Serves the supervisor at the other end of ``channel`` until it is gone."""

    def __init__(self, channel: Channel, *, fork: bool, used: bool) -> None:
        """``used``: the engine has made a session in this process."""
        self._channel = channel
        self._fork = fork
        self._used = used
        self._supervisor = os.getppid()

    def serve(self) -> NoReturn:
        self._tell(TemplateReady(forkable=self._fork))
        while True:
            try:
                received = self._channel.receive()
            except OSError as error:  # the descriptors of a model are more than this process may have
                self._tell(SpawnFailed(worker_id=0, reason=str(error)))
                continue
            if received is None:
                os._exit(0)
            self._spawn(on_template(received[0]), received[1])

    def _spawn(self, spawn: Spawn, fds: list[int]) -> None:
        if spawn.version != codec.PROTOCOL_VERSION:  # what it would start cannot talk to anybody
            print(_REPLACED, file=sys.stderr, flush=True)  # the supervisor says where that can be read
            os._exit(1)
        if not self._fork:
            self._tell(Spawned(worker_id=spawn.worker_id, pid=os.getpid()))
            self.become(spawn, fds)
        told = self._forked(spawn, fds)
        sockets.close_all(fds)
        if told.isdigit():
            self._tell(Spawned(worker_id=spawn.worker_id, pid=int(told)))
        else:
            self._tell(SpawnFailed(worker_id=spawn.worker_id, reason=told or "fork failed"))

    def _forked(self, spawn: Spawn, fds: list[int]) -> str:
        """The process id of the new worker, or why there is none."""
        read_end, write_end = os.pipe2(os.O_CLOEXEC)
        try:
            middle = os.fork()
            if middle == 0:
                try:
                    os.close(read_end)
                    self._fork_again(spawn, fds, write_end)
                finally:  # the template has gone meanwhile: this must not go on as a second one
                    os._exit(1)
            os.close(write_end)
            write_end = -1
            told = os.read(read_end, 1024).decode(errors="replace")
            os.waitpid(middle, 0)
        except OSError as error:
            return _why(error)
        finally:
            sockets.close_all(fd for fd in (read_end, write_end) if fd >= 0)
        return told

    def _fork_again(self, spawn: Spawn, fds: list[int], pipe: int) -> NoReturn:
        """In the process between: the worker's parent, which leaves at once."""
        middle = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:
            os.write(pipe, _why(error).encode())
            os._exit(1)
        if pid == 0:
            os.close(pipe)
            self.become(spawn, fds, middle)
        os.write(pipe, str(pid).encode())
        os._exit(0)

    def become(self, spawn: Spawn, fds: list[int], middle: int | None = None) -> NoReturn:
        """The rest of this process's life is a worker's; ``middle``: its parent until that has left."""
        try:
            self._channel.close()
            if spawn.standing is not None:
                thread_attributes.take(spawn.standing)  # before there is another thread
            if spawn.environment or (spawn.pristine and self._used):
                self._begin_anew(spawn, fds, middle)
            lifeline, stderr, page, *blobs = fds
            os.dup2(stderr, 2)
            os.close(stderr)
            faulthandler.enable()  # a crash leaves its stack in the last lines of stderr
            name_process(f"onnx-dl:{spawn.worker_id}")
            process_setup.go_first(_OOM_SCORE)
            self._die_with_supervisor(middle)
            Worker(spawn, lifeline, Page(page).gauges, blobs).serve()
        except ProcessesExhausted as error:  # before it could say so to the supervisor
            print(error, file=sys.stderr, flush=True)
            os._exit(os.EX_OSERR)
        except BaseException:
            traceback.print_exc()
            os._exit(70)

    def _die_with_supervisor(self, middle: int | None) -> None:
        """The lifeline says so too, but one whose native code hangs with the GIL would not hear it.

        Not before the parent has left: its end would count.
        """
        while os.getppid() == middle:
            time.sleep(0.0001)
        die_with_parent(self._supervisor)

    def _begin_anew(self, spawn: Spawn, fds: list[int], middle: int | None) -> NoReturn:
        """The same process with another interpreter, which becomes the worker."""
        self._die_with_supervisor(middle)  # what is executed keeps that; its imports take a while
        os.dup2(fds[1], 2)  # an environment may be one in which no interpreter starts
        ours, theirs = Channel.pair()
        begun = msgspec.structs.replace(spawn, environment=NOTHING)
        ours.send(codec.encode(begun), tuple(fds))  # lies in the socket until it is read
        os.set_inheritable(theirs.fileno(), True)
        environ = spawn.environment.over(os.environ)
        os.execve(*boot.launch("template", theirs.fileno(), _WORKER, environ=environ))

    def _tell(self, message: codec.Message) -> None:
        if not self._channel.send(codec.encode(message)):
            os._exit(0)


def _why(error: OSError) -> str:
    """Why there is no worker, for whoever waits for it."""
    return str(spawning.exhausted("A worker process") if spawning.is_shortage(error) else error)


def _import_engine() -> None:
    """Everything that a worker will need, so that its children share it."""
    import onnx_dl.workers.ort  # noqa: F401


def _warm_up() -> None:
    """Runs what every load runs, so that its pages are there."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    onnxruntime.InferenceSession(_THROW_AWAY, options, providers=["CPUExecutionProvider"])


def main(channel_fd: int, mode: str) -> NoReturn:
    """Entry point of the process; ``mode`` is ``fork`` or ``exec``, or ``worker`` for one that began anew."""
    process_setup.make_own()
    die_with_parent()
    recorder.remove()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; it is the application's
    name_process("onnx-dl-template")
    channel = Channel.from_fd(channel_fd)
    used = False
    with contextlib.suppress(Exception):  # a broken installation is told to whoever loads a model
        _import_engine()
        used = mode == "fork" and procfs.has_one_thread()
        if used:
            _warm_up()
    forkable = mode == "fork" and procfs.has_one_thread()
    if mode == "fork" and not forkable and frozen.is_frozen():
        print(_CALLED_LATE, file=sys.stderr, flush=True)
    heap.share()
    template = Template(channel, fork=forkable, used=used)
    if mode == _WORKER and (received := channel.receive()) is not None:
        data, fds = received
        template.become(on_template(data), fds)
    template.serve()
