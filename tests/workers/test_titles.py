"""Titles of our processes, as ``ps`` shows them."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

import onnx_dl
from onnx_dl import ModelHost
from onnx_dl.demo.assets import model_path
from tests.support.sharing import own_runtime
from tests.support.waiting import eventually, template_of


def title(pid: int | None) -> str:
    """All of it, without the padding."""
    return Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").decode()


@pytest.mark.parametrize("start", ["fork", "exec"])
def test_each_process_says_what_it_is(monkeypatch: pytest.MonkeyPatch, start: str) -> None:
    monkeypatch.setenv("ONNX_DL_START", start)
    monkeypatch.setenv("ONNX_DL_TITLED", "yes")
    with ModelHost() as host:
        alone = host.open(model_path("digits"))
        together = host.open(model_path("diabetes"), group="speech")
        host.preload([alone, together])
        found = host.snapshot()
        assert sorted(title(status.pid) for status in found.models) == [
            "onnx-dl: worker digits.onnx",
            "onnx-dl: worker group speech",
        ]
        assert title(found.supervisor_pid) == "onnx-dl: supervisor"
        eventually(lambda: title(template_of(host).pid) == "onnx-dl: template", "the template's title")
        for pid in (found.supervisor_pid, found.models[0].pid):  # it is not written over
            assert psutil.Process(pid).environ()["ONNX_DL_TITLED"] == "yes"
            assert psutil.Process(pid).environ().get("PATH") == os.environ.get("PATH")


def test_a_shared_host_has_its_name_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with own_runtime(monkeypatch):
        host = onnx_dl.connect("web")
        try:
            assert title(host.snapshot().supervisor_pid) == "onnx-dl: supervisor of web"
        finally:
            host.stop()
