"""Starts worker processes, hears their stderr, and learns of their end.

Covers the template process (:mod:`onnx_dl.workers.template`), its replacement when it dies, and the
descriptors that a worker is born with.  Which worker to start or kill is not decided here.  Used by the
supervisor's one thread only.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import secrets
import signal
import sys
from collections.abc import Container, Mapping
from types import MappingProxyType
from typing import Final, Protocol

from onnx_dl.supervisor.saverprocess import SaverProcess
from onnx_dl.transport import messages as m
from onnx_dl.transport.gauges import Page, Reading
from onnx_dl.transport.sockets import MOST_DESCRIPTORS, Channel

MOST_BLOBS: Final = MOST_DESCRIPTORS - 3
"""That a worker is born with, beside what every one has."""
_TAIL: Final = 40
"""Lines of a worker's stderr that are kept for the error that tells of its death."""

_BOOT: Final = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from onnx_dl.workers.template import main; main(int(sys.argv[2]), sys.argv[3])"
)


# Read when numpy and onnxruntime are imported, so it must be there before.  OpenBLAS would start a pool of
# threads, and onnxruntime 1.29 and later a telemetry thread (with an SQLite file that all forks would share);
# a process with threads cannot fork safely.
_SINGLE_THREADED: Final = {"OPENBLAS_NUM_THREADS": "1", "ORT_DISABLE_TELEMETRY": "1"}


class StderrTail:
    """One worker's stderr: passed on to ours as it comes, and its last lines kept."""

    def __init__(self) -> None:
        self._read_end, self.write_end = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._read_end, False)
        self._lines: collections.deque[bytes] = collections.deque(maxlen=_TAIL)
        self._partial = b""
        self.open = True

    def fileno(self) -> int:
        return self._read_end

    def pump(self) -> None:
        """Takes in what is there."""
        while self.open:
            try:
                data = os.read(self._read_end, 1 << 16)
            except BlockingIOError:
                return
            if not data:
                self.open = False
                return
            with contextlib.suppress(OSError):  # the application closed its stderr: nobody wants to read it
                os.write(2, data)
            *lines, self._partial = (self._partial + data).split(b"\n")
            self._lines.extend(lines)

    def text(self) -> str:
        lines = [*self._lines, *([self._partial] if self._partial else [])]
        return b"\n".join(lines).decode(errors="replace")

    def close(self) -> None:
        self.open = False
        os.close(self._read_end)


class _Template:
    """The supervisor's end of one template process."""

    def __init__(self, sys_path: list[str], mode: str) -> None:
        self.channel, theirs = Channel.pair()
        self.ready = False
        self.open = True
        fd = theirs.fileno()
        os.set_inheritable(fd, True)
        argv = [sys.executable, "-c", _BOOT, json.dumps(sys_path), str(fd), mode]
        self.pid = os.posix_spawn(sys.executable, argv, os.environ | _SINGLE_THREADED)
        theirs.close()


