"""Starts supervisor processes, and finds those that serve several applications.

A *private* supervisor is a child of the application that starts it and ends with it.  A *shared* one is found
by its name (:mod:`onnx_dl.rendezvous`), or started in the background, exactly once: of two that are started
at the same moment, the one that gets the lock is the host, and the other leaves.  What is said to a
supervisor is :mod:`onnx_dl.connection`'s.
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

from onnx_dl import config, surroundings
from onnx_dl.config import Settings
from onnx_dl.errors import SupervisorError, SupervisorStartError, SupervisorUnreachable
from onnx_dl.rendezvous import USUAL, Place

_BOOT: Final = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from onnx_dl.supervisor.main import main; main()"
)
_LOOK_EVERY: Final = 0.01
_RESTART: Final = 10.0
"""Seconds for a service manager to restart a host, before another is started in its place."""
_READY: Final = b"!"
"""What a supervisor says when it listens."""
_TAKEN: Final = b"-"
"""What it says if another was faster."""

_C = TypeVar("_C")


def start_private(settings: Settings, firm: Sequence[str] = ()) -> tuple[subprocess.Popen[bytes], str, str]:
    """A supervisor of this application's own: the process, its address and its secret.

    ``firm``: names of settings that a host's file does not change.

    Raises:
        SupervisorStartError: it did not come up.
    """
    address, secret = config.fresh_address("host"), secrets.token_hex(16)
    return _start(address, secret, settings, firm=firm)[0], address, secret


def reach(name: str, settings: Settings, link: Callable[[str, str], _C], *, start: bool) -> _C:
    """What ``link`` makes of the address and the secret of the shared host of this name.

    Args:
        link: raises :class:`~onnx_dl.errors.SupervisorUnreachable` where nobody answers.
        start: whether to start the host if there is none.

    Raises:
        SupervisorError: there is none, and it is not to be started.
        SupervisorStartError: it does not come up, or refuses us.
    """
    place = Place(name)
    began = time.monotonic()
    while True:
        holder, record = place.holder(), place.record()
        if record is not None and record.pid == holder:
            with contextlib.suppress(SupervisorUnreachable):
                return link(record.address, record.secret)
        waited = time.monotonic() - began
        # One that somebody looks after is about to be there again.
        absent = holder is None and not (record is not None and record.kept and waited < _RESTART)
        if absent and not start:
            raise SupervisorError(no_host(name))
        if waited >= settings.start_timeout + _RESTART:
            raise SupervisorStartError(
                f"The host {name!r} (pid {holder}) does not answer, or ends as soon as it is started; "
                f"its log is {place.log}. If it runs in a container or network namespace of its own, it "
                "serves only applications there."
            )
        if absent:
            _start_shared(place, settings)
        else:
            time.sleep(_LOOK_EVERY)  # for another process, which is about to listen or to end


def runs(name: str) -> bool:
    """Whether there is a host of this name now."""
    return Place(name).holder() is not None


def await_end(name: str, pid: int, patience: float) -> None:
    """Returns when this process is not the host of this name; the next one may be there already.

    Raises:
        TimeoutError: it still does after so many seconds.
    """
    place = Place(name)
    deadline = time.monotonic() + patience
    while place.holder() == pid:
        if time.monotonic() >= deadline:
            raise TimeoutError(f"The host {name!r} (pid {pid}) is still there after {patience:g} seconds.")
        time.sleep(_LOOK_EVERY)


def no_host(name: str) -> str:
    """What to do without a host of this name."""
    supervise, load = ("", "") if name == USUAL else (f" --name {name}", f" --host {name}")
    return (
        f"No shared host named {name!r} runs. Start one with: onnx-dl supervise{supervise}, in the "
        f"background with onnx_dl.connect({name!r}), or by loading a model into it: "
        f"onnx-dl load MODEL{load}. --host or ONNX_DL_HOST names another."
    )


def _start_shared(place: Place, settings: Settings) -> None:
    """A host in the background; returns when it listens or another does."""
    address, secret = config.fresh_address("host"), secrets.token_hex(16)
    log = os.open(place.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        # Not our stderr: whoever reads that to its end would wait for the host.
        process, _ = _start(address, secret, settings, host=place.name, stdout=log, stderr=log)
    except SupervisorStartError as error:
        last = place.log.read_text(errors="replace")[-2000:].rstrip()
        end = f"\nThe end of {place.log}:\n{last}" if last else ""
        raise SupervisorStartError(f"The host {place.name!r} did not come up. {error}{end}") from error
    finally:
        os.close(log)
    process.wait(settings.start_timeout)  # it has put a process of its own into the background


def _start(
    address: str,
    secret: str,
    settings: Settings,
    host: str | None = None,
    firm: Sequence[str] = (),
    **streams: Any,
) -> tuple[subprocess.Popen[bytes], bool]:
    """A supervisor process, and whether it listens; if not, another has its name."""
    sys_path = surroundings.search_path()
    ready, ready_write = os.pipe()
    orders = {
        "address": address,
        "secret": secret,
        "sys_path": sys_path,
        "settings": msgspec.to_builtins(settings),
        "ready_fd": ready_write,
        "host": host,
        "firm": list(firm),
        "application": (os.getpid(), surroundings.started_at(os.getpid())),
    }
    try:
        process = subprocess.Popen(
            # -P: a file named json.py in the current directory is not ours to import.
            [settings.python, "-P", "-c", _BOOT, json.dumps(sys_path)],
            stdin=subprocess.PIPE,
            pass_fds=[ready_write],
            # Ctrl-C in the terminal is the application's.  Not a session of its own: Linux schedules sessions
            # apart (autogroup), and a wake-up across them takes 40 µs instead of 10.
            process_group=0,
            **streams,
        )
    except (OSError, TypeError) as error:
        os.close(ready)
        raise SupervisorStartError(
            f"Cannot start {settings.python!r} ({error}). If this application embeds Python, set "
            "ONNX_DL_PYTHON to the path of an interpreter of the same version."
        ) from error
    finally:
        os.close(ready_write)
    return process, _await_ready(process, ready, json.dumps(orders).encode(), settings.start_timeout)


def _await_ready(process: subprocess.Popen[bytes], ready: int, orders: bytes, timeout: float) -> bool:
    """Gives the orders and waits for the byte that says that they are carried out, or why not."""
    assert process.stdin is not None
    try:
        with contextlib.suppress(BrokenPipeError), process.stdin as stdin:
            stdin.write(orders)
        poll = select.poll()
        poll.register(ready, select.POLLIN)
        said = os.read(ready, select.PIPE_BUF) if poll.poll(timeout * 1000) else b""
        if said in (_READY, _TAKEN):
            return said == _READY
    finally:
        os.close(ready)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # the group: one in the background is a child of this process
    status = process.wait()
    raise SupervisorStartError(
        said.decode(errors="replace")
        or f"The onnx-dl supervisor did not come up (exit status {status}); its stderr says why."
    )
