"""Link from this application to one supervisor: starts or finds it, connects, and ends it."""

from __future__ import annotations

import contextlib
import functools
import subprocess
import sys
from collections.abc import Sequence
from typing import Final

from onnx_dl.client import launcher
from onnx_dl.client.connection import Connection, ConnectionListener
from onnx_dl.client.event_dispatch import EventBus, EventDispatcher
from onnx_dl.client.worker_output import WorkerOutput
from onnx_dl.concurrency import waits
from onnx_dl.concurrency.background import Background
from onnx_dl.concurrency.deadline import Deadline, DeadlinePassed
from onnx_dl.concurrency.forking import Guard
from onnx_dl.core.events import ModelEvent
from onnx_dl.core.settings import Settings
from onnx_dl.errors import SupervisorDied, SupervisorError, SupervisorStartError
from onnx_dl.protocol import control as m
from onnx_dl.system import installation, process_setup
from onnx_dl.system.resources import check_platform
from onnx_dl.transport.rendezvous import HostEntry

FAREWELL: Final = 3.0
"""Seconds that the supervisor has to end all workers and itself when the application closes it."""
_CLOSED: Final = "The host was closed while it started."
_exiting = False
"""True when the interpreter exits: no supervisor is started any more."""


class SupervisorLink:
    """Connection to a supervisor, with its process if it is private, and the thread that gives out events."""

    def __init__(
        self,
        settings: Settings,
        explicit: Sequence[str],
        name: str | None,
        bus: EventBus,
        listener: ConnectionListener,
    ) -> None:
        """``explicit``: settings that a host's file does not change; ``name``: of a shared host, None: the
        supervisor is private."""
        self.settings = settings
        self.name = name
        self.starts = True
        """True if a shared host that does not run is started."""
        self._explicit = explicit
        self._bus = bus
        self._listener = listener
        self._lock = Guard()  # brief: guards the attributes below
        self._start: _Start | None = None
        self.connection: Connection | None = None
        """The last connection, which may have ended."""
        self._process: subprocess.Popen[bytes] | None = None
        self._events = EventDispatcher(bus)

    def disown(self) -> None:
        """Forgets the process in a forked child: its parent reaps the process."""
        if self._process is not None:
            self._process.returncode = 0  # subprocess must not warn of it

    def connect(self, deadline: Deadline | None = None, *, start: bool = True) -> Connection:
        """The live connection, to a new supervisor if there is none.  One thread starts it for all.

        ``start``: whether a shared host may be started.

        Raises:
            DeadlinePassed: the deadline did; the start goes on.
            PlatformError: onnx-dl cannot run on this system.
            SupervisorError: the supervisor did not come up, or there is none and it may not be started.
        """
        may_start = start and self.starts
        while True:
            if (connection := self._alive) is not None:
                return connection
            if sys.is_finalizing() or _exiting:
                raise SupervisorError("The interpreter is shutting down; no model can be loaded any more.")
            check_platform()
            with self._lock.alone():
                if (connection := self._alive) is not None:
                    return connection
                if self._start is None or self._start.done:
                    self._start = _Start(self, may_start)
                present = self._start
            try:
                return present.wait(deadline, "the host to start")
            except SupervisorError:
                if present.may_start or not may_start:
                    raise
                # Another thread only looked for a host that runs.

    @property
    def _alive(self) -> Connection | None:
        connection = self.connection
        return connection if connection is not None and connection.usable else None

    def bring_up(self, this: _Start, deadline: Deadline) -> Connection:
        """Connects to a new supervisor.  Runs in the thread of :class:`_Start`."""
        try:
            deadline.check("the host to start")
            process_setup.fill_standard_streams()
            with self._lock:
                process, self._process = self._process, None
            _bury(self.connection, process, self._events)
            events = EventDispatcher(self._bus)
            events.start()  # first: where no thread can be had, nothing is to be undone
            try:
                return self._bring_up(this, events, deadline)
            except BaseException:
                events.end()
                raise
        except (DeadlinePassed, SupervisorError):
            if deadline.passed:  # close() ended it
                raise SupervisorError(_CLOSED) from None
            raise

    def _bring_up(self, this: _Start, events: EventDispatcher, deadline: Deadline) -> Connection:
        process: subprocess.Popen[bytes] | None = None
        link = functools.partial(self._link, events)
        if self.name is not None:
            may_start, explicit = this.may_start, self._explicit
            connection = launcher.reach(
                self.name, self.settings, link, deadline, may_start=may_start, explicit=explicit
            )
        else:
            process, address, secret = launcher.start(self.settings, deadline, explicit=self._explicit)
            try:
                connection = link(address, secret, deadline)
            except BaseException:
                _end(process)
                raise
        with self._lock:
            if wanted := self._start is this:
                self.connection, self._process, self._events = connection, process, events
        if not wanted:  # closed meanwhile
            connection.close()
            _end(process)
            raise SupervisorError(_CLOSED)
        return connection

    def _link(self, events: EventDispatcher, address: str, secret: str, deadline: Deadline) -> Connection:
        def on_event(event: ModelEvent) -> None:
            self._listener.on_event(event)
            events.put(event)

        connection = Connection(
            address,
            secret,
            self.settings.start_timeout,
            self._listener._replace(on_event=on_event),
            WorkerOutput(log=self.settings.worker_stderr == "log"),
            deadline,
        )
        if connection.build and connection.build != (ours := installation.build()):
            connection.close()
            raise SupervisorStartError(
                f"The host {self.name!r} runs {connection.build}, this application has {ours}: results could "
                "differ. Use another host: give connect() or ONNX_DL_HOST another name."
            )
        return connection

    def present(self) -> Connection | None:
        """The live connection; after a restart of a shared host, to the next one.  Starts nothing.

        A private supervisor that has died is returned, too: requests to it raise SupervisorDied.
        """
        connection = self.connection
        if connection is None or connection.usable:
            return connection
        if self.name is None or HostEntry(self.name).holder() is None:
            return None
        with contextlib.suppress(SupervisorError):
            return self.connect(start=False)
        return None

    def close(self) -> None:
        """Ends a private supervisor, or leaves a shared one.  Returns when events were given out."""
        if (present := self.connection) is not None:
            present.check_thread()
        with self._lock.alone():
            # In one step: a use from now on, in a signal handler in this thread for one, starts a new
            # supervisor, which must not be ended here.
            connection, process, events = self.connection, self._process, self._events
            self.connection = self._process = start = None
            if self.name is None or (self._start is not None and self._start.done):
                # Other threads may look for the next shared host: that goes on.
                start, self._start = self._start, None
        if start is not None:
            start.end(FAREWELL)
        if connection is not None:
            if self.name is None:
                # A supervisor that is dead, or too busy to answer, is ended by _bury().
                with contextlib.suppress(SupervisorDied, TimeoutError):
                    connection.ask(lambda ticket: m.Shutdown(ticket=ticket), patience=FAREWELL)
            connection.close()
        _bury(connection, process, events)
        events.join(FAREWELL)

    def ask_to_end(self) -> int | None:
        """Ends the host, also for other applications.  Returns its process id; None: it does not run."""
        if (connection := self.present()) is None:
            return None
        with contextlib.suppress(SupervisorDied):
            patience = self.settings.exit_grace + FAREWELL
            connection.ask(lambda ticket: m.Shutdown(ticket=ticket), patience=patience)
        return connection.supervisor_pid


class _Start(Background[Connection]):
    """One attempt to start or find a supervisor."""

    def __init__(self, link: SupervisorLink, may_start: bool) -> None:
        self.may_start = may_start
        super().__init__(lambda deadline: link.bring_up(self, deadline), "onnx-dl-start")


def refuse_starts() -> None:
    """Has every later start raise: the interpreter exits."""
    global _exiting
    _exiting = True


def _bury(
    connection: Connection | None, process: subprocess.Popen[bytes] | None, events: EventDispatcher
) -> None:
    """Reaps a supervisor that ends or is dead, and lets its listeners finish."""
    if process is not None and connection is not None and connection.lost:
        process.kill()  # it does not see the end of its lifeline, on which an abandoned thread waits
    events.end()
    _end(process)


def _end(process: subprocess.Popen[bytes] | None) -> None:
    """Waits for a supervisor that ends, and kills one that does not."""
    if process is None:
        return
    if not waits.ended(process, FAREWELL):
        process.kill()  # its workers die with it: PR_SET_PDEATHSIG
        process.wait()
