"""What a hard cap costs a call, and how far beyond it a worker gets before it ends itself."""

from __future__ import annotations

import contextlib
import functools
from typing import Final

import numpy as np
import psutil
from onnx import helper, numpy_helper

from benchmarks.calls import PROVIDERS, options
from benchmarks.models import Case, make_model
from benchmarks.report import Row
from benchmarks.spinning import steady
from benchmarks.timing import Times, Way, figure
from onnx_dl import InferenceSessionProxy, MemoryLimitExceeded, ModelHost

CAPPED, FREE = "max_memory_hard", "no hard cap"
_RATE: Final = 30
_LIMIT: Final = 150_000_000
_ROWS, _COLUMNS = 20_000, 25_000


def cost(case: Case, rounds: int) -> list[Row]:
    """A call of a model with a hard cap beside one of the same model without."""
    with ModelHost() as host, contextlib.ExitStack() as stack:
        proxies = {
            name: stack.enter_context(
                InferenceSessionProxy(
                    case.model,
                    options(case.threads),
                    providers=PROVIDERS,
                    host=host,
                    max_memory_hard="8GB" if name == CAPPED else None,
                )
            )
            for name in (FREE, CAPPED)
        }
        pids: dict[str, int] = {}
        calls = {}
        for name, proxy in proxies.items():
            calls[name] = functools.partial(proxy.run, None, case.feed)
            calls[name]()
            (pids[name],) = {s.pid for s in host.snapshot().models if s.pid} - set(pids.values())
        times = Times([Way(name, call) for name, call in calls.items()], case.calls, rounds)
        shares: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                shares[name].append(steady(call, psutil.Process(pids[name]), _RATE, 1 / _RATE).share)
    added = [a - b for a, b in zip(times.by_round(CAPPED), times.by_round(FREE), strict=True)]
    return [
        figure(case.name, f"{CAPPED}, added", added, "µs"),
        *(figure(f"{case.name}, {_RATE} calls/s", name, found, "% core") for name, found in shares.items()),
    ]


def overshoot(rounds: int) -> list[Row]:
    """Megabytes beyond 150 that a worker had when it saw that it had too many: of one thread that fills a
    large tensor, and of all of them."""
    found: dict[str, list[float]] = {"one thread": [], "all threads": []}
    for _ in range(rounds):
        for name, megabytes in found.items():
            megabytes.append(_exceed(parallel=name == "all threads"))
    work = "beyond a hard cap of 150 MB, a run of 2 GB"
    return [figure(work, name, megabytes, "MB") for name, megabytes in found.items()]


def _exceed(*, parallel: bool) -> float:
    with ModelHost() as host:  # a new one: a model that fails again and again has to wait
        proxy = host.open(_large(parallel), options(0), providers=PROVIDERS, max_memory_hard=_LIMIT)
        try:
            proxy.run(None, {"x": np.ones((_ROWS, 1), np.float32)})
        except MemoryLimitExceeded as error:
            return (error.used - error.limit) / 1e6
    raise RuntimeError("a run of 2 GB stayed below 150 MB")


def _large(parallel: bool) -> bytes:
    """A column, as often as makes 2 GB: multiplied by a row, which all threads do, or repeated by one."""
    row = np.ones((1, _COLUMNS), np.float32) if parallel else np.array([1, _COLUMNS], np.int64)
    nodes = [
        helper.make_node("MatMul" if parallel else "Expand", ["x", "row"], ["large"]),
        helper.make_node("ReduceMax", ["large"], ["y"], keepdims=0),
    ]
    return make_model(nodes, {"x": ["n", 1]}, {"y": []}, [numpy_helper.from_array(row, "row")])
