"""Warm calls whose values are no tensors of numbers: text, and the dicts of a classifier's ZipMap.

Kinds of use: one string, one row and many rows of ZipMap, and what skl2onnx makes of a classifier, called
once for each row.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
from typing import Any, Final, NamedTuple

import numpy as np
from onnx import TensorProto, helper

from benchmarks.calls import LOW, OURS, proxy_of
from benchmarks.others import make_session
from benchmarks.report import ADDED, Row
from benchmarks.timing import BASE, Times, Way, figure
from benchmarks.valuefloor import ValueFloor
from onnx_dl import ModelHost

_ML: Final = "ai.onnx.ml"
_NAMES: Final = ["setosa", "versicolor", "virginica"]


class ValueCase(NamedTuple):
    """A model, its feed, how many calls make a block, and what is asked: the most that may be added, in
    microseconds, and the largest ratio."""

    name: str
    model: bytes
    feed: dict[str, Any]
    calls: int
    added: float | None
    ratio: float | None


def _model(nodes: list[Any], inputs: list[Any], outputs: list[Any]) -> bytes:
    graph = helper.make_graph(nodes, "bench", inputs, outputs)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(_ML, 3)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()


def _echo() -> bytes:
    """Text as it came."""
    ends = [helper.make_tensor_value_info(name, TensorProto.STRING, ["n"]) for name in "xy"]
    return _model([helper.make_node("Identity", ["x"], ["y"])], ends[:1], ends[1:])


def _maps(name: str, keys: Any) -> tuple[Any, Any]:
    """A ZipMap of three columns, and its output."""
    node = helper.make_node("ZipMap", [name], ["maps"], domain=_ML, **keys)
    key = TensorProto.STRING if "classlabels_strings" in keys else TensorProto.INT64
    value = helper.make_tensor_type_proto(TensorProto.FLOAT, None)
    kind = helper.make_sequence_type_proto(helper.make_map_type_proto(key, value))
    return node, helper.make_value_info("maps", kind)


def _zipmap() -> bytes:
    node, output = _maps("x", {"classlabels_strings": _NAMES})
    return _model([node], [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3])], [output])


def _classifier() -> bytes:
    """As skl2onnx makes it of a LogisticRegression: a label, and the probability of each class."""
    rng = np.random.default_rng(0)
    linear = helper.make_node(
        "LinearClassifier",
        ["x"],
        ["label", "scores"],
        domain=_ML,
        coefficients=rng.standard_normal(12).astype(np.float32).tolist(),
        intercepts=rng.standard_normal(3).astype(np.float32).tolist(),
        classlabels_ints=[0, 1, 2],
        multi_class=1,
        post_transform="SOFTMAX",
    )
    normal = helper.make_node("Normalizer", ["scores"], ["normal"], domain=_ML, norm="L1")
    node, output = _maps("normal", {"classlabels_int64s": [0, 1, 2]})
    label = helper.make_tensor_value_info("label", TensorProto.INT64, ["n"])
    rows = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])
    return _model([linear, normal, node], [rows], [label, output])


def cases() -> list[ValueCase]:
    """From small to large."""
    rng = np.random.default_rng(1)

    def rows(count: int, columns: int) -> dict[str, Any]:
        return {"x": rng.random((count, columns), dtype=np.float32)}

    text = {"x": np.array(["the quick brown fox"], object)}
    return [
        ValueCase("one string, in and out", _echo(), text, 400, 25.0, None),
        ValueCase("ZipMap, one row", _zipmap(), rows(1, 3), 400, 25.0, None),
        ValueCase("ZipMap, 3,000 rows", _zipmap(), rows(3000, 3), 20, None, 1.5),
        ValueCase("label and ZipMap, one row", _classifier(), rows(1, 4), 400, None, 4.0),
    ]


def measure(rounds: int) -> list[Row]:
    """In-process and onnx-dl, each case with a model of its own."""
    return [row for case in cases() for row in _measure(case, rounds)]


def _measure(case: ValueCase, rounds: int) -> list[Row]:
    session = make_session(case.model, 1)
    ways = [Way(BASE, lambda: session.run(None, case.feed))]
    with contextlib.ExitStack() as stack:
        floor = ValueFloor(case.model, case.feed, ways[0].call())
        stack.callback(floor.close)
        ways.append(Way(floor.name, functools.partial(floor.run, case.feed), floor.begin, floor.end))
        host = stack.enter_context(ModelHost())
        for name, latency in ((OURS, "normal"), (LOW, "low")):
            proxy = stack.enter_context(proxy_of(case.model, host, threads=1, latency=latency))
            ways.append(Way(name, functools.partial(proxy.run, None, case.feed)))
        _check(ways)
        found = Times(ways, case.calls, rounds)
    return [row for way in ways for row in _rows(case, way.name, found)]


def _check(ways: list[Way]) -> None:
    """That all give the same, three times in a row."""
    expected = _plain(ways[0].call())
    for way in ways:
        for _ in range(3):
            if _plain(way.call()) != expected:
                raise AssertionError(f"{way.name} computes something else than {BASE}")


def _plain(results: list[Any]) -> list[Any]:
    return [result.tolist() if isinstance(result, np.ndarray) else result for result in results]


def _rows(case: ValueCase, name: str, found: Times) -> list[Row]:
    if name == BASE:
        return [figure(case.name, name, found.by_round(name), "µs", p99=found.p99(name))]
    floor = ValueFloor.name
    added, ratio = (case.added, case.ratio) if name == OURS else (None, None)
    least = statistics.median(found.added(floor)), statistics.median(found.ratios(floor))
    floors = least if name.startswith(OURS) else (None, None)
    return [
        figure(case.name, name, found.added(name), ADDED, limit=added, floor=floors[0], p99=found.p99(name)),
        figure(case.name, f"{name}, p50 ratio", found.ratios(name), "x", limit=ratio, floor=floors[1]),
    ]
