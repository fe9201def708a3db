"""Where the time of one warm call goes, by step.

The steps are taken from calls that leave stamps (:mod:`benchmarks.stamps`), which take turns with calls that
leave none: what the stamps themselves cost is the difference of the two.  In a process of its own, which is
stamped all over.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from benchmarks.calls import make_session, proxy_of
from benchmarks.models import Case, cases, voice_activity, voice_shaped
from benchmarks.report import number
from benchmarks.stamps import CALL, CLIENT, HOOK, RETURNED, VARIABLE, Stamps, patch
from benchmarks.timing import BASE, Times, Way
from onnx_dl import InferenceSessionProxy, ModelHost

STEPS: Final = (
    "caller: arguments",
    "caller: a lane that is free",
    "caller: inputs into shared memory",
    "caller: note the request, place the worker",
    "wake the worker",
    "worker: may the call begin",
    "worker: find what is prepared",
    "worker: onnxruntime",
    "worker: the reply",
    "wake the caller",
    "caller: results",
    "caller: lane back",
)
"""From one mark of :mod:`benchmarks.stamps` to the next."""
_KINDS: Final = (
    ("tiny", "normal", False),
    ("tiny", "low", False),
    ("vad", "normal", False),
    ("vad", "auto", False),
    ("vad", "low", False),
    ("shaped", "normal", False),
    ("shaped", "low", False),
    ("5mb", "normal", False),
    ("5mb", "low", False),
    ("5mb", "normal", True),
)
"""Case, latency, and whether the input is built in shared memory."""
_PLAIN, _STAMPED = "without stamps", "with stamps"


def measure(rounds: int) -> list[dict[str, Any]]:
    """For each kind of call: its name, the steps and whole calls, all in µs."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.breakdown", str(rounds)], stdout=subprocess.PIPE, check=True
    )
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def table(found: list[dict[str, Any]]) -> str:
    lines = [
        "where the time of a call goes, µs".ljust(46) + "".join(kind["name"].rjust(19) for kind in found)
    ]
    for index, step in enumerate(STEPS):
        lines.append(f"{step:<46}" + "".join(number(kind["steps"][index]).rjust(19) for kind in found))
    for label in ("sum of these", _STAMPED, _PLAIN, BASE):
        values = [sum(kind["steps"]) if label == "sum of these" else kind[label] for kind in found]
        lines.append(f"{label:<46}" + "".join(number(value).rjust(19) for value in values))
    return "\n".join(lines)


# --- in the process of its own ---------------------------------------------------------------------------


@contextlib.contextmanager
def _hosts(folder: str) -> Iterator[tuple[ModelHost, ModelHost]]:
    """One whose workers leave no stamps, and one whose do."""
    (Path(folder) / "sitecustomize.py").write_text(HOOK)
    with ModelHost() as plain, ModelHost() as stamped:
        plain.start()
        before = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [folder, before]))
        os.environ[VARIABLE] = str(Path(folder) / "worker")
        stamped.start()
        yield plain, stamped


def _kind(
    case: Case, latency: str, in_arena: bool, hosts: tuple[ModelHost, ModelHost], folder: str, rounds: int
) -> dict[str, Any]:
    session = make_session(case.model, case.threads)
    with contextlib.ExitStack() as stack:
        plain, stamped = (
            stack.enter_context(proxy_of(case.model, host, threads=case.threads, latency=latency))
            for host in hosts
        )
        collector = _Collector(folder)
        ways = [
            Way(BASE, lambda: session.run(None, case.feed)),
            Way(_PLAIN, _call(plain, case, in_arena)),
            Way(_STAMPED, _call(stamped, case, in_arena), collector.begin, collector.end),
        ]
        times = Times(ways, case.calls, rounds)
        stamped.unload()  # so that the next case has the stamps to itself
    whole = {way.name: statistics.median(times.by_round(way.name)) for way in ways}
    name = f"{case.name.split(',')[0]}, {'in arena' if in_arena else latency}"
    return {"name": name, "steps": collector.steps(rounds * case.calls), **whole}


def _call(proxy: InferenceSessionProxy, case: Case, in_arena: bool) -> Callable[[], Any]:
    feed = dict(case.feed)
    if in_arena:
        for name, array in case.feed.items():
            feed[name] = proxy.empty(array.shape, array.dtype)
            feed[name][...] = array
    return lambda: proxy.run(None, feed)


class _Collector:
    """Gathers the stamps of both processes, block by block."""

    def __init__(self, folder: str) -> None:
        self._mine, self._theirs = Stamps(str(Path(folder) / "caller")), Stamps(str(Path(folder) / "worker"))
        self._calls: list[list[float]] = []

    def begin(self) -> None:
        self._take()
        self._undo = patch(CLIENT, self._mine)

    def end(self) -> None:
        self._undo()
        self._calls += _calls(self._take())

    def _take(self) -> list[tuple[int, int]]:
        return sorted(self._mine.take() + self._theirs.take())

    def steps(self, calls: int) -> list[float]:
        """The median of each step.

        Raises:
            RuntimeError: too few calls went the way that the stamps expect.
        """
        if len(self._calls) < calls // 2:
            raise RuntimeError(
                f"{len(self._calls)} of {calls} calls left all stamps: adapt benchmarks.stamps"
            )
        return [statistics.median(step) for step in zip(*self._calls, strict=True)]


def _calls(stamps: list[tuple[int, int]]) -> list[list[float]]:
    """The steps of each call that left every mark once, in µs."""
    calls, marks = [], dict[int, int]()
    for at, mark in stamps:
        if mark == CALL:
            marks = {}
        marks.setdefault(mark, at)
        if mark == RETURNED and len(marks) == RETURNED + 1:
            times = [marks[number] for number in range(RETURNED + 1)]
            calls.append([(b - a) / 1e3 for a, b in itertools.pairwise(times)])
    return calls


def _work(rounds: int) -> None:
    with tempfile.TemporaryDirectory() as folder, _hosts(folder) as hosts:
        known = {**cases(), "vad": voice_activity(), "shaped": voice_shaped()}
        kinds = [(case, *how) for key, *how in _KINDS if (case := known[key]) is not None]
        print(json.dumps([_kind(*kind, hosts, folder, rounds) for kind in kinds]))


if __name__ == "__main__":
    _work(int(sys.argv[1]))
