"""A host with a memory limit: who is evicted, who waits, who is refused."""

from __future__ import annotations

import concurrent.futures
import contextlib
import gc
import json
import os
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import psutil
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_dl import CapacityError, ConfigError, EventType, InferenceSessionProxy, ModelEvent, ModelHost
from tests.contract.both import CPU, F, model, node, scaled, tensor
from tests.support.waiting import DEADLINE, allowed, eventually

pytestmark = pytest.mark.slow

MB = 1 << 20
X = np.ones((1, 1024), np.float32)


def weighty(path: Path, mb: int, seed: int) -> str:
    """A model of so many MB: y = x @ w, w of mb / 4 thousand columns."""
    columns = mb * MB // 4 // 1024
    weights = np.full((1024, columns), seed, np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "weighty",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1024])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, columns])],
        [numpy_helper.from_array(weights, "w")],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(made.SerializeToString())
    return str(path)


def layered(path: Path) -> str:
    """A model of 48 MB that loads in less than it takes when its layers need not be packed any more."""
    nodes = [node("MatMul", [f"h{i}" if i else "x", f"w{i}"], [f"h{i + 1}"]) for i in range(12)]
    random = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array((random.standard_normal((1024, 1024)) / 32).astype(np.float32), f"w{i}")
        for i in range(12)
    ]
    path.write_bytes(model(nodes, [tensor("x", F, [1, 1024])], [tensor("h12", F, [1, 1024])], weights))
    return str(path)


def hollow(folder: Path, mb: int) -> str:
    """A model of so many MB that takes none of the disk."""
    columns = mb * MB // 4096
    path = weighty(folder / "hollow.onnx", 1, 0)
    model = onnx.load(path)
    (weights,) = model.graph.initializer
    weights.ClearField("raw_data")
    weights.dims[1] = model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = columns
    weights.data_location = onnx.TensorProto.EXTERNAL
    weights.external_data.add(key="location", value="hollow.bin")
    onnx.save(model, path)
    with open(folder / "hollow.bin", "wb") as file:
        file.truncate(columns * 4096)
    return path


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("models")
    return [weighty(folder / f"m{i}.onnx", 20, i) for i in range(5)]


# A worker of one of these models takes about 28 MB, and before the first load it is taken for 76.


class Watched(ModelHost):
    """A host that notes its events and the most memory that its workers ever took together."""

    def __init__(self, limit: int) -> None:
        super().__init__(memory_limit=limit)
        self.seen: list[ModelEvent] = []
        self.on_event(self.seen.append)

    def reasons(self) -> list[str]:
        return [str(event.reason) for event in self.seen if event.type is EventType.UNLOADED]

    def in_use(self) -> int:
        usages = [status.usage for status in self.snapshot().models]
        return sum(usage.pss - usage.inherited for usage in usages)


@pytest.fixture
def limited(nothing_is_left_behind: None) -> Iterator[Any]:
    hosts = []

    def make(limit: int) -> Watched:
        hosts.append(Watched(limit))
        return hosts[-1]

    yield make
    for host in hosts:
        host.close()


def proxies(models: list[str], host: ModelHost, **terms: Any) -> list[InferenceSessionProxy]:
    return [host.open(path, providers=CPU, **terms) for path in models]


def value(proxy: InferenceSessionProxy) -> float:
    return float(proxy.run(None, {"x": X})[0][0, 0])


def test_more_models_than_memory(limited: Any, models: list[str]) -> None:
    """Each gives its result, and together they never take more than the limit."""
    host = limited(120 * MB)
    asked = proxies(models, host)
    for _ in range(2):
        for seed, proxy in enumerate(asked):
            assert value(proxy) == 1024 * seed
            assert host.in_use() <= 120 * MB
    assert host.reasons() and set(host.reasons()) == {"evicted"}


def test_what_can_never_fit_is_refused_at_once(limited: Any, models: list[str], tmp_path: Path) -> None:
    host = limited(60 * MB)
    (proxy,) = proxies([weighty(tmp_path / "large.onnx", 40, 1)], host)
    with pytest.raises(
        CapacityError, match=r"large\.onnx needs about .* is more than the limit of 62\.9 MB"
    ) as caught:
        value(proxy)
    assert caught.value.limit == 60 * MB < caught.value.needed
    assert isinstance(caught.value, MemoryError)
    assert not host.snapshot().models


