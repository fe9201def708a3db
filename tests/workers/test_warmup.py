"""A run before the first call: by a supervisor that was told of one, in real workers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from onnx_dl import EventType, ExecutionSession, InferenceSessionProxy, ModelHost
from onnx_dl.session.proxy import ModelProxy
from onnx_dl.system import boot
from tests.contract.both import CPU, STR, F, identity, model, node, tensor
from tests.support.mlir import compiler
from tests.support.waiting import eventually, wait_for, worker_pid

pytestmark = pytest.mark.slow

Told = Callable[[ModelProxy, dict[str, Any]], None]

_TOLD = """
import json, msgspec
from onnx_dl.core.spec import Warmup
from onnx_dl.supervisor.policy import scheduler
plain = scheduler.Scheduler.__init__
def init(self, *args):
    plain(self, *args)
    self.orders.warmups = msgspec.convert({warmups!r}, dict[str, dict[str, Warmup]])
scheduler.Scheduler.__init__ = init
from onnx_dl.supervisor.main import main
main()
"""


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    """``told(proxy, warmup)``: the supervisor, which must not run yet, warms this model up with that."""

    def tell(proxy: ModelProxy, warmup: dict[str, Any]) -> None:
        prelude = "import json, sys; sys.path[:] = json.loads(sys.argv[1])[0]\n"
        program = _TOLD.format(warmups={proxy._handle.spec.key: warmup})
        monkeypatch.setattr(boot, "_BOOT", prelude + program)

    return tell


def drawing() -> bytes:
    """y = x and a random number, the next one of a seed's sequence at each run."""
    nodes = [
        node("RandomUniform", [], ["r"], seed=7.0, shape=[1], dtype=F),
        node("Add", ["x", "r"], ["y"]),
    ]
    return model(nodes, [tensor("x", F, ["n"])], [tensor("y", F, ["n"])])


@pytest.mark.parametrize("warm", [False, True])
def test_the_first_call_is_the_second_run(host: ModelHost, told: Told, warm: bool) -> None:
    zero = {"x": np.zeros(1, np.float32)}
    inside = onnxruntime.InferenceSession(drawing(), providers=CPU)
    drawn = [inside.run(None, zero)[0][0] for _ in range(2)]
    proxy = InferenceSessionProxy(drawing(), providers=CPU, host=host, ttl=0)
    told(proxy, {"x": {"dtype": "float32", "shape": [3], "fill": 1.5}} if warm else {})
    proxy.load()
    (status,) = host.snapshot().models
    assert (status.state, status.runs, status.busy, status.idle) == ("ready", 0, 0, None)
    assert proxy.run(None, zero)[0][0] == drawn[warm]
    assert drawn[0] != drawn[1]


def test_its_time_is_the_loads_and_it_counts_against_no_number_of_runs(
    host: ModelHost, told: Told, tmp_path: Path
) -> None:
    path = compiler(tmp_path)("wait")
    session = ExecutionSession(path, host=host, max_runs=2)
    told(session, {"milliseconds": {"dtype": "int64", "shape": [], "fill": 300}})
    with host.events() as events:
        session.run([np.array(0)])
        assert (wait_for(events, EventType.READY).seconds or 0) >= 0.3
        first = worker_pid(host)
        session.run([np.array(0)])
        wait_for(events, EventType.UNLOADED)
        session.run([np.array(0)])
        assert worker_pid(host) != first


@pytest.mark.parametrize(
    ("source", "warmup", "why"),
    [
        (identity(F, [1, 2]), {"x": {"dtype": "float32", "shape": [2, 2]}}, "INVALID_ARGUMENT"),
        (identity(F), {"z": {"dtype": "float32", "shape": [2]}}, "x"),
        (identity(F), {"x": {"dtype": "float33", "shape": [2]}}, "float33"),
        (identity(F), {"x": {"dtype": "float32", "shape": [1 << 60]}}, "MemoryError|ValueError"),
        (identity(F), {"x": {"dtype": "float32", "shape": [2], "fill": "one"}}, "one"),
        (identity(STR), {"x": {"dtype": "str", "shape": [2], "fill": "one"}}, None),
        (identity(F), {"x": {"dtype": "float32", "shape": [2]}}, None),
    ],
)
def test_a_warm_up_that_fails_leaves_a_model_that_works(
    host: ModelHost,
    told: Told,
    capfd: pytest.CaptureFixture[str],
    source: bytes,
    warmup: dict[str, Any],
    why: str | None,
) -> None:
    proxy = InferenceSessionProxy(source, providers=CPU, host=host)
    told(proxy, warmup)
    text = proxy.get_inputs()[0].type == "tensor(string)"
    fed = np.array([["a", "b"]], object) if text else np.ones((1, 2), np.float32)
    assert np.array_equal(proxy.run(None, {"x": fed})[0], fed)
    said: list[str] = []

    def heard() -> bool:
        said.append(capfd.readouterr().err)
        return "The model is ready anyway" in "".join(said)

    if why is not None:
        eventually(heard, "the worker said why")
        assert any(name in "".join(said) for name in why.split("|"))
        assert "x: tensor(float)" in "".join(said)
    else:
        proxy.unload()
        assert not heard()