class _Process:
    """One worker process, from the request for it until it is reaped."""

    def __init__(self, worker_id: int, blobs: Mapping[str, int], *, pristine: bool = False) -> None:
        self.worker_id = worker_id
        self._pristine = pristine
        self.identity = secrets.token_bytes(16)
        # Copies: the client may drop its own while this waits for a template.
        self._blobs = {name: os.dup(fd) for name, fd in blobs.items()}
        self.stderr = StderrTail()
        self.page = Page()
        self.template: _Template | None = None
        self.pid: int | None = None
        self.condemned = False
        self._pidfd: int | None = None
        self._dropped = False
        self._lifeline, self._lifeline_worker = Channel.pair()

    def request(self, template: _Template, control: str) -> None:
        """Asks the template for the process and hands over its ends of the descriptors."""
        self.template = template
        message = m.Spawn(
            worker_id=self.worker_id,
            identity=self.identity,
            control=control,
            blobs=list(self._blobs),
            pristine=self._pristine,
        )
        fds = (self._lifeline_worker.fileno(), self.stderr.write_end, self.page.fd)
        template.channel.send(m.encode(message), (*fds, *self._blobs.values()))
        self._drop_ends()

    def born(self, pid: int) -> None:
        self.pid = pid
        with contextlib.suppress(ProcessLookupError):  # already dead and reaped; that message is on its way
            self._pidfd = os.pidfd_open(pid)
        if self.condemned:
            self.kill()

    def kill(self) -> None:
        """SIGKILL, also if the process has no pid yet.  By pidfd: a pid may mean another process by now."""
        self.condemned = True
        if self._pidfd is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def _drop_ends(self) -> None:
        """Closes what is the worker's: our copies would hide its death from the other ends."""
        while self._blobs:
            os.close(self._blobs.popitem()[1])
        if not self._dropped:
            os.close(self.stderr.write_end)
            self._lifeline_worker.close()
        self._dropped = True

    def buried(self) -> str:
        """It is reaped; its last lines on stderr."""
        self._drop_ends()
        self.stderr.pump()
        self.stderr.close()
        self._lifeline.close()
        self.page.close()
        if self._pidfd is not None:
            os.close(self._pidfd)
        return self.stderr.text()


class Witness(Protocol):
    """Who is told what becomes of processes, from within ``handle`` and ``reap``."""

    def spawned(self, worker_id: int, pid: int) -> None: ...

    def spawn_failed(self, worker_id: int, reason: str) -> None: ...

    def exited(self, worker_id: int, status: int, stderr: str, reading: Reading) -> None: ...

    def saver_ended(self, status: int) -> None: ...


