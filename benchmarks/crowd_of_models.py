"""Eight models and eight callers at a time: eight workers beside one process that has eight sessions.

Every session has onnxruntime's default options, so as many threads as there are cores.  Each caller calls
each model equally often, in an order of its own that a seed decides: a block is the same work for all ways.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import random
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from onnx import helper, numpy_helper

from benchmarks.calls import OURS, PROVIDERS
from benchmarks.models import convolutions, make_model
from benchmarks.report import Row
from benchmarks.timing import BASE, figure, percentile
from onnx_dl import InferenceSessionProxy, ModelHost

CALLERS: Final = 8
SPINNING: Final = "session.intra_op.allow_spinning"
_WORK: Final = "8 models, 8 callers"
_STILL: Final = f'in-process, {SPINNING} = "0"'
_AS_ORT: Final = f'onnx-dl, {SPINNING} = "1"'
_ASKED: Final = 1.1
"""Calls per second, by those in-process; the p99 must be below that in-process."""
_SETTLE: Final = 0.2
"""Seconds between blocks: threads of the way before spin for up to 50 ms."""

Call = Callable[[], list[Any]]


class Block(NamedTuple):
    """Calls of all callers together."""

    speed: float
    """Calls per second."""
    p99: float
    """Milliseconds, over the calls of all models."""


def measure(rounds: int, repeats: int = 4) -> list[Row]:
    """``repeats``: calls of each model by each caller in a block."""
    with contextlib.ExitStack() as stack:
        callers = stack.enter_context(concurrent.futures.ThreadPoolExecutor(CALLERS))
        ways = _ways(stack)
        _check(ways)
        found: dict[str, list[Block]] = {name: [] for name in ways}
        for turn in range(rounds + 1):  # the first warms up
            for name in ways if turn % 2 else reversed(ways):
                made = _block(callers, ways[name], repeats if turn else 1, turn)
                if turn:
                    found[name].append(made)
    return _rows(found)


def _rows(found: dict[str, list[Block]]) -> list[Row]:
    rows = [figure(_WORK, name, [block.speed for block in blocks], "/s") for name, blocks in found.items()]
    rows += [figure(_WORK, f"{name}, p99", [b.p99 for b in blocks], "ms") for name, blocks in found.items()]
    pairs = list(zip(found[OURS], found[BASE], strict=True))
    speeds = [ours.speed / base.speed for ours, base in pairs]
    tails = [ours.p99 / base.p99 for ours, base in pairs]
    return [
        *rows,
        figure(_WORK, f"{OURS}, by in-process", speeds, "x", limit=_ASKED, at_least=True),
        figure(_WORK, f"{OURS}, p99, by in-process", tails, "x", limit=1.0),
    ]


# --- the models, from half a millisecond to 15 of one core -------------------------------------------------


def _models() -> list[tuple[bytes, dict[str, np.ndarray]]]:
    """Four of convolutions, four of matrices, each with its feed."""
    rng = np.random.default_rng(0)
    image = {"x": rng.standard_normal((1, 3, 224, 224), dtype=np.float32)}
    convolving = [(9, 32), (5, 32), (9, 16), (12, 24)]
    perceptrons = [(4, 512, 32), (6, 768, 16), (8, 1024, 8), (4, 1024, 64)]
    return [
        *((convolutions(layers, channels), image) for layers, channels in convolving),
        *(
            (_perceptron(layers, width, rng), {"x": rng.standard_normal((rows, width), dtype=np.float32)})
            for layers, width, rows in perceptrons
        ),
    ]


def _perceptron(layers: int, width: int, rng: np.random.Generator) -> bytes:
    nodes, weights = [], []
    for i in range(layers):
        matrix = rng.standard_normal((width, width), dtype=np.float32) / width**0.5
        weights.append(numpy_helper.from_array(matrix, f"w{i}"))
        nodes.append(helper.make_node("MatMul", [f"t{i - 1}" if i else "x", f"w{i}"], [f"m{i}"]))
        nodes.append(helper.make_node("Relu", [f"m{i}"], [f"t{i}"]))
    return make_model(nodes, {"x": ["n", width]}, {f"t{layers - 1}": ["n", width]}, weights)


# --- the ways ----------------------------------------------------------------------------------------------


def _ways(stack: contextlib.ExitStack) -> dict[str, list[Call]]:
    """By name, the call of each model."""
    models = _models()
    host = stack.enter_context(ModelHost())
    return {
        BASE: [_in_process(model, feed, {}) for model, feed in models],
        OURS: [_in_a_worker(model, feed, {}, host, stack) for model, feed in models],
        _STILL: [_in_process(model, feed, {SPINNING: "0"}) for model, feed in models],
        _AS_ORT: [_in_a_worker(model, feed, {SPINNING: "1"}, host, stack) for model, feed in models],
    }


def _options(entries: dict[str, str]) -> Any:
    import onnxruntime

    made = onnxruntime.SessionOptions()
    for key, value in entries.items():
        made.add_session_config_entry(key, value)
    return made


def _in_process(model: bytes, feed: dict[str, np.ndarray], entries: dict[str, str]) -> Call:
    import onnxruntime

    session = onnxruntime.InferenceSession(model, _options(entries), providers=PROVIDERS)
    return lambda: session.run(None, feed)


def _in_a_worker(
    model: bytes,
    feed: dict[str, np.ndarray],
    entries: dict[str, str],
    host: ModelHost,
    stack: contextlib.ExitStack,
) -> Call:
    proxy = InferenceSessionProxy(model, _options(entries), providers=PROVIDERS, host=host, ttl=-1)
    stack.enter_context(proxy)
    return lambda: proxy.run(None, feed)


def _check(ways: dict[str, list[Call]]) -> None:
    """That all compute the same, bit for bit."""
    expected = [[array.tobytes() for array in call()] for call in ways[BASE]]
    for name, calls in ways.items():
        if [[array.tobytes() for array in call()] for call in calls] != expected:
            raise AssertionError(f"{name} computes something else than {BASE}")


# --- a block -----------------------------------------------------------------------------------------------


def _block(
    callers: concurrent.futures.ThreadPoolExecutor, calls: Sequence[Call], repeats: int, seed: int
) -> Block:
    def work(caller: int) -> list[float]:
        order = [*calls] * repeats
        random.Random(f"{seed} {caller}").shuffle(order)
        times = []
        for call in order:
            started = time.perf_counter()
            call()
            times.append((time.perf_counter() - started) * 1e3)
        return times

    time.sleep(_SETTLE)
    began = time.perf_counter()
    times = [took for each in callers.map(work, range(CALLERS)) for took in each]
    return Block(len(times) / (time.perf_counter() - began), percentile(times, 0.99))
