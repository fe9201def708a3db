"""SHA-256 of a model's files: reads the argument ``sha256=``, and compares files with it."""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

from onnx_dl import linux_only
from onnx_dl.errors import ConfigError, ModelDigestMismatch

Digests = Mapping[str, str]
"""Lower-case digests by the name of the file: relative to the model's folder, or absolute; empty: the model's
own file."""

_DIGEST: Final = re.compile(r"[0-9a-fA-F]{64}")
_FORM: Final = "give 64 hexadecimal digits, as sha256sum prints them"


def parse(value: object) -> dict[str, str]:
    """The digests of one text, or of a mapping from names to texts; None: none.

    Raises:
        ConfigError: (a ValueError) it has another form.
    """
    if value is None:
        return {}
    if isinstance(value, str):
        return {"": _digest(value, "")}
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"sha256 is a {type(value).__name__}; {_FORM}, or a dict of them by the names of its files."
        )
    if not value:
        raise ConfigError("sha256 is an empty dict; leave it out if no file is to be checked.")
    found: dict[str, str] = {}
    for name, digest in value.items():
        if not isinstance(name, str | os.PathLike):
            raise ConfigError(f"sha256: {name!r} is not a file name.")
        found[_plain(os.fspath(name))] = _digest(digest, f" for {name}")
    return found


def of_model(digests: Digests, path: str | None) -> dict[str, str]:
    """The digests with the model's own file name, if it is among the names, replaced by the empty one.

    ``path``: of the model; None: it is given as bytes.

    Raises:
        ConfigError: there is none for the model's own file.
    """
    own = "" if path is None else os.path.basename(path)
    absolute = "" if path is None else os.path.abspath(path)
    found = {("" if name in (own, absolute) else name): digest for name, digest in digests.items()}
    if found and "" not in found:
        raise ConfigError(
            f"sha256 has no digest for the model itself; name it {own!r} or ''."
            if own
            else "sha256 has no digest for the model itself; name it ''."
        )
    return found


Place = Callable[[str], str | int]
"""Returns the path of a file, or the descriptor of its memory, by its name."""


def check(digests: Digests, names: Sequence[str], where: Place) -> list[int]:
    """Compares files with their digests.

    Args:
        names: of the files that the model is read from; absolute ones need no digest.

    Returns:
        The files' :func:`stamps` before they were read: equal ones after a load mean that it read the same.

    Raises:
        ModelDigestMismatch: a file is another, or has no digest.
    """
    if not digests:
        return []
    before = stamps(digests, names, where)
    for name in names:
        expected = digests.get(_plain(name))
        if expected is not None:
            _compare(where(name), expected)
        elif not os.path.isabs(name):  # a library of operators or of a provider, which the application named
            path = where(name)
            raise ModelDigestMismatch(
                f"sha256 has no digest for {path}, which the model reads, too. Give a dict of all its files: "
                f'{{"": "...", {name!r}: "..."}}.',
                str(path),
            )
    return before


def stamps(digests: Digests, names: Iterable[str], where: Place) -> list[int]:
    """Times of the files' last changes (ctime, in ns), which no program can set; empty without digests.  0:
    there is no such file."""
    found = []
    for name in names if digests else ():
        try:
            found.append(os.stat(where(name)).st_ctime_ns)
        except OSError:
            found.append(0)
    return found


def _compare(file: str | int, expected: str) -> None:
    name = "the model's bytes" if isinstance(file, int) else file
    try:
        actual = of_file(file)
    except OSError as error:
        raise ModelDigestMismatch(
            f"The SHA-256 of {name} cannot be checked: {error.strerror}.", name, expected
        ) from error
    if actual != expected:
        raise ModelDigestMismatch(
            f"{name} has the SHA-256 {actual}, but sha256 says {expected}. It is another file, or was "
            "changed: get the right one, or correct sha256.",
            name,
            expected,
            actual,
        )


def of_file(file: str | int) -> str:
    """The digest of a file, or of the memory of a descriptor, whose position is not changed.

    Raises:
        OSError: it cannot be read.
    """
    if isinstance(file, str):
        with open(file, "rb", buffering=0) as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    size = os.fstat(file).st_size
    with open(os.dup(file), "rb", buffering=0) as opened:
        return hashlib.file_digest(_Positioned(opened.fileno(), size), "sha256").hexdigest()


class _Positioned(io.RawIOBase):
    """Reads by offset: another process may share the descriptor's position."""

    def __init__(self, fd: int, size: int) -> None:
        self._fd = fd
        self._size = size
        self._at = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer)[: self._size - self._at]  # type: ignore[arg-type]
        data = linux_only.pread(self._fd, len(view), self._at)
        view[: len(data)] = data
        self._at += len(data)
        return len(data)


def _plain(name: str) -> str:
    return os.path.normpath(name) if name else ""


def _digest(value: object, which: str) -> str:
    if not isinstance(value, str) or not _DIGEST.fullmatch(value):
        raise ConfigError(f"sha256={value!r}{which} is no SHA-256; {_FORM}.")
    return value.lower()