class Processes:
    """All worker processes.  The template is started at once: its imports take longest."""

    def __init__(self, sys_path: list[str], mode: str) -> None:
        self._sys_path = sys_path
        self._mode = mode
        self._processes: dict[int, _Process] = {}
        self._pending: collections.deque[_Process] = collections.deque()
        self._template: _Template | None = _Template(sys_path, mode)
        """The one that the next worker comes from."""
        self._saver: SaverProcess | None = None

    def attach(self, control: str, witness: Witness) -> None:
        """Where workers find the supervisor, and who hears of them; before the first spawn."""
        self._control = control
        self._witness = witness

    def sources(self) -> list[int]:
        """Descriptors to poll, for :meth:`handle`."""
        fds = [process.stderr.fileno() for process in self._processes.values() if process.stderr.open]
        template = self._template
        return [*fds, template.channel.fileno()] if template and template.open else fds

    def spawn(
        self,
        worker_id: int,
        blobs: Mapping[str, int] = MappingProxyType({}),
        *,
        pristine: bool = False,
    ) -> bytes:
        """Starts a worker process and returns the routing id of its control socket.

        Args:
            blobs: descriptors of the memory that its model is loaded from, by name.
            pristine: it is to have made no session of the engine before.
        """
        process = self._processes[worker_id] = _Process(worker_id, blobs, pristine=pristine)
        self._pending.append(process)
        self._dispatch()
        return process.identity

    def kill(self, worker_id: int) -> None:
        if process := self._processes.get(worker_id):
            process.kill()

    def readings(self) -> dict[int, Reading]:
        """What the workers tell of themselves now."""
        return {worker_id: process.page.gauges.read() for worker_id, process in self._processes.items()}

    def handle(self, ready: Container[int]) -> None:
        """Takes in what came on these descriptors."""
        for process in self._processes.values():
            if process.stderr.open and process.stderr.fileno() in ready:
                process.stderr.pump()
        template = self._template
        if template and template.open and template.channel.fileno() in ready:
            self._hear(template)

    def reap(self) -> None:
        """Collects every child that has ended; called after SIGCHLD."""
        self._collect()
        if self._saver is not None and (status := self._saver.ended()) is not None:
            self._saver = None
            self._witness.saver_ended(status)

    def _collect(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    return
                if self._template and pid == self._template.pid:
                    self._template_died(self._template, status)
                elif process := self._by_pid(pid):
                    self._exited(process, status)
                elif self._saver is not None:
                    self._saver.reaped(pid, status)

    def start_saver(self, order: str, blob: int | None, memory: int) -> None:
        """Starts the process that saves a model, of which there is one at most.

        Raises:
            OSError: the system has no process for it, or no memory.
        """
        environment = os.environ | _SINGLE_THREADED
        self._saver = SaverProcess(self._sys_path, environment, order, blob, memory)

    def end_saver(self) -> None:
        if self._saver is not None:
            self._saver.kill()

    def close(self) -> None:
        """Ends the template and the saver.  Workers must have been reaped before."""
        if self._saver is not None:
            self._saver.kill()
            self._saver.bury()
        if self._template is not None:
            self._template.channel.close()
            os.kill(self._template.pid, signal.SIGKILL)
            os.waitpid(self._template.pid, 0)
            self._template = None

    def _by_pid(self, pid: int) -> _Process | None:
        return next((process for process in self._processes.values() if process.pid == pid), None)

    def _dispatch(self) -> None:
        """Requests what is pending, as far as there is a template that is ready."""
        while self._pending:
            if self._template is None:
                self._template = _Template(self._sys_path, self._mode)
            if not self._template.ready:
                return
            self._pending.popleft().request(self._template, self._control)
            # One that does not fork serves one request, and says so when it has become the worker.
            self._template.ready = self._mode == "fork"

    def _hear(self, template: _Template) -> None:
        """All that the template has said; at EOF it is dead or a worker, and must not be polled any more."""
        with contextlib.suppress(TimeoutError):
            while template.open:
                received = template.channel.receive(0)
                if received is None:
                    template.open = False
                    template.channel.close()
                else:
                    self._obey(template, m.on_template(received[0]))

    def _obey(self, template: _Template, message: object) -> None:
        match message:
            case m.TemplateReady(forkable=forkable):
                template.ready = True
                if not forkable:
                    self._mode = "exec"
                self._dispatch()
            case m.Spawned(worker_id=worker_id, pid=pid):
                self._processes[worker_id].born(pid)
                self._witness.spawned(worker_id, pid)
                if pid == template.pid:  # it became the worker; the next one needs another
                    self._template = _Template(self._sys_path, self._mode)
            case m.SpawnFailed(worker_id=worker_id, reason=reason):
                self._failed(self._processes[worker_id], reason)
            case m.Reaped(worker_id=worker_id, status=status):
                self._exited(self._processes[worker_id], status)

    def _template_died(self, template: _Template, status: int) -> None:
        """Its workers die with it; their parent is now this process, which reaps them.  See PR_SET_PDEATHSIG
        in :mod:`onnx_dl.workers.template` and PR_SET_CHILD_SUBREAPER in :mod:`onnx_dl.supervisor.main`."""
        self._hear(template)
        self._template = None
        reason = f"the template process ended with wait status {status}; its stderr says why"
        # A template that cannot start would be started again for ever, so what is pending fails now.
        pending, self._pending = list(self._pending), collections.deque()
        for process in list(self._processes.values()):
            if process in pending or (process.template is template and process.pid is None):
                self._failed(process, reason)
            elif process.template is template and not _is_child(process.pid):
                # The template reaped it and died before it could say so.
                self._exited(process, signal.SIGKILL)

    def _failed(self, process: _Process, reason: str) -> None:
        del self._processes[process.worker_id]
        process.buried()
        self._witness.spawn_failed(process.worker_id, reason)

    def _exited(self, process: _Process, status: int) -> None:
        del self._processes[process.worker_id]
        reading = process.page.gauges.read()
        self._witness.exited(process.worker_id, status, process.buried(), reading)


def _is_child(pid: int | None) -> bool:
    try:
        os.waitid(os.P_PID, pid or 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True
