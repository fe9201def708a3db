"""Program that forks while its threads use models: ``python -m tests.support.forks CHILDREN SEED``.

Each child calls the models that its parent uses at that moment, and says in its exit status whether it was
right.  They use a shared host, so that a child need not start one; each 25th starts one of its own, too.
"""

from __future__ import annotations

import collections
import contextlib
import os
import random
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable

import numpy as np

from onnx_dl import InferenceSessionProxy, ModelHost, connect
from tests.support.slow import identity_model

PATIENCE = 60
"""Seconds after which a child that hangs is ended by SIGALRM."""

small, large = np.arange(8, dtype=np.float32), np.arange(50_000, dtype=np.float32)
model = identity_model()


def is_right(proxy: InferenceSessionProxy, value: np.ndarray) -> bool:
    (result,) = proxy.run(None, {"x": value})
    return bool(np.array_equal(result, value))


class Parent:
    """The models, and a thread for each thing that is done with them."""

    def __init__(self, host: ModelHost) -> None:
        self.host = host
        self.own = ModelHost()
        self.steady = InferenceSessionProxy(model, host=host)
        self.polled = InferenceSessionProxy(model, host=host, latency="low")
        self.reloaded = InferenceSessionProxy(model, host=host, max_runs=1_000_000)
        self.private = InferenceSessionProxy(model, host=self.own)
        self.wrong: list[str] = []
        self.turns = collections.Counter[str]()
        self._kept: collections.deque[np.ndarray] = collections.deque(maxlen=10)
        self._done = threading.Event()
        self._threads = [
            threading.Thread(target=self._repeat, args=(work,), daemon=True)
            for work in (self.run, self.map, self.load, self.come_and_go)
        ]
        for thread in self._threads:
            thread.start()

    def _repeat(self, work: Callable[[], bool]) -> None:
        while not self._done.is_set():
            try:
                if not work():
                    self.wrong.append(f"{work.__name__}: another result")
            except Exception:
                self.wrong.append(f"{work.__name__}: {traceback.format_exc()}")
            self.turns[work.__name__] += 1
            self._done.wait(0.001)  # the children want the processors, too

    def run(self) -> bool:
        return is_right(self.steady, small) and is_right(self.private, small)

    def map(self) -> bool:
        value = self.polled.empty(large.shape)
        value[:] = large
        (result,) = self.polled.run(None, {"x": value})
        self._kept.append(result)
        return bool(np.array_equal(result, large))

    def load(self) -> bool:
        right = is_right(self.reloaded, small)
        self.reloaded.unload()
        return right

    def come_and_go(self) -> bool:
        with InferenceSessionProxy(model, host=self.host, ttl=0.01) as proxy, proxy.session():
            return is_right(proxy, large)

    def end(self) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join(PATIENCE)
            if thread.is_alive():
                self.wrong.append(f"{thread.name} hangs")
        self.own.close()
        self.host.close()


def in_child(parent: Parent, number: int) -> int:
    signal.alarm(PATIENCE)
    right = is_right(parent.steady, small) and is_right(parent.polled, large)
    right = right and is_right(parent.reloaded, small)
    if number % 25 == 0:
        right = right and is_right(parent.private, small)
    parent.own.close()
    parent.host.close()
    return 0 if right else 1


def fork(parent: Parent, number: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 2
    try:
        status = in_child(parent, number)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def main(children: int, seed: int) -> None:
    warnings.simplefilter("ignore")  # Python 3.12 warns of fork beside threads
    chance = random.Random(seed)
    parent = Parent(connect("forks"))
    living: set[int] = set()
    failed = 0
    for number in range(children):
        living.add(fork(parent, number))
        time.sleep(chance.random() * 0.005)  # at any moment
        while living and (len(living) > 2 or number == children - 1):
            living.remove(one := next(iter(living)))
            failed += os.waitpid(one, 0)[1] != 0
    parent.end()
    with contextlib.suppress(IndexError):
        print(parent.wrong[0], file=sys.stderr)
    print(f"{children} children, {failed} failed, {len(parent.wrong)} wrong, {dict(parent.turns)}")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
