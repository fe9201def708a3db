"""Entry point of the supervisor process.

The process that starts it writes one JSON object to its stdin (:class:`Orders`) and waits for its report on a
pipe: ``!``, its sockets are bound; ``-``, another process is already the host of this name; else, an error.
The two may run different versions of onnx-dl, if it was upgraded while the starter ran.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
import time
import traceback
from typing import TYPE_CHECKING, Final

import msgspec

from onnx_dl import linux_only
from onnx_dl.core.settings import Settings
from onnx_dl.errors import OnnxDLError
from onnx_dl.protocol.codec import PROTOCOL_VERSION
from onnx_dl.supervisor.processes.first_template import ForkedTemplate, fork_template
from onnx_dl.system import boot, frozen, process_setup
from onnx_dl.system.process_title import set_title
from onnx_dl.tensors import segment

if TYPE_CHECKING:
    from onnx_dl.transport.rendezvous import HostEntry

_PR_SET_CHILD_SUBREAPER: Final = 36
_REPLACED: Final = (
    "onnx-dl was replaced on disk while this application ran: the application uses {theirs}, "
    "the installed one uses version {ours}. Restart the application."
)
_LAST_WORDS: Final = 0.5
"""Seconds to write the rest of stdout and stderr at the end."""


class Starter(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of the orders that every version of onnx-dl sends."""

    protocol: int | None = None
    """Protocol version of the starter; None: one before 5."""
    ready_fd: int | None = None


class Orders(Starter, frozen=True, kw_only=True):
    """Settings of a supervisor for its start.  They are not in ``argv`` because of ``secret``."""

    address: str
    secret: str
    settings: Settings
    host: str | None = None
    """Name of a shared host; None: a private supervisor."""
    explicit: list[str] = []
    """Names of settings that were given as arguments, which the host's file does not change."""
    application: tuple[int, int | None] | None = None
    """Process id and start time of the application: its private supervisor ends with it."""
    foreground: bool = False
    """True if it was started by hand: it stays without clients, and prints events on stdout."""


def main(at_home: bool = False, template: str = "", *_: object) -> None:
    """Runs a supervisor until its last client is gone.

    Args:
        at_home: this is a shared host that is in the background already.
        template: mode of the template to start at once, see :func:`.fork_template`.
        _: of a later version, whose application is told to restart.
    """
    process_setup.set_up_process()
    first = fork_template(template)  # the imports below take place beside the template's
    data = sys.stdin.buffer.read()
    if not data:  # the application ended before it sent its orders
        return
    starter = msgspec.json.decode(data, type=Starter)
    if starter.protocol != PROTOCOL_VERSION:  # the other fields may have another meaning
        from onnx_dl.transport import running_hosts

        theirs = running_hosts.protocol_text(starter.protocol)
        _report(starter, _REPLACED.format(ours=PROTOCOL_VERSION, theirs=theirs))
        sys.exit(1)
    orders = msgspec.json.decode(data, type=Orders)
    if orders.host is not None and not at_home:
        _go_into_background(data)
    null = process_setup.open_null()  # in place of the application's stdin, whose directory is left, too
    os.dup2(null, 0)
    os.close(null)
    os.chdir("/")
    try:
        place = None if orders.host is None else _entry(orders.host)
        if place is None or place.claim():
            serve(orders, place, first)
        else:
            _report(orders, "-")
    except (OnnxDLError, OSError) as error:
        _report(orders, str(error))
        sys.exit(1)


def serve(orders: Orders, place: HostEntry | None, first: ForkedTemplate | None = None) -> None:
    """Serves until the last client is gone.

    ``place``: of a shared host; this process has claimed it.  ``first``: the first template, if it runs.

    Raises:
        OnnxDLError: the settings ask for something that is not available.
    """
    owner = orders.application if orders.host is None else _owner()
    try:
        # Its lifeline is EOF when the application is gone, too, but only after it was connected.
        application = None if owner is None else process_setup.watch_process(*owner)
    except ProcessLookupError:  # it is gone already
        return
    _take_in_orphans()
    if place is not None and not orders.foreground:
        os.ftruncate(2, 0)  # the log of the last host of this name
    settings = orders.settings
    log = place.log if place is not None and not orders.foreground else None
    with boot.without_collections():
        from onnx_dl.supervisor.processes.worker_processes import WorkerProcesses

    processes = WorkerProcesses(settings.start, settings.start_timeout, time.monotonic, log, first)
    # Imported while the template imports in its own process.
    with boot.without_collections():
        from onnx_dl.supervisor.lifetime import HostRole
        from onnx_dl.supervisor.loop import Supervisor
        from onnx_dl.supervisor.outlet import Outlet, Relay

    stdout, stderr = Outlet(1), Relay(2)
    role = HostRole(place, orders.foreground, orders.explicit, application)
    supervisor = Supervisor(processes, orders.address, orders.secret, settings, role, stderr)
    if place is not None:
        place.publish(orders.address, orders.secret, managed=orders.foreground)
    _report(orders, "!")
    if not orders.foreground:  # in the foreground, its command line says it
        # After the report: the library imports logging, for which nobody should wait.
        set_title("supervisor" if orders.host is None else f"supervisor of {orders.host}")
    sys.stdout, sys.stderr = stdout, stderr  # these never block
    try:
        if orders.foreground:
            print(f"host {orders.host!r} runs, pid {os.getpid()}; onnx_dl.connect({orders.host!r}) finds it")
        supervisor.run()
    except BaseException:
        traceback.print_exc()
        raise SystemExit(1) from None
    finally:
        for stream in (stdout, stderr):
            stream.finish(_LAST_WORDS)


def _owner() -> tuple[int, int | None] | None:
    """Process id and start time of the program that a shared host ends with, even if the host holds models;
    None: it ends when nobody uses it."""
    pid, _, started = os.environ.pop("ONNX_DL_OWNER", "").partition(":")
    return (int(pid), int(started)) if pid.isdecimal() and started.isdecimal() else None


def _entry(host: str) -> HostEntry:
    from onnx_dl.transport.rendezvous import HostEntry

    return HostEntry(host)


def _report(starter: Starter, text: str) -> None:
    if starter.ready_fd is not None:
        with contextlib.suppress(BrokenPipeError):  # the starter is gone; other clients may come
            os.write(starter.ready_fd, text.encode()[: select.PIPE_BUF])
        os.close(starter.ready_fd)


def _go_into_background(orders: bytes) -> None:
    """Forks a shared host away from its starter, which then need not wait for its end.

    A program in one file is unpacked anew: the folder that this process runs from is removed with the
    application.  The unpacking process waits for the end of the host, to remove the new folder, so it must be
    in the background, too.
    """
    if os.fork():
        os._exit(0)
    if frozen.unpacks_itself():
        os.chdir("/")
        os.dup2(segment.freeze(orders), 0)
        os.execve(*boot.launch("supervisor", True, own_folder=True))


def _take_in_orphans() -> None:
    """Makes orphaned workers children of this process, so that it reaps them if the template dies."""
    linux_only.libc().prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
