"""Workers that wait to be forked, the template process that forks them (:mod:`onnx_dl.workers.template`), and
the standby worker (:mod:`onnx_dl.supervisor.processes.standby`).

A template that dies, is silent for too long or sends nonsense is replaced.  All workers are children of this
process, so they outlive it.  The supervisor never waits for a template.  Only one request is under way at a
time, so the socket always has room for it, and the time for an answer is limited.
"""

from __future__ import annotations

import collections
import contextlib
import os
import signal
from collections.abc import Callable, Container, Iterable
from typing import Final

from onnx_dl.protocol import template as m
from onnx_dl.supervisor.boundary import boundary
from onnx_dl.supervisor.processes.first_template import ForkedTemplate
from onnx_dl.supervisor.processes.standby import StandbyPlace
from onnx_dl.supervisor.processes.template_process import TemplateProcess
from onnx_dl.supervisor.processes.worker_process import WorkerProcess

_HURRY: Final = 1.0
"""Seconds that a template has to report a worker that is to be killed."""


class SpawnQueue:
    """Owner of the template and of the standby worker.  The template is started at once, because its imports
    take longest."""

    def __init__(
        self,
        mode: str,
        timeout: float,
        now: Callable[[], float],
        on_spawned: Callable[[WorkerProcess, int], None],
        on_failed: Callable[[WorkerProcess, str], None],
        first: ForkedTemplate | None = None,
    ) -> None:
        """``mode``: ``fork`` or ``exec``; ``timeout``: seconds in which a template answers, and becomes
        ready; ``now``: the clock.

        ``on_spawned`` is called with the process id of a worker, ``on_failed`` with the reason for none.
        ``first``: the first template, if it has started already.

        Raises:
            OSError: the system has no process for a template, or no descriptors.
        """
        self._control = ""
        self.standby = StandbyPlace(now, is_possible=mode == "fork")
        self._mode = mode
        self._timeout = timeout
        self._now = now
        self._on_spawned = on_spawned
        self._on_failed = on_failed
        self._waiting: collections.deque[WorkerProcess] = collections.deque()
        self._template: TemplateProcess | None = TemplateProcess(mode, now(), timeout, first)
        """The template of the next worker; it is replaced when it is reaped."""

    def attach(
        self,
        control: str,
        make_standby: Callable[[], WorkerProcess | None],
        on_standby_gone: Callable[[int], None],
    ) -> None:
        """Sets the address of the control socket, for the workers; before the first :meth:`add`.

        The others are as for :meth:`.StandbyPlace.attach`.
        """
        self._control = control
        self.standby.attach(make_standby, on_standby_gone)

    def sources(self) -> list[int]:
        template = self._template
        return [template.channel.fileno()] if template and template.open else []

    def handle(self, ready: Container[object]) -> bool:
        """Handles what has arrived; true: the template has closed its socket, so it may have ended."""
        template = self._template
        if template is None or not template.open or template.channel.fileno() not in ready:
            return False
        self._receive(template)
        return not template.open

    def receive(self) -> None:
        """Handles what the template has sent, also if it was not polled."""
        if self._template is not None:
            self._receive(self._template)

    def next_deadline(self) -> float | None:
        template = None if self._template is None else self._template.deadline
        can_make = self._template is not None and self._template.is_free
        deadlines = [template, *self.standby.deadlines(can_make=can_make)]
        return min((at for at in deadlines if at is not None), default=None)

    def on_tick(self) -> None:
        """Makes a standby worker if it is time, and ends processes that have not answered in time.

        They are reaped later, but no one waits for that.
        """
        if self.standby.is_silent():
            self.end_standby()
        self._ask()
        template = self._template
        if template is None or template.deadline is None or self._now() < template.deadline:
            return
        self._receive(template)  # the answer may have come while this process did something else
        if template is not self._template or template.deadline is None:
            return
        doing = "answer" if template.was_ready else "become ready"
        template.end()
        template.given_up = True
        reason = f"the template process (pid {template.pid}) did not {doing} in time and was ended"
        self._fail_all(
            _waits_for(template, self._waiting), f"{reason} (ONNX_DL_START_TIMEOUT is {self._timeout:g})"
        )

    def add(self, worker: WorkerProcess) -> None:
        """Gives a worker its process: the standby worker's, if it may have that, or one of the template."""
        self.standby.load_begins(worker.worker_id)
        if not self.standby.offer(worker):
            self._waiting.append(worker)
            self._ask()

    def end_standby(self) -> None:
        """Ends the standby worker.  A worker that waited for it gets its process from the template."""
        if (worker := self.standby.end()) is not None:
            self._waiting.appendleft(worker)
            self._ask()

    def cancel(self, worker: WorkerProcess) -> bool:
        """Removes a worker that no template was asked for yet; false: a template was asked, and has little
        time left to answer."""
        if worker in self._waiting:
            self._waiting.remove(worker)
            return True
        if self.standby.waits(worker):
            self.standby.end()
            return True
        if self._template is not None and self._template.asked is worker:
            self._template.hurry(self._now() + _HURRY)
        return False

    def on_reaped(self, pid: int, status: int) -> bool:
        """Handles the end of a child process; false: it was neither the template nor the standby worker.

        The worker that the template was asked for fails.  If the template was never ready, all that wait
        fail: the next template would probably fail, too, and be restarted for ever.
        """
        template = self._template
        if self.standby.is_process(pid):
            self.end_standby()
            return True
        if template is None or template.pid != pid:
            return False
        self.end_standby()
        waiting = [] if template.given_up else _waits_for(template, self._waiting)
        template.close()
        self._template = None
        self._fail_all(waiting, f"the template process ended with wait status {status}; its stderr says why")
        self._ask()
        return True

    @property
    def has_spare(self) -> bool:
        """True if a template is ready, and neither it nor the standby worker has something to do."""
        is_free = self._template is not None and self._template.is_free
        return is_free and not self._waiting and not self.standby.is_awaited

    def end_spare(self) -> None:
        """Ends the template and the standby worker.  The next worker gets a new template.

        A template that was asked for a worker, or starts because of one, is left alone, and so is a standby
        worker that was asked to take a worker's place.
        """
        if self.has_spare and (template := self._template) is not None:
            self.standby.forgo()
            self.end_standby()
            template.given_up = True  # a worker that is added before it is reaped waits for the next one
            template.end()

    def close(self) -> None:
        pid = self.standby.pid()
        self.standby.end()
        if pid is not None:
            with contextlib.suppress(ChildProcessError):  # it was reaped before its process id was known
                os.waitpid(pid, 0)
        if self._template is not None:
            self._template.end()
            os.waitpid(self._template.pid, 0)
            self._template = None

    def _ask(self) -> None:
        """Asks a free template for the next worker."""
        if self._waiting and self._template is None:
            self._replace()
        template = self._template
        if template is None or not template.is_free:
            return
        if not self._waiting:
            if (process := self.standby.make()) is not None:
                try:
                    template.ask(process, self._control, self._now())
                except OSError:  # at the next load, the template tells what is wrong
                    self.standby.end()
            return
        worker = self._waiting.popleft()
        try:
            template.ask(worker, self._control, self._now())
        except BrokenPipeError:
            self._waiting.appendleft(worker)  # for the next template, when this one is reaped
            template.close()
        except OSError as error:
            self._on_failed(worker, str(error))
            self._ask()

    def _replace(self) -> None:
        """Starts the next template; if that fails, so do all workers that wait."""
        self._template = None
        try:
            self._template = TemplateProcess(self._mode, self._now(), self._timeout)
        except OSError as error:
            self._fail_all(list(self._waiting), f"no template process could be started ({error})")

    def _receive(self, template: TemplateProcess) -> None:
        """Handles all that the template has sent.  One that sends nonsense is ended, and reaped later; its
        workers are not concerned."""
        with boundary("the template", lambda error: template.end()):
            for message in template.received():
                self._handle_message(template, message)
            if not template.open and not template.became_worker:
                template.kill()  # it may have closed its end without ending

    def _handle_message(self, template: TemplateProcess, message: object) -> None:
        match message:
            case m.TemplateReady(forkable=forkable):
                template.was_ready, template.deadline = True, None
                if not forkable:
                    self._mode = "exec"
                    self.standby.is_possible = False
            case m.Spawned(pid=pid):
                self._spawned(template, pid)
            case m.SpawnFailed(reason=reason):
                if (worker := template.answered()) is not None:
                    self._fail_all([worker], reason)
        self._ask()

    def _spawned(self, template: TemplateProcess, pid: int) -> None:
        if (worker := template.answered()) is None:
            return
        if worker.kill_requested and worker.conditions.standby:  # it was ended meanwhile
            with contextlib.suppress(ChildProcessError):  # it is reaped, and the number may be another's
                os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
                os.kill(pid, signal.SIGKILL)
            return
        worker.on_spawned(pid)
        if pid == template.pid:  # the template became the worker
            template.became_worker = True
            template.close()
            self._replace()
        if not worker.conditions.standby:
            self._on_spawned(worker, pid)

    def _fail_all(self, workers: list[WorkerProcess], reason: str) -> None:
        for worker in workers:
            with contextlib.suppress(ValueError):
                self._waiting.remove(worker)
            if not worker.conditions.standby:
                self._on_failed(worker, reason)
            elif not worker.kill_requested:  # else it was ended before
                self.standby.end()


def _waits_for(template: TemplateProcess, waiting: Iterable[WorkerProcess]) -> list[WorkerProcess]:
    """Takes the workers that cannot start if this template ends: the one that it was asked for, and all that
    are ``waiting`` if it was never ready."""
    asked = template.answered()
    others = [] if template.was_ready else list(waiting)
    return others if asked is None else [asked, *others]
