"""Warm calls: in-process and every other way take turns in short blocks within each round.

Each figure is the median over rounds of what a round's p50 (or p99) added to the in-process p50 of the same
round.
Outputs are compared bit for bit before anything is timed.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import importlib.util
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np

from benchmarks.floor import BarePipe
from benchmarks.models import Case, cases
from benchmarks.others import OTHERS, make_session
from benchmarks.report import Row
from onnx_dl import InferenceSessionProxy, ModelHost

PROVIDERS = ["CPUExecutionProvider"]
THREADS = 2
Call = Callable[[], object]


def options(threads: int = THREADS) -> object:
    import onnxruntime

    made = onnxruntime.SessionOptions()
    made.intra_op_num_threads = threads
    return made


def proxy_of(model: bytes | str, host: ModelHost, latency: str = "normal", threads: int = THREADS):
    return InferenceSessionProxy(model, options(threads), providers=PROVIDERS, host=host, latency=latency)


def percentile(times: list[float], share: float) -> float:
    return sorted(times)[min(len(times) - 1, int(share * len(times)))]


def block(call: Call, count: int) -> list[float]:
    """Microseconds of each of ``count`` calls."""
    times = []
    for _ in range(count):
        started = time.perf_counter()
        call()
        times.append((time.perf_counter() - started) * 1e6)
    return times


def interleave(ways: dict[str, Call], count: int, rounds: int) -> dict[str, list[list[float]]]:
    """The times of each way in each round; the first round warms up."""
    found: dict[str, list[list[float]]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, call in ways.items():
            times = block(call, count)
            if turn:
                found[name].append(times)
    return found


def added(found: dict[str, list[list[float]]], way: str, share: float = 0.5) -> list[float]:
    """By round, what a way's percentile is above the in-process p50."""
    return [
        percentile(mine, share) - percentile(base, 0.5)
        for mine, base in zip(found[way], found["in-process"], strict=True)
    ]


def figure(work: str, way: str, values: list[float], unit: str = "µs+", **asked: float | bool | None) -> Row:
    return Row(work, way, statistics.median(values), unit, least=min(values), most=max(values), **asked)


def measure(case: Case, host: ModelHost, rounds: int, others: list[str]) -> list[Row]:
    """One case by every way."""
    (name, data), *_ = case.feed.items()
    session = make_session(case.model, THREADS)
    (expected,) = session.run(None, case.feed)
    target = np.empty_like(data)
    with contextlib.ExitStack() as stack:
        ways: dict[str, Call] = {"in-process": lambda: session.run(None, case.feed)}
        if data.nbytes > 1 << 16:
            ways["a copy of the input"] = lambda: np.copyto(target, data)
        ways |= _floors(case, data, expected, stack)
        ways |= _ours(case, host, name, data, stack)
        ways |= _others(case, others, stack)
        for way, call in ways.items():
            for _ in range(3):
                result = call()
            result = result[0] if isinstance(result, list) else result
            same = result is None or np.array_equal(result, expected)
            assert same, f"{way} computes something else"
        found = interleave(ways, case.calls, rounds)
    return _judge(case, data, found)


def _floors(case: Case, data: np.ndarray, result: np.ndarray, stack: contextlib.ExitStack) -> dict[str, Call]:
    pipe = BarePipe(case.model, THREADS, data, result, spin=False)
    stack.callback(pipe.close)
    ways: dict[str, Call] = {"floor: a bare pipe": lambda: pipe.run(data)}
    if data.nbytes <= 1 << 16:
        spin = BarePipe(case.model, THREADS, data, result, spin=True)
        stack.callback(spin.close)
        ways["floor: bare spinning"] = lambda: spin.run(data)
    return ways


def _ours(
    case: Case, host: ModelHost, name: str, data: np.ndarray, stack: contextlib.ExitStack
) -> dict[str, Call]:
    normal, low = (stack.enter_context(proxy_of(case.model, host, how)) for how in ("normal", "low"))
    ways: dict[str, Call] = {
        "onnx-dl": lambda: normal.run(None, case.feed),
        "onnx-dl, latency low": lambda: low.run(None, case.feed),
    }
    if data.nbytes > 1 << 16:
        inside = normal.empty(data.shape, data.dtype)
        inside[...] = data
        ways["onnx-dl, input in arena"] = lambda: normal.run(None, {name: inside})
        before = stack.enter_context(proxy_of(_identity(data), host))
        chained = before.run(None, {"x": data})[0]
        ways["onnx-dl, chained"] = lambda: normal.run(None, {name: chained})
    return ways


def _identity(data: np.ndarray) -> bytes:
    from onnx import helper

    from benchmarks.models import make_model

    return make_model([helper.make_node("Identity", ["x"], ["y"])], {"x": data.shape}, {"y": data.shape})


def _others(case: Case, others: list[str], stack: contextlib.ExitStack) -> dict[str, Call]:
    ways: dict[str, Call] = {}
    for name in others:
        other = OTHERS[name](case.model, THREADS)
        stack.callback(other.close)
        ways[name] = lambda other=other: other.run(case.feed)
    return ways