def test_pinned_models_stay(limited: Any, models: list[str]) -> None:
    """What they leave no room for is refused at once, with the numbers."""
    host = limited(70 * MB)
    (pinned,) = proxies(models[:1], host, pin=True)
    (other,) = proxies(models[1:2], host)
    assert value(pinned) == 0
    with pytest.raises(CapacityError, match="more than pinned models leave of the limit of 73") as caught:
        value(other)
    error = caught.value
    assert error.needed <= error.limit < error.needed + error.in_use
    assert pinned.is_loaded
    pinned.close()
    assert value(other) == 1024


def test_who_fits_is_not_refused_with_who_does_not(
    limited: Any, models: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model is in use; one that does not fit beside it waits, and small ones wait behind it."""
    monkeypatch.setenv("ONNX_DL_ROOM_TIMEOUT", "1")
    host = limited(450 * MB)
    (used,) = proxies(models[:1], host)
    (large,) = proxies([hollow(tmp_path, 390)], host)
    small = proxies([weighty(tmp_path / f"s{seed}.onnx", 2, seed) for seed in range(4)], host)
    with used.session(), concurrent.futures.ThreadPoolExecutor(5) as pool:
        refused = pool.submit(large.load)
        eventually(lambda: len(host.snapshot().models) == 2 or refused.done(), "the large one waits")
        found = [pool.submit(value, proxy) for proxy in small]
        with pytest.raises(CapacityError, match="did not become free within 1 seconds"):
            refused.result(allowed(DEADLINE))
        assert [each.result(allowed(DEADLINE)) for each in found] == [1024 * seed for seed in range(4)]
    assert not host.reasons()


def test_threads_that_want_one_model_wait_together(
    limited: Any, models: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By one proxy or by several: nobody begins to wait when another is refused."""
    monkeypatch.setenv("ONNX_DL_ROOM_TIMEOUT", "1")
    host = limited(90 * MB)
    used, one = proxies(models[:2], host)
    others = [*proxies(models[1:2], host), *proxies(models[1:2], host)]
    with used.session(), concurrent.futures.ThreadPoolExecutor(6) as pool:
        began = time.monotonic()
        loads = [pool.submit(proxy.load) for proxy in (one, one, one, one, *others)]
        errors = [load.exception(allowed(4 * DEADLINE)) for load in loads]
        took = time.monotonic() - began
    assert {type(error) for error in errors} == {CapacityError}
    assert took < allowed(2 * 1.0 + 1.5)  # one after the other would be six


# --- loads that are too large ------------------------------------------------------------------------------

CAP = 115 * MB
"""In which a model of 60 MB is worth a try: it takes 79 when it is loaded, and 138 while it loads."""


class Weighed:
    """The most that any worker of a host took: bytes, by the kernel's account of what each has for itself."""

    def __init__(self, host: ModelHost) -> None:
        self.most = 0
        self._host = host
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stop.wait(0.005):
            for status in self._host.snapshot().models:
                with contextlib.suppress(psutil.Error):
                    if status.pid is not None:
                        found = psutil.Process(status.pid).memory_full_info()
                        self.most = max(self.most, found.uss)

    def __enter__(self) -> Weighed:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder where hosts keep what they measured, and saved models."""
    monkeypatch.setenv("ONNX_DL_CACHE", "on")
    monkeypatch.setenv("ONNX_DL_CACHE_DIR", str(tmp_path / "kept"))
    return tmp_path / "kept"


def refused(path: str, host: ModelHost) -> CapacityError:
    with pytest.raises(CapacityError, match="is more than the limit") as caught:
        value(host.open(path, providers=CPU))
    return caught.value


def test_a_load_that_does_not_fit_is_ended_and_refused_alike_from_then_on(
    limited: Any, kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONNX_DL_CACHE_FROM", "1000")  # never: from the load cache it would fit
    path = weighty(tmp_path / "m.onnx", 60, 3)
    host = limited(CAP)
    with Weighed(host) as weighed:
        first = refused(path, host)
    loads = host.snapshot().seq
    assert first.needed > CAP and weighed.most < CAP + 60 * MB  # what a load takes within a look, and late
    for again in (refused(path, host), refused(path, limited(CAP))):
        assert (again.needed, again.size, again.limit) == (first.needed, first.size, CAP)
    assert host.snapshot().seq == loads  # nothing was tried
    assert value(limited(4 * CAP).open(path, providers=CPU)) == 3 * 1024
    last = refused(path, limited(CAP))
    assert last.size < CAP < last.needed and "once it is loaded" in str(last)


def test_a_model_that_fits_only_when_it_is_mapped_is_mapped(
    limited: Any, kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONNX_DL_CACHE_FROM", "0")
    path = layered(tmp_path / "m.onnx")
    host = limited(1 << 40)
    expected = host.open(path, providers=CPU).run(None, {"x": X})[0]
    eventually(lambda: list(kept.glob("[!u]*/meta.json")), "the model is saved", 60)
    host.close()
    (need,) = json.loads(next(kept.glob("needs-*.json")).read_bytes()).values()
    loading, size = need["load"][0], max(need["steady"]["ram"], need["peak"]["ram"])
    assert loading > size + 10 * MB
    host = limited((loading + size) // 2)
    with Weighed(host) as weighed:
        proxy = host.open(path, providers=CPU)
        assert np.array_equal(proxy.run(None, {"x": X})[0], expected)
    assert weighed.most < (loading + size) // 2
    proxy.close()
    for entry in kept.glob("[!u]*/meta.json"):
        entry.parent.rename(tmp_path / "gone")
    error = refused(path, host)
    assert error.size < error.limit < error.needed


def test_what_was_given_back_is_told_though_somebody_measures_all_the_time(limited: Any) -> None:
    host = limited(1 << 40)
    with Weighed(host), concurrent.futures.ThreadPoolExecutor(1) as pool:
        stop = threading.Event()
        asked = pool.submit(lambda: [host.snapshot() for _ in iter(stop.is_set, True)])
        for turn in range(10):
            proxy = host.open(scaled(), providers=CPU)
            proxy.load()
            proxy.unload(force=turn % 2 == 1)
            proxy.close()
        stop.set()
        assert len(asked.result(allowed(DEADLINE))) > 20
    host.close()
    freed = [event.freed for event in host.seen if event.type is EventType.UNLOADED]
    assert len(freed) == 10 and min(freed) > 500_000


def test_what_the_host_holds_and_nobody_called_makes_room(limited: Any, models: list[str]) -> None:
    host = limited(90 * MB)
    host.adopt(models[0])
    (other,) = proxies(models[1:2], host)
    assert value(other) == 1024
    assert host.reasons() == ["evicted"]


def test_what_the_host_holds_and_nobody_called_expires(limited: Any, models: list[str]) -> None:
    host = limited(90 * MB)
    host.adopt(models[0], ttl=0.2)
    eventually(lambda: host.reasons() == ["ttl"], "the model's TTL ends it")


def test_a_model_in_use_stays_until_it_is_not(limited: Any, models: list[str]) -> None:
    host = limited(90 * MB)
    used, other = proxies(models[:2], host)
    with used.session():
        thread = threading.Thread(target=value, args=(other,))
        thread.start()
        deadline = time.monotonic() + allowed(DEADLINE)
        while not any(status.model == models[1] for status in host.snapshot().models):
            assert time.monotonic() < deadline
        assert value(used) == 0  # it is asked to leave again and again, and stays
        assert used.is_loaded and not other.is_loaded
    thread.join(allowed(DEADLINE))
    assert other.is_loaded
    assert host.reasons() == ["evicted"]


def test_limits_are_told() -> None:
    with ModelHost(memory_limit=90 * MB, gpu_memory_limit="1GiB") as host:
        proxy = host.open(scaled(), providers=CPU)
        proxy.load()
        snapshot = host.snapshot()
        assert (snapshot.memory_limit, snapshot.gpu_memory_limit) == (90 * MB, 1 << 30)
        assert snapshot.memory_in_use > 1 * MB and snapshot.gpu_memory_in_use == 0
    with pytest.raises(ConfigError, match="not a size"):
        ModelHost(gpu_memory_limit="much")


def test_limits_of_devices_are_told(tmp_path: Path) -> None:
    """What counts on which device is tests/unit/supervisor/policy/test_gpu_limits.py's."""
    with ModelHost(gpu_memory_limit={0: "1GiB", 2: 5 * MB}) as host:
        host.start()
        snapshot = host.snapshot()
        assert snapshot.gpu_memory_limits == {0: 1 << 30, 2: 5 * MB}
        assert snapshot.gpu_memory_limit == (1 << 30) + 5 * MB
        assert snapshot.gpu_memory_in_use_on == {}
    file = tmp_path / "host.toml"
    file.write_text('[gpu_memory_limit]\n1 = "2GiB"\n')
    with ModelHost(config=file) as host:
        host.start()
        assert host.snapshot().gpu_memory_limits == {1: 2 << 30}


def test_priority(limited: Any, models: list[str]) -> None:
    host = limited(130 * MB)
    important = proxies(models[:1], host, priority=5)[0]
    second, third = proxies(models[1:3], host)
    for proxy in (important, second):
        value(proxy)
    # A call is busy for a moment after its answer, and a busy worker is not evicted, whatever its priority.
    eventually(lambda: not any(model.busy for model in host.snapshot().models), "the end of the calls")
    value(third)
    gone = [event.model for event in host.seen if event.type is EventType.UNLOADED]
    assert gone == [models[1]]


def test_who_waits_is_told_when_the_host_closes(limited: Any, models: list[str]) -> None:
    host = limited(90 * MB)
    used, other = proxies(models[:2], host)
    errors: list[Exception] = []

    def call() -> None:
        try:
            value(other)
        except Exception as error:
            errors.append(error)

    with used.session():
        thread = threading.Thread(target=call)
        thread.start()
        deadline = time.monotonic() + allowed(DEADLINE)
        while len(host.snapshot().models) < 2:
            assert time.monotonic() < deadline
        host.close()
        thread.join(allowed(DEADLINE))
    assert len(errors) == 1


# --- recycling ---------------------------------------------------------------------------------------------


def test_a_worker_is_replaced_after_so_many_runs(host: ModelHost) -> None:
    """No caller sees an error, whichever thread it is in."""
    gone: list[ModelEvent] = []
    proxy = InferenceSessionProxy(scaled(), providers=CPU, max_runs=3, host=host)
    host.on_event(lambda event: gone.append(event) if event.type is EventType.UNLOADED else None)
    proxy.load()  # no run
    results = [proxy.run(["twice"], {"x": np.full((1, 1), i, np.float32)})[0][0, 0] for i in range(10)]
    assert results == [2 * i for i in range(10)]
    wrong: list[object] = []

    def calls(number: int) -> None:
        for _ in range(10):
            value = proxy.run(["twice"], {"x": np.full((1, 1), number, np.float32)})[0][0, 0]
            if value != 2 * number:
                wrong.append(value)

    threads = [threading.Thread(target=calls, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(allowed(DEADLINE))
    assert not wrong
    assert len(gone) >= 10 and {event.reason for event in gone} == {"recycled"}


def test_a_worker_that_has_grown_is_replaced(host: ModelHost) -> None:
    """onnxruntime's arena keeps what a large input took."""
    nodes = [
        node("Sin", ["x"], ["s"]),
        node("Cos", ["s"], ["c"]),
        node("ReduceSum", ["c"], ["y"], keepdims=0),
    ]
    source = model(nodes, [tensor("x", F, ["N"])], [tensor("y", F, [])])
    proxy = InferenceSessionProxy(source, providers=CPU, max_memory="60MB", max_memory_hard="1GB", host=host)
    small, large = np.ones(4, np.float32), np.ones(16 << 20, np.float32)

    def pid_after(x: np.ndarray) -> int | None:
        assert np.isfinite(proxy.run(None, {"x": x})[0])
        return next((status.pid for status in host.snapshot().models), None)

    first = pid_after(small)
    assert pid_after(small) == first
    pid_after(large)
    second = pid_after(small)
    assert second != first
    assert pid_after(small) == second


@pytest.mark.parametrize(
    "terms", [{"max_runs": 0}, {"max_runs": "3"}, {"max_memory": "much"}, {"pin": "yes"}, {"priority": 1.5}]
)
def test_allowances_that_cannot_be(host: ModelHost, terms: dict) -> None:
    with pytest.raises(ConfigError):
        InferenceSessionProxy(scaled(), host=host, **terms)


def test_a_limit_that_was_misspelt_is_not_lost_unseen(host: ModelHost) -> None:
    with pytest.warns(
        UserWarning,
        match="max_memroy is not an argument.* did you mean max_memory",
    ):
        InferenceSessionProxy(scaled(), host=host, max_memroy="1MB")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what onnxruntime takes, and what is nothing like ours
        InferenceSessionProxy(scaled(), host=host, enable_fallback=0, something=1)


def test_a_forked_child_is_not_warned_of_its_parents_supervisor(host: ModelHost) -> None:
    host.start()
    pid = os.fork()
    if pid == 0:
        warnings.simplefilter("error")
        wrong: list[object] = []
        sys.unraisablehook = wrong.append
        gc.collect()
        os._exit(len(wrong))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
