"""Tokens: the file that lists them, and the comparison of one that a request has.

One a line: ``name:sha256:scopes``.  The digest, in hexadecimal, is that of the token's text; scopes are
separated by commas.  The token itself is in no file, so the file may be readable by others; it may not be
writable by them.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import stat
from collections.abc import Sequence
from typing import Final, NamedTuple

from onnx_dl.server.auth.followed import FileError
from onnx_dl.server.v2.operations import Scope
from onnx_dl.system import small_files

_MOST_BYTES: Final = 1 << 20
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,127}")
_DIGEST: Final = re.compile(r"[0-9a-fA-F]{64}")
_SCOPES: Final = tuple(scope for scope in Scope if scope is not Scope.HEALTH)
_WRITABLE: Final = stat.S_IWGRP | stat.S_IWOTH


class Token(NamedTuple):
    """``digest``: SHA-256 of the token's text, 32 bytes."""

    name: str
    digest: bytes
    scopes: frozenset[Scope]


def read(path: str) -> tuple[Token, ...]:
    """All tokens of a file, maybe none.

    Raises:
        FileError: it cannot be read, others may write it, or a line is not valid.
    """
    try:
        with small_files.opened(path) as file:
            found = os.fstat(file.fileno())
            data = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise FileError(f"{path}: {error.strerror}.") from None
    if found.st_mode & _WRITABLE or found.st_uid not in (0, os.geteuid()):
        raise FileError(f"{path}: others may write it. It must be yours or root's; use chmod go-w.")
    if len(data) > _MOST_BYTES:
        raise FileError(f"{path}: it has more than {_MOST_BYTES} bytes.")
    try:
        return parse(data.decode(), path)
    except UnicodeDecodeError:
        raise FileError(f"{path}: it is not UTF-8.") from None


def parse(text: str, path: str) -> tuple[Token, ...]:
    """Tokens of a file's text.  Raises FileError, with the line's number."""
    tokens: list[Token] = []
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        try:
            token = _token(line)
            if any(token.name == other.name for other in tokens):
                raise ValueError(f"the name {token.name!r} is there twice")
            if any(token.digest == other.digest for other in tokens):
                raise ValueError("another line has the same token")
        except ValueError as error:
            raise FileError(f"{path}:{number}: {error}.") from None
        tokens.append(token)
    return tuple(tokens)


def find(tokens: Sequence[Token], presented: str) -> Token | None:
    """The token with this text.  The time that it takes does not tell which, or how much, is right."""
    digest = hashlib.sha256(presented.encode("utf-8", "surrogateescape")).digest()
    found: Token | None = None
    for token in tokens:
        if hmac.compare_digest(token.digest, digest):
            found = token
    return found


def bearer(authorization: str | None) -> str | None:
    """The token in a value of ``Authorization``; None: there is none."""
    scheme, _, token = (authorization or "").strip().partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None


def _token(line: str) -> Token:
    parts = [part.strip() for part in line.split(":")]
    if len(parts) != 3:
        raise ValueError("it is not name:sha256:scopes")
    name, digest, scopes = parts
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name: use letters, digits and . _ @ -")
    if not _DIGEST.fullmatch(digest):  # not shown: it may be the token itself
        raise ValueError("the second part must be the SHA-256 of the token, as 64 hexadecimal digits")
    return Token(name, bytes.fromhex(digest), frozenset(map(_scope, scopes.split(","))))


def _scope(text: str) -> Scope:
    for scope in _SCOPES:
        if text.strip() == scope:
            return scope
    raise ValueError(f"{text.strip()!r} is no scope: use {', '.join(_SCOPES)}")
