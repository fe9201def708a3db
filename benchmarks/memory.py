"""Bytes and idle cycles: what our own processes take beside the models."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import numpy as np
import psutil

from benchmarks.calls import OURS, proxy_of
from benchmarks.cold import CACHED, HEAVY_FEED, PLAIN, caching_host, environment, heavy_file, wait_for_cache
from benchmarks.models import Case, heavy
from benchmarks.reclaim import BATCHES
from benchmarks.report import Row
from benchmarks.timing import figure
from onnx_dl import ModelHost

PUBLISHED: Final = "onnx-dl 0.1.0, in-process"
_ADDS: Final = """
import sys, os; os.environ["ORT_DISABLE_TELEMETRY"] = "1"
import numpy as np, onnxruntime, psutil
options = onnxruntime.SessionOptions()
options.intra_op_num_threads, options.inter_op_num_threads = 2, 1
x = np.ones(eval(sys.argv[2]), "f")
before = psutil.Process().memory_full_info().uss
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
session.run(None, {"x": x})
print(psutil.Process().memory_full_info().uss - before)
"""
# Needs nothing but numpy, so that it runs where an old version is installed.
_LEFT: Final = """
import gc, json, sys, time
import numpy as np
from onnx_dl import InferenceSessionProxy
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096
proxy = InferenceSessionProxy(sys.argv[1], providers=["CPUExecutionProvider"], ttl=1)
before, left = resident(), []
for _ in range(3):
    for batch in json.loads(sys.argv[2]):
        proxy.run(None, {"X": np.ones((batch, 1024), np.float32)})
    time.sleep(3)
    gc.collect()
    left.append(resident() - before)
print(json.dumps(left))
"""


def _pss(pid: int) -> int:
    return int(psutil.Process(pid).memory_full_info().pss)


def _worker_pids(host: ModelHost) -> list[int]:
    return [model.pid for model in host.snapshot().models if model.pid]


def beyond_the_session(tiny: Case, rounds: int) -> list[Row]:
    """A worker's private bytes less what the same session adds to a process that has imported onnxruntime."""
    rows = []
    with tempfile.TemporaryDirectory() as folder, ModelHost() as host:
        for name, model, shape in (("tiny model", tiny.model, (1, 16)), ("200 MB", heavy(), (1, 2048))):
            path = Path(folder) / f"{name}.onnx"
            path.write_bytes(model)
            found = [_beyond(host, str(path), shape) / 1e6 for _ in range(rounds)]
            rows.append(figure(f"private memory beyond session, {name}", OURS, found, "MB", limit=8))
    return rows


