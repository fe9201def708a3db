"""Comparison of the secrets that open a lifeline or a lane."""

from __future__ import annotations

import os
import secrets


def same_secret(sent: str, secret: str) -> bool:
    """True if a peer knows the secret.  Takes the same time for a good guess as for a bad one.  Compares
    bytes: Python refuses text that is not ASCII, and a peer may send any text."""
    return secrets.compare_digest(sent.encode(errors="replace"), secret.encode())


def fresh_address(role: str) -> str:
    """A new, unique name for a Unix socket in Linux's abstract namespace.

    An abstract name disappears with its owner, however that dies, so no file is ever left behind.  It has no
    file permissions: a listener checks the peer's user id and asks for a secret.
    """
    return f"onnx-dl/{os.getuid()}/{role}/{secrets.token_hex(16)}"
