"""The callers of a soak: models, calls whose answers were computed beforehand, and what was seen of them."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import os
import random
import threading
import time
import traceback
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from tests.fuzz import calls as fuzz_calls
from tests.fuzz import model_variants
from tests.fuzz.calls import Call
from tests.fuzz.steps import Wrong
from tests.support import zoo

from onnx_dl import CapacityError, InferenceSessionProxy, ModelHost, OnnxDLError
from onnx_dl.errors import RunTimeout, SupervisorDied, WorkerDied

CASES: Final = 12
"""Calls of each model that are known beforehand."""
SIZES: Final = (1, 3, 64, 4096, 20_000, 300_000)
GRACE: Final = 5.0
"""Seconds after a fault in which a call may still raise what the fault explains."""
KEPT: Final = 12
"""Results that each thread keeps and compares again."""
HEAVY: Final = "heavy"
"""A model of 12 MiB, which the load cache takes."""
_VARIANT: Final = model_variants.Variant("layers", "external", "default")
_DEATHS: Final = (WorkerDied, SupervisorDied)


class Fault(NamedTuple):
    """Something that was done to our processes: to which model (None: to all), and what calls may raise."""

    kind: str
    model: str | None
    allowed: tuple[type[Exception], ...]
    at: float


class Ledger:
    """What happened.  ``wrong``: answers and errors that nothing explains."""

    def __init__(self) -> None:
        self.calls: collections.Counter[str] = collections.Counter()
        self.errors: collections.Counter[str] = collections.Counter()
        self.faults: collections.Counter[str] = collections.Counter()
        self.recoveries: list[tuple[float, str]] = []
        self.wrong: list[str] = []
        self.waiting: dict[int, tuple[float, str]] = {}
        """By thread: since when it is in a call, and which."""
        self._recent: collections.deque[Fault] = collections.deque(maxlen=200)
        self._lock = threading.Lock()

    def fault(self, kind: str, model: str | None, *allowed: type[Exception]) -> float:
        """Something is about to be done; returns the time."""
        now = time.monotonic()
        with self._lock:
            self.faults[kind] += 1
            self._recent.append(Fault(kind, model, allowed, now))
        return now

    def extend(self, kind: str) -> None:
        """What was done by that fault lasted until now."""
        with self._lock:
            last = next(fault for fault in reversed(self._recent) if fault.kind == kind)
            self._recent.append(last._replace(at=time.monotonic()))

    def explains(self, model: str, error: Exception, since: float) -> bool:
        with self._lock:
            return any(
                fault.model in (None, model) and isinstance(error, fault.allowed) and fault.at > since - GRACE
                for fault in self._recent
            )

    def note(self, counter: collections.Counter[str], what: str) -> None:
        with self._lock:
            counter[what] += 1

    def blame(self, text: str) -> None:
        with self._lock:
            self.wrong.append(text)

    @contextlib.contextmanager
    def timed(self, what: str) -> Any:
        """A call that must end."""
        me = threading.get_ident()
        self.waiting[me] = time.monotonic(), what
        try:
            yield
        finally:
            self.waiting.pop(me, None)


class Ground:
    """A host, proxies of its models, and what their calls have to give."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.ledger = Ledger()
        self.host = ModelHost(memory_limit="600MiB")
        _VARIANT.write(folder)
        self.calls = {name: _calls(name, random.Random(f"{seed}/{name}")) for name in zoo.kinds()}
        answers = _VARIANT.expected(folder).answers
        self.calls[HEAVY] = [Call(HEAVY, None, feed, wanted) for feed, wanted in answers]
        self._proxies: dict[tuple[str, str], InferenceSessionProxy] = {}
        for name in self.calls:
            for latency in ("normal", "low"):
                self._proxies[name, latency] = self.open(name, latency)

    def open(self, name: str, latency: str = "normal", **how: Any) -> InferenceSessionProxy:
        source = str(_VARIANT.source(self.folder)) if name == HEAVY else zoo.kinds()[name].data
        options = _VARIANT.options() if name == HEAVY else zoo.session_options()
        return InferenceSessionProxy(source, options, zoo.CPU, host=self.host, latency=latency, **how)

    def proxy(self, name: str, rng: random.Random) -> InferenceSessionProxy:
        return self._proxies[name, rng.choice(["normal", "normal", "low"])]

    def proxies(self, name: str) -> list[InferenceSessionProxy]:
        return [self._proxies[name, latency] for latency in ("normal", "low")]

    def any_call(self, rng: random.Random) -> Call:
        return rng.choice(self.calls[rng.choice(sorted(self.calls))])

    def name_of(self, proxy_name: str) -> str | None:
        """The model that a snapshot names so."""
        return next(
            (n for (n, _), proxy in self._proxies.items() if proxy._handle.spec.name == proxy_name), None
        )

    def close(self) -> None:
        for proxy in self._proxies.values():
            proxy.close()
        self.host.close()


