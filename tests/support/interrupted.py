"""A program that interrupts itself in the middle of what it does with models, and uses them there.

``python -m tests.support.interrupted KIND SEED SIZE`` with what interrupts it, and how often in all:

``step``    whatever Python may run between two steps of ours, put there by a trace function
``signal``  a signal handler that arms the next signal as it ends
``del``     ``__del__`` of what the garbage collector finds, at almost any allocation of any thread
``weak``    the callback of a weak reference, and one of the garbage collector's own
``fork``    a fork between two steps of ours; the child uses a model and is gone

Prints what came of it, and ends with status 1 if that was anything but a right result or ReentrantUse.
"""

from __future__ import annotations

import collections
import contextlib
import faulthandler
import gc
import os
import random
import signal
import sys
import threading
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import numpy as np

import onnx_dl
from onnx_dl import InferenceSessionProxy, ModelHost, ReentrantUse
from tests.support.slow import identity_model

LONGEST = 60.0
"""Seconds; an interruption that takes longer has waited for its own thread."""
WITHIN = (os.path.dirname(onnx_dl.__file__), threading.__file__)
"""Whose steps are interrupted."""

model = identity_model()
small, large = np.arange(8, dtype=np.float32), np.arange(50_000, dtype=np.float32)
host = ModelHost()
proxies = [
    InferenceSessionProxy(model, host=host),
    InferenceSessionProxy(model, host=host, latency="low"),
    InferenceSessionProxy(model, host=host, max_runs=1_000_000),
]
seen: collections.Counter[str] = collections.Counter()
wrong: list[str] = []
chance = random.Random(int(sys.argv[2]))
size = int(sys.argv[3])


def call(proxy: InferenceSessionProxy, value: np.ndarray) -> None:
    (result,) = proxy.run(None, {"x": value})
    if not np.array_equal(result, value):
        wrong.append("another result")


def fed_in_place(proxy: InferenceSessionProxy) -> None:
    value = proxy.empty(large.shape)
    value[:] = large
    call(proxy, value)


def held(proxy: InferenceSessionProxy) -> None:
    with proxy.session():
        call(proxy, small)


def with_callback(proxy: InferenceSessionProxy) -> None:
    done = threading.Event()
    proxy.run_async(None, {"x": small}, lambda *_: done.set(), None)
    if not done.wait(LONGEST):
        wrong.append("no callback")


def new_one(proxy: InferenceSessionProxy) -> None:
    with InferenceSessionProxy(model, host=host, ttl=0.01) as another:
        call(another, small)


USES: list[Callable[[InferenceSessionProxy], Any]] = [
    *[lambda proxy: call(proxy, small)] * 4,
    lambda proxy: call(proxy, large),
    fed_in_place,
    held,
    with_callback,
    new_one,
    lambda proxy: proxy.unload(),
    lambda proxy: host.snapshot(),
]


def everything() -> None:
    """Start, load, calls, unload, close."""
    for use in (*USES, *chance.sample(USES, 5)):
        with contextlib.suppress(onnx_dl.HostClosing):
            use(chance.choice(proxies))
    host.preload(proxies)
    host.close()


_deep = threading.local()


def interrupt(*_: object) -> None:
    """What a signal handler, or a ``__del__``, does."""
    if getattr(_deep, "inside", False):
        return
    _deep.inside = True
    faulthandler.dump_traceback_later(LONGEST, exit=True)  # it waits for its own thread
    try:
        chance.choice(USES)(chance.choice(proxies))
        seen["results"] += 1
    except ReentrantUse:
        seen["refused"] += 1
    except (onnx_dl.SupervisorError, onnx_dl.WorkerDied) as error:  # in the midst of close()
        seen[type(error).__name__] += 1
    except BaseException:
        wrong.append(traceback.format_exc())
    finally:
        faulthandler.cancel_dump_traceback_later()
        _deep.inside = False


# --- what interrupts ---------------------------------------------------------------------------------------


def at_steps(what: Callable[[], None], mean: float) -> Callable[..., Any]:
    """A trace function that does this after so many steps on average, at any."""
    left = chance.expovariate(1 / mean)

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        nonlocal left
        if event == "call":
            if not frame.f_code.co_filename.startswith(WITHIN):
                return None
            frame.f_trace_opcodes = True
        left -= 1
        if left <= 0 and seen["interruptions"] < size:
            left = chance.expovariate(1 / mean)
            seen["interruptions"] += 1
            what()
        return trace

    return trace


@contextlib.contextmanager
def step() -> Iterator[None]:
    sys.settrace(at_steps(interrupt, 300))
    yield
    sys.settrace(None)


@contextlib.contextmanager
def fork() -> Iterator[None]:
    warnings.simplefilter("ignore")
    sys.settrace(at_steps(fork_once, 2000))
    yield
    sys.settrace(None)


def fork_once() -> None:
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            signal.alarm(3 * int(LONGEST))
            call(proxies[0], small)
            host.close()
            status = len(wrong)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    if os.waitpid(pid, 0)[1]:
        wrong.append("a child")


@contextlib.contextmanager
def signals() -> Iterator[None]:
    def handler(*_: object) -> None:
        seen["interruptions"] += 1
        interrupt()
        if seen["interruptions"] < size:
            signal.setitimer(signal.ITIMER_REAL, chance.random() * 0.004 + 1e-5)

    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.001)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)


class Cycle:
    """Found by the garbage collector only."""

    def __init__(self) -> None:
        self.me = self
        seen["interruptions"] += 1

    def __del__(self) -> None:
        interrupt()
        if seen["interruptions"] < size:
            Cycle()


@contextlib.contextmanager
def collected() -> Iterator[None]:
    before = gc.get_threshold()
    gc.set_threshold(3, 2, 2)
    Cycle()
    yield
    gc.set_threshold(*before)


class Node:
    pass


@contextlib.contextmanager
def weak() -> Iterator[None]:
    kept: list[Any] = []

    def found(*_: object) -> None:
        seen["interruptions"] += 1
        interrupt()
        if seen["interruptions"] < size:
            make()

    def make() -> None:
        node: Any = Node()
        node.me = node
        kept[:] = [*kept[-10:], weakref.ref(node, found)]

    def collecting(phase: str, info: dict[str, int]) -> None:
        if phase == "start" and chance.random() < 0.01:
            interrupt()

    before = gc.get_threshold()
    gc.set_threshold(20, 2, 2)
    gc.callbacks.append(collecting)
    make()
    yield
    gc.callbacks.remove(collecting)
    gc.set_threshold(*before)


KINDS = {"step": step, "signal": signals, "del": collected, "weak": weak, "fork": fork}


def main() -> int:
    with KINDS[sys.argv[1]]():
        while seen["interruptions"] < size and not wrong:
            try:
                everything()
            except (onnx_dl.SupervisorError, onnx_dl.WorkerDied) as error:
                seen[f"outside: {type(error).__name__}"] += 1
    host.close()
    print(*wrong[:3], dict(seen), sep="\n")
    return 1 if wrong or not seen["results"] + seen["interruptions"] else 0


if __name__ == "__main__":
    sys.exit(main())
