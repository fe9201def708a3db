"""Template process, from which workers are forked.

It imports the engine, makes and drops a throw-away session so that the code is warm, and waits.  For each
Spawn it forks a worker, which starts in a few milliseconds and shares the imported pages.  If forking is not
possible, or not wanted, it becomes the worker itself.  Some settings count only for onnxruntime's first
session of a process, which the throw-away session was: a worker whose model needs one of these executes a
fresh interpreter.  The parent of a worker ends at once, so that the supervisor, a subreaper, adopts and reaps
it, and the end of the template does not end workers.

Fork is safe because this process has exactly one thread, checked after the imports, and has never opened a
ZeroMQ context, touched CUDA or kept a session.  Its environment keeps libraries from starting threads
(``SINGLE_THREADED`` in :mod:`onnx_dl.supervisor.processes.first_template`).  Knows nothing of models.
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
from onnx_dl.system import boot, frozen, process_setup, resources, thread_attributes
from onnx_dl.system.process_setup import die_with_parent
from onnx_dl.system.process_title import set_title
from onnx_dl.transport import sockets
from onnx_dl.transport.gauges import Page
from onnx_dl.transport.sockets import Channel
from onnx_dl.workers.limits import share_heap
from onnx_dl.workers.sandbox import rights
from onnx_dl.workers.standby import THROW_AWAY
from onnx_dl.workers.worker import Worker

_REPLACED: Final = (
    "onnx-dl was replaced on disk by a version with another protocol while the supervisor ran. "
    "Restart the application, or the shared host."
)

_CALLED_LATE: Final = (
    "onnx-dl: models load about ten times slower than they could, because this program starts threads before "
    "it calls onnx_dl.freeze_support(). Call that first, before numpy and onnxruntime are imported."
)

_WORKER: Final = "worker"
_OOM_SCORE: Final = 900
"""Value for the template and its workers: the kernel ends them before a larger application, because models
can be loaded again, and after a saver.  The template, too: memory of a process that was ended is free only
after some milliseconds, and if another process needs memory meanwhile, the kernel ends a second one."""


class Template:
    """Serves the supervisor at the other end of ``channel`` until it is gone."""

    def __init__(self, channel: Channel, *, fork: bool, warm: bool) -> None:
        """``fork``: fork workers, else become one; ``warm``: onnxruntime has made a session here."""
        self._channel = channel
        self._fork = fork
        self._warm = warm
        self._supervisor = os.getppid()

    def serve(self) -> NoReturn:
        self._send(TemplateReady(forkable=self._fork))
        while True:
            try:
                received = self._channel.receive()
            except OSError as error:  # this process may not have all descriptors of the model
                self._send(SpawnFailed(worker_id=0, reason=str(error)))
                continue
            if received is None:
                os._exit(0)
            self._spawn(on_template(received[0]), received[1])

    def _spawn(self, spawn: Spawn, fds: list[int]) -> None:
        if spawn.version != codec.PROTOCOL_VERSION:  # the worker could not talk to the supervisor
            print(_REPLACED, file=sys.stderr, flush=True)  # the supervisor tells users where to read it
            os._exit(1)
        if not self._fork:
            self._send(Spawned(worker_id=spawn.worker_id, pid=os.getpid()))
            self.become_worker(spawn, fds)
        outcome = self._fork_worker(spawn, fds)
        sockets.close_all(fds)
        if outcome.isdigit():
            self._send(Spawned(worker_id=spawn.worker_id, pid=int(outcome)))
        else:
            self._send(SpawnFailed(worker_id=spawn.worker_id, reason=outcome or "fork failed"))

    def _fork_worker(self, spawn: Spawn, fds: list[int]) -> str:
        """Returns the process id of the new worker, or the text of an error."""
        read_end, write_end = os.pipe2(os.O_CLOEXEC)
        try:
            middle = os.fork()
            if middle == 0:
                try:
                    os.close(read_end)
                    self._fork_again(spawn, fds, write_end)
                finally:  # if the template ended meanwhile: this process must not go on as a second one
                    os._exit(1)
            os.close(write_end)
            write_end = -1
            outcome = os.read(read_end, 1024).decode(errors="replace")
            os.waitpid(middle, 0)
        except OSError as error:
            return _describe(error)
        finally:
            sockets.close_all(fd for fd in (read_end, write_end) if fd >= 0)
        return outcome

    def _fork_again(self, spawn: Spawn, fds: list[int], pipe: int) -> NoReturn:
        """Forks the worker from the process in between, which exits at once."""
        middle = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:
            os.write(pipe, _describe(error).encode())
            os._exit(1)
        if pid == 0:
            os.close(pipe)
            self.become_worker(spawn, fds, middle)
        os.write(pipe, str(pid).encode())
        os._exit(0)

    def become_worker(self, spawn: Spawn, fds: list[int], middle: int | None = None) -> NoReturn:
        """Runs a worker in this process until it exits; ``middle``: its parent, which exits at once."""
        try:
            self._channel.close()
            if spawn.thread_attributes is not None:
                thread_attributes.apply(spawn.thread_attributes)  # before another thread starts
            if spawn.environment or (spawn.pristine and self._warm):
                self._exec_worker(spawn, fds, middle)
            lifeline, stderr, page, *blobs = fds
            os.dup2(stderr, 2)
            os.close(stderr)
            faulthandler.enable()  # a crash writes its stack to stderr
            set_title("standby" if spawn.standby else "worker")  # the model comes with a later message
            self._die_with_supervisor(middle)
            Worker(spawn, lifeline, Page(page).gauges, blobs, _confined(spawn, blobs)).serve()
        except ProcessesExhausted as error:  # the worker could not yet send it to the supervisor
            print(error, file=sys.stderr, flush=True)
            os._exit(os.EX_OSERR)
        except BaseException:
            traceback.print_exc()
            os._exit(70)

    def _die_with_supervisor(self, middle: int | None) -> None:
        """Sets the parent death signal: a worker whose native code hangs with the GIL does not see EOF on its
        lifeline.  Waits until the process in between has exited, whose end would cause the signal."""
        while os.getppid() == middle:
            time.sleep(0.0001)
        die_with_parent(self._supervisor)

    def _exec_worker(self, spawn: Spawn, fds: list[int], middle: int | None) -> NoReturn:
        """Executes a fresh interpreter in this process, which becomes the worker."""
        self._die_with_supervisor(middle)  # survives exec, and the new imports take a while
        os.dup2(fds[1], 2)  # the interpreter may fail to start in this environment, and says so on stderr
        ours, theirs = Channel.pair()
        remaining = msgspec.structs.replace(spawn, environment=NOTHING)
        ours.send(codec.encode(remaining), tuple(fds))  # stays in the socket until it is read
        os.set_inheritable(theirs.fileno(), True)
        environ = spawn.environment.over(os.environ)
        os.execve(*boot.launch("template", theirs.fileno(), _WORKER, environ=environ))

    def _send(self, message: codec.Message) -> None:
        if not self._channel.send(codec.encode(message)):
            os._exit(0)


def _confined(spawn: Spawn, blobs: list[int]) -> Exception | None:
    """Restricts this process to what a sandboxed worker may do; returns the error if that is not possible."""
    if spawn.sandbox is not None:
        try:
            rights.confine(spawn.sandbox, dict(zip(spawn.blobs, blobs, strict=True)))
        except Exception as error:  # the worker sends it to those that wait for the model
            return error
    return None


def _describe(error: OSError) -> str:
    """Returns the text of the error for callers that wait for the worker."""
    return str(spawning.exhausted("A worker process") if spawning.is_shortage(error) else error)


def _warm_up() -> None:
    """Makes a session, so that workers share the pages of the code that runs at each load."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    onnxruntime.InferenceSession(THROW_AWAY, options, providers=["CPUExecutionProvider"])


def main(channel_fd: int, mode: str) -> NoReturn:
    """Entry point of the process.  ``mode``: ``fork``, ``exec``, or ``worker`` after :meth:`_exec_worker`."""
    process_setup.set_up_process()
    die_with_parent()
    recorder.remove()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the application handles it
    set_title("template")
    process_setup.raise_oom_score(_OOM_SCORE)
    channel = Channel.from_fd(channel_fd)
    warm = False
    # A broken installation is an error of each load.
    with contextlib.suppress(Exception), boot.without_collections():
        import onnx_dl.workers.engines.ort  # noqa: F401  # with all that a worker needs: workers share the pages

        warm = mode == "fork" and resources.has_one_thread()
        if warm:
            _warm_up()
    forkable = mode == "fork" and resources.has_one_thread()
    if mode == "fork" and not forkable and frozen.is_frozen():
        print(_CALLED_LATE, file=sys.stderr, flush=True)
    share_heap()
    template = Template(channel, fork=forkable, warm=warm)
    if mode == _WORKER and (received := channel.receive()) is not None:
        data, fds = received
        template.become_worker(on_template(data), fds)
    template.serve()