def _calls(name: str, rng: random.Random) -> list[Call]:
    kind = zoo.kinds()[name]
    made = []
    for _ in range(CASES):
        feed = kind.draw(np.random.default_rng(rng.getrandbits(64)), min(kind.most, rng.choice(SIZES)))
        outputs = fuzz_calls.some_outputs(rng, name)
        made.append(Call(name, outputs, feed, zoo.expected(name, outputs, feed)))
    return made


class Caller(threading.Thread):
    """Calls whatever it likes until it is told to stop, and looks at every answer, and again later."""

    def __init__(self, ground: Ground, rng: random.Random, stop: threading.Event) -> None:
        super().__init__(name="soak-caller")
        self._ground = ground
        self._rng = rng
        self._stop_ = stop
        self._kept: list[tuple[Any, Call]] = []

    def run(self) -> None:
        ledger = self._ground.ledger
        while not self._stop_.is_set():
            call = self._ground.any_call(self._rng)
            started = time.monotonic()
            try:
                with ledger.timed(call.kind):
                    self._one(call)
            except Exception as error:
                self._judge(call, error, started)

    def _one(self, call: Call) -> None:
        rng, proxy = self._rng, self._ground.proxy(call.kind, self._rng)
        kind = rng.choices(["call", "cancel", "timeout", "own", "again"], [80, 4, 4, 2, 10])[0]
        match kind:
            case "call":
                # The heavy model is not in the zoo, and neither are its other ways.
                way = fuzz_calls.plainly if call.kind == HEAVY else rng.choice(fuzz_calls.ways(call))
                self._keep(fuzz_calls.answer(proxy, call, way), call)
            case "cancel":
                asyncio.run(_cancelled(proxy, call, rng.random() * 0.02))
            case "timeout":
                _never_ends(self._ground.proxy("turns", rng), rng)
            case "own":
                with self._ground.open(call.kind, ttl=0) as own:
                    self._keep(fuzz_calls.answer(own, call, fuzz_calls.plainly), call)
            case "again":
                for found, kept in self._kept:
                    fuzz_calls.check(kept, found, "what was returned earlier")
        self._ground.ledger.note(self._ground.ledger.calls, kind)

    def _keep(self, found: Any, call: Call) -> None:
        if not isinstance(found, Exception):
            self._kept = [*self._kept, (found, call)][-KEPT:]

    def _judge(self, call: Call, error: Exception, started: float) -> None:
        ledger = self._ground.ledger
        # A call that is told to end is of "turns", whatever was drawn.
        explained = any(ledger.explains(name, error, started) for name in (call.kind, "turns"))
        if isinstance(error, OnnxDLError) and explained:
            ledger.note(ledger.errors, type(error).__name__)
            self._stop_.wait(min(1.0, getattr(error, "retry_after", 0.0) or 0.0))
        else:
            took = time.monotonic() - started
            told = "".join(traceback.format_exception(error))
            ledger.blame(f"{call.kind}, {took:.2f} s: {told}")


async def _cancelled(proxy: InferenceSessionProxy, call: Call, pause: float) -> None:
    """A task that is cancelled after so many seconds; if it has ended by then, it was right."""
    task = asyncio.create_task(proxy.arun(call.outputs, call.feed))
    await asyncio.sleep(pause)
    task.cancel()
    try:
        found: Any = await task
    except asyncio.CancelledError:
        return
    except OnnxDLError:
        raise
    except Exception as error:
        found = error
    fuzz_calls.check(call, found, "cancelled too late")


def _never_ends(proxy: InferenceSessionProxy, rng: random.Random) -> None:
    try:
        proxy.run(None, zoo.forever(fuzz_calls.numbers(rng)), timeout=rng.random() * 0.05)
    except RunTimeout:
        return
    raise Wrong("A run that never ends has ended.")


DEATHS: Final = _DEATHS
NO_ROOM: Final = (CapacityError,)


def environment(folder: Path) -> None:
    """Of all processes of a soak, before the first of them starts."""
    os.environ.update(ONNX_DL_CACHE="on", ONNX_DL_CACHE_DIR=str(folder / "cache"), ONNX_DL_CACHE_FROM="0")
