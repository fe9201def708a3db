"""Streams of small calls, as packages make them: voice activity, wake words, and a microphone's pace.

The package of silero-vad is measured if it and torch are installed.  Wake words have the call shape of
openwakeword: for each frame of 80 ms one model makes a spectrogram, one an embedding, and six classify it.
Their weights are random: the package loads its own from the network.
"""

from __future__ import annotations

import contextlib
import importlib.util
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import psutil
from onnx import helper, numpy_helper

from benchmarks.calls import LOW, NORMAL, OURS, proxy_of
from benchmarks.floor import Floor
from benchmarks.models import make_model, voice_activity
from benchmarks.others import make_session
from benchmarks.report import Row
from benchmarks.timing import BASE, Times, Way, figure
from onnx_dl import ModelHost

KINDS: Final = {OURS: "auto", NORMAL: "normal", LOW: "low"}
PERIOD: Final = 0.032
"""Seconds between two chunks of a microphone."""
_RATE: Final = 16000
_CHUNK: Final = 512
_WORDS: Final = 6

Run = Callable[[dict[str, Any]], list[Any]]
Make = Callable[[bytes], Run]


class _Floors:
    """Bare pipes to a child for each model, all on one core: what any worker costs that sleeps."""

    name = "floor: bare pipes, one core"

    def __init__(self) -> None:
        self._floors: list[Floor] = []

    def make(self, model: bytes) -> Run:
        """A child is started at the first call, which shows the shapes."""
        found: list[Floor] = []

        def run(feed: dict[str, Any]) -> list[Any]:
            if not found:
                results = make_session(model, 1).run(None, feed)
                found.append(Floor(model, 1, feed, results, "pipe", one_core=True))
                self._floors += found
            return found[0].run(feed)

        return run

    def begin(self) -> None:
        for floor in self._floors:
            floor.begin()

    def end(self) -> None:
        for floor in self._floors[:1]:
            floor.end()

    def close(self) -> None:
        for floor in self._floors:
            floor.close()


def measure(rounds: int) -> list[Row]:
    with contextlib.ExitStack() as stack:
        host = stack.enter_context(ModelHost())
        makers: dict[str, Make] = {BASE: _in_process}
        for name, latency in KINDS.items():
            makers[name] = _made_by(host, latency, stack)
        rows = _compared("wake words, 8 models a frame", makers, wake_words, 100, rounds)
        if importlib.util.find_spec("silero_vad") and importlib.util.find_spec("torch"):
            rows += _compared("silero-vad by its package", makers, voice_package, 200, rounds)
        return [*rows, *_microphone(makers, rounds)]


def _in_process(model: bytes) -> Run:
    session = make_session(model, 1)
    return lambda feed: session.run(None, feed)


def _made_by(host: ModelHost, latency: str, stack: contextlib.ExitStack) -> Make:
    def make(model: bytes) -> Run:
        proxy = stack.enter_context(proxy_of(model, host, threads=1, latency=latency))
        return lambda feed: proxy.run(None, feed)

    return make


def _compared(
    work: str, makers: dict[str, Make], stream: Callable[[Make], Callable[[], Any]], count: int, rounds: int
) -> list[Row]:
    with contextlib.closing(_Floors()) as floors:
        pipes = Way(floors.name, stream(floors.make), floors.begin, floors.end)
        pipes.call()
        found = Times([pipes, *(Way(name, stream(make)) for name, make in makers.items())], count, rounds)
    ratios = (
        figure(work, f"{name}, p50 ratio", found.ratios(name), "x", p99=found.p99(name))
        for name in (floors.name, *KINDS)
    )
    return [figure(work, BASE, found.by_round(BASE), "µs", p99=found.p99(BASE)), *ratios]


# --- what is called --------------------------------------------------------------------------------------


class _Session:
    """What the package of silero-vad uses of a session."""

    def __init__(self, run: Run) -> None:
        self._run = run

    def run(self, _: None, feed: dict[str, Any]) -> list[Any]:
        return self._run(feed)


def voice_package(make: Make) -> Callable[[], Any]:
    """A call of silero-vad's own wrapper, with tensors of torch."""
    import silero_vad
    import torch
    from silero_vad.utils_vad import OnnxWrapper

    path = Path(silero_vad.__file__).parent / "data" / "silero_vad.onnx"
    wrapper = OnnxWrapper(str(path), force_onnx_cpu=True)
    wrapper.session = _Session(make(path.read_bytes()))
    audio = torch.from_numpy(np.random.default_rng(0).standard_normal(_CHUNK, dtype=np.float32) / 10)
    return lambda: wrapper(audio, _RATE)


def wake_words(make: Make) -> Callable[[], Any]:
    """One frame: 1,760 samples to a spectrogram, 76 of its rows to an embedding, 16 of these to each word."""
    spectrogram, embedding = make(_spectrogram()), make(_embedding())
    words = [make(_word(seed)) for seed in range(_WORDS)]
    rng = np.random.default_rng(0)
    samples = rng.standard_normal((1, 1, 1760), dtype=np.float32)
    rows = rng.standard_normal((1, 1, 76, 32), dtype=np.float32)
    features = rng.standard_normal((1, 16, 96), dtype=np.float32)

    def frame() -> list[Any]:
        made = spectrogram({"x": samples})[0]
        rows[0, 0] = np.roll(rows[0, 0], -8, 0)
        rows[0, 0, -8:] = made[0, :, :8].T
        embedded = embedding({"x": rows})[0]
        features[0] = np.roll(features[0], -1, 0)
        features[0, -1] = embedded.reshape(-1)
        return [word({"x": features})[0] for word in words]

    return frame


