"""Measured memory requirements of models on disk: one small file for each version of onnxruntime.

Several supervisors may write it.  Errors of the disk are never raised: an unreadable file counts as empty,
and entries that cannot be written are kept in memory.  Each entry is checked by itself, so that valid entries
of a damaged file are used; the next write repairs the file.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import msgspec

from onnx_dl.core.settings import Settings, cache_folder
from onnx_dl.linux_only import fcntl
from onnx_dl.supervisor.policy.requirements import Requirement
from onnx_dl.system import installation, small_files

_MOST: Final = 4096
"""Models in the file; beyond that, the entries that were not updated for longest go."""
_MOST_BYTES: Final = 4 << 20
"""Largest size of the file, which has 0.3 KB for a model; a larger one is not read."""
_DAY: Final = 86_400.0


class RequirementStore:
    """The file; it is read at the first use."""

    def __init__(self, where: Callable[[], Path | None]) -> None:
        """``where``: returns the path of the file, which need not exist; None: nothing is read or written."""
        self._where = where
        self._path: Path | None = None
        self._known: dict[str, Requirement] | None = None
        self._unwritten: dict[str, Requirement] = {}

    def open(self) -> dict[str, Requirement]:
        """Finds and reads it.  Finding it may take 30 ms if many packages are installed."""
        if self._known is None:
            self._path = self._where()
            self._known = self._read()
        return self._known

    def get(self, key: str) -> Requirement | None:
        """The entry of a model when the file was read."""
        return self.open().get(key)

    def put(self, key: str, need: Requirement) -> None:
        """Writes an entry, together with those that could not be written before."""
        self.open()
        if self._path is None:
            return
        self._unwritten[key] = need
        with contextlib.suppress(OSError):  # read-only, full, or locked by another: the next put() retries
            self._write(self._path)

    def is_saved(self, entry: str) -> bool:
        """True if the load cache has an entry of this key."""
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
            # The folder's lock, because the file is replaced.  Not waited for: it would delay loads.
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            found = sorted((self._read() | self._unwritten).items(), key=lambda item: item[1].at)
            small_files.replace(path, _encode(found[-_MOST:]))
            self._unwritten = {}
        finally:
            os.close(folder)


def _encode(found: list[tuple[str, Requirement]]) -> bytes:
    """JSON with a line for each entry, so that the whole lines of a truncated file can be used."""
    lines = (msgspec.json.encode(key) + b": " + msgspec.json.encode(need) for key, need in found)
    return b"{\n" + b",\n".join(lines) + b"\n}\n"


def _entries(data: bytes, latest: float) -> Iterator[tuple[str, Requirement]]:
    """Valid entries.  Those with a time after ``latest`` would never be dropped, so they get time 0."""
    for key, raw in _split(data):
        if (need := small_files.decoded(raw, Requirement)) is not None:
            yield key, need if need.at <= latest else msgspec.structs.replace(need, at=0.0)


def _split(data: bytes) -> Iterator[tuple[str, msgspec.Raw]]:
    """All entries; if the file as a whole is damaged, those of its valid lines."""
    whole = small_files.decoded(data, dict[str, msgspec.Raw])
    lines = [data] if whole is not None else (b"{%b}" % line.strip(b", \r") for line in data.split(b"\n"))
    for part in lines:
        yield from (small_files.decoded(part, dict[str, msgspec.Raw]) or {}).items()


def of(settings: Settings) -> RequirementStore:
    """The store in the folder of the load cache; without that cache, one that keeps nothing."""
    folder = cache_folder(settings)
    # A relative path refers to the application's folder, which this process has left.
    if settings.cache == "off" or not folder.is_absolute():
        return RequirementStore(lambda: None)
    return RequirementStore(lambda: folder / f"needs-{installation.build()}.json")
