"""What is said of a broken installation of onnxruntime."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from onnx_dl import InferenceSessionProxy, InstallationError, cli, installation
from onnx_dl.demo.assets import model_path

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def fresh_check() -> None:
    installation.check.cache_clear()


def distribution(folder: Path, name: str) -> None:
    info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "top_level.txt").write_text("onnxruntime\n")


def test_two_builds_are_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("onnxruntime", "onnxruntime-directml"):
        distribution(tmp_path, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.warns(RuntimeWarning, match=r"overwrite each other's files.*pip uninstall -y onnxruntime"):
        installation.check()


def test_one_build_is_fine() -> None:
    installation.check()


def test_none_is_an_error_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InstallationError, match="pip install onnxruntime"):
        InferenceSessionProxy(model_path("digits")).get_inputs()


def test_a_proxy_needs_no_onnxruntime_in_the_application() -> None:
    code = (
        "import sys, numpy, onnx_dl\n"
        f"proxy = onnx_dl.InferenceSession({str(model_path('digits'))!r})\n"
        "proxy.run(None, {'pixels': numpy.zeros((1, 64), 'f')}); proxy.get_modelmeta()\n"
        "assert not [name for name in sys.modules if name.startswith('onnxruntime')]\n"
        "import onnxruntime\n"
        "assert isinstance(proxy, onnxruntime.InferenceSession)\n"
        "assert isinstance(proxy, onnx_dl.InferenceSessionProxy)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_bundle_without_metadata_still_has_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert installation.version() == "unknown"
    assert cli.parser().parse_args(["ps"]).command == "ps"
