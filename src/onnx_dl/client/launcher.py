"""Starts supervisor processes, and finds those that serve several applications.

A *private* supervisor is a child of the application that starts it and ends with it.  A *shared* one is found
by its name (:mod:`onnx_dl.transport.rendezvous`), if it speaks the same version of the protocol, or started in the
background, exactly once: of two that are started at the same moment, the one that gets the lock is the host,
and the other leaves.  What is said to a supervisor is :mod:`onnx_dl.client.connection`'s.
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
from typing import Any, Final, TypeVar

import msgspec

from onnx_dl.concurrency import forking, primitives, spawning, waits
from onnx_dl.concurrency.deadline import Deadline
from onnx_dl.core import settings as settings_module
from onnx_dl.core.settings import Settings
from onnx_dl.errors import SupervisorError, SupervisorStartError, SupervisorUnreachable
from onnx_dl.protocol.codec import PROTOCOL_VERSION
from onnx_dl.system import boot, frozen, process_setup
from onnx_dl.system.boot import Launch
from onnx_dl.transport import addresses, running_hosts
from onnx_dl.transport.rendezvous import USUAL, Place
from onnx_dl.transport.running_hosts import Sighting

_LOOK_EVERY: Final = 0.01
_RESTART: Final = 10.0
"""Seconds for a service manager to restart a host, before another is started in its place."""
_FAREWELL: Final = 3.0
"""Seconds that a host of another version has beyond the time that calls have to end."""
_READY: Final = b"!"
"""What a supervisor says when it listens."""
_TAKEN: Final = b"-"
"""What it says if another was faster."""

_C = TypeVar("_C")


def start_private(
    settings: Settings, firm: Sequence[str], deadline: Deadline
) -> tuple[subprocess.Popen[bytes], str, str]:
    """A supervisor of this application's own: the process, its address and its secret.

    ``firm``: names of settings that a host's file does not change.

    Raises:
        SupervisorStartError: it did not come up.
    """
    address, secret = addresses.fresh_address("host"), secrets.token_hex(16)
    return _start(_launch(settings), address, secret, settings, deadline, firm=firm)[0], address, secret


def reach(
    name: str,
    settings: Settings,
    link: Callable[[str, str, Deadline], _C],
    deadline: Deadline,
    *,
    start: bool,
) -> _C:
    """What ``link`` makes of the address and the secret of the shared host of this name.

    One that speaks another version of the protocol is none, and may run beside the one that is found.

    Args:
        link: is given a deadline, too; raises :class:`~onnx_dl.errors.SupervisorUnreachable` where nobody
            answers by then.
        start: whether to start the host if there is none.

    Raises:
        SupervisorError: there is none, and it is not to be started.
        SupervisorStartError: it does not come up, or refuses us.
    """
    place = Place(name)
    answer = Deadline(settings.start_timeout, outer=deadline)
    limit = Deadline(settings.start_timeout + _RESTART, outer=deadline)
    restart = Deadline(_RESTART)
    while True:
        holder, record = place.holder(), place.record()
        if record is not None and record.pid == holder:
            with contextlib.suppress(SupervisorUnreachable):
                return link(record.address, record.secret, answer)
        # One that somebody looks after is about to be there again.
        awaited = holder is None and record is not None and record.kept and not restart.passed
        absent = holder is None and not awaited
        deadline.check(f"the host {name!r}")
        if absent and not start:
            raise SupervisorError(no_host(name, running_hosts.of_other_versions(place)))
        if limit.passed or (holder is not None and answer.passed):
            raise SupervisorStartError(
                f"The host {name!r} (pid {holder}) does not answer, or ends as soon as it is started; "
                f"its log is {place.log}. If it runs in a container or network namespace of its own, it "
                "serves only applications there."
            )
        if absent:
            _start_shared(place, settings, deadline)
            answer = Deadline(settings.start_timeout, outer=deadline)
        else:
            waits.pause(_LOOK_EVERY)  # for another process, which is about to listen or to end


def runs(name: str) -> bool:
    """Whether there is a host of this name, and of this version, now."""
    return Place(name).holder() is not None


def await_end(name: str, pid: int, patience: float) -> None:
    """Returns when this process is not the host of this name; the next one may be there already.

    Raises:
        TimeoutError: it still does after so many seconds.
    """
    _await_end(Place(name), pid, patience)


def _await_end(place: Place, pid: int, patience: float) -> None:
    deadline = time.monotonic() + patience
    while place.holder() == pid:
        if time.monotonic() >= deadline:
            raise TimeoutError(
                f"The host {place.name!r} (pid {pid}) is still there after {patience:g} seconds."
            )
        waits.pause(_LOOK_EVERY)


def terminate(seen: Sighting) -> None:
    """Ends a host of another version, which cannot be asked to end; returns when it has gone.

    Raises:
        SupervisorError: it has no process id here.
        TimeoutError: it is still there after the time that calls have to end, and some seconds.
    """
    if not seen.pid:
        raise SupervisorError(f"The host {seen.name!r} runs in another container; end it from there.")
    place = Place(seen.name, protocol=seen.protocol)
    with contextlib.suppress(ProcessLookupError):
        fd = os.pidfd_open(seen.pid)
        try:
            if place.holder() == seen.pid:  # else the number may be another process's by now
                signal.pidfd_send_signal(fd, signal.SIGTERM)
        finally:
            primitives.close(fd)
    _await_end(place, seen.pid, settings_module.settings().exit_grace + _FAREWELL)


def no_host(name: str, others: Sequence[Sighting] = ()) -> str:
    """What to do without a host of this name that this version can ask; ``others``: of other versions."""
    supervise, load = ("", "") if name == USUAL else (f" --name {name}", f" --host {name}")
    of_this = f" for this version of onnx-dl ({running_hosts.version(PROTOCOL_VERSION)})" if others else ""
    listed = "".join(f" There is one of another version: {running_hosts.told(other)}." for other in others)
    return (
        f"No shared host named {name!r} runs{of_this}.{listed} Start one with: onnx-dl supervise{supervise}, "
        f"in the background with onnx_dl.connect({name!r}), or by loading a model into it: "
        f"onnx-dl load MODEL{load}. --host or ONNX_DL_HOST names another."
    )


def _start_shared(place: Place, settings: Settings, deadline: Deadline) -> None:
    """A host in the background; returns when it listens or another does."""
    address, secret = addresses.fresh_address("host"), secrets.token_hex(16)
    launch = _launch(settings)
    log = os.open(place.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        # Not our stderr: whoever reads that to its end would wait for the host.
        process, _ = _start(
            launch, address, secret, settings, deadline, host=place.name, stdout=log, stderr=log
        )
    except SupervisorStartError as error:
        last = place.log.read_text(errors="replace")[-2000:].rstrip()
        end = f"\nThe end of {place.log}:\n{last}" if last else ""
        raise SupervisorStartError(f"The host {place.name!r} did not come up. {error}{end}") from error
    finally:
        primitives.close(log)
    waits.ended(process, settings.start_timeout)  # it has put a process of its own into the background


def _launch(settings: Settings) -> Launch:
    return boot.launch("supervisor", python=settings.python)


def _start(
    launch: Launch,
    address: str,
    secret: str,
    settings: Settings,
    deadline: Deadline,
    host: str | None = None,
    firm: Sequence[str] = (),
    **streams: Any,
) -> tuple[subprocess.Popen[bytes], bool]:
    """A supervisor process, and whether it listens; if not, another has its name."""
    orders = {
        "address": address,
        "secret": secret,
        "settings": msgspec.to_builtins(settings),
        "protocol": PROTOCOL_VERSION,
        "host": host,
        "firm": list(firm),
        "application": (os.getpid(), process_setup.started_at(os.getpid())),
    }
    # A child that another thread forks meanwhile would keep our ends of its pipes: the supervisor would wait
    # for the end of its orders, or we for its failure, until that child ends.
    with forking.still():
        process, ready = _spawn(launch, orders, streams)
    return process, _await_ready(process, ready, Deadline(settings.start_timeout, outer=deadline))


def _spawn(
    launch: Launch, orders: dict[str, Any], streams: dict[str, Any]
) -> tuple[subprocess.Popen[bytes], int]:
    """A supervisor process that has its orders, and where it says that they are carried out."""
    ready, ready_write = os.pipe()
    try:
        process = primitives.popen(
            launch.argv,
            env=launch.environment,
            stdin=subprocess.PIPE,
            pass_fds=[ready_write],
            # Ctrl-C in the terminal is the application's.  Not a session of its own: Linux schedules sessions
            # apart (autogroup), and a wake-up across them takes 40 µs instead of 10.
            process_group=0,
            **streams,
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


def _is_readable(fd: int, limit: Deadline) -> bool:
    while not waits.ready(fd, select.POLLIN, limit.step() or 0.0):
        if limit.passed:
            return False
    return True


def _await_ready(process: subprocess.Popen[bytes], ready: int, limit: Deadline) -> bool:
    """Waits for the byte that says that the orders are carried out, or why not."""
    try:
        said = os.read(ready, select.PIPE_BUF) if _is_readable(ready, limit) else b""
        if said in (_READY, _TAKEN):
            return said == _READY
    finally:
        primitives.close(ready)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # the group: one in the background is a child of this process
    status = process.wait()
    raise SupervisorStartError(
        said.decode(errors="replace")
        or f"The onnx-dl supervisor did not come up (exit status {status}); its stderr says why."
        + frozen.advice()
    )
