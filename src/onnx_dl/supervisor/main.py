"""Entry point of the supervisor process.

Who starts it writes one JSON object to its stdin (:class:`Orders`) and waits for what it says on a pipe:
``!``, its sockets are bound; ``-``, another process is the host of this name already; else, why it failed.
The starter and this process may be of two versions of onnx-dl, if it was upgraded while the starter ran.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import sys
import time
import traceback
from typing import Final

import msgspec

from onnx_dl.core.settings import Settings
from onnx_dl.errors import OnnxDLError
from onnx_dl.protocol.codec import PROTOCOL_VERSION
from onnx_dl.supervisor.outlet import Outlet
from onnx_dl.supervisor.processes.worker_processes import Processes
from onnx_dl.supervisor.relay import Relay
from onnx_dl.system import boot, frozen, process_setup
from onnx_dl.tensors import segment
from onnx_dl.transport import running_hosts
from onnx_dl.transport.rendezvous import Place

_PR_SET_CHILD_SUBREAPER: Final = 36
_REPLACED: Final = (
    "onnx-dl was replaced on disk while this application ran: the application speaks {theirs}, "
    "what is installed now speaks version {ours}. Restart the application."
)
_LAST_WORDS: Final = 0.5
"""Seconds for what is to be read by people, at the end."""


class Starter(msgspec.Struct, frozen=True, kw_only=True):
    """What an application of any version of onnx-dl says of itself in its orders."""

    protocol: int | None = None
    """The version that it speaks; None: one before 5."""
    ready_fd: int | None = None


class Orders(Starter, frozen=True, kw_only=True):
    """What the supervisor is told at its start.  ``secret`` is why this does not travel in ``argv``."""

    address: str
    secret: str
    settings: Settings
    host: str | None = None
    """The name under which other applications find it."""
    firm: list[str] = []
    """Names of settings that were given as arguments, which the host's file does not change."""
    application: tuple[int, int | None] | None = None
    """The process that starts it, and when that began: a supervisor of its own ends with it."""
    foreground: bool = False
    """It was started by hand: it stays without clients, and says on stdout what happens."""


def main(at_home: bool = False) -> None:
    """Runs a supervisor until its last client is gone.

    ``at_home``: this is a shared host's process that needs not go into the background any more.
    """
    process_setup.make_own()
    said = sys.stdin.buffer.read()
    if not said:  # the application ended before it could say what it wants
        return
    starter = msgspec.json.decode(said, type=Starter)
    if starter.protocol != PROTOCOL_VERSION:  # the rest of its orders may mean anything
        _tell(
            starter, _REPLACED.format(ours=PROTOCOL_VERSION, theirs=running_hosts.version(starter.protocol))
        )
        sys.exit(1)
    orders = msgspec.json.decode(said, type=Orders)
    if orders.host is not None and not at_home:
        _go_into_background(said)
    _detach()
    try:
        place = None if orders.host is None else Place(orders.host)
        if place is None or place.claim():
            serve(orders, place)
        else:
            _tell(orders, "-")
    except (OnnxDLError, OSError) as error:
        _tell(orders, str(error))
        sys.exit(1)


def serve(orders: Orders, place: Place | None) -> None:
    """Serves until there is nobody left to serve.

    ``place``: of a shared host; this process has claimed it.

    Raises:
        OnnxDLError: what the settings ask for cannot be had.
    """
    try:
        application = _application(orders)
    except ProcessLookupError:
        return
    _take_in_orphans()
    if place is not None and not orders.foreground:
        os.ftruncate(2, 0)  # what the last one of this name wrote
    settings = orders.settings
    processes = Processes(settings.start, settings.start_timeout, time.monotonic)
    # Imported while the template imports in its own process.
    from onnx_dl.supervisor.loop import Supervisor

    stdout, stderr = Outlet(1), Relay(Outlet(2))
    supervisor = Supervisor(
        processes,
        orders.address,
        orders.secret,
        settings,
        place=place,
        foreground=orders.foreground,
        firm=orders.firm,
        application=application,
        stderr=stderr,
    )
    if place is not None:
        place.publish(orders.address, orders.secret, kept=orders.foreground)
    _tell(orders, "!")
    sys.stdout, sys.stderr = stdout, stderr  # a host serves, whatever becomes of its output
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


def _application(orders: Orders) -> int | None:
    """A descriptor that is readable when the application is gone that has this supervisor for itself.

    Its lifeline says so, too, but not before it is connected.

    Raises:
        ProcessLookupError: it is gone already.
    """
    if orders.host is not None or orders.application is None:
        return None
    return process_setup.watch(*orders.application)


def _tell(starter: Starter, text: str) -> None:
    if starter.ready_fd is not None:
        with contextlib.suppress(BrokenPipeError):  # it has gone; others may come
            os.write(starter.ready_fd, text.encode()[: select.PIPE_BUF])
        os.close(starter.ready_fd)


def _go_into_background(orders: bytes) -> None:
    """Whoever started a shared host need not wait for its end.

    A program in one file is unpacked anew: the folder that this process runs from goes with the application.
    What unpacks it waits for the end of the host, to remove the folder, so it must be in the background, too.
    """
    if os.fork():
        os._exit(0)
    if frozen.unpacks_itself():
        os.chdir("/")
        os.dup2(segment.freeze(orders), 0)
        os.execve(*boot.launch("supervisor", True, own_folder=True))


def _detach() -> None:
    """Lets go of the application's stdin and directory."""
    null = process_setup.nothing()
    os.dup2(null, 0)
    os.close(null)
    os.chdir("/")


def _take_in_orphans() -> None:
    """If the template dies, its workers become children of this process, so that they are reaped."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
