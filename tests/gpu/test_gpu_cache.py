"""The load cache and models for CUDA: the second load maps their weights, and computes the same."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from onnx_dl import InferenceSessionProxy, ModelHost
from onnx_dl.workers.load_cache.store import MODEL, Cache
from tests.fuzz.model_variants import KINDS, WIDTH
from tests.support.gpu import equal, in_process, providers
from tests.workers.test_load_cache import is_saved, no_saver_is_left, store  # noqa: F401


@pytest.mark.parametrize("form", ["path", "bytes"])
def test_the_second_load_is_from_the_cache(
    store: Cache,  # noqa: F811
    host: ModelHost,
    tmp_path: Path,
    form: str,
) -> None:
    data = KINDS["large"](np.random.default_rng(0)).SerializeToString()
    (path := tmp_path / "m.onnx").write_bytes(data)
    feed = {"x": np.random.default_rng(1).standard_normal((2, WIDTH)).astype(np.float32)}
    expected = in_process(data).run(None, feed)
    proxy = InferenceSessionProxy(str(path) if form == "path" else data, providers=providers(), host=host)
    equal(proxy.run(None, feed), expected)
    is_saved(store)
    no_saver_is_left(host)
    (entry,) = store.entries()
    assert (entry.path / MODEL).stat().st_size < 8192
    os.utime(entry.path, (0, 0))
    proxy.unload()
    equal(proxy.run(None, feed), expected)
    (entry,) = store.entries()
    assert entry.used > 0 and not store.is_refused(entry.key)
