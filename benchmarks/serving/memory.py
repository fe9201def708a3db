"""Memory that servers keep: of all their processes (PSS), beside what they had before."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from benchmarks.report import Row
from benchmarks.serving.clients import Clients
from benchmarks.serving.servers import OnnxDl, Server
from benchmarks.serving.works import Work
from benchmarks.timing import figure

LARGE: Final = "64mb"
_UNLOADED, _REQUESTS = "left after an unload", "more, {:.0f} s after eight 64 MB requests"
_SETTLED: Final = 0.2e6
"""Bytes by which memory may still change when it is taken to be settled."""


def _settle(read: Callable[[], float], seconds: float) -> float:
    """The value, when it has not changed for a while, or after these seconds."""
    until, before = time.monotonic() + seconds, read()
    while time.monotonic() < until:
        time.sleep(min(1.0, seconds / 4))
        now = read()
        if abs(now - before) < _SETTLED:
            return now
        before = now
    return before


def after_unload(server: Server, clients: Clients, work: Work, times: int, patience: float) -> list[Row]:
    """A model is loaded, called and unloaded once to warm up, then several times more."""

    def cycle() -> None:
        server.control(work.name, "load")
        clients.open(server, "HTTP", work, 1)
        clients.close(server, "HTTP", work, 1)
        server.control(work.name, "unload")

    cycle()
    own, total = _settle(lambda: server.memory()[0], patience), server.memory()[1]
    for _ in range(times):
        cycle()
    left = [(_settle(lambda: server.memory()[0], patience) - own) / 1e6]
    in_all = [(server.memory()[1] - total) / 1e6]
    limit = 1.0 if isinstance(server, OnnxDl) else None
    name = f"{_UNLOADED}, {times} times"
    return [
        figure(name, f"{server.name}, the server's process", left, "MB", limit=limit),
        figure(name, f"{server.name}, all processes", in_all, "MB"),
    ]


def after_requests(server: Server, clients: Clients, work: Work, way: str, wait: float) -> list[Row]:
    """Eight large requests at once."""
    server.control(work.name, "load")
    clients.open(server, way, work, 1)  # the model has run once: what it always needs is there
    clients.close(server, way, work, 1)
    before = _settle(lambda: server.memory()[1], 2 * wait)
    for _ in range(1):
        clients.open(server, way, work, 8)  # each makes a call
        clients.close(server, way, work, 8)
    time.sleep(wait)
    more = (server.memory()[1] - before) / 1e6
    server.control(work.name, "unload")
    limit = 80.0 if isinstance(server, OnnxDl) else None
    return [figure(_REQUESTS.format(wait), f"{server.name}, {way}", [more], "MB", limit=limit)]
