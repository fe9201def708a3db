"""Secrets that open a lifeline or a lane."""

from __future__ import annotations

import secrets


def same_secret(told: str, secret: str) -> bool:
    """Whether a peer knows the secret.  Takes as long for a good guess as for a bad one.

    As bytes: of text, Python compares only ASCII, and a peer may tell anything.
    """
    return secrets.compare_digest(told.encode(errors="replace"), secret.encode())
