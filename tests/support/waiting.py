"""Waiting for what must happen, with a deadline."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from onnx_dl import EventStream, EventType, ModelEvent, ModelHost

DEADLINE = 20.0
"""Seconds; far more than anything takes, so that a slow machine fails no test."""


def allowed(seconds: float) -> float:
    """How long what takes at most ``seconds`` on a quiet machine may take now, where more processes want to
    run than there are processors."""
    return seconds * max(1.0, _wanting_to_run() / len(os.sched_getaffinity(0)))


def _wanting_to_run() -> float:
    """How many threads want to run: now, or over the last minute if that is more.

    The average alone is behind where the load has just begun.
    """
    average, *_, threads, _ = Path("/proc/loadavg").read_text().split()
    return max(float(average), float(threads.partition("/")[0]))


def eventually(happened: Callable[[], object], what: str, timeout: float = DEADLINE) -> None:
    """Returns as soon as ``happened()`` is true; fails the test if it never is."""
    began = time.monotonic()
    while not happened():
        waited = time.monotonic() - began
        # A machine that became busy meanwhile gives more time.
        assert waited < timeout or waited < allowed(timeout), f"never happened: {what}"
        time.sleep(0.002)


def wait_for(stream: EventStream, kind: EventType) -> ModelEvent:
    """The next event of this kind."""
    while (event := stream.get(allowed(DEADLINE))).type != kind:
        pass
    return event


def worker_pid(host: ModelHost) -> int:
    """The process id of the only worker."""
    (pid,) = [status.pid for status in host.snapshot().models if status.pid is not None]
    return pid


def template_of(host: ModelHost) -> psutil.Process:
    """The process that the workers of a host are forked from."""
    found: list[psutil.Process] = []

    def is_there() -> bool:
        with contextlib.suppress(psutil.NoSuchProcess):
            children = psutil.Process(host.snapshot().supervisor_pid).children()
            found[:] = [child for child in children if is_process(child, "template")]
        return len(found) == 1

    eventually(is_there, "a template")
    return found[0]


def with_standby(supervisor: int) -> psutil.Process:
    """The supervisor's process, when it has all that it keeps: a standby worker that has connected, too.

    It is made a moment after a load.  As long as the two are not done with each other, descriptors change or
    a thread of theirs wants to run, even if it has to wait for a processor.
    """
    process = psutil.Process(supervisor)
    counts: list[tuple[int, float]] = []

    def is_settled() -> bool:
        with contextlib.suppress(psutil.NoSuchProcess, OSError):
            if standby := [child for child in process.children() if is_process(child, "standby")]:
                now, at = process.num_fds(), time.monotonic()
                sleeps = all(_sleeps(each.pid) for each in (process, *standby))
                if not sleeps or not counts or counts[-1][0] != now:
                    counts.append((now, at))
                return at - counts[-1][1] > 0.2
        return False

    eventually(is_settled, "a standby worker")
    return process


def _sleeps(pid: int) -> bool:
    """Whether no thread of a process runs or wants to."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    return all((each / "stat").read_text().rpartition(")")[2].split()[0] == "S" for each in threads)


def is_process(process: psutil.Process, kind: str) -> bool:
    """Whether it is one of our processes: a supervisor, template, worker or saver.  Before it sets its title,
    its arguments tell.  One that has ended, and is perhaps not reaped yet, is none."""
    try:
        arguments = process.cmdline()
    except psutil.NoSuchProcess:
        return False
    return kind in arguments or " ".join(arguments).startswith(f"onnx-dl: {kind}")


def is_gone(pid: int) -> bool:
    """No process has this id, not even a zombie."""
    return not psutil.pid_exists(pid)


def family(pid: int) -> list[psutil.Process]:
    """A process and all its descendants."""
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]
