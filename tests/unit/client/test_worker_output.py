"""Pieces of stderr become lines, and a thread writes them; nobody waits for who reads them."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator

import pytest

from onnx_dl.client import worker_output
from onnx_dl.client.worker_output import LineAssembler, WorkerOutput
from onnx_dl.protocol.control import Wrote
from tests.support.waiting import DEADLINE, eventually


def piece(text: bytes, worker_id: int = 1, *, last: bool = False) -> Wrote:
    return Wrote(pid=100 + worker_id, text=text, worker_id=worker_id, model=f"model {worker_id}", last=last)


def of(lines: LineAssembler, *pieces: Wrote) -> list[tuple[int, str, int]]:
    return [(r.level, r.line, r.piece.pid) for each in pieces for r in lines.add(each)]


def test_lines_of_several_workers_are_put_together() -> None:
    found = of(
        LineAssembler(), piece(b"on"), piece(b"two\n", 2), piece(b"e\nthree\r\n\nfo"), piece(b"", last=True)
    )
    told = [(logging.INFO, "two", 102)] + [(logging.INFO, line, 101) for line in ("one", "three", "fo")]
    assert found == told


def test_levels_are_onnxruntimes() -> None:
    text = b"".join(b"\x1b[0;93mnow [%c:onnxruntime:, here] it is\x1b[m\n" % letter for letter in b"VIWEF")
    levels = [logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR, logging.CRITICAL]
    assert [level for level, _, _ in of(LineAssembler(), piece(text))] == levels
    assert of(LineAssembler(), piece(b"\x1b[1;31m[E:onnxruntime:] it\x1b[m\n"))[0][1] == "[E:onnxruntime:] it"


def test_what_the_supervisor_says_is_a_warning() -> None:
    assert of(LineAssembler(), Wrote(pid=7, text=b"onnx-dl: no\n")) == [(logging.WARNING, "onnx-dl: no", 7)]


def test_a_line_without_end_is_cut() -> None:
    lines = LineAssembler()
    found = of(lines, *[piece(b"x" * (1 << 15)) for _ in range(4)])
    assert [len(line) for _, line, _ in found] == [3 << 15]
    assert [len(r.line) for r in lines.end()] == [1 << 15]
    assert list(lines.end()) == []


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, int]]:
    """In the place of descriptor 2."""
    ends = os.pipe()
    monkeypatch.setattr(worker_output, "_STDERR", ends[1])
    yield ends
    os.close(ends[0])


def no_writer() -> bool:
    return not any(thread.name == "onnx-dl-stderr" for thread in threading.enumerate())


@pytest.fixture(autouse=True)
def no_thread_is_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(worker_output, "_IDLE", 0.01)
    yield
    eventually(no_writer, "the thread ends")


def test_whoever_waits_finds_it_written(pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_output, "_PATIENCE", DEADLINE)
    lines = WorkerOutput()
    for turn in range(20):
        if turn % 5 == 4:
            eventually(no_writer, "the thread ends, and another one begins")
        lines.put(piece(b"%d\n" % turn))
        lines.catch_up()
        assert os.read(pipe[0], 100) == b"%d\n" % turn
    os.close(pipe[1])


def test_nobody_reads(pipe: tuple[int, int]) -> None:
    """Each caller waits once, and then none does; what is too much is dropped, and said so."""
    lines = WorkerOutput()
    for _ in range(100):
        lines.put(piece(bytes(1 << 16)))
    lines.catch_up()
    assert lines._stuck
    lines.catch_up()
    taken = bytearray()
    while len(taken) < 15 << 16:  # that many are taken at least, and the pipe has room for what is left
        taken += os.read(pipe[0], 1 << 16)
    eventually(lambda: lines._put == lines._written, "all is written")
    lines.put(piece(b"the end"))
    while b"the end" not in taken:
        taken += os.read(pipe[0], 1 << 16)
    assert b"bytes were not written, because nothing reads this" in taken
    assert len(taken) < 2 << 20
    os.close(pipe[1])


def test_a_descriptor_that_does_not_block(pipe: tuple[int, int]) -> None:
    os.set_blocking(pipe[1], False)
    lines = WorkerOutput()
    lines.put(piece(bytes(1 << 18)))
    taken = 0
    while taken < 1 << 18:
        taken += len(os.read(pipe[0], 1 << 16))
    eventually(lambda: lines._put == lines._written, "all is written")
    os.close(pipe[1])


def test_the_end_of_an_unended_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "onnx_dl.worker")
    lines = WorkerOutput(log=True)
    lines.put(piece(b"begun"))
    lines.end()
    eventually(lambda: caplog.messages == ["begun"], "it is told")


class Fails(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        raise OSError("no")


def test_a_handler_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "onnx_dl.worker")
    handler, lines = Fails(), WorkerOutput(log=True)
    worker_output.logger.addHandler(handler)
    try:
        lines.put(piece(b"one\n"))
        lines.put(piece(b"two\n"))
        eventually(lambda: lines._put == lines._written, "both are told")
    finally:
        worker_output.logger.removeHandler(handler)
