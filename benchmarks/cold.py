"""What happens before a model is warm: first calls, reloads, cycles of load, run and unload."""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np

from benchmarks.calls import OURS, proxy_of
from benchmarks.models import Case, heavy
from benchmarks.report import Row
from benchmarks.timing import BASE, figure
from onnx_dl import EventType, InferenceSessionProxy, ModelHost
from onnx_dl.workers.load_cache.store import Cache

PLAIN, CACHED = "onnx-dl, plain load", "onnx-dl, load cache warm"
HEAVY_FEED: Final = {"x": np.ones((1, 2048), np.float32)}
_CYCLES: Final = 30
_FRESH: Final = """
import sys, time; started = time.perf_counter()
import numpy as np
from onnx_dl import InferenceSessionProxy
proxy = InferenceSessionProxy(sys.argv[1], providers=["CPUExecutionProvider"])
proxy.run(None, {"x": np.zeros((1, 16), "f")}); print(time.perf_counter() - started)
"""
_CREATE_AND_RUN: Final = """
import sys, time
import numpy as np, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads, options.inter_op_num_threads = 2, 1
feed = {"x": np.ones((1, 2048), "f")}
started = time.perf_counter()
onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"]).run(None, feed)
print(time.perf_counter() - started)
"""


@contextlib.contextmanager
def environment(**values: str) -> Iterator[None]:
    """Environment variables for a while."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def caching_host(folder: Path | None) -> ModelHost:
    """A host that is started, whose load cache is in ``folder``; None: it has none."""
    switch = (
        {"ONNX_DL_CACHE": "off"}
        if folder is None
        else {"ONNX_DL_CACHE": "on", "ONNX_DL_CACHE_DIR": str(folder)}
    )
    with environment(**switch):
        host = ModelHost()
        host.start()
    return host


def wait_for_cache(folder: Path, count: int = 1) -> None:
    """Until so many saves in the background are done, which come one after another."""
    deadline = time.monotonic() + 60 * count
    while len(Cache(folder, 1 << 40).entries()) < count:
        if time.monotonic() > deadline:
            raise TimeoutError("nothing was saved")
        time.sleep(0.1)
    time.sleep(1)  # the saver still reads back what it wrote


@contextlib.contextmanager
def heavy_file() -> Iterator[Path]:
    """200 MB of weights in a file, in a folder that goes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "heavy.onnx"
        path.write_bytes(heavy())
        yield path


def printed(code: str, path: str, bytecode: str | None = None) -> float:
    """The number that a fresh interpreter prints last which runs this code.

    ``bytecode``: folder for compiled modules, for it and the processes that it starts.
    """
    environ = {**os.environ}
    if bytecode is not None:
        environ |= {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": bytecode}
    done = subprocess.run([sys.executable, "-c", code, path], env=environ, stdout=subprocess.PIPE, check=True)
    return float(done.stdout.split()[-1])  # libraries may have printed before


def _fresh(path: str, count: int) -> list[float]:
    """Seconds of a fresh application's first call.  Modules are compiled, as where pip has installed them:
    from a checkout, in an environment that writes no bytecode, half of the time would be compilation."""
    with tempfile.TemporaryDirectory() as folder:
        return [printed(_FRESH, path, folder) for _ in range(count + 1)][1:]


def _seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def small(case: Case, rounds: int) -> list[Row]:
    """The tiny model: fresh application, reload, cycles."""
    with tempfile.NamedTemporaryFile(suffix=".onnx") as file, ModelHost() as host:
        file.write(case.model)
        file.flush()
        fresh = _fresh(file.name, max(3, rounds))
        with proxy_of(file.name, host) as proxy:
            proxy.run(None, case.feed)
            reloads = [_reload(proxy, case.feed) * 1e3 for _ in range(2 * rounds)]
        cycles = [_cycles(case.feed, file.name, host) for _ in range(max(3, rounds // 3))]
    return [
        figure("fresh application, first call", OURS, fresh, "s", limit=0.3),
        figure("unloaded to first result, tiny model", OURS, reloads, "ms", limit=25),
        figure("ttl=0: load + run + unload, tiny model", OURS, cycles, "/s", limit=25, at_least=True),
    ]


def _reload(proxy: InferenceSessionProxy, feed: dict[str, Any]) -> float:
    proxy.unload()
    return _seconds(lambda: proxy.run(None, feed))


def _cycles(feed: dict[str, Any], path: str, host: ModelHost) -> float:
    """Loads per second: counted, because a call that finds the model still loaded is no cycle."""
    with proxy_of(path, host, ttl=0) as brief, contextlib.closing(host.events()) as events:
        brief.run(None, feed)
        while events.get(10.0).type is not EventType.READY:
            continue
        seconds = _seconds(lambda: [brief.run(None, feed) for _ in range(_CYCLES)])
        brief.unload()
        seq, loads = host.snapshot().seq, 0
        while (event := events.get(10.0)).seq < seq:
            loads += event.type is EventType.READY
    return loads / seconds


def large(rounds: int) -> list[Row]:
    """200 MB of weights: with the load cache off, and on and filled."""
    found: dict[str, list[float]] = {BASE: [], PLAIN: [], CACHED: []}
    with heavy_file() as path, contextlib.ExitStack() as stack:
        folder = path.parent / "cache"
        proxies = {}
        for name, cache in ((PLAIN, None), (CACHED, folder)):
            host = stack.enter_context(caching_host(cache))
            proxies[name] = proxy_of(str(path), host)
            proxies[name].run(None, HEAVY_FEED)
        wait_for_cache(folder)
        for _ in range(max(3, rounds)):
            found[BASE].append(printed(_CREATE_AND_RUN, str(path)))
            for name, proxy in proxies.items():
                found[name].append(_reload(proxy, HEAVY_FEED))
                proxy.unload()
    work = "unloaded to first result, 200 MB"
    rows = [figure(work, name, values, "s") for name, values in found.items()]
    base = statistics.median(found[BASE])  # of other processes: rounds have nothing in common
    ratios = {name: [value / base for value in found[name]] for name in (PLAIN, CACHED)}
    return [
        *rows,
        figure(work, f"{PLAIN}, ratio", ratios[PLAIN], "x"),
        figure(work, f"{CACHED}, ratio", ratios[CACHED], "x", limit=0.5),
    ]
