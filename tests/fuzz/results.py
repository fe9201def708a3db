"""Calls of every kind against in-process onnxruntime, bit for bit: ``python -m tests.fuzz.results --help``.

Every step draws what it does from the seed.  Results are kept, fed again and written to, and compared again
many calls later: none of them may change unless this program changes it.
"""

from __future__ import annotations

import os
import random
import sys
from typing import Any, Final, NamedTuple

# Before the first import of onnxruntime: neither telemetry nor the user's cache.
os.environ.update(ORT_DISABLE_TELEMETRY="1", ONNX_DL_CACHE="off", ONNX_DL_STABLE_AFTER="0")

import numpy as np

from onnx_dl import InferenceSessionProxy, ModelHost
from onnx_dl.client import connection, model_table
from tests.fuzz import calls
from tests.fuzz import steps as fuzzing
from tests.fuzz.steps import Wrong
from tests.support import zoo

HELD: Final = 90
"""Results that are kept: more than an application keeps descriptors of."""
HELD_BYTES: Final = 128 << 20
TIDY: Final = 0.05
"""Seconds without use after which an idle lane gives its memory back; 5 would never pass here."""

WEIGHTS: Final = {
    "call": 40, "burst": 12, "look": 6, "change": 6, "feed": 10, "pipeline": 4, "flood": 1, "threads": 4,
    "coroutines": 4, "cancel": 4, "timeout": 3, "session": 2, "unload": 3, "kill": 2, "kill_supervisor": 1,
    "ttl": 2, "reopen": 2, "fork": 2, "fork_busy": 1,
}  # fmt: skip


class Held(NamedTuple):
    """A result, what it has to be, and where it came from."""

    value: Any
    wanted: Any
    source: str


class World:
    """Two hosts, one for each kind of lane, proxies of all models, and results that are kept."""

    def __init__(self) -> None:
        self.held: list[Held] = []
        self.hosts = {lane: _host(lane) for lane in ("socket", "zmq")}
        self._proxies: dict[tuple[str, str, str], InferenceSessionProxy] = {}

    def proxy(self, kind: str, lane: str = "socket", latency: str = "normal") -> InferenceSessionProxy:
        key = (kind, lane, latency)
        if key not in self._proxies:
            self._proxies[key] = InferenceSessionProxy(
                zoo.kinds()[kind].data, zoo.session_options(), zoo.CPU, host=self.hosts[lane], latency=latency
            )
        return self._proxies[key]

    def any_proxy(self, rng: random.Random, kind: str | None = None) -> InferenceSessionProxy:
        lane = rng.choice(["socket", "socket", "zmq"])
        latency = rng.choice(["normal", "normal", "low"])
        return self.proxy(kind or rng.choice(list(zoo.kinds())), lane, latency)

    def forget(self, rng: random.Random) -> None:
        """Closes a proxy, if there are any; who uses the model next makes another."""
        if self._proxies:
            self._proxies.pop(rng.choice(list(self._proxies))).close()

    def keep(self, value: Any, wanted: Any, source: str, rng: random.Random) -> None:
        """Some results are kept, for a while."""
        if rng.random() < 0.4:
            self.held.append(Held(value, zoo.plain(wanted), source))
        while len(self.held) > HELD or _bytes(self.held) > HELD_BYTES:
            self._drop(rng)

    def _drop(self, rng: random.Random) -> None:
        index = rng.randrange(len(self.held))
        self.held.pop(index)

    def look(self) -> None:
        """Nothing that is kept has changed."""
        for one in list(self.held):
            if (text := zoo.difference(one.value, one.wanted)) is not None:
                raise Wrong(f"What {one.source} returned has changed since: {text}")

    def close(self) -> None:
        for proxy in self._proxies.values():
            proxy.close()
        for host in self.hosts.values():
            host.close()


def _host(lane: str) -> ModelHost:
    os.environ["ONNX_DL_LANE"] = lane
    return ModelHost()


def _bytes(held: list[Held]) -> int:
    return sum(array.nbytes for one in held for array in one.wanted if isinstance(array, np.ndarray))


def main(argv: list[str] | None = None) -> int:
    given = fuzzing.arguments("fuzz_results", WEIGHTS, argv)
    connection.TIDY_EVERY = model_table.TIDY_EVERY = TIDY  # type: ignore[misc]
    for kind in zoo.kinds():
        zoo.reference(kind)
    descriptors = len(os.listdir("/proc/self/fd")) + 1  # numpy's and Python's own: a random source
    world = World()
    try:
        status = fuzzing.Player("fuzz_results", given, WEIGHTS).play(calls.steps(world))
        if status == 0:
            world.look()
    finally:
        world.held.clear()
        world.close()
    del world
    return fuzzing.ended(status, descriptors)


if __name__ == "__main__":
    sys.exit(main())
