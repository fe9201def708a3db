"""The text of the host's own metrics, fetched from its endpoint."""

from __future__ import annotations

import http.client
import urllib.parse
from typing import Final

TIMEOUT: Final = 3.0
"""Seconds for the whole page; a scraper waits for ten."""
_MOST: Final = 32 << 20
"""Bytes of a page."""


def fetch(address: str | None, accept: str, timeout: float = TIMEOUT) -> str:
    """Return the page in the format that ``accept`` asks for; empty if there is none, or not in time.  Waits:
    for a thread.

    Args:
        address: "host:port", from ``Snapshot.metrics``; None: the host has no endpoint.
        accept: the scraper's header ``Accept``.
    """
    if not address:
        return ""
    parts = urllib.parse.urlsplit(f"//{address}")
    if parts.hostname is None or parts.port is None:
        return ""
    connection = http.client.HTTPConnection(_reachable(parts.hostname), parts.port, timeout=timeout)
    try:
        connection.request("GET", "/metrics", headers={"Accept": accept} if accept else {})
        response = connection.getresponse()
        page = response.read(_MOST + 1)
    except (OSError, http.client.HTTPException):
        return ""
    finally:
        connection.close()
    if response.status != 200 or len(page) > _MOST:
        return ""
    return page.decode(errors="replace")


def _reachable(host: str) -> str:
    """Return an address to connect to for one to listen at."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
