"""The load cache on disk: entries by key, complete or not there at all.

An entry is a folder with a model in the form that loads fastest, its weights, and what is known of them.  It
is written under another name and renamed when it is complete, and never changed after that: workers map its
weights.  Covers files only; what may be cached and under which key is :mod:`onnx_dl.workers.load_cache.rules`, who
makes entries :mod:`onnx_dl.workers.saver`.  Reading never raises because of a disk: a cache that cannot be
used is an empty one.
"""

from __future__ import annotations

import contextlib
import fcntl
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
from onnx_dl.system import small_files

MODEL: Final = "model.onnx"
WEIGHTS: Final = "weights.bin"
_META: Final = "meta.json"
_UNFINISHED: Final = "unfinished-"
_REFUSED: Final = ".refused"
_VERIFIED: Final = "verified"
_CHUNK: Final = 1 << 22
_MOST_BYTES: Final = 64 << 20
"""Of what an entry says of itself: the model's own metadata is in it."""


class Meta(msgspec.Struct, frozen=True, kw_only=True):
    """What an entry says of itself.

    ``key``: what it was written under, so that the whole entry of another model in its place is none;
    ``source``: the model's file, empty for one given as bytes; ``files``: size and CRC-32 by name.  Which
    files the model itself was read from is in ``description``.
    """

    key: str
    name: str
    source: str
    description: ModelDescription
    files: dict[str, tuple[int, int]]


class _Sealed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What :class:`Meta` is on disk: ``crc`` is the CRC-32 of the bytes of ``meta``."""

    crc: int
    meta: msgspec.Raw


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One model in the cache."""

    key: str
    path: Path
    meta: Meta
    nbytes: int
    used: float
    """Unix time of the last load."""

    @property
    def model(self) -> str:
        return str(self.path / MODEL)


def folder() -> Path:
    """Where the cache lies, by the environment."""
    return settings.cache_folder(settings.settings())


class Cache:
    """The entries in one folder, shared by all processes of a user."""

    def __init__(self, root: Path, limit: int) -> None:
        """``limit``: bytes of all entries together."""
        self.root = root
        self._limit = limit

    def find(self, key: str) -> Entry | None:
        """A complete entry, used now; one that was changed since it was written is removed."""
        entry = self._read(self.root / key)
        if entry is None:
            return None
        if not _is_whole(entry):
            self.discard(key)
            return None
        with contextlib.suppress(OSError):  # a read-only cache can be read
            os.utime(entry.path)
        return entry

    def discard(self, key: str) -> None:
        """Removes an entry; processes that have mapped it keep what they mapped."""
        with (
            contextlib.suppress(OSError),
            tempfile.TemporaryDirectory(
                prefix=_UNFINISHED, dir=self.root, ignore_cleanup_errors=True
            ) as grave,
        ):
            os.rename(self.root / key, Path(grave) / "old")

    def refuse(self, key: str) -> None:
        """This model is not to be saved; nobody need try again."""
        (self.root / f"{key}{_REFUSED}").touch()

    def is_refused(self, key: str) -> bool:
        return (self.root / f"{key}{_REFUSED}").exists()

    def entries(self) -> list[Entry]:
        """All complete entries, the one that was used last first."""
        try:
            found = [
                self._read(path) for path in self.root.iterdir() if not path.name.startswith(_UNFINISHED)
            ]
        except OSError:
            return []
        return sorted((entry for entry in found if entry), key=lambda entry: -entry.used)

    def clear(self) -> int:
        """Removes everything; the bytes that were freed."""
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
        """A folder to write an entry in; None if somebody else is at it.  Removed unless it was kept.

        Raises:
            OSError: it cannot be written.
        """
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._sweep()
        path = Path(tempfile.mkdtemp(prefix=f"{_UNFINISHED}{key}-", dir=self.root))
        try:
            with open(self.root / f".{key}.lock", "w") as lock, _locked(lock.fileno()) as mine:
                yield path if mine else None
                if mine:
                    os.unlink(lock.name)
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def keep(self, key: str, path: Path, meta: Meta) -> bool:
        """Makes a folder from :meth:`writing` an entry; false if it alone is larger than the cache may be.

        Raises:
            OSError: the disk is full, for one.
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
        return self.find(key) is not None  # read back, so that its first user need not

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

    def _read(self, path: Path) -> Entry | None:
        try:
            meta = open_meta(small_files.read(path / _META, _MOST_BYTES))
            used = path.stat().st_mtime
        except (OSError, ValueError):
            return None
        if meta.key != path.name:
            return None
        nbytes = sum(size for size, _ in meta.files.values())
        return Entry(key=path.name, path=path, meta=meta, nbytes=nbytes, used=used)

    def _sweep(self) -> None:
        """Removes what is no entry, and what a save left that was killed: its lock is free."""
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
    """Whether this process has the lock of a file; it ends with the process, however that ends."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        yield False
    else:
        yield True


def seal_meta(meta: Meta) -> bytes:
    """As it is on disk."""
    plain = msgspec.json.encode(meta)
    return msgspec.json.encode(_Sealed(zlib.crc32(plain), msgspec.Raw(plain)))


def open_meta(data: bytes) -> Meta:
    """What was written.

    Raises:
        ValueError: it is not that any more.
    """
    sealed = small_files.decoded(data, _Sealed)
    if sealed is None or zlib.crc32(sealed.meta) != sealed.crc:
        raise ValueError("it is no JSON, or its checksum is another")
    meta = small_files.decoded(sealed.meta, Meta)
    if meta is None:
        raise ValueError("it is of another version")
    return meta


def files_of(path: Path) -> dict[str, tuple[int, int]]:
    """Size and CRC-32 of each file in a folder."""
    return {file.name: (file.stat().st_size, _crc(file)) for file in path.iterdir()}


def _crc(path: Path) -> int:
    crc = 0
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            crc = zlib.crc32(chunk, crc)
    return crc


def _is_whole(entry: Entry) -> bool:
    """Whether its files are what was written.

    To read them all takes half as long as a load (0.1 s for 400 MB), so that is done once per boot; after
    that, that nobody has touched them since is enough.
    """
    try:
        stats = {name: (entry.path / name).lstat() for name in entry.meta.files}
        if not all(map(_is_own, stats, stats.values())):
            return False
        if any(stats[name].st_size != size for name, (size, _) in entry.meta.files.items()):
            return False
        seal = _seal(stats)
        mark = entry.path / _VERIFIED
        if _holds(mark, seal.encode()):
            return True
        if any(_crc(entry.path / name) != crc for name, (_, crc) in entry.meta.files.items()):
            return False
        with contextlib.suppress(OSError):  # a read-only cache is read each time
            _put(mark, seal.encode())
    except OSError:
        return False
    return True


def _is_own(name: str, found: os.stat_result) -> bool:
    """A file of the entry's folder, and not what one would wait for, or another's."""
    return os.path.basename(name) == name and stat.S_ISREG(found.st_mode)


def _holds(path: Path, data: bytes) -> bool:
    with contextlib.suppress(OSError):
        return small_files.read(path, len(data)) == data
    return False


def _put(path: Path, data: bytes) -> None:
    """In place of whatever is there: to write into a FIFO would wait."""
    fresh = path.with_name(f".{path.name}-{os.getpid()}")
    fresh.write_bytes(data)
    try:
        os.replace(fresh, path)
    except OSError:
        fresh.unlink()
        raise


def _seal(stats: dict[str, os.stat_result]) -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    parts = [f"{name} {s.st_ino} {s.st_mtime_ns} {s.st_ctime_ns}" for name, s in sorted(stats.items())]
    return "\n".join([boot, *parts])
