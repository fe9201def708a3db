"""A snapshot as text and as HTML."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

import pytest

from onnx_dl.core.lifecycle import ModelState
from onnx_dl.core.status import ModelStatus, Snapshot, Usage
from onnx_dl.core.text import file_name


def status(model: str = "/m/asr.onnx", **fields: Any) -> ModelStatus:
    known: dict[str, Any] = {"state": ModelState.READY, "pid": 4711, "ttl": 60.0, "idle": 15.0, "runs": 12}
    usage = Usage(rss=45_000_000, pss=31_200_000)
    plain = {"worker_id": 1, "leases": 1, "usage": usage, "loads": 1, "failures": 0, "retry_after": 0.0}
    return ModelStatus(model=model, key="k" + model, **plain | known | fields)


def snapshot(*models: ModelStatus, **fields: Any) -> Snapshot:
    return Snapshot(seq=1, supervisor_pid=4700, models=list(models), **fields)


def test_a_printed_snapshot_is_a_table() -> None:
    failed = status("/m/vad.onnx", state=ModelState.FAILED, pid=None, ttl=None, retry_after=4.0, runs=0)
    taken = snapshot(status(), failed, host="web", memory_limit=10**9, memory_in_use=31_200_000)
    first, head, asr, vad, memory = str(taken).splitlines()
    assert first == "Shared host 'web', supervisor pid 4700"
    assert head.split()[:3] == ["MODEL", "STATE", "PID"] and "PSS" in head
    assert asr.split()[:3] == ["asr.onnx", "ready", "4711"] and "31.2 MB" in asr
    assert vad.startswith("vad.onnx  failed, retry in 4.0 s")
    assert head.index("PSS") + 3 == asr.index("31.2 MB") + len("31.2 MB")  # aligned to the right
    assert memory == "Memory: 31.2 MB in use of 1000.0 MB (3 %)"


def test_it_fits_80_columns() -> None:
    usage = Usage(rss=12_345_000_000, pss=12_345_000_000, gpu=9_000_000_000)
    many = [
        status(f"/m/{name}", usage=usage, pinned=True, runs=123_456, p50=0.0123, pid=1_234_567)
        for name in ("a" * 90, "模型" * 40, "b\n\x1b[31m.onnx")
    ]
    shown = str(snapshot(*many))
    assert max(map(len, shown.splitlines())) <= 80
    assert "aaaaaaaaa…" in shown and "PSS" in shown and "\x1b" not in shown
    assert len(shown.splitlines()) == 3 + len(many)


def test_nothing() -> None:
    assert str(Snapshot(seq=0, supervisor_pid=None, models=[])).splitlines()[:2] == [
        "Private host, not running",
        "No models.",
    ]


class _Cells(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.cells.append((self.open[-1], data))


def test_a_notebook_shows_a_table_in_which_names_are_text() -> None:
    parser = _Cells()
    parser.feed(snapshot(status("/m/<b>&.onnx"))._repr_html_())
    parser.close()
    assert parser.open == []
    assert ("th", "MODEL") in parser.cells and ("td", "<b>&.onnx") in parser.cells
    assert ("th", "GPU") not in parser.cells  # no model has any


def test_one_model_in_one_line() -> None:
    assert str(status()) == "asr.onnx: ready, pid 4711, PSS 31.2 MB, ttl 60 s"
    gone = status(state=ModelState.UNLOADED, pid=None, ttl=-1.0, pinned=True)
    assert str(gone) == "asr.onnx: unloaded, stays, pinned"


@pytest.mark.parametrize(
    ("model", "name"),
    [("/m/asr.onnx", "asr.onnx"), ("asr.onnx", "asr.onnx"), ("bytes:1f2e", "bytes:1f2e"),
     ("group:a/b", "group a/b"), ("group:speech#1f", "group speech#1f")],
)  # fmt: skip
def test_the_name_of_a_model_without_its_folders(model: str, name: str) -> None:
    assert file_name(model) == name
