"""What models were measured to need, on disk: one small file for each version of onnxruntime.

Several supervisors may write it.  Reading and writing never raise because of a disk: a file that cannot be
read is an empty one, and what cannot be written is known until this process ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from onnx_dl import config, installation
from onnx_dl.config import Settings
from onnx_dl.supervisor.needs import Need

_MOST: Final = 4096
"""Models; beyond that, what was not told of for longest goes."""
_decoder: Final = msgspec.json.Decoder(dict[str, Need])


class Store:
    """The file, read when it is first asked for a model or told to open."""

    def __init__(self, where: Callable[[], Path | None]) -> None:
        """``where``: tells the path of the file, which need not exist; None: nothing is read or written."""
        self._where = where
        self._path: Path | None = None
        self._known: dict[str, Need] | None = None
        self._unwritten: dict[str, Need] = {}

    def open(self) -> dict[str, Need]:
        """Finds and reads it, which may take 30 ms where much is installed."""
        if self._known is None:
            self._path = self._where()
            self._known = self._read()
        return self._known

    def get(self, key: str) -> Need | None:
        """What was known of a model when the file was read."""
        return self.open().get(key)

    def put(self, key: str, need: Need) -> None:
        """Writes it down, together with what could not be written before."""
        self.open()
        if self._path is None:
            return
        self._unwritten[key] = need
        with contextlib.suppress(OSError):  # read-only, full, or somebody else is at it: the next time
            self._write(self._path)

    def _read(self) -> dict[str, Need]:
        try:
            return {} if self._path is None else _decoder.decode(self._path.read_bytes())
        except (OSError, msgspec.DecodeError, UnicodeDecodeError):
            return {}

    def _write(self, path: Path) -> None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            # The folder's lock, because the file is replaced; without waiting, because models wait for us.
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            found = sorted((self._read() | self._unwritten).items(), key=lambda item: item[1].at)
            _replace(path, msgspec.json.encode(dict(found[-_MOST:])))
            self._unwritten = {}
        finally:
            os.close(folder)


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
    folder = config.cache_folder(settings)
    # A relative one means the application's folder, which this process has left.
    if settings.cache == "off" or not folder.is_absolute():
        return Store(lambda: None)
    return Store(lambda: folder / f"needs-{installation.build()}.json")
