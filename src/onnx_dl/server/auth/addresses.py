"""Addresses as text: "host:port" of options, of the header Host, and of the header Origin.  Pure."""

from __future__ import annotations

import ipaddress
import urllib.parse
from typing import Final, NamedTuple

_MOST_PORT: Final = 65535
_PORTS: Final = {"http": 80, "https": 443}


class Address(NamedTuple):
    """``host``: a name or an IP address, without brackets, in small letters, without a dot at the end; empty:
    all interfaces.  ``port`` None: none was given."""

    host: str
    port: int | None


def parsed(text: str) -> Address | None:
    """The address "host", "host:port", "[address]" or "[address]:port"; None: it is none of these."""
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket or ip_address(host) is None:
            return None
    else:
        host, colon, port = text.partition(":")
        rest = colon + port
    if rest and not (rest[1:].isascii() and rest[1:].isdecimal() and rest[0] == ":"):
        return None
    port_number = int(rest[1:6]) if rest else None
    if len(rest) > 6 or (port_number is not None and port_number > _MOST_PORT):
        return None
    return Address(host.lower().removesuffix("."), port_number)


def ip_address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The host as an IP address; None: it is a name."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def is_loopback(host: str) -> bool:
    """True for 127.0.0.0/8, ::1 and the name localhost.  Other names may lead anywhere."""
    if host == "localhost":
        return True
    found = ip_address(host)
    if isinstance(found, ipaddress.IPv6Address) and found.ipv4_mapped is not None:
        return found.ipv4_mapped.is_loopback
    return found is not None and found.is_loopback


def is_same(host: Address, origin: str) -> bool:
    """True if a page of this ``Origin`` ("scheme://host:port") came from the address in ``Host``."""
    try:
        parts = urllib.parse.urlsplit(origin)
    except ValueError:
        return False
    found = parsed(parts.netloc)
    default = _PORTS.get(parts.scheme)
    if found is None or default is None or not found.host:
        return False
    return (found.host, found.port or default) == (host.host, host.port or default)
