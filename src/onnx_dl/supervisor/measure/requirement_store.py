"""What models were measured to need, on disk: one small file for each version of onnxruntime.

Several supervisors may write it.  Reading and writing never raise because of a disk: a file that cannot be
read is an empty one, and what cannot be written is known until this process ends.  Each entry is checked for
itself, so that of a file that was damaged all is used that is whole; the next writing mends the rest.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import msgspec

from onnx_dl.core.settings import Settings, cache_folder
from onnx_dl.supervisor.policy.requirements import Requirement
from onnx_dl.system import installation, small_files

_MOST: Final = 4096
"""Models; beyond that, what was not told of for longest goes."""
_MOST_BYTES: Final = 4 << 20
"""Of the file, which has 0.3 KB for a model; one that is larger is not ours."""
_DAY: Final = 86_400.0


class Store:
    """The file, read when it is first asked for a model or told to open."""

    def __init__(self, where: Callable[[], Path | None]) -> None:
        """``where``: tells the path of the file, which need not exist; None: nothing is read or written."""
        self._where = where
        self._path: Path | None = None
        self._known: dict[str, Requirement] | None = None
        self._unwritten: dict[str, Requirement] = {}

    def open(self) -> dict[str, Requirement]:
        """Finds and reads it, which may take 30 ms where much is installed."""
        if self._known is None:
            self._path = self._where()
            self._known = self._read()
        return self._known

    def get(self, key: str) -> Requirement | None:
        """What was known of a model when the file was read."""
        return self.open().get(key)

    def put(self, key: str, need: Requirement) -> None:
        """Writes it down, together with what could not be written before."""
        self.open()
        if self._path is None:
            return
        self._unwritten[key] = need
        with contextlib.suppress(OSError):  # read-only, full, or somebody else is at it: the next time
            self._write(self._path)

    def is_saved(self, entry: str) -> bool:
        """Whether the load cache has an entry of this key."""
        self.open()
        return bool(entry) and self._path is not None and (self._path.parent / entry).is_dir()

    def _read(self) -> dict[str, Requirement]:
        try:
            data = b"" if self._path is None else small_files.read(self._path, _MOST_BYTES)
        except OSError:
            return {}
        return dict(_entries(data, time.time() + _DAY))

    def _write(self, path: Path) -> None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # The folder's lock, because the file is replaced; without waiting, because models wait for us.
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            found = sorted((self._read() | self._unwritten).items(), key=lambda item: item[1].at)
            _replace(path, _encode(found[-_MOST:]))
            self._unwritten = {}
        finally:
            os.close(folder)


def _encode(found: list[tuple[str, Requirement]]) -> bytes:
    """JSON with a line for each entry, so that the lines are left of a file that was cut off."""
    lines = (msgspec.json.encode(key) + b": " + msgspec.json.encode(need) for key, need in found)
    return b"{\n" + b",\n".join(lines) + b"\n}\n"


def _entries(data: bytes, latest: float) -> Iterator[tuple[str, Requirement]]:
    """What is whole.  ``latest``: what claims to be of later than that would stay for ever, and is old."""
    for key, raw in _split(data):
        if (need := small_files.decoded(raw, Requirement)) is not None:
            yield key, need if need.at <= latest else msgspec.structs.replace(need, at=0.0)


def _split(data: bytes) -> Iterator[tuple[str, msgspec.Raw]]:
    """The entries, of single lines if the whole is damaged."""
    whole = small_files.decoded(data, dict[str, msgspec.Raw])
    lines = [data] if whole is not None else (b"{%b}" % line.strip(b", \r") for line in data.split(b"\n"))
    for part in lines:
        yield from (small_files.decoded(part, dict[str, msgspec.Raw]) or {}).items()


def _replace(path: Path, data: bytes) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}-", delete=False) as file:
        try:
            file.write(data)
            file.flush()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def of(settings: Settings) -> Store:
    """Where these settings have it: beside the load cache, and with it switched off."""
    folder = cache_folder(settings)
    # A relative one means the application's folder, which this process has left.
    if settings.cache == "off" or not folder.is_absolute():
        return Store(lambda: None)
    return Store(lambda: folder / f"needs-{installation.build()}.json")
