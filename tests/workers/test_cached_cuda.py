"""Models for CUDA in the load cache, through the public API and real processes.

There is no GPU: sessions say that they have the provider, and run on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from onnx_dl import InferenceSessionProxy, ModelHost
from onnx_dl.workers.load_cache.store import MODEL, WEIGHTS, Cache
from tests.fuzz.model_variants import KINDS, WIDTH
from tests.support.waiting import eventually, worker_pid
from tests.workers.test_load_cache import is_saved, no_saver_is_left, store  # noqa: F401

pytestmark = pytest.mark.slow

CUDA = ["CUDAExecutionProvider", "CPUExecutionProvider"]
PRETENDED = Path(__file__).parents[1] / "support" / "pretended_cuda"
X = np.random.default_rng(1).standard_normal((2, WIDTH)).astype(np.float32)


def make(path: Path, *, external: bool = False, seed: int = 0) -> str:
    """A model of 40 MiB."""
    model = KINDS["large"](np.random.default_rng(seed))
    onnx.save(model, path, save_as_external_data=external, location=f"{path.stem}.bin")
    return str(path)


def options() -> onnxruntime.SessionOptions:
    """Weights that are not packed stay mapped, also on the CPU."""
    made = onnxruntime.SessionOptions()
    made.add_session_config_entry("session.disable_prepacking", "1")
    return made


def expected(path: str) -> Any:
    session = onnxruntime.InferenceSession(path, options(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": X})[0]


def is_mapped(host: ModelHost, store: Cache) -> bool:  # noqa: F811
    return str(store.root) in Path(f"/proc/{worker_pid(host)}/maps").read_text()


@pytest.fixture
def cuda_host(
    store: Cache,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    nothing_is_left_behind: None,
) -> Iterator[ModelHost]:
    monkeypatch.setenv("PYTHONPATH", str(PRETENDED), prepend=":")
    with ModelHost() as host:
        yield host


def saved(path: str | bytes, host: ModelHost, store: Cache) -> InferenceSessionProxy:  # noqa: F811
    """A model whose entry is there, and which is not loaded."""
    proxy = InferenceSessionProxy(path, options(), providers=CUDA, host=host)
    proxy.load()
    is_saved(store)
    no_saver_is_left(host)
    proxy.unload()
    return proxy


def saved_before(
    store: Cache,  # noqa: F811
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[str, str]:
    """A model whose entry a host of before has made, and the key of that; sessions say that they use CUDA."""
    monkeypatch.setenv("PYTHONPATH", str(PRETENDED), prepend=":")
    path = make(folder / "m.onnx")
    with ModelHost() as host:
        saved(path, host, store).close()
    (entry,) = store.entries()
    return path, entry.key


@pytest.mark.parametrize("form", ["path", "bytes"])
def test_the_second_load_maps_the_weights(
    cuda_host: ModelHost,
    store: Cache,  # noqa: F811
    tmp_path: Path,
    form: str,
) -> None:
    path = make(tmp_path / "m.onnx")
    proxy = InferenceSessionProxy(
        path if form == "path" else Path(path).read_bytes(), options(), providers=CUDA, host=cuda_host
    )
    assert np.array_equal(proxy.run(None, {"x": X})[0], expected(path))
    before = said(proxy)
    assert not is_mapped(cuda_host, store)
    is_saved(store)
    (entry,) = store.entries()
    assert (entry.path / MODEL).stat().st_size < 8192
    assert (entry.path / WEIGHTS).stat().st_size < 1.01 * Path(path).stat().st_size
    proxy.unload()
    assert np.array_equal(proxy.run(None, {"x": X})[0], expected(path))
    assert is_mapped(cuda_host, store) and said(proxy) == before
    no_saver_is_left(cuda_host)


def said(proxy: InferenceSessionProxy) -> list[Any]:
    told, meta = proxy.get_session_options(), proxy.get_modelmeta()
    return [
        proxy.get_providers(),
        told.graph_optimization_level,
        told.optimized_model_filepath,
        meta.graph_name,
        meta.custom_metadata_map,
        [(node.name, node.type, node.shape) for node in (*proxy.get_inputs(), *proxy.get_outputs())],
    ]


def test_other_options_and_devices_share_the_entry(
    cuda_host: ModelHost,
    store: Cache,  # noqa: F811
    tmp_path: Path,
) -> None:
    path = make(tmp_path / "m.onnx")
    saved(path, cuda_host, store).close()
    other = options()
    other.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    providers = [("CUDAExecutionProvider", {"device_id": 0, "prefer_nhwc": 1}), "CPUExecutionProvider"]
    with InferenceSessionProxy(path, other, providers=providers, host=cuda_host) as proxy:
        assert np.array_equal(proxy.run(None, {"x": X})[0], expected(path))
        assert is_mapped(cuda_host, store)
        level = proxy.get_session_options().graph_optimization_level
        assert level == onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    no_saver_is_left(cuda_host)
    assert len(store.entries()) == 1


def test_a_file_that_changed_is_loaded_itself(
    cuda_host: ModelHost,
    store: Cache,  # noqa: F811
    tmp_path: Path,
) -> None:
    path = make(tmp_path / "m.onnx")
    saved(path, cuda_host, store).close()
    old = expected(path)
    make(tmp_path / "m.onnx", seed=1)
    with InferenceSessionProxy(path, options(), providers=CUDA, host=cuda_host) as proxy:
        (after,) = proxy.run(None, {"x": X})
    assert np.array_equal(after, expected(path)) and not np.array_equal(after, old)
    no_saver_is_left(cuda_host)


def test_weights_that_are_in_another_file_already_stay_there(
    cuda_host: ModelHost,
    store: Cache,  # noqa: F811
    tmp_path: Path,
) -> None:
    path = make(tmp_path / "m.onnx", external=True)
    with InferenceSessionProxy(path, options(), providers=CUDA, host=cuda_host) as proxy:
        assert np.array_equal(proxy.run(None, {"x": X})[0], expected(path))
        no_saver_is_left(cuda_host)
    assert not store.entries() and not list(store.root.glob("*.refused"))


def test_an_entry_that_does_not_load_is_no_entry(
    store: Cache,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The model itself is loaded, and is not saved again: the next load would find the same."""
    path, key = saved_before(store, tmp_path, monkeypatch)
    monkeypatch.setenv("PRETENDED_REFUSAL", key)
    with ModelHost() as host, InferenceSessionProxy(path, options(), providers=CUDA, host=host) as proxy:
        assert np.array_equal(proxy.run(None, {"x": X})[0], expected(path))
        assert not is_mapped(host, store)
        assert store.is_refused(key) and not store.entries()
        no_saver_is_left(host)
    assert not store.entries()


