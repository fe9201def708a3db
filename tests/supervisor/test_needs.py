"""What is known of models' memory: from host to host, of runs, and when it runs out all the same."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from onnx_dl import EventType, InferenceSessionProxy, ModelEvent, ModelHost
from tests.contract.both import CPU, F, model, node, tensor
from tests.supervisor.test_capacity import MB, value, weighty
from tests.support.waiting import DEADLINE, allowed

pytestmark = pytest.mark.slow

BIG = np.ones(16 << 20, np.float32)
"""64 MiB, of which a worker needs two or three while it runs."""


def spiky(path: Path) -> str:
    """A model that takes next to nothing, but for its runs: y = sum(cos(sin(x)))."""
    nodes = [
        node("Sin", ["x"], ["s"]),
        node("Cos", ["s"], ["c"]),
        node("ReduceSum", ["c"], ["y"], keepdims=0),
    ]
    path.write_bytes(model(nodes, [tensor("x", F, ["N"])], [tensor("y", F, [])]))
    return str(path)


def modest(path: str, host: ModelHost) -> InferenceSessionProxy:
    """Gives back after each run what it took."""
    options = onnxruntime.SessionOptions()
    options.enable_cpu_mem_arena = False
    return InferenceSessionProxy(path, options, providers=CPU, host=host)


def unloads(host: ModelHost) -> list[str | None]:
    """The reasons; complete once the host is closed."""
    seen: list[str | None] = []
    host.on_event(lambda event: seen.append(event.reason) if event.type is EventType.UNLOADED else None)
    return seen


def use_all(paths: list[str], limit: int | None, x: np.ndarray) -> list[str | None]:
    """Why models went, in a host of its own that uses each once."""
    with ModelHost(memory_limit=limit) as host:
        gone = unloads(host)
        for proxy in [modest(path, host) for path in paths]:
            proxy.run(None, {"x": x})
    return gone


def test_the_next_host_knows_what_models_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that are small at rest stay together, until a host has seen what their runs take."""
    monkeypatch.setenv("ONNX_DL_CACHE", "on")
    monkeypatch.setenv("ONNX_DL_CACHE_DIR", str(tmp_path / "kept"))
    paths = [spiky(tmp_path / f"m{i}.onnx") for i in range(2)]
    assert "evicted" not in use_all(paths, 280 * MB, BIG[:4])
    assert "evicted" not in use_all(paths, None, BIG)
    assert "evicted" in use_all(paths, 280 * MB, BIG[:4])
    (kept,) = (tmp_path / "kept").glob("needs-*.json")
    assert kept.name.endswith(f"-{onnxruntime.__version__}.json")
    kept.unlink()
    assert "evicted" not in use_all(paths, 280 * MB, BIG[:4])


def test_without_the_cache_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONNX_DL_CACHE_DIR", str(tmp_path / "cache"))
    use_all([spiky(tmp_path / "m.onnx")], None, BIG)
    assert not (tmp_path / "cache").exists()


def test_the_peak_of_runs_is_measured(host: ModelHost, tmp_path: Path) -> None:
    proxy = modest(spiky(tmp_path / "m.onnx"), host)

    def usage() -> Any:
        return host.snapshot().models[0].usage

    proxy.run(None, {"x": BIG[:4]})
    quiet = usage()
    assert quiet.peak - quiet.pss < 10 * MB  # the mark of the load was set back
    proxy.run(None, {"x": BIG})
    loud = usage()
    assert loud.peak - loud.pss > 50 * MB
    assert host.snapshot().memory_in_use >= loud.peak - loud.inherited


def test_models_whose_runs_do_not_fit_together_are_not_loaded_together(tmp_path: Path) -> None:
    """Though they would fit while they do nothing."""
    with ModelHost(memory_limit=280 * MB) as host:
        gone = unloads(host)
        first, second = [modest(spiky(tmp_path / f"m{i}.onnx"), host) for i in range(2)]
        for proxy in (first, second):
            proxy.run(None, {"x": BIG})
            proxy.unload()
        first.run(None, {"x": BIG[:4]})
        (status,) = host.snapshot().models
        assert status.usage.pss < 100 * MB
        second.run(None, {"x": BIG[:4]})
        assert second.is_loaded and not first.is_loaded
    assert gone[:3] == ["request", "request", "evicted"]


def test_models_that_push_each_other_out_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "onnx_dl")
    paths = [weighty(tmp_path / f"m{i}.onnx", 30, i) for i in range(2)]
    with ModelHost(memory_limit=70 * MB) as host:
        told: list[ModelEvent] = []
        host.on_event(lambda event: told.append(event) if event.type is EventType.THRASH else None)
        proxies = [host.open(path, providers=CPU) for path in paths]
        deadline = time.monotonic() + allowed(5 * DEADLINE)
        while not told:
            assert time.monotonic() < deadline
            for proxy in proxies:
                value(proxy)
    assert told[0].model in paths and told[0].worker_id > 2
    assert all(path in (told[0].detail or "") for path in paths)
    assert "raise memory_limit" in str(told[0])
    levels = {record.levelno for record in caplog.records if record.getMessage().startswith("thrash")}
    assert levels == {logging.WARNING}


HUGE = {"load": [1 << 49, False], "steady": {"ram": 1 << 49}, "peak": {"ram": 1 << 49}}
WRONG = {
    "above 2^64": {"load": [1 << 65, False]},
    "endless": {"load": [10**400, False]},
    "huge": HUGE,
    "huge and ended": {"load": [1 << 49, True]},
    "negative": {"load": [-1, False], "steady": {"ram": -1}},
    "nested": None,
}


@pytest.mark.parametrize("wrong", WRONG)
def test_whatever_stands_in_the_file_of_needs_models_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    """And what was wrong is measured anew."""
    monkeypatch.setenv("ONNX_DL_CACHE", "on")
    monkeypatch.setenv("ONNX_DL_CACHE_DIR", str(tmp_path / "kept"))
    path = spiky(tmp_path / "m.onnx")
    use_all([path], 280 * MB, BIG[:4])
    (file,) = (tmp_path / "kept").glob("needs-*.json")
    (key,) = known = json.loads(file.read_bytes())
    text = json.dumps({key: WRONG[wrong]}) if wrong != "nested" else "[" * 100_000
    file.write_text(text)
    use_all([path], 280 * MB, BIG[:4])
    again = json.loads(file.read_bytes())[key]["steady"]["ram"]
    assert again == pytest.approx(known[key]["steady"]["ram"], rel=0.5)
