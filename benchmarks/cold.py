"""What happens before a model is warm: first calls, reloads, cycles of load, run and unload."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.calls import PROVIDERS, figure, proxy_of
from benchmarks.models import cases, heavy
from benchmarks.report import Row
from onnx_dl import InferenceSessionProxy, ModelHost
from onnx_dl.workers.cache import Cache

_FRESH = """
import sys, time; started = time.perf_counter()
import numpy as np
from onnx_dl import InferenceSessionProxy
proxy = InferenceSessionProxy(sys.argv[1], providers=["CPUExecutionProvider"])
proxy.run(None, {"x": np.zeros((1, 16), "f")}); print(time.perf_counter() - started)
"""
_IN_PROCESS = """
import sys, time
import numpy as np, onnxruntime
x = np.ones((1, 2048), "f")
started = time.perf_counter()
onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"]).run(None, {"x": x})
print(time.perf_counter() - started)
"""


def _seconds(code: str, *arguments: str) -> float:
    """What a fresh interpreter that runs this code prints."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, check=True)
    return float(done.stdout)


def small(rounds: int) -> list[Row]:
    """The tiny model."""
    case = cases()[0]
    with tempfile.NamedTemporaryFile(suffix=".onnx") as file, ModelHost() as host:
        file.write(case.model)
        file.flush()
        fresh = [_seconds(_FRESH, file.name) for _ in range(max(3, rounds // 2))]
        proxy = proxy_of(file.name, host)
        proxy.run(None, case.feed)
        reloads = []
        for _ in range(2 * rounds):
            proxy.unload()
            started = time.perf_counter()
            proxy.run(None, case.feed)
            reloads.append((time.perf_counter() - started) * 1e3)
        proxy.close()
        cycles = [_cycles(case.feed, file.name, host) for _ in range(3)]
    return [
        figure("fresh application, first call", "onnx-dl", fresh, "s", limit=0.6),
        figure("unloaded to first result, tiny", "onnx-dl", reloads, "ms", limit=25),
        figure("ttl=0, load + run + unload", "onnx-dl", cycles, "/s", limit=25, at_least=True),
    ]


def _cycles(feed: dict, path: str, host: ModelHost) -> float:
    with InferenceSessionProxy(path, providers=PROVIDERS, ttl=0, host=host) as brief:
        brief.run(None, feed)
        seq, started = host.snapshot().seq, time.perf_counter()
        for _ in range(30):
            brief.run(None, feed)
        # Four events a cycle; counted, so that a call that found the model still loaded does not count.
        return (host.snapshot().seq - seq) / 4 / (time.perf_counter() - started)


def large(rounds: int) -> list[Row]:
    """200 MB of weights, with the load cache off, and on and filled."""
    import numpy as np

    feed = {"x": np.ones((1, 2048), np.float32)}
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "heavy.onnx")
        Path(path).write_bytes(heavy())
        os.environ["ONNX_DL_CACHE_DIR"] = str(Path(folder) / "cache")
        os.environ["ONNX_DL_CACHE"] = "off"
        plain_host = ModelHost()
        plain_host.start()
        os.environ["ONNX_DL_CACHE"] = "on"
        cached_host = ModelHost()
        cached_host.start()
        with plain_host, cached_host:
            plain, cached = (
                InferenceSessionProxy(path, providers=PROVIDERS, host=h) for h in (plain_host, cached_host)
            )
            cached.run(None, feed)
            wait_for_cache(Path(folder) / "cache")
            times: dict[str, list[float]] = {
                "in-process": [],
                "onnx-dl, plain": [],
                "onnx-dl, cache warm": [],
            }
            for _ in range(max(5, rounds // 2)):
                times["in-process"].append(_seconds(_IN_PROCESS, path))
                for name, proxy in (("onnx-dl, plain", plain), ("onnx-dl, cache warm", cached)):
                    proxy.unload()
                    started = time.perf_counter()
                    proxy.run(None, feed)
                    times[name].append(time.perf_counter() - started)
    work = "unloaded to first result, 200 MB"
    rows = [figure(work, name, values, "s") for name, values in times.items()]
    base = statistics.median(times["in-process"])
    ratios = [value / base for value in times["onnx-dl, cache warm"]]
    return [*rows, figure(work, "cache warm, ratio", ratios, "x", limit=0.5)]


def wait_for_cache(folder: Path) -> None:
    """Until a save in the background is done."""
    deadline = time.monotonic() + 60
    while not Cache(folder, 1 << 40).entries():
        if time.monotonic() > deadline:
            raise TimeoutError("nothing was saved")
        time.sleep(0.1)
    time.sleep(1)  # the saver still reads back what it wrote