def test_an_entry_that_is_removed_while_it_is_loaded_is_saved_again(
    store: Cache,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The cache was cleared, or had no room for it."""
    path, key = saved_before(store, tmp_path, monkeypatch)
    monkeypatch.setenv("PRETENDED_REFUSAL", key)
    monkeypatch.setenv("PRETENDED_REMOVAL", "1")
    with ModelHost() as host, InferenceSessionProxy(path, options(), providers=CUDA, host=host) as proxy:
        assert np.array_equal(proxy.run(None, {"x": X})[0], expected(path))
        is_saved(store)
        assert not store.is_refused(key)
        no_saver_is_left(host)


def test_an_entry_stays_if_the_model_itself_does_not_load_either(
    store: Cache,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For example, because the memory of the GPU ran out."""
    path, _ = saved_before(store, tmp_path, monkeypatch)
    monkeypatch.setenv("PRETENDED_REFUSAL", tmp_path.name)
    with ModelHost() as host, pytest.raises(Exception, match="out of memory"):
        InferenceSessionProxy(path, options(), providers=CUDA, host=host).load()
    (entry,) = store.entries()
    assert not store.is_refused(entry.key)
    monkeypatch.delenv("PRETENDED_REFUSAL")
    with ModelHost() as host, InferenceSessionProxy(path, options(), providers=CUDA, host=host) as proxy:
        proxy.load()
        assert is_mapped(host, store)


def test_a_session_without_cuda_saves_nothing(
    store: Cache,  # noqa: F811
    tmp_path: Path,
    nothing_is_left_behind: None,
) -> None:
    """It was asked for, and is not there; what a session with it has saved is used."""
    path = make(tmp_path / "m.onnx")
    with ModelHost() as host, InferenceSessionProxy(path, options(), providers=CUDA, host=host) as proxy:
        (before,) = proxy.run(None, {"x": X})
        no_saver_is_left(host)
        eventually(lambda: not store.entries(), "nothing is saved")
    assert np.array_equal(before, expected(path))
