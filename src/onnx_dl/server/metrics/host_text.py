"""The text of the host's own metrics, fetched from its endpoint."""

from __future__ import annotations

import asyncio
import urllib.parse
from typing import Final

TIMEOUT: Final = 3.0
"""Seconds for the whole page; a scraper waits for ten."""
_MOST: Final = 32 << 20
"""Bytes of a page."""


async def fetch(address: str | None, accept: str, timeout: float = TIMEOUT) -> str:
    """Return the page in the format that ``accept`` asks for; empty if there is none, or not in time.

    Args:
        address: "host:port", from ``Snapshot.metrics``; None: the host has no endpoint.
        accept: the scraper's header ``Accept``.
        timeout: seconds for the whole page.
    """
    try:
        parts = urllib.parse.urlsplit(f"//{address or ''}")
        if not parts.hostname or not parts.port or not (accept.isascii() and accept.isprintable()):
            return ""
        async with asyncio.timeout(timeout):
            page = await _exchange(_reachable(parts.hostname), parts.port, accept)
    except (OSError, ValueError, EOFError):
        return ""
    head, _, body = page.partition(b"\r\n\r\n")
    status = head.split(None, 2)[1:2]
    return body.decode(errors="replace") if status == [b"200"] else ""


async def _exchange(host: str, port: int, accept: str) -> bytes:
    """Return the whole answer, which ends with the connection."""
    reader, writer = await asyncio.open_connection(host, port)
    try:
        name = f"[{host}]" if ":" in host else host
        accepted = f"Accept: {accept}\r\n" if accept else ""
        writer.write(f"GET /metrics HTTP/1.0\r\nHost: {name}:{port}\r\n{accepted}\r\n".encode())
        parts, size = [], 0
        while part := await reader.read(1 << 20):
            parts.append(part)
            if (size := size + len(part)) > _MOST:
                raise EOFError("the page is too long")
        return b"".join(parts)
    finally:
        writer.close()


def _reachable(host: str) -> str:
    """Return an address to connect to for one to listen at."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