def _weights(seed: int, shapes: dict[str, tuple[int, ...]]) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [
        numpy_helper.from_array(
            rng.standard_normal(shape, dtype=np.float32) / np.float32(np.prod(shape[1:]) or 1) ** 0.5, name
        )
        for name, shape in shapes.items()
    ]


def _spectrogram() -> bytes:
    weights = _weights(0, {"basis": (128, 1, 512), "mel": (32, 128, 1)})
    nodes = [
        helper.make_node("Conv", ["x", "basis"], ["t"], strides=[160]),
        helper.make_node("Mul", ["t", "t"], ["p"]),
        helper.make_node("Conv", ["p", "mel"], ["y"]),
    ]
    return make_model(nodes, {"x": [1, 1, 1760]}, {"y": [1, 32, 8]}, weights)


def _embedding(layers: int = 8, channels: int = 24) -> bytes:
    shapes = {f"w{i}": (channels, channels if i else 1, 3, 3) for i in range(layers)}
    nodes = []
    for i in range(layers):
        strides = [2, 2] if i in (1, 3, 5) else [1, 1]
        node = helper.make_node("Conv", [f"r{i - 1}" if i else "x", f"w{i}"], [f"t{i}"], strides=strides)
        node.attribute.append(helper.make_attribute("pads", [1, 1, 1, 1]))
        nodes += [node, helper.make_node("Relu", [f"t{i}"], [f"r{i}"])]
    shapes["last"] = (96, channels, 1, 1)
    nodes.append(helper.make_node("Conv", [f"r{layers - 1}", "last"], ["e"]))
    nodes.append(helper.make_node("GlobalAveragePool", ["e"], ["y"]))
    return make_model(nodes, {"x": [1, 1, 76, 32]}, {"y": [1, 96, 1, 1]}, _weights(1, shapes))


def _word(seed: int) -> bytes:
    shapes = {"a": (1536, 128), "b": (128, 128), "c": (128, 1), "one": (128,), "two": (128,)}
    nodes = [
        helper.make_node("Flatten", ["x"], ["f"]),
        helper.make_node("Gemm", ["f", "a"], ["t0"]),
        helper.make_node("LayerNormalization", ["t0", "one"], ["n0"]),
        helper.make_node("Relu", ["n0"], ["r0"]),
        helper.make_node("Gemm", ["r0", "b"], ["t1"]),
        helper.make_node("LayerNormalization", ["t1", "two"], ["n1"]),
        helper.make_node("Relu", ["n1"], ["r1"]),
        helper.make_node("Gemm", ["r1", "c"], ["t2"]),
        helper.make_node("Sigmoid", ["t2"], ["y"]),
    ]
    return make_model(nodes, {"x": [1, 16, 96]}, {"y": [1, 1]}, _weights(seed + 2, shapes))


# --- a microphone ----------------------------------------------------------------------------------------


def _microphone(makers: dict[str, Make], rounds: int, calls: int = 60) -> list[Row]:
    """One call every 32 ms: how long it takes, and the processor time of all processes."""
    case = voice_activity()
    if case is None:
        return []
    work = "silero-vad, a call every 32 ms"
    runs = {name: make(case.model) for name, make in makers.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    shares: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(max(2, rounds // 3)):
        for name, run in runs.items():
            took, share = _paced(lambda run=run: run(case.feed), calls)
            times[name].append(took)
            shares[name].append(share)
    rows = [figure(work, name, values, "µs") for name, values in times.items()]
    for name, values in shares.items():
        if name != BASE:
            more = [mine - base for mine, base in zip(values, shares[BASE], strict=True)]
            limit = 1.0 if name == OURS else None
            rows.append(figure(work, f"{name}, beyond in-process", more, "% core", limit=limit))
    return rows


def _paced(call: Callable[[], Any], calls: int) -> tuple[float, float]:
    """Median microseconds of a call, and the processor time in percent of a core."""
    call()
    processes = [own := psutil.Process(), *own.children(recursive=True)]
    before, started = _seconds(processes), time.perf_counter()
    times = []
    for _ in range(calls):
        time.sleep(PERIOD)
        began = time.perf_counter_ns()
        call()
        times.append((time.perf_counter_ns() - began) / 1e3)
    elapsed = time.perf_counter() - started
    return statistics.median(times), (_seconds(processes) - before) / elapsed * 100


def _seconds(processes: list[psutil.Process]) -> float:
    """Processor time of all their threads, in the kernel's nanoseconds: the clock ticks are too coarse."""
    found = 0
    for process in processes:
        for task in Path(f"/proc/{process.pid}/task").iterdir():
            with contextlib.suppress(OSError):
                found += int((task / "schedstat").read_text().split()[0])
    return found / 1e9
