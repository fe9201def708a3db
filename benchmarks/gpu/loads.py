"""Loads of 512 MB of weights, and the memory of a GPU that models take and leave."""

from __future__ import annotations

import contextlib
import gc
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.calls import OURS
from benchmarks.cold import CACHED, PLAIN, caching_host, environment, printed
from benchmarks.gpu import machine
from benchmarks.gpu.works import another, proxy_of, session_of
from benchmarks.models import heavy
from benchmarks.report import Row
from benchmarks.timing import BASE, figure
from onnx_dl import ModelHost
from onnx_dl.workers.load_cache.store import Cache

FEED: Final = {"x": np.ones((1, 2048), np.float32)}
_SAVED_WITHIN: Final = 20.0
_HEAD: Final = """
import gc, sys, time
import numpy as np
started = time.perf_counter()
"""
_FRESH: Final = f"""{_HEAD}
from benchmarks.gpu.works import PROVIDERS
from onnx_dl import InferenceSessionProxy
InferenceSessionProxy(sys.argv[1], providers=PROVIDERS).run(None, {{"x": np.ones((1, 2048), "f")}})
print(time.perf_counter() - started)
"""
_FRESH_BASE: Final = f"""{_HEAD}
import onnxruntime
if hasattr(onnxruntime, "preload_dlls"):
    onnxruntime.preload_dlls()
providers = [("CUDAExecutionProvider", {{"cudnn_conv_algo_search": "HEURISTIC"}}), "CPUExecutionProvider"]
onnxruntime.InferenceSession(sys.argv[1], providers=providers).run(None, {{"x": np.ones((1, 2048), "f")}})
print(time.perf_counter() - started)
"""
_LEFT_BASE: Final = f"""{_HEAD}
from benchmarks.gpu.machine import preload, used
from benchmarks.gpu.works import session_of
before = used()
preload()
session = session_of(sys.argv[1])
session.run(None, {{"x": np.ones((1, 2048), "f")}})
del session
gc.collect()
print(used() - before)
"""
_THREE_BASE: Final = f"""{_HEAD}
from benchmarks.gpu.machine import preload, used
from benchmarks.gpu.works import another, session_of
before = used()
preload()
sessions = [session_of(another(number)) for number in range(3)]
for number, session in enumerate(sessions):
    session.run(None, {{"x": np.ones((1, 16 + number), "f")}})
print(used() - before)
"""


@contextlib.contextmanager
def large_file() -> Iterator[Path]:
    """512 MB of weights in a file, in a folder that goes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "large.onnx"
        path.write_bytes(heavy(layers=32))
        yield path


def measure(path: Path, rounds: int) -> Iterator[list[Row]]:
    """From unloaded to the first result, and then a fresh application's first call: with and without the
    cache."""
    folder = path.parent / "cache"
    with contextlib.ExitStack() as stack:
        proxies = {}
        for name, cache in ((PLAIN, None), (CACHED, folder)):
            host = stack.enter_context(caching_host(cache))
            proxies[name] = stack.enter_context(proxy_of(str(path), host))
            proxies[name].run(None, FEED)
        note = "" if _is_saved(folder) else "nothing was saved in the load cache"
        for proxy in proxies.values():
            proxy.unload()
        ways: dict[str, Callable[[], object]] = {BASE: lambda: session_of(str(path)).run(None, FEED)}
        ways |= {name: lambda proxy=proxy: proxy.run(None, FEED) for name, proxy in proxies.items()}
        reloads: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, way in ways.items():
                reloads[name].append(_seconds(way))
                gc.collect()
                if name in proxies:
                    proxies[name].unload()
    yield _rows("512 MB, unloaded to result", reloads, 0.5, note)
    yield _rows("512 MB, fresh application", _fresh(path, folder, rounds), 1.5, note)


def _rows(work: str, found: dict[str, list[float]], limit: float, note: str) -> list[Row]:
    return [
        figure(work, name, values, "s", limit=limit if name == CACHED else None, note=note * (name == CACHED))
        for name, values in found.items()
    ]


def _fresh(path: Path, cache: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds from the first line of a program, which has numpy, to the result of its first call."""
    off, on = {"ONNX_DL_CACHE": "off"}, {"ONNX_DL_CACHE": "on", "ONNX_DL_CACHE_DIR": str(cache)}
    ways = {BASE: (_FRESH_BASE, off), PLAIN: (_FRESH, off), CACHED: (_FRESH, on)}
    found: dict[str, list[float]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as bytecode:
        for turn in range(rounds + 1):  # the first compiles modules
            for name, (code, variables) in ways.items():
                with environment(**variables):
                    seconds = printed(code, str(path), bytecode)
                if turn:
                    found[name].append(seconds)
    return found


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _is_saved(folder: Path) -> bool:
    """Waits for the save in the background."""
    deadline = time.monotonic() + _SAVED_WITHIN
    while not Cache(folder, 1 << 40).entries():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    time.sleep(1)  # the saver still reads back what it wrote
    return True


# --- memory of the device --------------------------------------------------------------------------------


def left(path: Path, rounds: int) -> list[Row]:
    """What the device has above what it had before a load, when the model is unloaded."""
    found: dict[str, list[float]] = {BASE: [], OURS: []}
    with ModelHost() as host, proxy_of(str(path), host) as proxy:
        for _ in range(rounds):
            found[BASE].append(printed(_LEFT_BASE, str(path)) / 1e6)
            found[OURS].append(_above(lambda: (proxy.run(None, FEED), proxy.unload())))
    work = "GPU memory after unload, 512 MB"
    return [
        figure(work, f"{BASE}, after del", found[BASE], "MB"),
        figure(work, OURS, found[OURS], "MB", limit=0),
    ]


def three(rounds: int) -> list[Row]:
    """Three small models: a context each, or one for all."""
    found: dict[str, list[float]] = {BASE: [], "three workers": [], "one group": []}
    for _ in range(rounds):
        found[BASE].append(printed(_THREE_BASE, "") / 1e6)
        for name, group in (("three workers", None), ("one group", "three")):
            with contextlib.ExitStack() as stack:
                host = stack.enter_context(ModelHost())
                proxies = [
                    stack.enter_context(proxy_of(another(number), host, group=group)) for number in range(3)
                ]
                found[name].append(_above(lambda proxies=proxies: _run_all(proxies)))
    work = "GPU memory of three small models"
    return [
        figure(work, name, values, "MB", limit=1515 if name == "one group" else None)
        for name, values in found.items()
    ]


def _run_all(proxies: list[Any]) -> None:
    for number, proxy in enumerate(proxies):
        proxy.run(None, {"x": np.ones((1, 16 + number), np.float32)})


def _above(use: Callable[[], object]) -> float:
    """MB that the device has more after a use than before."""
    before = machine.used()
    use()
    return (machine.used() - before) / 1e6
