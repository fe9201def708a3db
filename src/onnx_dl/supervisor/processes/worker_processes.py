"""Starts worker processes, hears their stderr, and learns of their end.

Covers the template process (:mod:`onnx_dl.workers.template`) and its replacement when it dies or does not
answer.  All workers are children of this process, so the end of a template is not theirs.  Which worker to
start or kill is not decided here.  Used by the supervisor's one thread only.
"""

from __future__ import annotations

import collections
import contextlib
import os
import signal
from collections.abc import Callable, Container, Mapping
from types import MappingProxyType
from typing import Final, Protocol

from onnx_dl.core.environment import Environment
from onnx_dl.protocol import template as m
from onnx_dl.supervisor.boundary import boundary
from onnx_dl.supervisor.processes.saver_process import SaverProcess
from onnx_dl.supervisor.processes.template_process import SINGLE_THREADED, TemplateProcess
from onnx_dl.supervisor.processes.worker_process import COST, Birth, WorkerProcess
from onnx_dl.system import descriptor_limits
from onnx_dl.transport.gauges import Reading

RESERVE: Final = 16
"""Descriptors that stay free, so that files can be read, and clients let in to be told why not."""
_HURRY: Final = 1.0
"""Seconds for a template to tell of a worker that is to end."""


class Witness(Protocol):
    """Who is told what becomes of processes, from within ``handle``, ``reap``, ``spawn`` and ``on_tick``."""

    def spawned(self, worker_id: int, pid: int) -> None: ...

    def spawn_failed(self, worker_id: int, reason: str) -> None: ...

    def exited(self, worker_id: int, status: int, stderr: str, reading: Reading) -> None: ...

    def wrote(self, process: WorkerProcess, text: bytes, *, last: bool = False) -> None: ...

    def saver_ended(self, status: int) -> None: ...


