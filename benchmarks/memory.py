"""Bytes and idle cycles: what our own processes take beside the models."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

from benchmarks.calls import PROVIDERS, figure
from benchmarks.cold import wait_for_cache
from benchmarks.models import cases, heavy
from benchmarks.report import Row
from onnx_dl import InferenceSessionProxy, ModelHost

_ADDS = """
import ctypes, sys, os; os.environ["ORT_DISABLE_TELEMETRY"] = "1"
import numpy as np, onnxruntime, psutil
from onnx_dl.workers import template
template._import_engine()  # a throw-away session, as the template makes one
x = np.ones(eval(sys.argv[2]), "f")
before = psutil.Process().memory_full_info().uss
kept = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
ctypes.CDLL(None).malloc_trim(0)  # as a worker does
kept.run(None, {"x": x})
print(psutil.Process().memory_full_info().uss - before)
"""


def _full(pid: int) -> psutil._common.pfullmem:
    return psutil.Process(pid).memory_full_info()


def _family(host: ModelHost) -> list[psutil.Process]:
    supervisor = psutil.Process(host.snapshot().supervisor_pid)
    return [supervisor, *supervisor.children(recursive=True)]


def beyond_the_session() -> list[Row]:
    """A worker's private bytes less what the same session adds to a process that has imported onnxruntime."""
    rows = []
    os.environ["ONNX_DL_CACHE"] = "off"
    with tempfile.TemporaryDirectory() as folder, ModelHost() as host:
        for name, model, shape in (("tiny", cases()[0].model, (1, 16)), ("200 MB", heavy(), (1, 2048))):
            path = Path(folder) / f"{name}.onnx"
            path.write_bytes(model)
            done = subprocess.run(
                [sys.executable, "-c", _ADDS, str(path), str(shape)], capture_output=True, check=True
            )
            with InferenceSessionProxy(str(path), providers=PROVIDERS, host=host) as proxy:
                proxy.run(None, {"x": np.ones(shape, np.float32)})
                private = next(m.usage.private for m in host.snapshot().models if m.pid)
                proxy.unload()
            work = f"private memory beyond session, {name}"
            rows.append(figure(work, "onnx-dl", [(private - float(done.stdout)) / 1e6], "MB", limit=8))
    return rows


def three_workers() -> list[Row]:
    """Three workers with the same 200 MB model (by three hosts): PSS, plain and from the load cache."""
    feed = {"x": np.ones((1, 2048), np.float32)}
    sums = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "heavy.onnx"
        path.write_bytes(heavy())
        os.environ["ONNX_DL_CACHE_DIR"] = str(Path(folder) / "cache")
        for switch in ("off", "on"):
            os.environ["ONNX_DL_CACHE"] = switch
            if switch == "on":
                with ModelHost() as host:
                    first = InferenceSessionProxy(str(path), providers=PROVIDERS, host=host)
                    first.run(None, feed)
                    wait_for_cache(Path(folder) / "cache")
            hosts = [ModelHost() for _ in range(3)]
            try:
                proxies = [InferenceSessionProxy(str(path), providers=PROVIDERS, host=h) for h in hosts]
                for proxy in proxies:
                    proxy.run(None, feed)
                pids = [m.pid for host in hosts for m in host.snapshot().models if m.pid]
                sums[switch] = sum(_full(pid).pss for pid in pids) / 1e6
            finally:
                for host in hosts:
                    host.close()
    work = "three workers, one 200 MB model, PSS"
    return [
        figure(work, "onnx-dl, plain", [sums["off"]], "MB"),
        figure(work, "onnx-dl, cache warm", [sums["on"]], "MB"),
        figure(work, "cache warm, ratio", [sums["on"] / sums["off"]], "x", limit=0.6),
    ]


def idle(seconds: float = 10.0) -> list[Row]:
    """Supervisor and template before any model; then CPU time with three idle workers."""
    with ModelHost() as host:
        host.start()
        time.sleep(2)  # the template imports onnxruntime
        supervisor = next(p for p in psutil.Process().children() if "onnx_dl" in " ".join(p.cmdline()))
        before = [supervisor, *supervisor.children(recursive=True)]
        pss = sum(_full(process.pid).pss for process in before) / 1e6
        proxies = [
            InferenceSessionProxy(case.model, providers=PROVIDERS, host=host, ttl=3600) for case in cases()
        ]
        for proxy, case in zip(proxies, cases(), strict=True):
            proxy.run(None, case.feed)
        time.sleep(1)
        processes = _family(host)

        def spent() -> float:
            return sum(sum(process.cpu_times()[:2]) for process in processes)

        start, at = spent(), time.monotonic()
        time.sleep(seconds)
        share = (spent() - start) / (time.monotonic() - at) * 100
    return [
        figure("before any model, PSS", "supervisor + template", [pss], "MB", limit=70),
        figure("idle, four models loaded", "share of a core", [share], "%", limit=1),
    ]
