"""What is said where no thread or process can be had."""

from __future__ import annotations

import errno
import threading

import pytest

from onnx_dl import OnnxDLError, ProcessesExhausted
from onnx_dl.concurrency import spawning
from onnx_dl.protocol import failures
from onnx_dl.supervisor.policy import outcomes
from onnx_dl.supervisor.processes.worker_process import exit_status


def refused(self: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def test_a_thread_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    spawning.check(3, "A test")
    monkeypatch.setattr(threading.Thread, "start", refused)
    for act in (lambda: spawning.start(threading.Thread(), "A test"), lambda: spawning.check(2, "A test")):
        with pytest.raises(ProcessesExhausted, match=r"^A test needs .* ulimit -u") as raised:
            act()
        assert isinstance(raised.value, OnnxDLError | OSError) and raised.value.errno == errno.EAGAIN


def test_it_travels() -> None:
    error = spawning.exhausted("A test")
    again = failures.rebuild(failures.describe(error))
    assert type(again) is ProcessesExhausted and str(again) == str(error)


def test_an_error_of_somebody_else_has_a_note() -> None:
    for text in ("can't start new thread", "env.cc: pthread_create failed, error code: 11 error msg: busy"):
        error = RuntimeError(text)
        spawning.note_shortage(error)
        again = failures.rebuild(failures.describe(error))
        assert type(again) is RuntimeError and str(again) == text
        assert "ulimit -u" in again.__notes__[0]
    error = RuntimeError("something else")
    spawning.note_shortage(error)
    assert not hasattr(failures.rebuild(failures.describe(error)), "__notes__")


def test_a_worker_that_ended_for_want_of_one() -> None:
    status = 71 << 8
    assert outcomes.lacked_a_process(exit_status(status)) and not outcomes.lacked_a_process(
        exit_status(70 << 8)
    )
    assert "m.onnx was not loaded. Why." in str(outcomes.no_process("m.onnx", "noise\nWhy.\n\n"))