class Processes:
    """All worker processes.  The template is started at once: its imports take longest."""

    def __init__(self, mode: str, patience: float, now: Callable[[], float]) -> None:
        """``patience``: seconds in which a template answers, and becomes ready; ``now``: the clock.

        Raises:
            OSError: the system has no process for a template, or no descriptors.
        """
        self._mode = mode
        self._patience = patience
        self._now = now
        self._processes: dict[int, WorkerProcess] = {}
        self._pending: collections.deque[WorkerProcess] = collections.deque()
        self._saver: SaverProcess | None = None
        self._template: TemplateProcess | None = self._new_template()
        """The one that the next worker comes from; it is replaced when it is reaped."""

    def attach(self, control: str, witness: Witness) -> None:
        """Where workers find the supervisor, and who hears of them; before the first spawn."""
        self._control = control
        self._witness = witness

    def sources(self) -> list[int]:
        """Descriptors to poll, for :meth:`handle`."""
        fds = [process.stderr.fileno() for process in self._processes.values() if process.stderr.open]
        template = self._template
        return [*fds, template.channel.fileno()] if template and template.open else fds

    def next_deadline(self) -> float | None:
        """When :meth:`on_tick` has something to do; None: not before something happens."""
        return None if self._template is None else self._template.deadline

    def on_tick(self) -> None:
        """Time has passed: a template that owes an answer for too long is ended."""
        template = self._template
        if template is None or template.deadline is None or self._now() < template.deadline:
            return
        self._hear(template)  # the answer may have come while this process did something else
        if template is self._template and template.deadline is not None:
            self._end_template(template)

    def _end_template(self, template: TemplateProcess) -> None:
        """It is reaped when it is dead; who waits for it need not."""
        doing = "answer" if template.was_ready else "become ready"
        template.close()
        template.kill()
        template.given_up = True
        reason = f"the template process (pid {template.pid}) did not {doing} in time and was ended"
        self._fail_all(self._waiting_for(template), f"{reason} (ONNX_DL_START_TIMEOUT is {self._patience:g})")

    # --- workers ------------------------------------------------------------------------------------------

    def spawn(
        self,
        worker_id: int,
        identity: bytes,
        blobs: Mapping[str, int] = MappingProxyType({}),
        birth: Birth = Birth(),  # noqa: B008 - is immutable
    ) -> None:
        """Starts a worker process.

        Args:
            identity: the routing id of its control socket.
            blobs: descriptors of the memory that its model is loaded from, by name.
            birth: what else it is to begin with.

        Raises:
            DescriptorsExhausted: it needs more descriptors than this process may have.
            OSError: the system has none left, or no memory.
        """
        owed = sum(process.owed for process in self._processes.values())
        if descriptor_limits.free() - owed < COST + len(blobs) + RESERVE:
            raise descriptor_limits.exhausted("A worker process")
        self._processes[worker_id] = process = WorkerProcess(worker_id, identity, blobs, birth)
        self._pending.append(process)
        self._dispatch()

    def kill(self, worker_id: int) -> None:
        """SIGKILL, now.  One that is asked for gets it when it is there, which may not be long."""
        process = self._processes.get(worker_id)
        if process is None:
            return
        process.kill()
        if process in self._pending:  # nobody was asked for it
            self._pending.remove(process)
            self._exited(process, signal.SIGKILL)
        elif self._template is not None and self._template.asked is process:
            self._template.hurry(self._now() + _HURRY)

    def greeted(self, worker_id: int) -> None:
        """The worker has its connection."""
        if process := self._processes.get(worker_id):
            process.greeted = True

    def readings(self) -> dict[int, Reading]:
        """What the workers tell of themselves now."""
        return {worker_id: process.page.gauges.read() for worker_id, process in self._processes.items()}

    def handle(self, ready: Container[object]) -> None:
        """Takes in what came on these descriptors."""
        for process in self._processes.values():
            if process.stderr.open and process.stderr.fileno() in ready:
                self._pump(process)
        template = self._template
        if template and template.open and template.channel.fileno() in ready:
            self._hear(template)
            if not template.open:
                self.reap()  # SIGCHLD may have come before

    def drain(self, worker_id: int) -> None:
        """Takes in what a worker has written: before somebody is told of what it has done since."""
        process = self._processes.get(worker_id)
        if process is not None and process.stderr.open:
            self._pump(process)

    def _pump(self, process: WorkerProcess) -> None:
        with boundary(f"stderr of worker {process.worker_id}", process.mute):
            if text := process.stderr.pump():
                self._witness.wrote(process, text)

    def reap(self) -> None:
        """Collects every child that has ended; called after SIGCHLD."""
        while (pid := _ended_child()) is not None:
            if self._template is not None and self._by_pid(pid) is None:
                self._hear(self._template)  # it says that there is a worker before that can end
            status = os.waitpid(pid, 0)[1]
            if process := self._by_pid(pid):
                self._exited(process, status)
            elif self._template and pid == self._template.pid:
                self._template_died(self._template, status)
            elif self._saver is not None:
                self._saver.reaped(pid, status)
        if self._saver is not None and (status_of_saver := self._saver.ended()) is not None:
            self._saver = None
            self._witness.saver_ended(status_of_saver)

    # --- the saver ----------------------------------------------------------------------------------------

    def start_saver(self, order: str, blob: int | None, memory: int, environment: Environment) -> None:
        """Starts the process that saves a model, of which there is one at most.

        Raises:
            OSError: the system has no process for it, or no memory.
        """
        self._saver = SaverProcess(environment.over(os.environ | SINGLE_THREADED), order, blob, memory)

    def end_saver(self) -> None:
        if self._saver is not None:
            self._saver.kill()

    def close(self) -> None:
        """Ends the template and the saver.  Workers must have been reaped before."""
        if self._saver is not None:
            self._saver.kill()
            self._saver.bury()
        if self._template is not None:
            self._template.close()
            self._template.kill()
            os.waitpid(self._template.pid, 0)
            self._template = None

    # --- the template -------------------------------------------------------------------------------------

    def _new_template(self) -> TemplateProcess:
        return TemplateProcess(self._mode, self._now(), self._patience)

    def _dispatch(self) -> None:
        """Asks for the next worker, if there is a template that is free."""
        if self._pending and self._template is None:
            self._replace()
        template = self._template
        if not self._pending or template is None or not template.is_free:
            return
        process = self._pending.popleft()
        try:
            template.ask(process, self._control, self._now())
        except BrokenPipeError:
            self._pending.appendleft(process)  # for the next one, when this one is reaped
            template.close()
        except OSError as error:
            self._failed(process, str(error))
            self._dispatch()

    def _replace(self) -> None:
        """Starts the next template; where none can be, those fail that wait for it."""
        self._template = None
        try:
            self._template = self._new_template()
        except OSError as error:
            self._fail_all(list(self._pending), f"no template process could be started ({error})")

    def _hear(self, template: TemplateProcess) -> None:
        """All that the template has said.  One that talks nonsense is ended, and reaped later; its workers
        have done nothing."""
        with boundary("the template", lambda error: self._distrust(template)):
            for message in template.heard():
                self._obey(template, message)
            if not template.open and not self._is_worker(template):
                template.kill()  # it may have closed its end without ending

    def _distrust(self, template: TemplateProcess) -> None:
        template.close()
        template.kill()

    def _is_worker(self, template: TemplateProcess) -> bool:
        return self._by_pid(template.pid) is not None

    def _obey(self, template: TemplateProcess, message: object) -> None:
        match message:
            case m.TemplateReady(forkable=forkable):
                template.became_ready()
                if not forkable:
                    self._mode = "exec"
            case m.Spawned(pid=pid):
                self._spawned(template, pid)
            case m.SpawnFailed(reason=reason):
                if (process := template.answered()) is not None:
                    self._failed(process, reason)
        self._dispatch()

    def _spawned(self, template: TemplateProcess, pid: int) -> None:
        if (process := template.answered()) is None:
            return
        process.born(pid)
        if pid == template.pid:  # it became the worker; the next one needs another
            template.close()
            self._replace()
        self._witness.spawned(process.worker_id, pid)

    def _template_died(self, template: TemplateProcess, status: int) -> None:
        """What it was asked for fails.  One that was never ready would be started again for ever, so what
        waits for it fails, too."""
        waiting = [] if template.given_up else self._waiting_for(template)
        template.close()
        self._template = None
        self._fail_all(waiting, f"the template process ended with wait status {status}; its stderr says why")
        self._dispatch()

    def _waiting_for(self, template: TemplateProcess) -> list[WorkerProcess]:
        asked = template.answered()
        waiting = [] if template.was_ready else list(self._pending)
        return waiting if asked is None else [asked, *waiting]

    # --- ends ---------------------------------------------------------------------------------------------

    def _by_pid(self, pid: int) -> WorkerProcess | None:
        return next((process for process in self._processes.values() if process.pid == pid), None)

    def _fail_all(self, processes: list[WorkerProcess], reason: str) -> None:
        for process in processes:
            self._failed(process, reason)

    def _failed(self, process: WorkerProcess, reason: str) -> None:
        with contextlib.suppress(ValueError):
            self._pending.remove(process)
        del self._processes[process.worker_id]
        process.buried()
        self._witness.spawn_failed(process.worker_id, reason)

    def _exited(self, process: WorkerProcess, status: int) -> None:
        del self._processes[process.worker_id]
        reading = process.page.gauges.read()
        stderr, rest = process.buried()
        self._witness.wrote(process, rest, last=True)
        self._witness.exited(process.worker_id, status, stderr, reading)


def _ended_child() -> int | None:
    """A child that is dead and not reaped; the first one of them."""
    try:
        found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return None
    return None if found is None else found.si_pid
