"""What may happen to a file of the load cache."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Final


def remove(path: Path) -> None:
    """Whatever it is."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _cut(path: Path, rng: random.Random) -> None:
    os.truncate(
        path, rng.choice([0, 1, rng.randrange(path.stat().st_size + 1), max(0, path.stat().st_size - 1)])
    )


def _longer(path: Path, rng: random.Random) -> None:
    with open(path, "ab") as file:
        file.write(rng.randbytes(rng.choice([1, 4096])))


def _flip(path: Path, rng: random.Random) -> None:
    """One bit: in the first bytes, the last ones, or anywhere; the file's time may be what it was."""
    stat = path.stat()
    size = max(1, stat.st_size)
    at = rng.choice(
        [rng.randrange(min(64, size)), size - 1 - rng.randrange(min(64, size)), rng.randrange(size)]
    )
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1) or b"\0"
        file.seek(at)
        file.write(bytes([byte[0] ^ (1 << rng.randrange(8))]))
    if rng.random() < 0.5:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def _zeros(path: Path, rng: random.Random) -> None:
    """As a disk that was full, or lost a page."""
    with open(path, "r+b") as file:
        file.seek(rng.randrange(path.stat().st_size // 4096 + 1) * 4096)
        file.write(bytes(4096))
    os.truncate(path, max(1, path.stat().st_size))


def _replaced_by_flipped(path: Path, rng: random.Random) -> None:
    """Another file of the same size and time."""
    copy = path.with_name("copy")
    shutil.copy2(path, copy)
    _flip(copy, rng)
    stat = path.stat()
    os.utime(copy, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    os.replace(copy, path)


def _gone(path: Path, rng: random.Random) -> None:
    path.unlink()


def _folder(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.mkdir()


def _pipe(path: Path, rng: random.Random) -> None:
    """What one would wait for."""
    path.unlink()
    os.mkfifo(path)


def _link_to_nothing(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.symlink_to("nothing")


def _link_to_itself(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.symlink_to(path.name)


def _link_elsewhere(path: Path, rng: random.Random) -> None:
    """To a file with a flipped bit in another folder."""
    other = path.parent.parent / f"elsewhere-{path.name}"
    shutil.copy2(path, other)
    _flip(other, rng)
    path.unlink()
    path.symlink_to(other)


def _forbidden(path: Path, rng: random.Random) -> None:
    os.chmod(path, 0)


def _forbidden_folder(path: Path, rng: random.Random) -> None:
    """Can be read, if that, and not written."""
    with contextlib.suppress(FileNotFoundError):
        (path.parent / "verified").unlink()
    os.chmod(path.parent, rng.choice([0o500, 0o000]))


def _all_gone(path: Path, rng: random.Random) -> None:
    remove(path.parent)


def _empty(path: Path, rng: random.Random) -> None:
    remove(path.parent)
    path.parent.mkdir()


def _entry_is_a_file(path: Path, rng: random.Random) -> None:
    remove(path.parent)
    path.parent.write_bytes(b"{}")


OF_FILES: Final[dict[str, Callable[[Path, random.Random], None]]] = {
    "cut": _cut, "longer": _longer, "flip": _flip, "flip again": _flip, "zeros": _zeros,
    "replaced": _replaced_by_flipped, "gone": _gone, "folder": _folder, "pipe": _pipe,
    "link to nothing": _link_to_nothing, "link to itself": _link_to_itself, "link elsewhere": _link_elsewhere,
    "forbidden": _forbidden, "forbidden folder": _forbidden_folder, "all gone": _all_gone, "empty": _empty,
    "a file": _entry_is_a_file,
}  # fmt: skip