def _beyond(host: ModelHost, path: str, shape: tuple[int, int]) -> float:
    command = [sys.executable, "-c", _ADDS, path, str(shape)]
    adds = float(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    with proxy_of(path, host) as proxy:
        proxy.run(None, {"x": np.ones(shape, np.float32)})
        (pid,) = _worker_pids(host)
        private = psutil.Process(pid).memory_full_info().uss
        proxy.unload()
    return private - adds


def three_workers() -> list[Row]:
    """Three workers with the same 200 MB model (of three hosts): PSS, plain and from the load cache."""
    with heavy_file() as path:
        folder = path.parent / "cache"
        plain = _pss_of_three(str(path), None)
        with caching_host(folder) as host, proxy_of(str(path), host) as proxy:
            proxy.run(None, HEAVY_FEED)
            wait_for_cache(folder)
        cached = _pss_of_three(str(path), folder)
    work = "three workers, one 200 MB model, PSS"
    return [
        figure(work, PLAIN, [plain], "MB"),
        figure(work, CACHED, [cached], "MB"),
        figure(work, f"{CACHED}, ratio", [cached / plain], "x", limit=0.6),
    ]


def _pss_of_three(path: str, cache: Path | None) -> float:
    with contextlib.ExitStack() as stack:
        hosts = [stack.enter_context(caching_host(cache)) for _ in range(3)]
        for host in hosts:
            stack.enter_context(proxy_of(path, host)).run(None, HEAVY_FEED)
        pids = [pid for host in hosts for pid in _worker_pids(host)]
        if len(pids) != len(hosts):
            raise RuntimeError(f"{len(pids)} workers run, not {len(hosts)}")
        return sum(map(_pss, pids)) / 1e6


def idle(cases: dict[str, Case], seconds: float) -> list[Row]:
    """Supervisor and template before any model; then what they and idle workers do for ``seconds``."""
    with ModelHost() as host, contextlib.ExitStack() as stack:
        host.start()
        time.sleep(2)  # the template imports onnxruntime
        pss = sum(_pss(process.pid) for process in _family(host)) / 1e6
        for case in cases.values():
            proxy = stack.enter_context(proxy_of(case.model, host, ttl=3600))
            proxy.run(None, case.feed)
        time.sleep(2)  # onnxruntime's threads spin for a while, and idle lanes give memory back
        share = busy(_family(host), seconds)
    return [
        figure("before any model, PSS", "supervisor + template", [pss], "MB", limit=70),
        figure("after the last model, USS", "supervisor alone", [_alone(cases["tiny"])], "MB", limit=15),
        figure(
            f"idle for {seconds:.0f} s, {len(cases)} models loaded",
            "all processes",
            [share],
            "% core",
            limit=1,
        ),
    ]


def _alone(case: Case) -> float:
    """MB of a supervisor whose model is unloaded and whose template has ended.  It has a folder of its own,
    because it also holds what it knows of all models of this machine, which may be thousands."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(environment(ONNX_DL_TEMPLATE_TTL="0", ONNX_DL_CACHE_DIR=folder))
        host = stack.enter_context(ModelHost())
        with proxy_of(case.model, host) as proxy:
            proxy.run(None, case.feed)
        deadline = time.monotonic() + 60
        while len(family := _family(host)) > 1:
            if time.monotonic() > deadline:
                raise TimeoutError("the template does not end")
            time.sleep(0.1)
        time.sleep(2)  # the last events are written
        return float(family[0].memory_full_info().uss) / 1e6


def _family(host: ModelHost) -> list[psutil.Process]:
    supervisor = psutil.Process(host.snapshot().supervisor_pid)
    return [supervisor, *supervisor.children(recursive=True)]


def busy(processes: list[psutil.Process], seconds: float) -> float:
    """Per cent of a core; from the scheduler's nanoseconds, because ticks are 10 ms."""
    before, started = sum(map(cpu, processes)), time.monotonic()
    time.sleep(seconds)
    return (sum(map(cpu, processes)) - before) / (time.monotonic() - started) * 100


def cpu(process: psutil.Process) -> float:
    """Seconds that all threads of a process have run."""
    tasks = Path(f"/proc/{process.pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


def left_after_ttl(published: str | None) -> list[Row]:
    """Memory of the application above what it was before, after three cycles of load, runs and TTL.

    ``published``: an interpreter that has onnx-dl 0.1.0, whose sessions are in-process.
    """
    from onnx_dl.demo.assets import make_large_model

    work = "left in the application, 210 MB model"
    with tempfile.TemporaryDirectory() as folder:
        model = str(make_large_model(Path(folder)))
        rows = [figure(work, OURS, _left([sys.executable], model), "MB")]
        if published is None or _version(published) != "0.1.0":
            return [*rows, Row(work, PUBLISHED, None, note="not installed")]
        return [*rows, figure(work, PUBLISHED, _left([published, "-I"], model), "MB")]


def _left(python: list[str], model: str) -> list[float]:
    done = subprocess.run(
        [*python, "-c", _LEFT, model, json.dumps(BATCHES)], stdout=subprocess.PIPE, check=True
    )
    left: list[Any] = json.loads(done.stdout)
    return [value / 1e6 for value in left]


def _version(python: str) -> str:
    """Of the onnx-dl that an interpreter has; -I: not of ours, which PYTHONPATH may name."""
    code = "from importlib import metadata; print(metadata.version('onnx-dl'))"
    done = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True)
    return done.stdout.strip()