def _judge(case: Case, data: np.ndarray, found: dict[str, list[list[float]]]) -> list[Row]:
    base = [percentile(times, 0.5) for times in found["in-process"]]
    rows = [figure(case.name, "in-process", base, "µs")]
    tiny = data.nbytes <= 1 << 16
    copy = 0.0
    if not tiny:
        copies = [percentile(times, 0.5) for times in found["a copy of the input"]]
        copy = statistics.median(copies)
        rows.append(figure(case.name, "a copy of the input", copies, "µs"))
    if case.name.startswith("conv"):
        ratios = [1 + extra / p50 for extra, p50 in zip(added(found, "onnx-dl"), base, strict=True)]
        rows.append(figure(case.name, "onnx-dl, ratio", ratios, "x", limit=1.02))
    limits: dict[str, float] = {"onnx-dl": 20, "onnx-dl, latency low": 10} if tiny else {}
    if data.nbytes > 1 << 20:
        limits = {"onnx-dl": 1.5 * copy + 25, "onnx-dl, input in arena": 40, "onnx-dl, chained": 40}
    ways = [way for way in found if way not in ("in-process", "a copy of the input")]
    return rows + [figure(case.name, way, added(found, way), limit=limits.get(way)) for way in ways]


# --- streams and crowds ----------------------------------------------------------------------------------


def voice_activity(host: ModelHost, rounds: int) -> list[Row]:
    """silero-vad from its package: one stream, its state fed back, 512 samples (and 64 of context) a call."""
    found_spec = importlib.util.find_spec("silero_vad")
    if found_spec is None or found_spec.origin is None:
        return []
    path = str(Path(found_spec.origin).parent / "data" / "silero_vad.onnx")
    chunk = np.random.default_rng(0).standard_normal((1, 576)).astype(np.float32)
    rate = np.array(16000, np.int64)

    def stream(session: object) -> Call:
        state = np.zeros((2, 1, 128), np.float32)

        def call() -> object:
            nonlocal state
            out, state = session.run(None, {"input": chunk, "state": state, "sr": rate})
            return out

        return call

    import onnxruntime

    made = onnxruntime.SessionOptions()
    made.intra_op_num_threads = made.inter_op_num_threads = 1
    sessions = {"in-process": onnxruntime.InferenceSession(path, made, providers=PROVIDERS)}
    for way, latency in (("onnx-dl", "normal"), ("onnx-dl, latency low", "low")):
        sessions[way] = InferenceSessionProxy(path, made, providers=PROVIDERS, host=host, latency=latency)
    ways = {way: stream(session) for way, session in sessions.items()}
    results = {way: [call() for _ in range(5)] for way, call in ways.items()}
    assert all(np.array_equal(results["in-process"], result) for result in results.values())
    found = interleave(ways, 200, rounds)
    work = "silero-vad, one stream"
    base = [percentile(times, 0.5) for times in found["in-process"]]
    rows = [figure(work, "in-process", base, "µs")]
    for way, limit in (("onnx-dl", 1.3), ("onnx-dl, latency low", 1.15)):
        for name, share, asked in ((way, 0.5, limit), (f"{way}, p99", 0.99, 2.0)):
            ratios = [
                percentile(mine, share) / percentile(theirs, share)
                for mine, theirs in zip(found[way], found["in-process"], strict=True)
            ]
            rows.append(figure(work, name, ratios, "x", limit=asked))
        sessions[way].close()
    return rows


def crowd(host: ModelHost, rounds: int) -> list[Row]:
    """Four threads that call the same model."""
    tiny, *_, convolutions = cases()
    rows = []
    for case, count in ((tiny, 2000), (convolutions, 6)):
        rows += _crowd(case, count, host, rounds, tiny)
    return rows


def _crowd(case: Case, count: int, host: ModelHost, rounds: int, tiny: Case) -> list[Row]:
    session, proxy = make_session(case.model, 1), proxy_of(case.model, host, threads=1)
    ways = {"in-process": session, "onnx-dl": proxy}
    speeds: dict[str, list[float]] = {name: [] for name in ways}

    def work(way: object) -> None:
        for _ in range(count):
            way.run(None, case.feed)

    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        for turn in range(rounds + 1):
            for name, way in ways.items():
                started = time.perf_counter()
                list(threads.map(work, [way] * 4))
                if turn:
                    speeds[name].append(4 * count / (time.perf_counter() - started))
    proxy.close()
    name = f"{case.name}, 4 threads"
    rows = [figure(name, way, values, "/s") for way, values in speeds.items()]
    if case is tiny:
        return [rows[0], rows[1]._replace(limit=30_000, at_least=True)]
    ratios = [a / b for a, b in zip(speeds["onnx-dl"], speeds["in-process"], strict=True)]
    return [*rows, figure(name, "onnx-dl, ratio", ratios, "x", limit=0.95, at_least=True)]


def crowd_floor(rounds: int) -> list[Row]:
    """Four threads with a bare pipe each, to the same tiny model."""
    tiny = cases()[0]
    (data,) = tiny.feed.values()
    pipes = [BarePipe(tiny.model, 1, data, np.empty_like(data), spin=False) for _ in range(4)]
    speeds = []
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        for turn in range(rounds + 1):
            started = time.perf_counter()
            list(threads.map(lambda pipe: [pipe.run(data) for _ in range(2000)], pipes))
            if turn:
                speeds.append(8000 / (time.perf_counter() - started))
    for pipe in pipes:
        pipe.close()
    return [figure(f"{tiny.name}, 4 threads", "floor: 4 bare pipes", speeds, "/s")]
