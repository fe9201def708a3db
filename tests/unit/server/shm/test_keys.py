"""What a client's key may name: shared memory of this user, and nothing else."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from onnx_dl.server.shm import keys
from onnx_dl.server.v2.failures import RequestFailure


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "good").write_bytes(bytes(64))
    yield str(tmp_path)


def refused(folder: str, key: str, nbytes: int = 64) -> str:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(RequestFailure) as caught:
        keys.open_key(key, nbytes, folder)
    assert (caught.value.http, caught.value.grpc) == (400, "INVALID_ARGUMENT")
    assert os.listdir("/proc/self/fd") == before
    return str(caught.value)


@pytest.mark.parametrize("key", ["good", "/good"])
def test_a_file_is_opened_for_reading_and_writing(folder: str, key: str) -> None:
    fd = keys.open_key(key, 64, folder)
    assert os.pwrite(fd, b"x", 63) == 1 and os.pread(fd, 1, 63) == b"x"
    assert not os.get_inheritable(fd)
    os.close(fd)


@pytest.mark.parametrize(
    "key", ["", "/", "//good", "a/b", "../good", "..", "/..", ".", "/.", "good\0", "x" * 256, "é" * 200]
)
def test_a_key_that_is_no_name(key: str) -> None:
    with pytest.raises(RequestFailure, match="invalid shm key"):
        keys.name_of(key)


def test_nothing_of_that_name(folder: str) -> None:
    assert "Unable to open shared memory region: '/none': No such file" in refused(folder, "/none")
    assert "Unable to open" in refused(folder, "\udcff")


def test_a_file_that_is_too_small(folder: str) -> None:
    assert "it has 64 bytes, not 65" in refused(folder, "good", 65)


def test_a_link(folder: str) -> None:
    os.symlink("good", f"{folder}/link")
    assert "Unable to open" in refused(folder, "link")


def test_a_pipe_is_not_waited_for(folder: str) -> None:
    os.mkfifo(f"{folder}/pipe")
    assert "it is not a file of shared memory" in refused(folder, "pipe")


def test_a_folder(folder: str) -> None:
    os.mkdir(f"{folder}/folder")
    assert "Unable to open" in refused(folder, "folder")


def test_a_socket_and_a_device(folder: str) -> None:
    os.mknod(f"{folder}/socket", 0o140600)
    assert "Unable to open" in refused(folder, "socket")
    if os.geteuid() == 0:
        os.mknod(f"{folder}/device", 0o020600, os.makedev(1, 3))
        assert "Unable to open" in refused(folder, "device") or "it is not a file" in refused(
            folder, "device"
        )


def test_a_file_that_only_others_may_write(folder: str) -> None:
    os.chmod(f"{folder}/good", 0o400)
    if os.geteuid() != 0:
        assert "Permission denied" in refused(folder, "good")
        return
    os.chown(f"{folder}/good", 12345, 12345)  # root may open it, but it is not root's
    assert "it belongs to another user" in refused(folder, "good")


def test_a_file_of_another_file_system(folder: str) -> None:
    with pytest.raises(RequestFailure, match="it is not a file of shared memory"):
        keys._check("good", os.stat(f"{folder}/good"), os.stat("/proc").st_dev, 64)
