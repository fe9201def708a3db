"""The other end of a connection."""

from __future__ import annotations

import asyncio
import ipaddress
import select
from typing import Any, Final

from onnx_dl.server.interfaces import Caller

_LOOK_EVERY: Final = 0.1
"""Seconds."""


def caller_of(transport: asyncio.BaseTransport) -> Caller:
    """The client of a connection, without what its requests say."""
    peer = transport.get_extra_info("peername")
    address = str(peer[0]) if isinstance(peer, tuple) and peer else ""
    secured = transport.get_extra_info("ssl_object")
    shown = None if secured is None else secured.getpeercert()
    return Caller(None, is_loopback(address), subject(shown) if shown else None, address)


class Watch:
    """Ends a connection whose client has gone, while its socket is not read."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._next: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """Look now, and every 0.1 s until :meth:`end`."""
        self.end()
        if has_gone(self._transport.get_extra_info("socket").fileno()):
            self._transport.abort()
        else:
            self._next = self._loop.call_later(_LOOK_EVERY, self.begin)

    def end(self) -> None:
        """Look no more."""
        if self._next is not None:
            self._next.cancel()
            self._next = None


def is_loopback(address: str) -> bool:
    """True for addresses of this machine alone, also as IPv6 writes those of IPv4."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is not None:
        parsed = parsed.ipv4_mapped
    return parsed.is_loopback


def subject(certificate: dict[str, Any]) -> str:
    """The subject of a certificate in the form of Python's ``getpeercert``: ``commonName=x, ...``."""
    names = (pair for group in certificate.get("subject", ()) for pair in group)
    return ", ".join(f"{name}={value}" for name, value in names)


def has_gone(fd: int) -> bool:
    """True if the other end of a TCP connection has closed its half, whatever is unread before that."""
    looking = select.poll()
    looking.register(fd, select.POLLRDHUP)  # errors and hang-ups are always told
    return bool(looking.poll(0))
