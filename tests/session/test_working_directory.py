"""Where a program is: it parts no models that are the same, and its folder may be removed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from onnx_dl import InferenceSessionProxy, ModelHost
from tests.contract.both import scaled

X = np.ones((1, 1), np.float32)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "twice.onnx").write_bytes(scaled())
    (tmp_path / "sub").mkdir()
    return tmp_path / "twice.onnx"


def doubles(proxy: InferenceSessionProxy) -> bool:
    return bool(proxy.run(["twice"], {"x": X})[0][0, 0] == 2)


def both(path: Path, host: ModelHost, monkeypatch: pytest.MonkeyPatch, **how: Any) -> int:
    """How many workers serve two proxies that were made in two folders, with different paths."""
    monkeypatch.chdir(path.parent)
    first = InferenceSessionProxy(path, host=host, **how)
    monkeypatch.chdir(path.parent / "sub")
    second = InferenceSessionProxy("../twice.onnx", host=host, **how)
    assert doubles(first) and doubles(second)
    return len(host.snapshot().models)


def test_programs_in_different_folders_share(
    path: Path, host: ModelHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert both(path, host, monkeypatch) == 1


def test_options_that_name_no_file_share(
    path: Path, host: ModelHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    given = {"sess_options": options, "providers": ["CPUExecutionProvider"], "provider_options": [{}]}
    assert both(path, host, monkeypatch, **given) == 1


def test_a_profile_lands_where_its_program_is(
    path: Path, host: ModelHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    assert both(path, host, monkeypatch, sess_options=options) == 2


def test_the_folder_is_removed_between_two_loads(
    path: Path, host: ModelHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(path.parent / "sub")
    proxy = InferenceSessionProxy(path, host=host)
    assert doubles(proxy)
    (path.parent / "sub").rmdir()
    assert doubles(proxy)
    proxy.unload()
    assert doubles(proxy)


def test_a_model_is_opened_where_the_folder_is_gone(
    path: Path, host: ModelHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(path.parent / "sub")
    (path.parent / "sub").rmdir()
    assert doubles(InferenceSessionProxy(path, host=host))


def test_models_of_a_group_whose_folder_is_gone(
    path: Path, host: ModelHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(path.parent / "sub")
    (path.parent / "sub").rmdir()
    proxies = [InferenceSessionProxy(source, group="g", host=host) for source in (path, scaled())]
    assert all(map(doubles, proxies))
    assert len(host.snapshot().models) == 1
