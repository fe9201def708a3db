"""Secrets that open a lifeline or a lane."""

from __future__ import annotations

import os
import secrets


def same_secret(told: str, secret: str) -> bool:
    """Whether a peer knows the secret.  Takes as long for a good guess as for a bad one.

    As bytes: of text, Python compares only ASCII, and a peer may tell anything.
    """
    return secrets.compare_digest(told.encode(errors="replace"), secret.encode())


def fresh_address(role: str) -> str:
    """A name for a Unix socket that no other process has, in Linux's abstract namespace.

    Abstract names vanish with their owner, however it dies, so nothing is ever left on disk.  They carry no
    file permissions: whoever listens checks the peer's user id and asks for a secret.
    """
    return f"onnx-dl/{os.getuid()}/{role}/{secrets.token_hex(16)}"
