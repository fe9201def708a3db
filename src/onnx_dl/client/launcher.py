"""Starts supervisor processes, and finds those that serve several applications.

A *private* supervisor is a child of the application that starts it and ends with it.  A *shared* one is found
by its name (:mod:`onnx_dl.transport.rendezvous`) if it has the same protocol version, or else started in the
background.  Of two that are started at the same moment, the one that gets the lock becomes the host.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

import msgspec

from onnx_dl.concurrency import forking, primitives, spawning, waits
from onnx_dl.concurrency.deadline import Deadline
from onnx_dl.core.settings import DEFAULT_HOST, Settings, settings
from onnx_dl.errors import SupervisorError, SupervisorStartError, SupervisorUnreachable
from onnx_dl.protocol.codec import PROTOCOL_VERSION
from onnx_dl.system import boot, frozen, process_setup
from onnx_dl.system.boot import Launch
from onnx_dl.transport import running_hosts
from onnx_dl.transport.rendezvous import HostEntry
from onnx_dl.transport.running_hosts import RunningHost
from onnx_dl.transport.sockets import fresh_address

_POLL_INTERVAL: Final = 0.01
_RESTART: Final = 10.0
"""Seconds that a service manager has to restart a managed host before a client starts another one."""
_EXIT_MARGIN: Final = 3.0
"""Seconds that a host of another version has to exit, after the time for running calls."""
_READY: Final = (b"!", b"-")
"""A supervisor's report that it listens, or that another process has become the host of this name."""

_C = TypeVar("_C")


def reach(
    name: str,
    settings: Settings,
    link: Callable[[str, str, Deadline], _C],
    deadline: Deadline,
    *,
    may_start: bool,
    explicit: Sequence[str] = (),
) -> _C:
    """Connects to the shared host of this name and returns the result of ``link``.

    A host of another protocol version is ignored: both may run at the same time.  ``link`` connects to an
    address with a secret; it raises SupervisorUnreachable if nobody answers by its deadline.

    Raises:
        SupervisorError: no host runs, and none may be started.
        SupervisorStartError: the host does not come up, or refuses the connection.
    """
    entry = HostEntry(name)
    answer = Deadline(settings.start_timeout, outer=deadline)
    limit = Deadline(settings.start_timeout + _RESTART, outer=deadline)
    restart = Deadline(_RESTART)
    while True:
        holder, record = entry.holder(), entry.record()
        if record is not None and record.pid == holder:
            with contextlib.suppress(SupervisorUnreachable):
                return link(record.address, record.secret, answer)
        # A managed host that has ended will soon be started again.
        awaited = holder is None and record is not None and record.managed and not restart.passed
        absent = holder is None and not awaited
        deadline.check(f"the host {name!r}")
        if absent and not may_start:
            raise SupervisorError(no_host(name, running_hosts.of_other_versions(entry)))
        if limit.passed or (holder is not None and answer.passed):
            raise SupervisorStartError(
                f"The host {name!r} (pid {holder}) does not answer, or ends as soon as it is started; "
                f"its log is {entry.log}. If it runs in another container or network namespace, only "
                "applications there can reach it."
            )
        if absent:
            _start_shared(entry, settings, deadline, explicit)
            answer = Deadline(settings.start_timeout, outer=deadline)
        else:
            waits.pause(_POLL_INTERVAL)  # another process is about to listen or to exit


def await_end(name: str, pid: int, patience: float, protocol: int | None = PROTOCOL_VERSION) -> None:
    """Waits until this process is no longer the host of this name; the next host may run already.  Raises
    TimeoutError after ``patience`` seconds."""
    entry = HostEntry(name, protocol=protocol)
    deadline = time.monotonic() + patience
    while entry.holder() == pid:
        if time.monotonic() >= deadline:
            raise TimeoutError(f"The host {name!r} (pid {pid}) is still running after {patience:g} seconds.")
        waits.pause(_POLL_INTERVAL)


def terminate(host: RunningHost) -> None:
    """Ends a host of another version by SIGTERM, because it cannot be asked to end; waits for its exit.

    Raises:
        SupervisorError: the host has no process id here.
        TimeoutError: it is still running after the time for running calls and some seconds.
    """
    if not host.pid:
        raise SupervisorError(f"The host {host.name!r} runs in another container; end it from there.")
    entry = HostEntry(host.name, protocol=host.protocol)
    with contextlib.suppress(ProcessLookupError):
        fd = os.pidfd_open(host.pid)
        try:
            if entry.holder() == host.pid:  # else the number may belong to another process by now
                signal.pidfd_send_signal(fd, signal.SIGTERM)
        finally:
            primitives.close(fd)
    await_end(host.name, host.pid, settings().exit_grace + _EXIT_MARGIN, host.protocol)


