"""``sha256=``: the worker loads this file, and no other."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnx_dl import (
    ConfigError,
    ExecutionSession,
    InferenceSessionProxy,
    ModelDigestMismatch,
    ModelHost,
    SupervisorStartError,
)
from onnx_dl.core import digests
from tests.support.slow import identity_model
from tests.support.waiting import eventually

CPU = ["CPUExecutionProvider"]
X = {"x": np.ones(4, np.float32)}


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def opened(source: Any, host: ModelHost, sha256: Any, **how: Any) -> InferenceSessionProxy:
    return InferenceSessionProxy(source, providers=CPU, host=host, sha256=sha256, **how)


def external_model(folder: Path, factor: float, size: int = 4) -> Path:
    """y = x * weights, which lie in weights.bin."""
    weights = numpy_helper.from_array(np.full(size, factor, np.float32), "w")
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [size]) for name in "xy"]
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "w"], ["y"])], "g", ends[:1], ends[1:], [weights]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = folder / "model.onnx"
    onnx.save_model(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    return path


@pytest.mark.parametrize("given", ["path", "bytes"])
def test_the_right_model_and_another(given: str, host: ModelHost, tmp_path: Path) -> None:
    data = identity_model()
    path = tmp_path / "model.onnx"
    path.write_bytes(data)
    source = path if given == "path" else data
    with opened(source, host, digest(data).upper()) as proxy:
        assert (proxy.run(None, X)[0] == X["x"]).all()
    with opened(source, host, digest(b"")) as proxy, pytest.raises(ModelDigestMismatch) as caught:
        proxy.load()
    assert (caught.value.expected, caught.value.actual) == (digest(b""), digest(data))
    assert caught.value.path == (str(path) if given == "path" else "the model's bytes")
    assert digest(data) in str(caught.value)


def test_a_file_that_is_changed_between_two_loads(host: ModelHost, tmp_path: Path) -> None:
    """Also one whose size and time are the same as before.  The right one is loaded again at once."""
    data = identity_model()
    path = tmp_path / "model.onnx"
    path.write_bytes(data)
    before = os.stat(path)
    with opened(path, host, digest(data)) as proxy:
        proxy.load()
        proxy.unload()
        eventually(lambda: not proxy.is_loaded, "the unload")
        changed = data.replace(b"identity", b"Identity")
        assert changed != data
        path.write_bytes(changed)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        with pytest.raises(ModelDigestMismatch):
            proxy.run(None, X)
        path.write_bytes(data)
        assert (proxy.run(None, X)[0] == X["x"]).all()


def test_external_data(host: ModelHost, tmp_path: Path) -> None:
    path = external_model(tmp_path, 2.0)
    own, weights = digest(path.read_bytes()), digest((tmp_path / "weights.bin").read_bytes())
    with opened(path, host, own) as proxy, pytest.raises(ModelDigestMismatch, match="Give a dict of all"):
        proxy.load()
    for name in ("", "model.onnx", str(path)):
        with opened(path, host, {name: own, "./weights.bin": weights}) as proxy:
            assert (proxy.run(None, X)[0] == 2).all()
    both = {"": own, "weights.bin": weights}
    (tmp_path / "weights.bin").write_bytes(np.full(4, 3, np.float32).tobytes())
    with opened(path, host, both) as proxy, pytest.raises(ModelDigestMismatch) as caught:
        proxy.load()
    assert caught.value.path == str(tmp_path / "weights.bin")
    with opened(path, host, both, sandbox=False, group="g") as proxy, pytest.raises(ModelDigestMismatch):
        proxy.load()


def test_a_saved_form_is_used_for_the_right_files_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nothing_is_left_behind: None
) -> None:
    monkeypatch.setenv("ONNX_DL_CACHE", "on")
    monkeypatch.setenv("ONNX_DL_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("ONNX_DL_CACHE_FROM", "0")
    path = external_model(tmp_path, 2.0, 1 << 22)
    both = {name: digest((tmp_path / (name or path.name)).read_bytes()) for name in ("", "weights.bin")}
    x = {"x": np.ones(1 << 22, np.float32)}
    with ModelHost() as host, opened(path, host, both) as proxy:
        proxy.run(None, x)
        eventually(lambda: list((tmp_path / "cache").glob("*/meta.json")), "the save", 60)
        proxy.unload()
        assert (proxy.run(None, x)[0] == 2).all()
        proxy.unload()
        weights, stat = tmp_path / "weights.bin", os.stat(tmp_path / "weights.bin")
        with open(weights, "r+b") as file:
            file.write(np.float32(3).tobytes())
        os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        with pytest.raises(ModelDigestMismatch):
            proxy.run(None, x)


def test_a_compiled_model(host: ModelHost, tmp_path: Path) -> None:
    path = tmp_path / "model.so"
    path.write_bytes(b"none")
    with pytest.raises(ModelDigestMismatch):
        ExecutionSession(path, host=host, sha256=digest(b""), eager=True)


@pytest.mark.parametrize("value", ["", "5f2b", digest(b"") + "0", 7, [], {}, {"": "x"}, {7: digest(b"")}])
def test_values_that_are_no_digests(value: object) -> None:
    with pytest.raises(ConfigError, match="sha256"):
        digests.parse(value)


def test_a_model_without_a_digest_of_its_own() -> None:
    with pytest.raises(ConfigError, match="no digest for the model itself"):
        InferenceSessionProxy(identity_model(), sha256={"weights.bin": digest(b"")})


def test_the_hosts_file(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(identity_model())
    config = tmp_path / "host.toml"
    config.write_text(f'[models.m]\npath = "model.onnx"\nsandbox = true\nsha256 = "{digest(b"")}"\n')
    with ModelHost(config=config) as host, host.open("m") as proxy:
        assert proxy._handle.spec.sandbox and proxy._handle.spec.sha256 == {"": digest(b"")}
        with pytest.raises(ModelDigestMismatch):
            proxy.load()
    config.write_text('[models.m]\npath = "model.onnx"\nsha256 = "abc"\n')
    with (
        ModelHost(config=config) as host,
        pytest.raises(SupervisorStartError, match=r"line 3.*sha256.*64 hex"),
    ):
        host.start()
