"""Models that load faster the second time, through the public API and real processes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import psutil
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_dl import InferenceSessionProxy, ModelHost
from onnx_dl.workers.load_cache.store import WEIGHTS, Cache
from tests.support.waiting import DEADLINE, allowed, eventually, is_process, worker_pid

pytestmark = pytest.mark.slow

CPU = ["CPUExecutionProvider"]
WIDTH = 1024
X = np.random.default_rng(0).standard_normal((3, WIDTH)).astype(np.float32)


def make(path: Path, *, external: bool = False, seed: int = 0) -> str:
    """A model of three layers of 4 MB each."""
    random = np.random.default_rng(seed)
    weights = [
        numpy_helper.from_array((random.standard_normal((WIDTH, WIDTH)) / 32).astype(np.float32), f"w{i}")
        for i in range(3)
    ]
    nodes = [helper.make_node("MatMul", [f"h{i}" if i else "x", f"w{i}"], [f"h{i + 1}"]) for i in range(3)]
    graph = helper.make_graph(
        nodes,
        "layers",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", WIDTH])],
        [helper.make_tensor_value_info("h3", TensorProto.FLOAT, ["n", WIDTH])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    helper.set_model_props(model, {"author": "me"})
    onnx.save(model, path, save_as_external_data=external, location=f"{path.stem}.bin")
    return str(path)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    monkeypatch.setenv("ONNX_DL_CACHE", "on")
    monkeypatch.setenv("ONNX_DL_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("ONNX_DL_CACHE_FROM", "0")
    return Cache(tmp_path / "cache", 1 << 30)


@pytest.fixture
def cached_host(store: Cache, nothing_is_left_behind: None) -> Iterator[ModelHost]:
    with ModelHost() as host:
        yield host


def maps(pid: int, path: Path) -> bool:
    return str(path) in Path(f"/proc/{pid}/maps").read_text()


def is_saved(store: Cache, count: int = 1) -> None:
    eventually(lambda: len(store.entries()) == count, "the model is in the cache", timeout=60)


def no_saver_is_left(host: ModelHost) -> None:
    supervisor = psutil.Process(host.snapshot().supervisor_pid)
    eventually(
        lambda: not [p for p in supervisor.children(recursive=True) if is_saver(p)], "savers end", timeout=60
    )


def is_saver(process: psutil.Process) -> bool:
    try:
        return is_process(process, "saver")
    except psutil.Error:
        return False


def test_the_second_load_maps_what_the_first_one_saved(cached_host: ModelHost, store: Cache, tmp_path: Path):
    path = make(tmp_path / "m.onnx")
    expected = onnxruntime.InferenceSession(path, providers=CPU).run(None, {"x": X})[0]
    proxy = InferenceSessionProxy(path, providers=CPU, host=cached_host)
    assert np.array_equal(proxy.run(None, {"x": X})[0], expected)
    plain = proxy.get_modelmeta().custom_metadata_map, proxy.get_session_options().graph_optimization_level
    is_saved(store)
    assert not maps(worker_pid(cached_host), store.root)
    proxy.unload()
    assert np.array_equal(proxy.run(None, {"x": X})[0], expected)
    assert maps(worker_pid(cached_host), store.root)
    told = proxy.get_modelmeta().custom_metadata_map, proxy.get_session_options().graph_optimization_level
    assert told == plain == ({"author": "me"}, onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL)


def test_a_model_given_as_bytes(cached_host: ModelHost, store: Cache, tmp_path: Path):
    data = Path(make(tmp_path / "m.onnx")).read_bytes()
    proxy = InferenceSessionProxy(data, providers=CPU, host=cached_host)
    (before,) = proxy.run(None, {"x": X})
    is_saved(store)
    proxy.unload()
    assert np.array_equal(proxy.run(None, {"x": X})[0], before)
    assert maps(worker_pid(cached_host), store.root)


@pytest.mark.parametrize("external", [False, True])
def test_a_file_that_changed_is_loaded_itself(
    cached_host: ModelHost, store: Cache, tmp_path: Path, external: bool
):
    """External data counts: the .onnx file beside it may stay the same."""
    path = make(tmp_path / "m.onnx", external=external)
    proxy = InferenceSessionProxy(path, providers=CPU, host=cached_host)
    (before,) = proxy.run(None, {"x": X})
    is_saved(store)
    proxy.unload()
    stat = os.stat(path)
    make(tmp_path / "m.onnx", external=external, seed=1)
    if external:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    (after,) = InferenceSessionProxy(path, providers=CPU, host=cached_host).run(None, {"x": X})
    expected = onnxruntime.InferenceSession(path, providers=CPU).run(None, {"x": X})[0]
    assert np.array_equal(after, expected) and not np.array_equal(after, before)
    no_saver_is_left(cached_host)


def test_a_corrupt_entry_means_a_plain_load(cached_host: ModelHost, store: Cache, tmp_path: Path):
    proxy = InferenceSessionProxy(make(tmp_path / "m.onnx"), providers=CPU, host=cached_host)
    (before,) = proxy.run(None, {"x": X})
    is_saved(store)
    no_saver_is_left(cached_host)
    proxy.unload()
    (entry,) = store.entries()
    with open(entry.path / WEIGHTS, "r+b") as weights:
        weights.seek(5_000_000)
        weights.write(b"\xff" * 4096)
    assert np.array_equal(proxy.run(None, {"x": X})[0], before)
    assert not maps(worker_pid(cached_host), entry.path)
    is_saved(store)
    no_saver_is_left(cached_host)


def test_what_must_load_plainly_does(cached_host: ModelHost, store: Cache, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    path = make(tmp_path / "m.onnx")
    with InferenceSessionProxy(path, options, providers=CPU, host=cached_host) as proxy:
        proxy.run(None, {"x": X})
        assert Path(proxy.end_profiling()).exists()
    no_saver_is_left(cached_host)
    assert not store.entries()


def test_small_models_and_dice_are_not_saved(cached_host: ModelHost, store: Cache, tmp_path: Path):
    path = Path(make(tmp_path / "m.onnx"))
    model = onnx.load(path)
    shape = helper.make_node("RandomNormalLike", ["h3"], ["noise"])
    model.graph.node.extend([shape, helper.make_node("Add", ["h3", "noise"], ["y"])])
    model.graph.output[0].name = "y"
    onnx.save(model, path)
    proxy = InferenceSessionProxy(str(path), providers=CPU, host=cached_host)
    proxy.run(None, {"x": X})
    eventually(lambda: list(store.root.glob("*.refused")), "it is refused", timeout=60)
    no_saver_is_left(cached_host)
    assert not store.entries()


def test_off_is_off(store: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ONNX_DL_CACHE", "off")
    with ModelHost() as host:
        InferenceSessionProxy(make(tmp_path / "m.onnx"), providers=CPU, host=host).run(None, {"x": X})
        no_saver_is_left(host)
    assert not store.root.exists()


def test_a_cache_that_cannot_be_written_is_in_nobodys_way(
    store: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ONNX_DL_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with ModelHost() as host:
        proxy = InferenceSessionProxy(make(tmp_path / "m.onnx"), providers=CPU, host=host)
        for _ in range(2):
            proxy.run(None, {"x": X})
            no_saver_is_left(host)
            proxy.unload()
    assert capfd.readouterr().err == ""


def test_a_save_outlives_the_worker_but_not_the_supervisor(store: Cache, tmp_path: Path):
    """With ttl=0 the worker is gone before the save is done.  Who closes the host leaves nothing behind."""
    with ModelHost() as host:
        proxy = InferenceSessionProxy(make(tmp_path / "m.onnx"), providers=CPU, ttl=0, host=host)
        proxy.run(None, {"x": X})
        is_saved(store)
        no_saver_is_left(host)
        store.clear()
        proxy.run(None, {"x": X})
        supervisor = psutil.Process(host.snapshot().supervisor_pid)
        savers = [process for process in supervisor.children(recursive=True) if is_saver(process)]
    _, alive = psutil.wait_procs(savers, timeout=allowed(DEADLINE))
    assert not alive


def test_two_hosts_may_save_at_the_same_moment(store: Cache, tmp_path: Path):
    path = make(tmp_path / "m.onnx")
    with ModelHost() as one, ModelHost() as other:
        proxies = [InferenceSessionProxy(path, providers=CPU, host=host) for host in (one, other)]
        results = [proxy.run(None, {"x": X})[0] for proxy in proxies]
        is_saved(store)
        for host in (one, other):
            no_saver_is_left(host)
        for proxy in proxies:
            proxy.unload()
        again = [proxy.run(None, {"x": X})[0] for proxy in proxies]
    assert all(np.array_equal(result, results[0]) for result in (*results, *again))


def test_variables_of_a_model(cached_host: ModelHost, store: Cache, tmp_path: Path) -> None:
    """What is saved is found by the same variables, and nothing of them is kept but a digest."""
    secret = "swordfish-7211"
    path = make(tmp_path / "large.onnx")

    def mapped(variables: dict[str, str]) -> bool:
        how = {"providers": CPU, "host": cached_host, "environment": variables}
        with InferenceSessionProxy(path, **how) as proxy:  # type: ignore[arg-type]
            proxy.load()
            found = maps(worker_pid(cached_host), tmp_path / "cache")
            proxy.unload()
            return found

    assert not mapped({"TOKEN": secret})
    is_saved(store)
    assert mapped({"TOKEN": secret})
    assert not mapped({})
    no_saver_is_left(cached_host)
    kept = [file for file in (tmp_path / "cache").rglob("*") if file.is_file()]
    assert not any(secret.encode() in file.read_bytes() for file in kept)
