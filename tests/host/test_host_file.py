"""Models of a host file, in real workers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper, save_model

from onnx_dl import InferenceSessionProxy, ModelHost
from onnx_dl.supervisor.hostfile.reader import Configured, read

TEXT = """
[defaults.options]
intra_op_num_threads = 3
config = {"session.intra_op.allow_spinning" = "0"}

[models.scaler]
path = "models/scaler.onnx"
providers = [["CPUExecutionProvider", {}]]
warmup = {x = {shape = [2], fill = 1.5}}

[models.scaler.options]
graph_optimization_level = "basic"
enable_profiling = true
profile_file_prefix = "profile"
config = {"session.set_denormal_as_zero" = "1"}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A host file, and a model whose factors lie in a file beside it: y = x * (1, 2)."""
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "w"], ["y"])],
        "scaler",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])],
        [numpy_helper.from_array(np.float32([1, 2]), "w")],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (tmp_path / "models").mkdir()
    path = str(tmp_path / "models" / "scaler.onnx")
    save_model(made, path, save_as_external_data=True, location="w", size_threshold=0)
    (tmp_path / "host.toml").write_text(TEXT)
    return tmp_path


def proxy_of(model: Configured, host: ModelHost) -> InferenceSessionProxy:
    """As a client has it that got the spec from a host."""
    return InferenceSessionProxy.of_spec(model.spec, model.terms, host=host)


def test_a_model_of_the_file_runs_as_it_says(folder: Path, host: ModelHost) -> None:
    model = read(folder / "host.toml").models["scaler"]
    proxy = proxy_of(model, host)
    warm = model.warmup["x"]
    (result,) = proxy.run(None, {"x": np.full(warm.shape, warm.fill, warm.dtype)})
    assert result.tolist() == [1.5, 3.0]
    options = proxy.get_session_options()
    assert (options.intra_op_num_threads, options.graph_optimization_level.name) == (3, "ORT_ENABLE_BASIC")
    for key, value in (("session.intra_op.allow_spinning", "0"), ("session.set_denormal_as_zero", "1")):
        assert options.get_session_config_entry(key) == value
    assert proxy.get_providers() == ["CPUExecutionProvider"]


def test_what_onnxruntime_writes_lands_beside_the_file(folder: Path, host: ModelHost) -> None:
    proxy = proxy_of(read(folder / "host.toml").models["scaler"], host)
    proxy.run(None, {"x": np.zeros(2, np.float32)})
    assert (folder / proxy.end_profiling()).parent == folder
    assert list(folder.glob("profile*.json"))


def test_two_readings_share_a_worker(folder: Path, host: ModelHost) -> None:
    proxies = [proxy_of(read(folder / "host.toml").models["scaler"], host) for _ in range(2)]
    for proxy in proxies:
        proxy.load()
    (status,) = host.snapshot().models
    assert status.loads == 1


def test_a_file_without_options(folder: Path, host: ModelHost) -> None:
    (folder / "host.toml").write_text('[models.scaler]\npath = "models/scaler.onnx"')
    model = read(folder / "host.toml").models["scaler"]
    same = InferenceSessionProxy(model.spec.path, providers=None, host=host)
    assert model.spec.options is None is same._handle.spec.options
    (result,) = proxy_of(model, host).run(None, {"x": np.ones(2, np.float32)})
    assert result.tolist() == [1.0, 2.0]
