"""``python -m benchmarks.soak --minutes N --seed S``: random calls and random faults, every answer checked.

Several threads call several models in all ways; meanwhile workers, template and supervisor are killed,
stopped and crashed, models are unloaded, evicted and replaced.  What calls have to give was computed before,
by onnxruntime in this process.  The exit status is 1 if an answer was wrong, an error had no cause, a call
hung, recovery took too long, or anything is left at the end.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import faulthandler
import gc
import os
import random
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Final

# Before the first import of onnxruntime.  Workers that are killed all the time are no reason to wait.
os.environ.update(ORT_DISABLE_TELEMETRY="1", ONNX_DL_STABLE_AFTER="0", ONNX_DL_ROOM_TIMEOUT="15")

import numpy as np
import psutil
from tests.fuzz import steps

from benchmarks.soak_calls import Caller, Ground, Ledger, environment
from benchmarks.soak_faults import FAULTS, Injector
from onnx_dl import OnnxDLError

THREADS: Final = 4
INJECTORS: Final = 2
"""Threads that do something to processes and models, and wait each time until calls are right again."""
_LAST_THREAD: Final = 3.0
"""Seconds after the end of the host in which the last thread of ours ends."""
HANG: Final = 60.0
"""Seconds after which a call hangs."""
WORST: Final = 10.0
"""Seconds that recovery may take."""


class Memory(threading.Thread):
    """Private bytes of application and supervisor, once a second; and calls that hang."""

    def __init__(self, ground: Ground, stop: threading.Event) -> None:
        super().__init__(name="soak-memory")
        self._ground = ground
        self._stop_ = stop
        self.points: list[tuple[float, float]] = []

    def run(self) -> None:
        while not self._stop_.wait(1.0):
            with contextlib.suppress(OnnxDLError, psutil.Error):
                pids = (None, self._ground.host.snapshot().supervisor_pid)
                used = sum(psutil.Process(pid).memory_full_info().uss for pid in pids)
                self.points.append((time.monotonic(), used / 1e6))
            self._look_for_hung()

    def _look_for_hung(self) -> None:
        now = time.monotonic()
        waiting = list(self._ground.ledger.waiting.values())
        if hung := [f"{what} since {now - since:.0f} s" for since, what in waiting if now - since > HANG]:
            print(f"hung: {len(hung)}", *hung, sep="\n  ", flush=True)
            faulthandler.dump_traceback(all_threads=True)
            os._exit(1)  # nobody can wait for them

    def slope(self) -> float | None:
        """MB per hour, without the first quarter, in which it fills what it keeps."""
        late = self.points[len(self.points) // 4 :]
        if len(late) < 10:
            return None
        times, used = np.array(late).T
        return float(np.polyfit(times / 3600, used, 1)[0])


def soak(given: argparse.Namespace, folder: Path) -> int:
    """The exit status."""
    environment(folder)
    ground = Ground(folder, given.seed)
    stop = threading.Event()
    callers = [Caller(ground, random.Random(f"{given.seed}/{i}"), stop) for i in range(given.threads)]
    kinds = [kind for kind in given.only if kind not in given.without]
    memory = Memory(ground, stop)
    injectors = [Injector(ground, random.Random(f"{given.seed}/f{i}"), stop, kinds) for i in range(INJECTORS)]
    threads = [*callers, *injectors, memory]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 60 * given.minutes
    while time.monotonic() < deadline and not (given.fail_fast and ground.ledger.wrong):
        time.sleep(0.1)
    stop.set()
    for thread in threads:
        thread.join(HANG)
    ledger = ground.ledger
    if alive := [thread.name for thread in threads if thread.is_alive()]:
        ledger.blame(f"threads that do not end: {alive}")
        faulthandler.dump_traceback(all_threads=True)
    ground.close()
    return report(ledger, memory.slope())


def report(ledger: Ledger, slope: float | None) -> int:
    print(f"calls: {sum(ledger.calls.values())} ({_counted(ledger.calls)})")
    print(f"faults: {sum(ledger.faults.values())} ({_counted(ledger.faults)})")
    print(f"errors that faults explain: {sum(ledger.errors.values())} ({_counted(ledger.errors)})")
    worst, kind = max(ledger.recoveries, default=(0.0, "none"))
    print(f"recoveries: {len(ledger.recoveries)}, the worst {worst:.2f} s ({kind})")
    print(f"slope of memory: {'-' if slope is None else f'{slope:+.1f}'} MB/h (application and supervisor)")
    print("hung: 0")  # who hangs ends the program
    print(f"wrong: {len(ledger.wrong)}", *ledger.wrong[:20], sep="\n  ", flush=True)
    return int(bool(ledger.wrong) or worst > WORST)


def _counted(counter: collections.Counter[str]) -> str:
    return ", ".join(f"{count} {what}" for what, count in sorted(counter.items()))


def _left(descriptors: int, threads: int, shared: set[str]) -> list[str]:
    """What is there that was not before, when all is closed."""
    gc.collect()
    left = steps.leftovers(descriptors)
    deadline = time.monotonic() + _LAST_THREAD
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.01)  # one that writes what workers said ends soon after its connection
    if threading.active_count() > threads:
        left += [f"thread {thread.name}" for thread in threading.enumerate()]
    return [*left, *(f"/dev/shm/{name}" for name in _shared() - shared)]


def _shared() -> set[str]:
    """Other programs have theirs there, too; these are the names that Python or we would give."""
    return {name for name in os.listdir("/dev/shm") if "onnx" in name or "psm_" in name}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=1.0, help="(1)")
    parser.add_argument("--seed", type=int, default=1, help="of calls and faults (1)")
    parser.add_argument("--threads", type=int, default=THREADS, help=f"that call ({THREADS})")
    parser.add_argument("--only", nargs="+", choices=FAULTS, default=list(FAULTS), metavar="FAULT")
    parser.add_argument("--without", nargs="+", choices=FAULTS, default=[], metavar="FAULT")
    parser.add_argument("--fail-fast", action="store_true", help="end at the first thing that is wrong")
    given = parser.parse_args(argv)
    before = len(os.listdir("/proc/self/fd")) + 1, threading.active_count(), _shared()
    with tempfile.TemporaryDirectory() as folder:
        status = soak(given, Path(folder))
    left = _left(*before)
    print(f"left: {len(left)}", *left, sep="\n  ")
    return int(bool(status or left))


if __name__ == "__main__":
    sys.exit(main())
