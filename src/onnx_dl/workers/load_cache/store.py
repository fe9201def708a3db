"""Load cache on disk: complete entries by key.

An entry is a folder with a model in the form that loads fastest, its weights and their metadata.  It is
written under another name, renamed when it is complete, and never changed after that: workers map its
weights.  Covers files only; :mod:`onnx_dl.workers.load_cache.rules` has keys, :mod:`onnx_dl.workers.saver`
makes entries.  Reading never raises for a disk error: a cache that cannot be read is an empty one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from onnx_dl.core import settings
from onnx_dl.core.status import ModelDescription
from onnx_dl.linux_only import fcntl
from onnx_dl.system import small_files

MODEL: Final = "model.onnx"
WEIGHTS: Final = "weights.bin"
_META: Final = "meta.json"
_UNFINISHED: Final = "unfinished-"
_REFUSED: Final = ".refused"
_VERIFIED: Final = "verified"
_CHUNK: Final = 1 << 22
_MAX_META: Final = 64 << 20
"""Bytes of an entry's metadata, which includes the model's own."""


class EntryMeta(msgspec.Struct, frozen=True, kw_only=True):
    """Metadata of an entry.

    ``key``: the key that it was written under, by which the entry of another model in its place is detected;
    ``source``: the model's file, empty for one given as bytes; ``files``: size and CRC-32 by name.
    ``description`` has the files that the model itself was read from.
    """

    key: str
    name: str
    source: str
    description: ModelDescription
    files: dict[str, tuple[int, int]]


class _Sealed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Form of :class:`EntryMeta` on disk; ``crc`` is the CRC-32 of the bytes of ``meta``."""

    crc: int
    meta: msgspec.Raw


class CacheEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One model in the cache."""

    key: str
    path: Path
    meta: EntryMeta
    nbytes: int
    used: float
    """Unix time of the last load."""

    @property
    def model(self) -> str:
        return str(self.path / MODEL)


def folder() -> Path:
    """Returns the folder of the cache, by the environment."""
    return settings.cache_folder(settings.settings())


def open_cache() -> Cache:
    """Returns the cache of this environment."""
    return Cache(folder(), settings.settings().cache_limit)


class Cache:
    """Entries in one folder, shared by all processes of a user."""

    def __init__(self, root: Path, limit: int) -> None:
        """``limit``: total bytes of all entries."""
        self.root = root
        self._limit = limit

    def find(self, key: str) -> CacheEntry | None:
        """Returns a complete entry and notes its use; removes one that was changed since it was written."""
        entry = self._read(self.root / key)
        if entry is None:
            return None
        if not _is_whole(entry):
            self.discard(key)
            return None
        with contextlib.suppress(OSError):  # the cache may be read-only
            os.utime(entry.path)
        return entry

    def discard(self, key: str) -> None:
        """Removes an entry; processes that have mapped it keep their mappings."""
        with (
            contextlib.suppress(OSError),
            tempfile.TemporaryDirectory(
                prefix=_UNFINISHED, dir=self.root, ignore_cleanup_errors=True
            ) as trash,
        ):
            os.rename(self.root / key, Path(trash) / "old")

    def refuse(self, key: str) -> None:
        """Notes that this model must not be saved again."""
        (self.root / f"{key}{_REFUSED}").touch()

    def is_refused(self, key: str) -> bool:
        return (self.root / f"{key}{_REFUSED}").exists()

    def entries(self) -> list[CacheEntry]:
        """Returns all complete entries, the most recently used first."""
        try:
            folders = [path for path in self.root.iterdir() if not path.name.startswith(_UNFINISHED)]
        except OSError:
            return []
        return sorted(filter(None, map(self._read, folders)), key=lambda entry: -entry.used)

    def clear(self) -> int:
        """Removes all entries; returns the bytes that were freed."""
        entries = self.entries()
        for entry in entries:
            self.discard(entry.key)
        with contextlib.suppress(OSError):
            for refused in self.root.glob(f"*{_REFUSED}"):
                refused.unlink()
        self._sweep()
        return sum(entry.nbytes for entry in entries)

    @contextlib.contextmanager
    def writing(self, key: str) -> Iterator[Path | None]:
        """Gives a folder to write an entry in, None if another process writes it; removes it unless kept.

        Raises:
            OSError: the cache cannot be written.
        """
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._sweep()
        path = Path(tempfile.mkdtemp(prefix=f"{_UNFINISHED}{key}-", dir=self.root))
        try:
            with open(self.root / f".{key}.lock", "w") as lock, _locked(lock.fileno()) as locked:
                yield path if locked else None
                if locked:
                    os.unlink(lock.name)
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def keep(self, key: str, path: Path, meta: EntryMeta) -> bool:
        """Turns a folder from :meth:`writing` into an entry; false if it is larger than the cache may be.

        Raises:
            OSError: for example, the disk is full.
        """
        files = meta.files
        nbytes = sum(size for size, _ in files.values())
        if not self._make_room(nbytes):
            return False
        (path / _META).write_bytes(seal_meta(meta))
        for file in path.iterdir():
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())
        self.discard(key)
        os.rename(path, self.root / key)
        return self.find(key) is not None  # checks the files, so that the first load need not

    def _make_room(self, nbytes: int) -> bool:
        if nbytes > self._limit:
            return False
        for entry in self.entries():
            if entry.meta.source and not os.path.exists(entry.meta.source):
                self.discard(entry.key)
        entries = self.entries()
        while entries and sum(entry.nbytes for entry in entries) + nbytes > self._limit:
            self.discard(entries.pop().key)
        return True

    def _read(self, path: Path) -> CacheEntry | None:
        try:
            meta = open_meta(small_files.read(path / _META, _MAX_META))
            used = path.stat().st_mtime
        except (OSError, ValueError):
            return None
        if meta.key != path.name:
            return None
        nbytes = sum(size for size, _ in meta.files.values())
        return CacheEntry(key=path.name, path=path, meta=meta, nbytes=nbytes, used=used)

    def _sweep(self) -> None:
        """Removes folders that are no entries, and those of killed saves, whose locks are free."""
        with contextlib.suppress(OSError):
            for path in self.root.glob(f"*/{_META}"):
                if not path.parent.name.startswith(_UNFINISHED) and self._read(path.parent) is None:
                    self.discard(path.parent.name)
            for path in self.root.glob(f"{_UNFINISHED}*"):
                key = path.name.removeprefix(_UNFINISHED).rpartition("-")[0]
                with open(self.root / f".{key}.lock", "w") as lock, _locked(lock.fileno()) as free:
                    if free:
                        shutil.rmtree(path, ignore_errors=True)
                        os.unlink(lock.name)


@contextlib.contextmanager
def _locked(fd: int) -> Iterator[bool]:
    """Locks a file if no other process has; gives whether it did.  The lock ends with the process."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        yield False
    else:
        yield True


