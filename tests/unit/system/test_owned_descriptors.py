"""A descriptor has one owner, who closes it once, and only while it is what it was."""

from __future__ import annotations

import concurrent.futures
import os
import socket

import pytest

from onnx_dl.system.descriptor_limits import is_open
from onnx_dl.system.owned_descriptors import Descriptor, are_held


def opened(kind: str) -> int:
    if kind == "eventfd":
        return os.eventfd(0)
    if kind == "socket":
        return socket.socket(socket.AF_UNIX).detach()
    return os.memfd_create("test") if kind == "memfd" else os.open(os.devnull, os.O_RDONLY)


KINDS = ["eventfd", "socket", "memfd", "file"]


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_closed_with_its_owner(kind: str) -> None:
    fd = opened(kind)
    descriptor = Descriptor(fd)
    assert descriptor.holds() and descriptor.number == fd
    del descriptor
    assert not is_open(fd)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("others", KINDS)
def test_a_number_that_is_anothers_is_left_alone(kind: str, others: str) -> None:
    descriptor = Descriptor(opened(kind))
    number = descriptor.number
    other = opened(others)
    os.dup2(other, number)
    os.close(other)
    assert not descriptor.holds()
    assert descriptor.duplicate() is None
    descriptor.close()
    del descriptor
    assert is_open(number)
    os.close(number)


def test_a_number_that_was_closed_is_no_error() -> None:
    descriptor = Descriptor(opened("file"))
    os.close(descriptor.number)
    assert not descriptor.holds() and descriptor.duplicate() is None
    descriptor.close()


def test_one_of_many_who_take_it_gets_it() -> None:
    for _ in range(50):
        descriptor = Descriptor(opened("file"))
        with concurrent.futures.ThreadPoolExecutor(4) as threads:
            taken = list(threads.map(lambda take: take(), [descriptor.take] * 4))
        (number,) = [fd for fd in taken if fd is not None]
        os.close(number)


def test_a_second_owner_of_the_same_file() -> None:
    """A duplicate shares what marks the file: both know it."""
    first = Descriptor(opened("eventfd"))
    second = Descriptor(first.duplicate() or -1)
    assert first.holds() and second.holds()
    first.close()
    assert second.holds()


def test_a_child_has_none_of_them() -> None:
    descriptor = Descriptor(opened("file"))
    number = descriptor.number
    if not (pid := os.fork()):
        closed = not is_open(number)
        other = os.open(os.devnull, os.O_RDONLY)  # has the number now
        del descriptor
        os._exit(0 if closed and is_open(other) else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert descriptor.holds()


def test_without_marks_the_files_identity_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> int:
        raise OSError

    with monkeypatch.context() as patch:
        patch.setattr("onnx_dl.system.owned_descriptors._get", refused)
        descriptor, second = Descriptor(opened("memfd")), Descriptor(opened("memfd"))
        assert descriptor.holds()
        assert are_held(descriptor, second)
        second.close()
        assert not are_held(descriptor, second)
        number, other = descriptor.number, opened("memfd")
        os.dup2(other, number)
        os.close(other)
        assert not descriptor.holds()
        descriptor.close()
        assert is_open(number)
    os.close(number)


def test_what_another_thread_closes_meanwhile_has_no_duplicate(monkeypatch: pytest.MonkeyPatch) -> None:
    owner = Descriptor(opened("memfd"))
    monkeypatch.setattr(Descriptor, "holds", lambda self: True)  # the look came before
    owner.close()
    assert owner.duplicate() is None


def test_only_what_others_ended_is_lost() -> None:
    mine, theirs = Descriptor(opened("memfd")), Descriptor(opened("memfd"))
    os.close(theirs.number)
    assert theirs.is_lost and not mine.is_lost
    mine.close()
    theirs.close()
    assert theirs.is_lost and not mine.is_lost
