"""Three ways to serve requests for more models than fit, each in a process of its own; who starts them and
looks at their memory is :mod:`benchmarks.capped_host`.

Requests come one after another, the next when the one before has its result.
"""

from __future__ import annotations

import bisect
import gc
import os
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np

from benchmarks.calls import PROVIDERS, options, proxy_of
from onnx_dl import EventType, ModelHost

SKEW: Final = 1.1
THREADS: Final = 2
_HUGE: Final = 1 << 50


class Setup(NamedTuple):
    """What is asked for: so many models of so many square float32 matrices, ``cap`` in bytes."""

    models: int = 8
    layers: int = 9
    width: int = 2048
    cap: int = 500_000_000
    requests: int = 300

    def order(self, seed: int = 0) -> list[int]:
        """The model that each request is for; the first is asked for most, as by Zipf's law."""
        weights = np.arange(1, self.models + 1) ** -SKEW
        random = np.random.default_rng(seed)
        return [int(i) for i in random.choice(self.models, self.requests, p=weights / weights.sum())]


class Load(NamedTuple):
    """``at``: Unix time when the model was ready; ``seconds``: from the start of the load to that."""

    model: str
    at: float
    seconds: float


class Hosted:
    """onnx-dl with a limit; models stay until they have to make way.

    ``loads`` and ``workers`` (process ids) are known after ``close()``.
    """

    def __init__(self, paths: Sequence[str], limit: int) -> None:
        self.loads: list[Load] = []
        self.workers: list[int] = []
        self._host = ModelHost(memory_limit=limit)
        self._events = self._host.events()
        self._host.start()
        self._proxies = {path: proxy_of(path, self._host, threads=THREADS) for path in paths}

    def ask(self, path: str, feed: dict[str, Any]) -> None:
        self._proxies[path].run(None, feed)

    def close(self) -> None:
        self._host.close()
        for event in self._events:  # ends with the last one
            if event.type is EventType.READY:
                self.loads.append(Load(event.model, event.at, event.seconds or 0.0))
                self.workers.append(event.pid or 0)


class LeastRecentlyUsed:
    """What is written by hand: sessions in this process, as many as their files fit under the cap."""

    def __init__(self, cap: int) -> None:
        self.loads: list[Load] = []
        self.workers: list[int] = []
        self._cap = cap
        self._sessions: OrderedDict[str, Any] = OrderedDict()
        import onnxruntime

        self._open = onnxruntime.InferenceSession

    def ask(self, path: str, feed: dict[str, Any]) -> None:
        if path not in self._sessions:
            self._load(path)
        self._sessions.move_to_end(path)
        self._sessions[path].run(None, feed)

    def _load(self, path: str) -> None:
        started = time.perf_counter()
        while self._sessions and sum(map(os.path.getsize, [path, *self._sessions])) > self._cap:
            self._sessions.popitem(last=False)
            gc.collect()
        self._sessions[path] = self._open(path, options(THREADS), providers=PROVIDERS)
        self.loads.append(Load(path, time.time(), time.perf_counter() - started))

    def close(self) -> None:
        self._sessions.clear()


CAPPED, ALL, LRU = "capped", "all", "lru"


def _server(way: str, paths: Sequence[str], cap: int) -> Hosted | LeastRecentlyUsed:
    if way == LRU:
        return LeastRecentlyUsed(cap)
    return Hosted(paths, cap if way == CAPPED else _HUGE)


def work(way: str, folder: str, setup: Setup) -> dict[str, Any]:
    """In a process of its own: the trace; the clock of ``began`` and ``ended`` is the whole machine's."""
    paths = sorted(map(str, Path(folder).glob("*.onnx")))
    asked = [paths[i] for i in setup.order()]
    feed = {"x": np.ones((1, setup.width), np.float32)}
    server = _server(way, paths, setup.cap)
    time.sleep(0.5)  # the template imports onnxruntime
    starts, seconds, began = [], [], time.monotonic()
    for path in asked:
        starts.append(time.time())
        started = time.perf_counter()
        server.ask(path, feed)
        seconds.append(time.perf_counter() - started)
    ended = time.monotonic()
    server.close()
    return {
        "began": began,
        "ended": ended,
        "starts": [start - starts[0] for start in starts],
        "seconds": seconds,
        "loads": [load.seconds for load in server.loads],
        "loaded": needed_a_load(starts, asked, server.loads),
        "workers": server.workers,
    }


def needed_a_load(starts: Sequence[float], asked: Sequence[str], loads: Sequence[Load]) -> list[bool]:
    """For each request, whether its model became ready while it waited.

    Raises:
        RuntimeError: a model was loaded that nobody had asked for at that time.
    """
    needed = [False] * len(asked)
    for load in loads:
        request = bisect.bisect(starts, load.at) - 1
        if request < 0 or asked[request] != load.model:
            raise RuntimeError(f"{load.model} was loaded out of turn")
        needed[request] = True
    return needed
