"""The faults of a soak, and how long calls take to be right again after each."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import psutil
from tests.fuzz import calls as fuzz_calls
from tests.fuzz import faults, file_damage
from tests.fuzz.steps import Wrong
from tests.support import zoo
from tests.support.zoo import I64, build, constant, node, tensor

from benchmarks.soak_calls import DEATHS, HEAVY, NO_ROOM, Ground
from onnx_dl import InferenceSessionProxy, OnnxDLError
from onnx_dl.errors import MemoryLimitExceeded

STOPPED: Final = 1.5
"""Seconds for which a process is stopped at most."""
LIMIT: Final = 30.0
"""Seconds after which a call that should be right again is given up."""
HARD: Final = "200MB"


class Injector(threading.Thread):
    """One fault after the other, until it is told to stop."""

    def __init__(self, ground: Ground, rng: random.Random, stop: threading.Event, kinds: list[str]) -> None:
        super().__init__(name="soak-faults")
        self._ground = ground
        self._rng = rng
        self._stop_ = stop
        self._kinds = kinds

    def run(self) -> None:
        ledger = self._ground.ledger
        while not self._stop_.wait(self._rng.expovariate(3.0)):
            kind, started = self._rng.choice(self._kinds), time.monotonic()
            try:
                with ALONE[kind], ledger.timed(f"fault {kind}"):
                    model, since = FAULTS[kind](self._ground, self._rng)
                    if since is not None:
                        self._recover(kind, model, since)
            except Exception as error:  # of a fault before this one, for one
                if not (isinstance(error, OnnxDLError) and ledger.explains("", error, started)):
                    ledger.blame(f"after {kind}: {''.join(traceback.format_exception(error))}")

    def _recover(self, kind: str, model: str | None, since: float) -> None:
        """Calls until one is right; how long that takes from when it could be."""
        rng, ledger = self._rng, self._ground.ledger
        call = rng.choice(self._ground.calls[model]) if model else self._ground.any_call(rng)
        while True:
            try:
                fuzz_calls.answer(self._ground.proxy(call.kind, rng), call, _in_time)
                ledger.recoveries.append((time.monotonic() - since, kind))
                return
            except OnnxDLError as error:
                if time.monotonic() - since > LIMIT:
                    raise Wrong(f"{call.kind} is not right again after {LIMIT:g} s: {error!r}") from error
                time.sleep(min(1.0, getattr(error, "retry_after", 0.0) or 0.01))


def _in_time(proxy: InferenceSessionProxy, call: fuzz_calls.Call) -> Any:
    return proxy.run(call.outputs, call.feed, timeout=LIMIT)


Done = tuple[str | None, float | None]
"""The model that was concerned, and since when calls of it can be right again."""


# --- processes -------------------------------------------------------------------------------------------


def _worker(ground: Ground, rng: random.Random) -> tuple[str | None, int | None]:
    """A model and its worker."""
    found = {}
    with contextlib.suppress(OnnxDLError):
        found = {status.pid: ground.name_of(status.model) for status in ground.host.snapshot().models}
    pids = sorted(pid for pid in found if pid is not None)
    pid = rng.choice(pids) if pids else None
    return found.get(pid), pid


def _supervisor(ground: Ground, rng: random.Random) -> tuple[str | None, int | None]:
    with contextlib.suppress(OnnxDLError):
        return None, ground.host.snapshot().supervisor_pid
    return None, None


def _template(ground: Ground, rng: random.Random) -> tuple[str | None, int | None]:
    _, supervisor = _supervisor(ground, rng)
    with contextlib.suppress(psutil.Error):
        for child in psutil.Process(supervisor).children() if supervisor else []:
            if " ".join(child.cmdline()).startswith("onnx-dl: template"):
                return None, child.pid
    return None, None


Find = Callable[[Ground, random.Random], tuple[str | None, int | None]]


def _killing(kind: str, find: Find, number: int) -> Callable[[Ground, random.Random], Done]:
    def act(ground: Ground, rng: random.Random) -> Done:
        model, pid = find(ground, rng)
        if pid is None:
            return None, None
        since = ground.ledger.fault(kind, model, *DEATHS)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        return model, since

    return act


def _stopping(kind: str, find: Find) -> Callable[[Ground, random.Random], Done]:
    """Nobody may be told of that: calls take longer."""

    def act(ground: Ground, rng: random.Random) -> Done:
        model, pid = find(ground, rng)
        if pid is None:
            return None, None
        ground.ledger.fault(kind, model)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
            time.sleep(rng.random() * STOPPED)
            os.kill(pid, signal.SIGCONT)
        return model, time.monotonic()

    return act


# --- what the program does ---------------------------------------------------------------------------------


def _unload(ground: Ground, rng: random.Random) -> Done:
    model = rng.choice(sorted(ground.calls))
    since = ground.ledger.fault("unload", model)
    ground.proxy(model, rng).unload()
    return model, since


def _force(ground: Ground, rng: random.Random) -> Done:
    model = rng.choice(sorted(ground.calls))
    since = ground.ledger.fault("force unload", model, *DEATHS)
    ground.proxy(model, rng).unload(force=True)
    return model, since


def _ttl(ground: Ground, rng: random.Random) -> Done:
    """It runs out between calls, for a while."""
    model = rng.choice(sorted(ground.calls))
    since = ground.ledger.fault("ttl", model)
    for proxy in ground.proxies(model):
        proxy.ttl = rng.choice([0, 0.01, 0.05])
    time.sleep(rng.random())
    for proxy in ground.proxies(model):
        proxy.ttl = -1
    return model, since


def _evict(ground: Ground, rng: random.Random) -> Done:
    """A model that is said to need nearly all there is has to be let in, and goes again."""
    ground.ledger.fault("evict", None, *NO_ROOM)
    large = _large(ground.folder)
    with InferenceSessionProxy(large, zoo.session_options(), zoo.CPU, host=ground.host) as proxy:
        _load_and_go(proxy)
    ground.ledger.extend("evict")
    return None, time.monotonic()


def _load_and_go(proxy: InferenceSessionProxy) -> None:
    with contextlib.suppress(*NO_ROOM, *DEATHS):
        proxy.load()
        proxy.unload(force=True)


def _large(folder: Path) -> str:
    """150 MB of weights that nobody reads: before it was measured, it is thought to need three times that."""
    path = folder / "large.onnx"
    if not path.exists():
        weights = constant("w", np.ones((1, 40 << 20), np.float32))
        ends = [tensor("x", zoo.F, [1])], [tensor("y", zoo.F, [1])]
        nodes = [node("ReduceMax", ["w"], ["m"], keepdims=0), node("Add", ["x", "m"], ["y"])]
        path.write_bytes(build(nodes, *ends, [weights]).SerializeToString())
    return str(path)


def _cap(ground: Ground, rng: random.Random) -> Done:
    """A run that takes more than it may ends its worker; a smaller one of the same model is right."""
    ground.ledger.fault("cap", "grows", MemoryLimitExceeded)
    with InferenceSessionProxy(
        _grows(), zoo.session_options(), zoo.CPU, host=ground.host, max_memory_hard=HARD
    ) as proxy:
        for count, may_fail in ((120 << 20, True), (1000, False)):
            try:
                found = proxy.run(None, {"n": np.array([count])})
            except MemoryLimitExceeded:
                if not may_fail:
                    raise
            except DEATHS as error:
                if not ground.ledger.explains("grows", error, time.monotonic()):
                    raise
            else:
                if found[0].tolist() != [1.0]:
                    raise Wrong(f"{found} of a model that says 1")
    return None, None


def _grows() -> bytes:
    """Takes 4 n bytes for a moment."""
    nodes = [node("ConstantOfShape", ["n"], ["many"], value=constant("v", np.float32([1]))),
             node("ReduceMax", ["many"], ["y"])]  # fmt: skip
    data: bytes = build(nodes, [tensor("n", I64, [1])], [tensor("y", zoo.F, [1])]).SerializeToString()
    return data


def _fork(ground: Ground, rng: random.Random) -> Done:
    """A child of a program whose threads are in calls calls a model of its own."""
    call = ground.any_call(rng)
    ground.ledger.fault("fork", None)
    proxy = ground.proxy(call.kind, rng)
    pid = faults.fork_child(lambda: fuzz_calls.answer(proxy, call, fuzz_calls.plainly))
    faults.await_child(pid, f"A child that calls {call.kind}")
    return None, None


# --- files -----------------------------------------------------------------------------------------------


def _damage(ground: Ground, rng: random.Random) -> Done:
    """Of an entry of the load cache, between two loads."""
    ground.ledger.fault("damaged entry", HEAVY)
    root = ground.folder / "cache"
    entries = [
        path.parent for path in root.glob("*/meta.json") if not path.parent.name.startswith("unfinished")
    ]
    proxy = ground.proxy(HEAVY, rng)
    if entries:
        entry = rng.choice(entries)
        file = entry / rng.choice(["meta.json", "model.onnx", "weights.bin"])
        copy = ground.folder / "damaged"
        with contextlib.suppress(OSError):  # somebody else has removed it
            shutil.copytree(entry, copy)
            file_damage.OF_FILES[rng.choice(["cut", "flip", "zeros", "gone", "replaced"])](
                copy / file.name, rng
            )
            shutil.rmtree(entry)  # not in place: others have mapped it
            os.rename(copy, entry)
        shutil.rmtree(copy, ignore_errors=True)
    proxy.unload()
    return HEAVY, time.monotonic()


def _replace(ground: Ground, rng: random.Random) -> Done:
    """A model's file is another from now on, and who opens it gets that one."""
    since = ground.ledger.fault("replaced file", "replaced")
    added = float(rng.randrange(1, 1000))
    path = ground.folder / "replaced.onnx"
    path.with_suffix(".new").write_bytes(zoo.plus(added))
    os.replace(path.with_suffix(".new"), path)
    x = np.arange(5, dtype=np.float32)
    while True:
        with InferenceSessionProxy(str(path), zoo.session_options(), zoo.CPU, host=ground.host) as proxy:
            try:
                (found,) = proxy.run(None, {"x": x})
            except OnnxDLError as error:
                if not ground.ledger.explains("replaced", error, since):
                    raise
                continue
        if found.tolist() != (x + np.float32(added)).tolist():
            raise Wrong(f"A file that was replaced: {found - x} for {added}")
        return None, None


FAULTS: Final[dict[str, Callable[[Ground, random.Random], Done]]] = {
    "kill worker": _killing("kill worker", _worker, signal.SIGKILL),
    "crash worker": _killing("crash worker", _worker, signal.SIGSEGV),
    "stop worker": _stopping("stop worker", _worker),
    "kill template": _killing("kill template", _template, signal.SIGKILL),
    "crash template": _killing("crash template", _template, signal.SIGSEGV),
    "stop template": _stopping("stop template", _template),
    "kill supervisor": _killing("kill supervisor", _supervisor, signal.SIGKILL),
    "crash supervisor": _killing("crash supervisor", _supervisor, signal.SIGSEGV),
    "stop supervisor": _stopping("stop supervisor", _supervisor),
    "unload": _unload,
    "force unload": _force,
    "ttl": _ttl,
    "evict": _evict,
    "cap": _cap,
    "fork": _fork,
    "damaged entry": _damage,
    "replaced file": _replace,
}
ALONE: Final = {kind: threading.Lock() for kind in FAULTS}
"""One thread at a time does each: files would be written by two."""