def no_host(name: str, others: Sequence[RunningHost] = ()) -> str:
    """The message if no host of this name and version runs; ``others``: hosts of other versions."""
    option = "" if name == DEFAULT_HOST else f" --host {name}"
    of_this = (
        f" for this version of onnx-dl ({running_hosts.protocol_text(PROTOCOL_VERSION)})" if others else ""
    )
    listed = "".join(
        f" There is one of another version: {running_hosts.describe(other)}." for other in others
    )
    return (
        f"No shared host named {name!r} runs{of_this}.{listed} Start one with onnx-dl supervise{option}, or "
        f"load a model into it with onnx-dl load MODEL{option}, or run your program with ONNX_DL_HOST={name}"
        ". A program without ONNX_DL_HOST has a private host, which commands cannot see. --host NAME chooses "
        "another shared host."
    )


def _start_shared(entry: HostEntry, settings: Settings, deadline: Deadline, explicit: Sequence[str]) -> None:
    """Starts a host in the background; returns when it listens or another one does."""
    log = os.open(entry.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        # Not our stderr: a process that reads that to its end would wait for the end of the host.
        process, *_ = start(settings, deadline, host=entry.name, explicit=explicit, output=log)
    except SupervisorStartError as error:
        last = entry.log.read_text(errors="replace")[-2000:].rstrip()
        end = f"\nThe end of {entry.log}:\n{last}" if last else ""
        raise SupervisorStartError(f"The host {entry.name!r} did not start. {error}{end}") from error
    finally:
        primitives.close(log)
    waits.ended(process, settings.start_timeout)  # its child is the host, in the background


def start(
    settings: Settings,
    deadline: Deadline,
    *,
    host: str | None = None,
    explicit: Sequence[str] = (),
    output: int | None = None,
) -> tuple[subprocess.Popen[bytes], str, str]:
    """Starts a supervisor and waits until it listens, or another process has its name.  Returns the process,
    its address and its secret; raises SupervisorStartError.

    ``host``: its name, None for a private one; ``explicit``: settings that the host's file does not change;
    ``output``: descriptor for its stdout and stderr, None for this process's.
    """
    # A private supervisor forks its template before it has read its orders.
    launch = boot.launch("supervisor", False, settings.start if host is None else "", python=settings.python)
    address, secret = fresh_address("host"), secrets.token_hex(16)
    orders = {
        "address": address,
        "secret": secret,
        "settings": msgspec.to_builtins(settings),
        "protocol": PROTOCOL_VERSION,
        "host": host,
        "explicit": list(explicit),
        "application": (os.getpid(), process_setup.start_time(os.getpid())),
    }
    # A child that another thread forks meanwhile would keep our ends of the pipes: the supervisor would wait
    # for the end of its orders, or we for its failure, until that child exits.
    with forking.still():
        process, ready = _spawn(launch, orders, output)
    _await_ready(process, ready, Deadline(settings.start_timeout, outer=deadline))
    return process, address, secret


def _spawn(
    launch: Launch, orders: dict[str, object], output: int | None
) -> tuple[subprocess.Popen[bytes], int]:
    """A supervisor process that has received its orders, and the pipe on which it reports the result."""
    ready, ready_write = os.pipe()
    try:
        process = primitives.popen(
            launch.argv,
            env=launch.environment,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            pass_fds=[ready_write],
            # Ctrl-C in the terminal is for the application.  Not a session of its own: Linux schedules
            # sessions apart (autogroup), and a wake-up across them takes 40 µs instead of 10.
            process_group=0,
        )
    except OSError as error:
        primitives.close(ready)
        if spawning.is_shortage(error):
            raise spawning.exhausted("The supervisor process") from None
        raise SupervisorStartError(
            f"Cannot start {launch.program!r} ({error}). ONNX_DL_PYTHON may be set to the path of an "
            "interpreter of the same version."
        ) from error
    finally:
        primitives.close(ready_write)
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError), process.stdin as stdin:
        stdin.write(json.dumps(orders | {"ready_fd": ready_write}).encode())
    return process, ready


def _await_ready(process: subprocess.Popen[bytes], ready: int, limit: Deadline) -> None:
    """Waits for the supervisor's report; kills a supervisor that has failed or does not report in time."""
    try:
        while not (there := waits.ready(ready, select.POLLIN, limit.step() or 0.0)) and not limit.passed:
            pass
        report = os.read(ready, select.PIPE_BUF) if there else b""
    finally:
        primitives.close(ready)
    if report in _READY:
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # the group: a background host is a child of this process
    status = process.wait()
    raise SupervisorStartError(
        report.decode(errors="replace")
        or f"The onnx-dl supervisor did not start (exit status {status}); its stderr has the reason."
        + frozen.advice()
    )
