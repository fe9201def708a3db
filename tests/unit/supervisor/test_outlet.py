"""What people read is written without waiting for them."""

from __future__ import annotations

import os
import threading

import pytest

from onnx_dl.supervisor.outlet import Outlet
from tests.support.waiting import DEADLINE, allowed


@pytest.fixture
def pipe():
    ends = os.pipe()
    yield ends
    for fd in ends:
        os.close(fd)


def test_what_is_written_arrives(pipe: tuple[int, int]) -> None:
    outlet = Outlet(pipe[1])
    print("one", "zwölf \udcff", file=outlet, flush=True)
    outlet.pass_on(b"\xffraw\n")
    outlet.finish(DEADLINE)
    assert os.read(pipe[0], 4096) == "one zwölf \\udcff\n".encode() + b"\xffraw\n"
    outlet.end()


def test_a_pipe_that_nobody_empties_keeps_nobody_waiting(pipe: tuple[int, int]) -> None:
    outlet = Outlet(pipe[1])
    for _ in range(100):
        outlet.pass_on(bytes(1 << 16))
    taken = bytearray()

    def take() -> None:
        while data := os.read(pipe[0], 1 << 16):
            taken.extend(data)
            if b"the end" in taken[-100:]:
                return

    outlet.finish(0.05)  # to no avail, and soon back
    reader = threading.Thread(target=take)
    reader.start()
    outlet.finish(DEADLINE)
    outlet.pass_on(b"the end")
    reader.join(allowed(DEADLINE))
    assert b"bytes were not written, because nothing reads this" in taken
    assert len(taken) < 2 << 20
    outlet.end()


def test_a_descriptor_that_somebody_has_made_non_blocking(pipe: tuple[int, int]) -> None:
    """An application's event loop may do that to the stderr that it shares with us."""
    os.set_blocking(pipe[1], False)
    outlet = Outlet(pipe[1])
    outlet.pass_on(bytes(1 << 18))
    taken = 0
    while taken < 1 << 18:
        taken += len(os.read(pipe[0], 1 << 16))
    outlet.end()


def test_nobody_is_there_to_read() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    outlet = Outlet(write_end)
    for _ in range(3):
        outlet.write("lost\n")
    outlet.finish(DEADLINE)
    outlet.end()
    os.close(write_end)
