"""Proxies that are pickled, copied, and used in other processes."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from onnx_dl import InferenceSessionProxy, ModelHost
from tests.contract.both import CPU, fixed, ortvalue, scaled

pytestmark = pytest.mark.slow

X = np.ones((2, 3), np.float32)


def twice(proxy: InferenceSessionProxy) -> float:
    return float(proxy.run(["twice"], {"x": X})[0][0, 0])


def through_a_pickle(proxy: Any) -> Any:
    return pickle.loads(pickle.dumps(proxy))


@pytest.fixture
def default() -> Any:
    """The default host, which other processes have, too; closed in the end."""
    host = InferenceSessionProxy(scaled())._handle.host
    yield host
    host.close()


@pytest.mark.parametrize("source", ["path", "bytes"])
def test_a_pickled_proxy_is_another_of_the_same_model(
    default: ModelHost, tmp_path: Path, source: str
) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(scaled())
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    options.add_session_config_entry("mine", "1")
    given = str(path) if source == "path" else scaled()
    proxy = InferenceSessionProxy(given, options, CPU, ttl=60, latency="low")
    again = through_a_pickle(proxy)
    assert (twice(proxy), twice(again)) == (2, 2)
    assert (again.ttl, again._handle.lease.terms.latency) == (60, "low")
    assert len(default.snapshot().models) == 1
    assert again.get_session_options().get_session_config_entry("mine") == "1"
    assert (again._model_path, again._model_bytes) == (proxy._model_path, proxy._model_bytes)
    proxy.close()
    again.set_providers(CPU)
    assert twice(again) == 2
    assert again.get_session_options().intra_op_num_threads == 2


@pytest.mark.parametrize("act", [copy.copy, copy.deepcopy])
def test_a_copy_outlives_the_original(host: ModelHost, act: Any) -> None:
    proxy = InferenceSessionProxy(scaled(), providers=CPU, host=host)
    assert twice(proxy) == 2
    another = act(proxy)
    del proxy
    gc.collect()
    assert twice(another) == 2
    assert len(host.snapshot().models) == 1


@pytest.mark.parametrize("act", [copy.copy, copy.deepcopy, through_a_pickle])
def test_a_copy_has_the_terms_of_the_original(default: ModelHost, act: Any) -> None:
    """The model stays pinned, and has its priority, when only the copy is left."""
    proxy = InferenceSessionProxy(scaled(), providers=CPU, ttl=60, pin=True, priority=3, max_memory="1GB")
    again = act(proxy)
    proxy.close()
    assert twice(again) == 2
    (status,) = default.snapshot().models
    assert (status.pinned, status.priority, status.ttl) == (True, 3, 60)
    assert again._handle.spec == proxy._handle.spec


def test_live_initializers(default: ModelHost) -> None:
    """Copies see them change, and so does what was pickled for this process: it is the same model."""
    weights = np.full(3, 5, np.float32)
    kept = ortvalue(weights)
    options = onnxruntime.SessionOptions()
    options.add_initializer("w", kept)
    feed = {"a": X, "b": X}
    proxy = InferenceSessionProxy(fixed(), options, CPU)
    proxies = [proxy, copy.copy(proxy), through_a_pickle(proxy)]
    assert [p.run(["product"], feed)[0][0, 0] for p in proxies] == [10, 10, 10]
    weights[:] = 7
    assert [p.run(["product"], feed)[0][0, 0] for p in proxies] == [14, 14, 14]


ELSEWHERE = """
import pickle, sys
import numpy as np
proxy = pickle.load(open(sys.argv[1], "rb"))
feed = {"a": np.ones((2, 3), np.float32), "b": np.ones((2, 3), np.float32)}
print(proxy.run(["product"], feed)[0][0, 0], "onnxruntime" in sys.modules)
"""


def test_in_another_process(default: ModelHost, tmp_path: Path) -> None:
    """Arrays that are no file go along as they are when it is pickled."""
    weights = np.full(3, 5, np.float32)
    kept = ortvalue(weights)
    options = onnxruntime.SessionOptions()
    options.add_initializer("w", kept)
    options.log_severity_level = 3
    proxy = InferenceSessionProxy(fixed(), options, CPU)
    (tmp_path / "p").write_bytes(pickle.dumps(proxy))
    weights[:] = 7
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, tmp_path / "p"], capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.stderr) == ("10.0 False\n", "")


def test_after_a_fork_without_a_word(default: ModelHost) -> None:
    proxy = InferenceSessionProxy(scaled(), providers=CPU)
    assert twice(proxy) == 2
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(write, str(twice(proxy)).encode())
        proxy._handle.host.close()
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        assert answer.read() == "2.0"
    os.waitpid(pid, 0)
    assert twice(proxy) == 2
