"""What idle processes take of the processor, and what onnxruntime's spinning threads do.

A session's threads look for more work for a while after each run before they sleep; workers bound that while
by default.  Three workers of one model, with the bound, without it and without spinning, take turns in short
blocks; processor time is that of all threads of the worker.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable
from typing import Final, NamedTuple

import psutil

from benchmarks.calls import PROVIDERS, options
from benchmarks.memory import busy, cpu
from benchmarks.models import Case
from benchmarks.report import Row
from benchmarks.timing import figure, percentile
from onnx_dl import InferenceSessionProxy, ModelHost

ENTRY: Final = "session.intra_op.allow_spinning"
WAYS: Final = {"spinning, bounded (the default)": None, f'{ENTRY} = "1"': "1", f'{ENTRY} = "0"': "0"}
"""What each way sets; "1" is how onnxruntime spins by itself."""
BOUNDED, UNBOUNDED, STILL = WAYS
_RATE: Final = 30.0
"""Calls per second, as of a camera."""


class Block(NamedTuple):
    """Calls of one worker."""

    latency: float
    """Microseconds, the median."""
    share: float
    """Per cent of a core, from the first call to a quarter of a second after the last."""


def idle(cases: dict[str, Case], seconds: float) -> list[Row]:
    """Each process for itself, once its models were used; by what the kernel has counted."""
    with ModelHost() as host, contextlib.ExitStack() as stack:
        for case in cases.values():
            proxy = stack.enter_context(_proxy(case, host, None))
            for _ in range(20):
                proxy.run(None, case.feed)
        time.sleep(2)  # threads spin for a while, and idle lanes give memory back five seconds after
        snapshot = host.snapshot()
        supervisor = psutil.Process(snapshot.supervisor_pid)
        workers = [psutil.Process(status.pid) for status in snapshot.models if status.pid]
        others = {process.pid for process in workers}
        template = [p for p in supervisor.children() if p.pid not in others]
        before = [cpu(process) for process in workers]
        share = busy([supervisor, *template], seconds)
        took = [(cpu(process) - was) / seconds * 100 for process, was in zip(workers, before, strict=True)]
    work = f"idle for {seconds:.0f} s after calls"
    return [
        figure(work, "supervisor and template", [share], "% core", limit=1),
        figure(work, f"each of {len(took)} workers", took, "% core", limit=1),
    ]


def measure(case: Case, rounds: int) -> list[Row]:
    """Calls at a steady rate, and calls that follow each other."""
    with ModelHost() as host, contextlib.ExitStack() as stack:
        ways = {name: stack.enter_context(_proxy(case, host, entry)) for name, entry in WAYS.items()}
        pids = {}
        for name, proxy in ways.items():
            proxy.run(None, case.feed)
            (pids[name],) = {s.pid for s in host.snapshot().models if s.pid} - set(pids.values())
        return [
            *_rows(f"{case.name}, {_RATE:.0f} calls/s", ways, pids, case, rounds, int(_RATE), 1 / _RATE),
            *_rows(f"{case.name}, one after another", ways, pids, case, rounds, case.calls, 0.0),
        ]


def _proxy(case: Case, host: ModelHost, entry: str | None) -> InferenceSessionProxy:
    """With as many threads as onnxruntime takes by itself."""
    made = options(0)
    if entry is not None:
        made.add_session_config_entry(ENTRY, entry)
    return InferenceSessionProxy(case.model, made, providers=PROVIDERS, host=host)


def _rows(
    work: str,
    ways: dict[str, InferenceSessionProxy],
    pids: dict[str, int],
    case: Case,
    rounds: int,
    count: int,
    every: float,
) -> list[Row]:
    found: dict[str, list[Block]] = {name: [] for name in ways}
    for turn in range(rounds + 1):  # the first warms up
        for name in ways if turn % 2 else reversed(ways):
            call = functools.partial(ways[name].run, None, case.feed)
            made = steady(call, psutil.Process(pids[name]), count, every)
            if turn:
                found[name].append(made)
    ratios = {
        name: [mine.latency / base.latency for mine, base in zip(found[name], found[UNBOUNDED], strict=True)]
        for name in (BOUNDED, STILL)
    }
    return [
        *(figure(work, name, [block.latency for block in blocks], "µs") for name, blocks in found.items()),
        *(figure(work, f"{name}, latency by unbounded", values, "x") for name, values in ratios.items()),
        *(
            figure(work, f"{name}, worker", [block.share for block in blocks], "% core")
            for name, blocks in found.items()
        ),
    ]


def steady(call: Callable[[], object], worker: psutil.Process, count: int, every: float) -> Block:
    """``count`` calls, one ``every`` so many seconds or, with 0, one after another."""
    times = []
    began, before = time.perf_counter(), cpu(worker)
    for index in range(count):
        time.sleep(max(0.0, began + index * every - time.perf_counter()))
        started = time.perf_counter()
        call()
        times.append((time.perf_counter() - started) * 1e6)
    time.sleep(0.25)
    took = time.perf_counter() - began
    return Block(percentile(times, 0.5), (cpu(worker) - before) / took * 100)