def seal_meta(meta: EntryMeta) -> bytes:
    """Returns the form on disk."""
    plain = msgspec.json.encode(meta)
    return msgspec.json.encode(_Sealed(zlib.crc32(plain), msgspec.Raw(plain)))


def open_meta(data: bytes) -> EntryMeta:
    """Reads the form on disk.

    Raises:
        ValueError: it is damaged, or of another version.
    """
    sealed = small_files.decoded(data, _Sealed)
    if sealed is None or zlib.crc32(sealed.meta) != sealed.crc:
        raise ValueError("it is no JSON, or its checksum is another")
    meta = small_files.decoded(sealed.meta, EntryMeta)
    if meta is None:
        raise ValueError("it is of another version")
    return meta


def files_of(path: Path) -> dict[str, tuple[int, int]]:
    """Returns size and CRC-32 of each file in a folder."""
    return {file.name: (file.stat().st_size, _crc(file)) for file in path.iterdir()}


def _crc(path: Path) -> int:
    crc = 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            crc = zlib.crc32(chunk, crc)
    return crc


def _is_whole(entry: CacheEntry) -> bool:
    """Tells whether the files are as they were written.

    Checking their CRC-32 takes half as long as a load (0.1 s for 400 MB), so it is done once per boot.  After
    that, inode, size and times must be the same.
    """
    try:
        stats = {name: (entry.path / name).lstat() for name in entry.meta.files}
        # A name with a folder is another entry's, and a FIFO would block its reader.
        if not all(os.path.basename(name) == name and stat.S_ISREG(s.st_mode) for name, s in stats.items()):
            return False
        if any(stats[name].st_size != size for name, (size, _) in entry.meta.files.items()):
            return False
        seal = _seal(stats)
        mark = entry.path / _VERIFIED
        if _holds(mark, seal.encode()):
            return True
        if any(_crc(entry.path / name) != crc for name, (_, crc) in entry.meta.files.items()):
            return False
        with contextlib.suppress(OSError):  # in a read-only cache, CRC-32 is checked each time
            small_files.replace(mark, seal.encode())
    except OSError:
        return False
    return True


def _holds(path: Path, data: bytes) -> bool:
    with contextlib.suppress(OSError):
        return small_files.read(path, len(data)) == data
    return False


def _seal(stats: dict[str, os.stat_result]) -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    parts = [f"{name} {s.st_ino} {s.st_mtime_ns} {s.st_ctime_ns}" for name, s in sorted(stats.items())]
    return "\n".join([boot, *parts])
